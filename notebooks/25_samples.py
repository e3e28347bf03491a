# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What did we train?
#
# ```{admonition} Cost box
# Any machine: about half a minute on two CPU cores, no GPU. The samples and the curve in the figures come from the CPU run of some three minutes and are committed with it.
# ```
#
# ## The problem
#
# The loss went down. Down to what? Nobody has ever met a nat. But bits are bits, and there are older programs that predict text for a living: a compressor that describes a text in few bits has predicted it well. Here is what two of them need for the validation text on which the laptop's run was scored, without any training:

# %%
import gzip
import lzma
import math
import time

from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.sources import build_embedded
from speedrun.data.tokenizer import decode_bytes
from speedrun.lab.results import load_result, root

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
embedded = load_manifest(data_folder("data/embedded"))
tokens = read_shard(data_folder("data/embedded") / "val_000000.bin", embedded.vocab_size)
held_out = decode_bytes(tokens.tolist())

run = load_result("speedrun", "cpu")["data"]["runs"][0]
scored = run["config"]["val_tokens"]
text = decode_bytes(tokens[:scored].tolist())
begin = time.perf_counter()
packed = {"gzip": gzip.compress(text, 9), "xz": lzma.compress(text, preset=9)}
seconds = time.perf_counter() - begin
bits = {name: 8 * len(archive) / len(text) for name, archive in packed.items()}
ours = run["curve"][-1]["val_loss"] * scored / len(text) / math.log(2)
whole = 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
assert whole < ours < bits["xz"] < bits["gzip"]
print(f"bits a byte: gzip {bits['gzip']:.2f}, xz {bits['xz']:.2f}, both in {seconds:.1f} s")
print(f"our GPT {ours:.2f}, after {run['seconds']:.0f} s of training")
print(f"xz on the whole file, {len(held_out) / len(text):.1f} times as long: {whole:.2f}")

# %% [markdown]
# How can a loss and a file size be in one table? Because a prediction *is* a code. Whoever gives the next byte the probability $p$ can spend $-\log_2 p$ bits on it: that nobody can do better on average is Shannon's theorem {cite}`shannon1948`, and arithmetic coding comes within two bits of it for a whole file. The mean of that is the cross-entropy, in bits where it is usually told in nats, so a language model with
# a loss of $L$ nats a byte is a compressor that needs $L / \ln 2$ bits a byte. And it works backwards: gzip, which knows nothing but the last 32 kilobytes, is a language model, and the numbers above are its loss, at most.
#
# Three minutes of training on two cores beat both, narrowly. Then comes the last line. xz goes on learning while it reads; it may look back over a megabyte of the very text that it is packing, and libraries repeat themselves. Our model's weights are frozen, it sees 128 tokens, and then it forgets: nothing that it reads makes it better. Did we train anything?
# (Exercise 2 takes xz's memory away, and then gives it ours.)
#
# The comparison also asks the wrong question. There is one thing that xz is hopeless at, which is to go on: to write the next line of a file that does
# not exist. To see what a model knows, leave it alone with its own mistakes.
#
# ```{admonition} Prediction
# Let the laptop's model write two thousand tokens of Python, and take from them every word of four letters or more. **Which share of those words occurs in the training text?** And what would the same count give for the same characters in random order?
# ```
#
# ## The idea
#
# A language model is a conditional distribution $p(x_{t+1} \mid x_{\le t})$. To write, draw $x_{t+1}$ from it, append, and ask again. Two knobs are customary. A **temperature** $\tau$ divides the logits before the softmax: below 1 it prefers what is likely already. **Top-k** forbids all but the $k$ likeliest tokens, because
# the tail is long: two hundred bytes that are each wrong with a probability of 0.05% are, together, one wrong byte in ten.
#
# Training never asked for this. It asked for the next token *given a correct past*, and the past of a sample is the model's own. The first slip makes the second likelier, which is why text from a weak model does not merely contain errors but falls apart.
#
# ## The code
#
# A run's folder has all that is needed: the checkpoint knows its configuration, its vocabulary and its tokenizer.

# %%
#| default_exp sample
#| export
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from speedrun.checkpoint import latest_checkpoint, load_checkpoint
from speedrun.config import config_from_json
from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.tokenizer import Tokenizer, get_tokenizer
from speedrun.lab.hardware import Problem, setup
from speedrun.train import build_model


# %%
#| export
@dataclass(frozen=True)
class Trained:
    """A trained model with its tokenizer, the length of the rows that it was trained on, its step, its data folder."""

    model: nn.Module
    tokenizer: Tokenizer
    context: int
    step: int
    data: Path


def load_trained(folder: Path, device: str = "cpu") -> Trained:
    """The model of a run's latest checkpoint, uncompiled and in float32."""
    weights, _, facts = load_checkpoint(latest_checkpoint(Path(folder)))
    config, tokenizer = config_from_json(facts["config"]), get_tokenizer(facts["tokenizer"])
    model, _ = build_model(config, facts["vocab_size"], torch.device(device))
    model.load_state_dict(weights)
    data = data_folder(config.data.path)
    return Trained(model.eval(), tokenizer, config.data.seq_len, facts["step"], data)


# %% [markdown]
# We need a model to try things on. This one is trained here, for some ten seconds:

# %%
import tempfile
from pathlib import Path

from speedrun.config import preset, vary
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
brief = {"steps": 300, "val_every": 300, "log_every": 100, "val_tokens": 16_384}
train(vary(preset("smoke"), brief), scratch)
trained = load_trained(scratch)
assert trained.step == 300 and trained.tokenizer.name == "bytes" and trained.context == 128

# %% [markdown]
# The two knobs are one small function. It is tested where it is exact: at temperature zero it must choose the likeliest token, and with $k=2$ nothing but the likeliest two, in the right proportion.


# %%
#| export
def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token from logits, (vocab,), among the `top_k` likeliest (0: all). Temperature 0: the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


# %%
logits, generator = torch.tensor([0.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
assert choose(logits, 0.0, 0, generator) == 1 and {
    choose(logits, 0.01, 0, generator) for _ in range(50)
} == {1}
drawn = [choose(logits, 1.0, 2, generator) for _ in range(4000)]
seen, expected = drawn.count(1) / len(drawn), 1 / (1 + math.exp(-1))
assert set(drawn) == {1, 2} and abs(seen - expected) < 0.03
print(f"top-2: token 1 drawn in {seen:.1%} of cases, expected {expected:.1%}")

# %% [markdown]
# Writing is then a loop over single tokens, each of which reads the whole window again. A cache of keys and values would save most of that work, but not here. GPT-2 *learns* its positions, and when the window slides by one, every token moves to another position and every key changes. Rotary
# embeddings (chapter 06) do not have that flaw.


# %%
#| export
@torch.no_grad()
def generate(
    trained: Trained, prompt: str, count: int, temperature=0.8, top_k: int = 40, seed: int = 0
) -> str:
    """`count` tokens that the model writes after a prompt, as text. An empty prompt begins a document."""
    generator, device = torch.Generator().manual_seed(seed), next(trained.model.parameters()).device
    tokens = [trained.tokenizer.document, *trained.tokenizer.encode(prompt).tolist()]
    start = len(tokens)
    for _ in range(count):
        window = torch.tensor([tokens[-trained.context :]], device=device)
        logits = trained.model(window)[0, -1].float().cpu()
        tokens.append(choose(logits, temperature, top_k, generator))
    return trained.tokenizer.decode(tokens[start:])


# %%
text = generate(trained, "def ", 250)
assert text == generate(trained, "def ", 250) != generate(trained, "def ", 250, seed=1)
print("def " + text)

# %% [markdown]
# It has found out that there are words and that lines begin with spaces. Not more. How that goes on is the measurement; first it needs a judge.
#
# ### Counting words
#
# Syntax would be a natural judge for Python, and is a bad one. Python's own tokenizer accepts most short lines of garbage, since `x ( y` is three perfectly good tokens. Words are harder to hit by chance. There are 456,976 strings of four small letters, and few of them mean anything.


# %%
#| export
def words_of(text: str) -> list[str]:
    """Runs of four or more letters, in order."""
    return re.findall(r"[A-Za-z]{4,}", text)


def known_share(text: str, known: set[str]) -> float:
    """Share of the words of a text that are known; nan where it has none."""
    found = words_of(text)
    return sum(word in known for word in found) / len(found) if found else float("nan")


# %%
import random

known = set(
    words_of(
        decode_bytes(
            read_shard(data_folder("data/embedded") / "train_000000.bin", 288).tolist()
        ).decode()
    )
)
real = held_out[100_000:110_000].decode(errors="replace")
letters = list(real)
random.Random(0).shuffle(letters)
noise = "".join(letters)
assert words_of("def gcd(a, b): return_type = gaussian3") == ["return", "type", "gaussian"]
assert known_share(real, known) > 0.9 and known_share(noise, known) < 0.1
print(
    f"{len(known):,} words; known in held-out text {known_share(real, known):.0%}, shuffled {known_share(noise, known):.0%}"
)

# %% [markdown]
# The judge knows real text when it sees it, even text that is not in the training files, and is not fooled by noise. (A held-out file has a few words that the training files do not. So a perfect writer would not score 100% either, and one that does is a suspect.)
#
# ### Does it recite?
#
# The suspicion deserves a test of its own. Cut a text into pieces of 16 characters, too long to be anybody's by accident, and look each up in the training text, as it stands.


# %%
#| export
def training_text(folder: Path, most_tokens: int = 20_000_000) -> str:
    """The training text (its first `most_tokens` tokens)."""
    manifest, texts, left = load_manifest(folder), [], most_tokens
    tokenizer = get_tokenizer(manifest.tokenizer)
    for file in manifest.split("train"):
        tokens = read_shard(folder / file.name, manifest.vocab_size)[:left]
        texts.append(tokenizer.decode(tokens.tolist()))
        left -= len(tokens)
        if not left:
            break
    return "".join(texts)


def recited_share(text: str, training: str, length: int = 16) -> float:
    """Share of a text's pieces of `length` characters that occur in the training text word for word."""
    pieces = [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
    return sum(piece in training for piece in pieces) / len(pieces) if pieces else float("nan")


# %%
training = training_text(data_folder("data/embedded"))
assert set(words_of(training)) == known
theirs = recited_share(real, training)
assert recited_share(training[5_000_000:5_004_000], training) == 1.0
assert theirs > 0.4 and recited_share(noise[:2000], training) < 0.05
print(f"of a held-out file's pieces {theirs:.0%} stand in the training text")

# %% [markdown]
# ### How far back does it look?
#
# A second question has a sharper answer. At the first position of a row the model has seen one token; at the last, 128. If it uses what it sees, its loss must fall along the row, and where it stops falling is how far back it looks.


# %%
#| export
@torch.no_grad()
def loss_by_position(trained: Trained, rows: int = 1000) -> list[float]:
    """Mean loss in nats at each position of a row, over the first rows of the validation text."""
    manifest, length = load_manifest(trained.data), trained.context
    path = trained.data / manifest.split("val")[0].name
    tokens = read_shard(path, manifest.vocab_size)[: rows * length + 1].astype("int64")
    row = torch.from_numpy(tokens).to(next(trained.model.parameters()).device)
    inputs, targets = row[:-1].view(-1, length), row[1:].view(-1, length)
    losses = [
        nn.functional.cross_entropy(trained.model(x).transpose(1, 2), y, reduction="none")
        for x, y in zip(inputs.split(50), targets.split(50))
    ]
    return torch.cat(losses).mean(0).tolist()


# %%
positions = loss_by_position(trained, rows=200)
assert len(positions) == 128 and positions[0] > positions[-1]
print(
    f"the ten-second model: {positions[0]:.2f} nats at the first position, {sum(positions[-32:]) / 32:.2f} over the last 32"
)

# %% [markdown]
# ## The measurement
#
# The laptop's run, stopped twice on its way, and each time asked to write. The measuring code is as short as that sentence:

# %% tags=["hide-input"]
#| export measure.samples
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from speedrun.config import preset, vary
from speedrun.data.shards import load_manifest
from speedrun.lab.results import stamp
from speedrun.lab.runlog import read_metrics, series
from speedrun.train import train

NAMES = ("cpu",)
STAGES = (125, 1000, 0)  # steps; 0: the end


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the preset `name` in three stages, and let each write four samples. Returns data and stamp."""
    stages, config = [], preset(name)
    with TemporaryDirectory() as folder:
        for stage in STAGES:
            train(vary(config, {"max_steps": stage}), Path(folder), again=stage != STAGES[0])
            trained = load_trained(Path(folder))
            text = "\n".join(generate(trained, "", 500, seed=seed) for seed in range(4))
            val = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
            share = known_share(text, set(words_of(training_text(trained.data))))
            facts = {"step": trained.step, "val_loss": val, "text": text, "known_share": share}
            greedy = generate(trained, "", 500, temperature=0.0)
            facts |= {"config": asdict(config), "greedy": greedy}
            stages.append(facts | {"loss_by_position": loss_by_position(trained)})
        data = load_manifest(trained.data)
    corpus = {"name": data.source, "sha256": data.sha256}
    modules = ["speedrun.measure.samples"]
    return {"stages": stages}, stamp(command, modules, 1, [config.seed], corpus)


# %%
result = load_result("samples", "cpu")
stages = result["data"]["stages"]
shares = [known_share(stage["text"], known) for stage in stages]
mixed = list(stages[-1]["text"])
random.Random(0).shuffle(mixed)
shuffled = known_share("".join(mixed), known)
assert shares == [stage["known_share"] for stage in stages], (
    "counted again, from the committed texts"
)
assert shares[-1] >= 0.5 > shuffled and shares == sorted(shares)
for share, stage in zip(shares, stages):
    count = len(words_of(stage["text"]))
    print(
        f"step {stage['step']:>5}: {stage['val_loss']:.2f} nats a token, {share:.0%} of {count} words are known"
    )
words_written = len(words_of(stages[-1]["text"]))
margin = 2 * math.sqrt(shares[-1] * (1 - shares[-1]) / words_written)
recited = [recited_share(stage["text"], training) for stage in stages]
assert recited[0] < recited[-1] < theirs / 2
print(
    f"the last share is good to ±{100 * margin:.0f} points; its characters, shuffled: {shuffled:.0%}"
)
print(f"pieces that stand in the training text: {', '.join(f'{share:.0%}' for share in recited)}")

# %% tags=["hide-input"]
import html

from IPython.display import HTML

from speedrun.lab.results import measured_on


def coloured(text: str, lines: int = 12) -> str:
    """A text as HTML, its unknown words of four or more letters in bold orange."""
    shown, pieces = "\n".join(text.strip().splitlines()[:lines]), []
    for piece in re.findall(r"[A-Za-z]+|[^A-Za-z]+", shown):
        unknown = len(piece) >= 4 and piece.isalpha() and piece not in known
        safe = html.escape(piece)
        pieces.append(f'<b style="color:#D55E00">{safe}</b>' if unknown else safe)
    return "<pre>" + "".join(pieces) + "</pre>"


parts = [
    f"<p><b>step {stage['step']:,}: {share:.0%} of its words occur in the training text</b></p>{coloured(stage['text'])}"
    for stage, share in zip(stages, shares)
]
print(measured_on(result))
HTML("".join(parts))

# %% [markdown]
# Orange words occur nowhere in nineteen megabytes of training text. Indentation comes first, because a few tokens are enough for it. Words come later: four in five of the last text's are real, where the same characters in random order give one in a hundred. And it does not get them by reciting; it shares less than half as much with the training text as a held-out file does.
#
# What it does not have is anything to say. A name that is used was not defined; an argument that is documented does not exist. That, too, is knowledge, about what a loss of this size means. Between 1.5 nats a token and a program that runs lies everything that a larger model learns later and slower.

# %%
last = stages[-1]["loss_by_position"]
near, far = (sum(last[i] for i in span) / len(span) for span in (range(14, 19), range(111, 128)))
gains = {"first": last[0] - near, "rest": near - far}
assert gains["first"] > 10 * gains["rest"] > 0
print(f"{last[0]:.2f} nats with one token in sight, {near:.2f} with sixteen, {far:.2f} with all")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss against position in the row, for the model after three lengths of training"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(8.2, 3.2))
for stage in stages:
    axis.semilogx(range(1, 129), stage["loss_by_position"], label=f"step {stage['step']:,}", base=2)
axis.set_xlabel("tokens seen")
axis.set_ylabel("loss (nats/token)")
axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
axis.legend()
axis.set_title(
    f"sixteen tokens of context save {gains['first']:.2f} nats, the next hundred {gains['rest']:.2f}"
)
plt.show()

# %% [markdown]
# After 125 steps the curve is flat from the second token on: the model has learned which bytes follow which, and nothing else. In the end it falls steeply for a dozen or two of tokens, a word and the one before it, and from there on hardly at all. Of the 128 tokens that it may see, three or four lines, the last hundred hardly matter. A single number at the end of a log
# cannot say such a thing, and it matters when one number is compared with another: an idea that improves the use of *long* context would show next to nothing here.
#
# ## What did not work: always the likeliest
#
# If the model knows which token is likeliest, why ever take another? That would be temperature zero, and it sounds like quality. The trained model wrote a text that way, too. Count how much of it was not in it before:


# %%
def fresh_share(text: str, length: int = 16) -> float:
    """Share of a text's pieces of `length` characters that occur in it for the first time."""
    pieces = [text[i : i + length] for i in range(len(text) - length + 1)]
    return len(set(pieces)) / len(pieces)


greedy = stages[-1]["greedy"]
drawn_text = stages[-1]["text"][: len(greedy)]
assert fresh_share(greedy) < 0.5 and fresh_share(drawn_text) > 0.9
print(greedy[-240:])
print(
    f"\nnew: {fresh_share(greedy):.0%} of it at temperature 0, {fresh_share(drawn_text):.0%} at 0.8"
)

# %% [markdown]
# It loops. The likeliest continuation of a phrase is often the phrase once more, a repeated phrase makes its own repetition likelier still, and nothing ever breaks the circle. The likeliest token at each step is not the likeliest text; it is not even a typical one. A typical text of $n$ tokens has about $n$ times the entropy of one token of surprise in it, and a text
# without any surprise is as far from typical as noise is. GPT-2's largest model, two thousand times this one's size, still loops when it is read out this way {cite}`holtzman2020`.
#
# ## When it fails
#
# Known words are a floor, not a ceiling. A model that repeats the word `return` scores 100%. The count sees spelling and nothing above it. For GPT-2's vocabulary it is weaker still, because most tokens *are* words. There the book will use multiple-choice questions about what happens next, with GPT-2's own score as a control.
#
# ## The command
#
# `make speedrun` ends by writing a sample. By hand, with any run and any prompt:


# %%
#| export sample
@dataclass(frozen=True)
class SampleCommand:
    """Let the model of a run write."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, with a checkpoint."""
    prompt: str = ""
    """How the text begins; empty: the beginning of a document."""
    tokens: int = 600
    """Tokens to write."""
    temperature: float = 0.8
    """Below 1: more of what is likely. 0: always the likeliest."""
    top_k: int = 40
    """Choose among this many likeliest tokens; 0: among all."""
    seed: int = 0
    """Of the random choices."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


# %%
#| export sample
def main(arguments: list[str]) -> int:
    """`python -m speedrun.sample RUN`: print a sample, keep it in RUN/sample.txt, and count its known words."""
    try:
        setup()
        command = tyro.cli(SampleCommand, args=arguments, prog="python -m speedrun.sample")
        trained = load_trained(command.run, command.device)
        knobs = (command.temperature, command.top_k, command.seed)
        text = command.prompt + generate(trained, command.prompt, command.tokens, *knobs)
        (command.run / "sample.txt").write_text(text, encoding="utf-8")
        known = set(words_of(training_text(trained.data)))
        share, count = known_share(text, known), len(words_of(text))
        print(
            f"{text}\n\n{share:.0%} of its {count} words of four or more letters occur in the training text"
        )
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main(sys.argv[1:]))

# %%
assert main([str(scratch), "--prompt", "import ", "--tokens", "60"]) == 0
assert (scratch / "sample.txt").read_text().startswith("import ")
assert main([str(scratch / "nothing")]) == 1

# %% [markdown]
# ## Exercises
#
# 1. A temperature changes how much the model surprises itself. Write `entropy(logits, temperature)`, in bits, and check two limits: at a high temperature it is $\log_2 V$, near zero it vanishes.


# %% tags=["solution"]
def entropy(logits: torch.Tensor, temperature: float) -> float:
    """Entropy in bits of the softmax of logits / temperature."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum() / math.log(2))


# %%
logits = trained.model(torch.tensor([[287, *b"def gcd(a, b):"]]))[0, -1].detach()
assert abs(entropy(logits, 1e4) - math.log2(288)) < 0.01 and entropy(logits, 1e-3) < 0.1
assert entropy(logits, 0.8) < entropy(logits, 1.0)
print(
    f"after “def gcd(a, b):” {entropy(logits, 1.0):.2f} bits of surprise; at temperature 0.8 {entropy(logits, 0.8):.2f}"
)

# %% [markdown]
# 2. How unfair was the comparison with xz? Write `bits_per_byte(text, before)`: the bits a byte that LZMA needs for `text` when it has already packed `before`, that is, the difference of two archives. Then take its memory away (pieces as long as our rows, nothing before), and give it some of our training text.


# %% tags=["solution"]
def bits_per_byte(text: bytes, before: bytes = b"") -> float:
    """Bits a byte of text that LZMA needs after it has packed what comes before."""
    raw = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9}]}
    return (
        8
        * (len(lzma.compress(before + text, **raw)) - len(lzma.compress(before, **raw)))
        / len(text)
    )


# %%
row = round(128 * run["bytes_per_token"])
short_pieces = [held_out[i : i + row] for i in range(0, 20_000, row)]
forgetful = sum(bits_per_byte(piece) * len(piece) for piece in short_pieces) / sum(
    map(len, short_pieces)
)
informed = bits_per_byte(held_out[:100_000], training[:2_000_000].encode())
assert forgetful > 3 and informed < bits_per_byte(held_out[:100_000])
print(f"xz with a memory of {row} bytes: {forgetful:.1f} bits a byte; our model {ours:.2f}")
print(f"xz after two megabytes of our training text: {informed:.2f}")

# %%
import shutil

shutil.rmtree(scratch)
