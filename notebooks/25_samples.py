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
# Under a minute on two CPU cores; within three minutes on one GPU. The samples and the curve in the figures come from the CPU run of some four minutes and are committed with it.
# ```
#
# ## The problem
#
# The loss went down. Down to what? A nat is a unit without a scale that one knows. But it can be turned into bits, and there are older programs that predict text for a living: a compressor that describes a text in few bits has predicted it well. Here is what two of them need for the validation text on which the laptop's run was scored, without any training:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import gzip
import lzma
import math
import time

from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.sources import build_embedded
from speedrun.data.tokenizer import decode_bytes
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
embedded = load_manifest(data_folder("data/embedded"))
tokens = read_shard(data_folder("data/embedded") / "val_000000.bin", embedded.vocab_size)
held_out = decode_bytes(tokens.tolist())

run = load_result("speedrun", "cpu")["data"]["runs"][0]
scored = run["config"]["val_tokens"]
scored_text = decode_bytes(tokens[:scored].tolist())
begin = time.perf_counter()
packed = {"gzip": gzip.compress(scored_text, 9), "xz": lzma.compress(scored_text, preset=9)}
seconds = time.perf_counter() - begin
bits = {name: 8 * len(archive) / len(scored_text) for name, archive in packed.items()}
ours = run["curve"][-1]["val_loss"] / run["bytes_per_token"] / math.log(2)
assert abs(run["bytes_per_token"] * scored / len(scored_text) - 1) < 1e-9
whole = 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
gpt2 = load_result("speedrun", "cpu_gpt2")["data"]["runs"][0]
theirs = gpt2["curve"][-1]["val_loss"] / gpt2["bytes_per_token"] / math.log(2)
assert ours < whole < theirs < bits["xz"] < bits["gzip"]
print(f"bits a byte: gzip {bits['gzip']:.2f}, xz {bits['xz']:.2f}, both in {seconds:.1f} s")
print(f"our GPT {ours:.2f}, after {run['seconds']:.0f} s of training; llm.c's recipe {theirs:.2f}")
print(f"xz on the whole file, {len(held_out) / len(scored_text):.1f} times as long: {whole:.2f}")

# %% [markdown]
# How can a loss and a file size be in one table? Because a prediction *is* a code. Whoever gives the next byte the probability $p$ can spend $-\log_2 p$ bits on it: that nobody can do better on average is Shannon's theorem {cite}`shannon1948`, and arithmetic coding comes within two bits of it for a whole file. The mean of that is the cross-entropy, in bits where it is usually told in nats, so a language model with
# a loss of $L$ nats a byte is a compressor that needs $L / \ln 2$ bits a byte. And it works backwards: gzip, which knows nothing but the last 32 kilobytes, is a language model, and the numbers above are its loss, at most. Delétang and others measured large language models as compressors in this way {cite}`deletang2023`.
#
# Four minutes of training on two cores (one run) beat both by far. The last line is the harder opponent: xz goes on learning while it reads, it may look back over a megabyte of the very text that it is packing, and libraries repeat themselves. Our model's weights are frozen, and at the end of a document, after 1,024 tokens at most, it forgets everything. It needs fewer bits all the same. By llm.c's recipe (`cpu_gpt2`) about as many minutes end just below xz, and well above the last line.
# (Exercise 2 takes xz's memory away, and then gives it some of ours.)
#
# The comparison also asks the wrong question. There is one thing that xz is hopeless at, which is to go on: to write the next line of a file that does
# not exist. To see what a model knows, leave it alone with its own mistakes.
#
# ```{admonition} Prediction
# Let the laptop's model write sixteen samples of 500 tokens of Python, and take from them every word of four letters or more. **Which share of those words occurs in the training text?** And what would the same count give for the same characters in random order?
# ```
#
# ## The idea
#
# A language model is a conditional distribution $p(x_{t+1} \mid x_{\le t})$. To write, draw $x_{t+1}$ from it, append, and ask again. Two knobs are customary. A **temperature** $\tau$ divides the logits before the softmax: below 1 it prefers what is likely already. **Top-k** forbids all but the $k$ likeliest tokens, because
# the tail is long: two hundred bytes that are each wrong with a probability of 0.05% are, together, one wrong byte in ten.
#
# Training never asked for this. It asked for the next token *given a correct past*, and the past of a sample is the model's own, with errors that no training text has. It is often said that such text falls apart, the first slip making the second likelier. That can be counted, too.
#
# ## The code
#
# A run's folder has all that is needed: the checkpoint knows its configuration, its vocabulary and its tokenizer.

# %%
#| default_exp sample
#| export
if (
    __name__ == "__main__" and __spec__ is not None
):  # python -m: before the imports that take seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()

# %%
#| export
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from annotated_types import Ge, Interval
from torch import Tensor, nn

from speedrun.checkpoint import check_tensors, damaged, latest_checkpoint, load_facts, load_tensors
from speedrun.config import check_config, config_from_json, schedule_of, vary
from speedrun.data.shards import data_folder, load_manifest, read_shard
from speedrun.data.tokenizer import Tokenizer, get_tokenizer
from speedrun.lab.bounds import check_ranges
from speedrun.lab.errors import UserError, check_words, explained, run_main
from speedrun.lab.hardware import setup
from speedrun.model.attention import AttentionSettings, Packed
from speedrun.model.gpt import GPT, attention_settings


# %%
#| export
@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, the length of the rows that it was trained on, its step, its data folder."""

    model: nn.Module
    tokenizer: Tokenizer
    seq_len: int
    step: int
    data: Path
    told: AttentionSettings | None = None
    """What attention was told last, if it was trained on packed documents."""

    def logits(self, row: Tensor) -> Tensor:
        """Logits (1, tokens, vocab) of a row, (1, tokens) int64, which is seen as a document if the model knows documents."""
        if self.told is None:
            return self.model(row)
        count = torch.tensor(row.shape[1], dtype=torch.int32)
        ends = torch.tensor([0, row.shape[1]], dtype=torch.int32, device=row.device)
        return self.model(row, None, Packed(ends, count, *self.told))


def load_trained(folder: Path, device: str = "cpu") -> LoadedModel:
    """The model of a run's latest checkpoint, uncompiled and in float32. Reads no optimizer state. Raises UserError."""
    path = latest_checkpoint(Path(folder))
    facts = load_facts(path)
    weights, config = load_tensors(path, "model", facts), config_from_json(facts["config"])
    tokenizer = get_tokenizer(facts["tokenizer"])
    if facts["vocab_size"] != tokenizer.vocab_size:
        raise damaged(path, f"a vocabulary of {facts['vocab_size']} is not the tokenizer's")
    exact = vary(check_config(config), {"model.layout.stream_dtype": "float32"})
    model = GPT(exact.model, facts["vocab_size"]).to(device)
    weights = {k: w.float() if w.dtype == torch.bfloat16 else w for k, w in weights.items()}
    check_tensors(path, weights, dict(model.named_parameters()))
    model.load_state_dict(weights)
    data, length, told = data_folder(config.data.path), config.data.seq_len, None
    if config.data.mode != "stream":
        stages = config.schedule.stages
        length = max(stage.max_doc_tokens or config.data.max_doc_tokens for stage in stages)
        number = schedule_of(config).at(min(facts["step"], config.steps - 1)).stage
        windows = [stage.windows for stage in stages]
        told = attention_settings(config.model, windows, torch.device(device))[number]
    return LoadedModel(model.eval(), tokenizer, length, facts["step"], data, told)


# %% [markdown]
# We need a model to try things on. This one is trained here, for a quarter of a minute:

# %%
import tempfile
from pathlib import Path

from speedrun.config import vary
from speedrun.presets import preset
from speedrun.train import train

scratch = Path(tempfile.mkdtemp())
brief = {"steps": 120, "val_every": 120, "log_every": 40, "val_tokens": 16_384}
train(vary(preset("smoke"), brief | {"device": tier.device}), scratch)
trained = load_trained(scratch, tier.device)
assert trained.step == 120 and trained.tokenizer.name == "bytes" and trained.seq_len == 128

# %% [markdown]
# The two knobs are one small function. It is tested where it is exact: at temperature zero it must choose the likeliest token, and with $k=2$ nothing but the likeliest two, in the right proportion.


# %%
#| export
def sample_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Draw a token from logits, (vocab,), among the `top_k` likeliest (0: all). Temperature 0: the likeliest.

    Raises UserError where a logit is not finite: such a model has nothing to say.
    """
    if not torch.isfinite(logits).all():
        raise UserError(
            "the model's logits are not finite", "sample an earlier checkpoint of the run"
        )
    if temperature <= 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


# %%
logits, generator = torch.tensor([0.0, 2.0, 1.0, -1.0]), torch.Generator().manual_seed(0)
assert sample_token(logits, 0.0, 0, generator) == 1 and {
    sample_token(logits, 0.01, 0, generator) for _ in range(50)
} == {1}
drawn = [sample_token(logits, 1.0, 2, generator) for _ in range(4000)]
seen, expected = drawn.count(1) / len(drawn), 1 / (1 + math.exp(-1))
assert set(drawn) == {1, 2} and abs(seen - expected) < 0.03
print(f"top-2: token 1 drawn in {seen:.1%} of cases, expected {expected:.1%}")

# %% [markdown]
# Writing is then a loop over single tokens, each of which reads the whole window again. A cache of keys and values would save most of that work, but not once the window is full. GPT-2 *learns* its positions, and when the window slides by one, every token moves to another position and every key changes. Rotary
# embeddings (chapter 06), which the laptop's run has, do not have that flaw.


# %%
#| export
@torch.no_grad()
def generate(
    trained: LoadedModel, prompt: str, count: int, temperature=0.8, top_k: int = 40, seed: int = 0
) -> str:
    """`count` tokens that the model writes after a prompt, as text. An empty prompt begins a document."""
    generator, device = torch.Generator().manual_seed(seed), next(trained.model.parameters()).device
    tokens = [trained.tokenizer.document, *trained.tokenizer.encode(prompt).tolist()]
    start = len(tokens)
    for _ in range(count):
        window = torch.tensor([tokens[-trained.seq_len :]], device=device)
        logits = trained.logits(window)[0, -1].float().cpu()
        tokens.append(sample_token(logits, temperature, top_k, generator))
    return trained.tokenizer.decode(tokens[start:])


# %%
text = generate(trained, "def ", 250)
assert text == generate(trained, "def ", 250) != generate(trained, "def ", 250, seed=1)
print("def " + text)

# %% [markdown]
# It has learned about indentation, some punctuation, and that there are words. How that goes on is the measurement; first it needs a judge.
#
# ### Counting words
#
# Syntax would be a natural judge for Python, and is a bad one. Python's own tokenizer accepts most short lines of garbage, since `x ( y` is three perfectly good tokens. Words are harder to hit by chance. There are 456,976 strings of four small letters, and few of them mean anything.


# %%
#| export
def words_of(text: str) -> list[str]:
    """Runs of four or more letters, in order."""
    return re.findall(r"[A-Za-z]{4,}", text)


def known_word_fraction(text: str, known: set[str]) -> float:
    """Share of the words of a text that are known; nan where it has none."""
    found = words_of(text)
    return sum(word in known for word in found) / len(found) if found else float("nan")


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


# %%
import random

training = training_text(data_folder("data/embedded"))
known = set(words_of(training))
real = held_out[100_000:110_000].decode(errors="replace")
letters = list(real)
random.Random(0).shuffle(letters)
noise = "".join(letters)
assert words_of("def gcd(a, b): return_type = gaussian3") == ["return", "type", "gaussian"]
assert known_word_fraction(real, known) > 0.9 and known_word_fraction(noise, known) < 0.1
read_mb = run["tokens"] * run["bytes_per_token"] / 1e6
assert 0.1 < 2e6 / len(training) < 0.11 and 2.0 < read_mb < 3.0
print(f"of {len(training) / 1e6:.0f} MB of training text the laptop's run has read {read_mb:.1f}")
print(
    f"{len(known):,} words; known in held-out text {known_word_fraction(real, known):.0%}, shuffled {known_word_fraction(noise, known):.0%}"
)

# %% [markdown]
# The judge knows real text when it sees it, even text that is not in the training files, and is not fooled by noise. (A held-out file has a few words that the training files do not. So a perfect writer would not score 100% either, and one that does is a suspect.)
#
# ### Does it recite?
#
# The suspicion deserves a test of its own. Cut a text into pieces of 16 characters, too long to be anybody's by accident, and look each up in the training text, as it stands. Pieces of punctuation prove nothing (every file has its line of sixteen hashes), so a piece counts only if half of it are letters.


# %%
#| export
def verbatim_fraction(text: str, training: str, length: int = 16) -> float:
    """Share of a text's pieces of `length` characters, half of them letters, that stand in the training text."""
    pieces = [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
    pieces = [piece for piece in pieces if 2 * sum(map(str.isalpha, piece)) >= length]
    return sum(piece in training for piece in pieces) / len(pieces) if pieces else float("nan")


# %%
theirs = verbatim_fraction(real, training)
half = re.search(r"[a-z]{4} [a-z]{4} [a-z]{6}", training)[0] + "qzxv" * 4
assert verbatim_fraction(half, training) == 0.5 and math.isnan(
    verbatim_fraction("#" * 64, training)
)
assert theirs > 0.3 and verbatim_fraction(noise, training) < 0.02
print(f"of a held-out file's pieces {theirs:.0%} stand in the training text")

# %% [markdown]
# ### How far back does it look?
#
# A second question has a sharper answer. At the first position of a row, or of a document, the model has seen one token; at the last, hundreds. If it uses what it sees, its loss must fall along the row (from about the ninth token on: most documents here begin in the middle of a file, so that their first token is a line's indentation, which is easy, and the second that line's first letter, which is hard), and where it stops falling is how far back it looks. A model that was trained on documents is asked about documents, each from its beginning.


# %%
#| export
@torch.no_grad()
def losses_of_rows(trained: LoadedModel, rows: int = 2000) -> Tensor:
    """Loss in nats at each position of the first rows of the validation text, (rows, positions).

    A row is as long as the model's context; a model of documents reads the first documents that have 512 tokens, and of each so many.
    """
    manifest, alone = load_manifest(trained.data), trained.told is not None
    path, length = trained.data / manifest.split("val")[0].name, trained.seq_len
    tokens = read_shard(path, manifest.vocab_size).astype("int64")
    begins = np.arange(0, len(tokens) - length, length)
    if alone:
        length = min(length, 512)
        begins = np.flatnonzero(tokens == manifest.document)
        begins = begins[np.diff(begins, append=len(tokens)) > length]
    pieces = np.stack([tokens[at : at + length + 1] for at in begins[:rows]])
    row = torch.from_numpy(pieces).to(next(trained.model.parameters()).device)
    losses = []
    for x, y in zip(row[:, :-1].split(50), row[:, 1:].split(50)):
        logits = torch.cat([trained.logits(row) for row in x.split(1)]) if alone else trained.model(x)  # fmt: skip
        losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none"))
    return torch.cat(losses).cpu()


def by_context(losses: Tensor) -> list[dict]:
    """Mean loss and its standard error over rows, by how many tokens were seen: 1, 2, 3–4, 5–8, … at position 0, 1, …"""
    edges, found = [0, 1, *(2**n for n in range(1, losses.shape[1].bit_length()))], []
    for begin, end in zip(edges, edges[1:]):
        means = losses[:, begin:end].mean(1)
        error = means.std() / math.sqrt(len(means))
        found.append({"seen": [begin + 1, end], "mean": means.mean().item(), "error": error.item()})
    return found


# %%
losses = losses_of_rows(trained, rows=200)
context = by_context(losses)
assert losses.shape == (200, 128) and [step["seen"] for step in context[:3]] == [
    [1, 1],
    [2, 2],
    [3, 4],
]
weights = [step["seen"][1] - step["seen"][0] + 1 for step in context]
whole_mean = sum(weight * step["mean"] for weight, step in zip(weights, context)) / 128
assert abs(whole_mean - losses.mean()) < 1e-4 and context[0]["mean"] > context[-1]["mean"]
for step in (context[0], context[-1]):
    print(f"{step['seen'][0]} to {step['seen'][1]} tokens seen: {step['mean']:.2f} nats")

# %% [markdown]
# ## The measurement
#
# The laptop's run, stopped twice on its way, and each time asked to write. The measuring code is as short as that sentence:

# %% tags=["hide-input"]
#| export measure.samples
import math
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from speedrun.config import vary
from speedrun.presets import preset
from speedrun.data.shards import load_manifest
from speedrun.lab.provenance import stamp
from speedrun.lab.metrics import read_metrics, series
from speedrun.train import train

NAMES = ("cpu",)
STAGES = {125: 4, 500: 4, 0: 16}  # steps (0: the end) → samples


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train the preset `name` in three stages, and let each write samples. Returns data and stamp."""
    stages, config = [], preset(name)
    with TemporaryDirectory() as folder:
        for stage, count in STAGES.items():
            train(vary(config, {"max_steps": stage}), Path(folder), again=bool(stages))
            trained = load_trained(Path(folder))
            texts = [generate(trained, "", 500, seed=seed) for seed in range(count)]
            val = series(read_metrics(Path(folder) / "metrics.jsonl"), "val")[-1]["val_loss"]
            known = set(words_of(training_text(trained.data)))
            facts = {"step": trained.step, "val_loss": val, "texts": texts}
            facts["known_share"] = known_word_fraction("\n".join(texts), known)
            losses = losses_of_rows(trained)
            middle, half = losses.shape[1] // 8, losses.shape[1] // 2
            late = losses[:, middle // 2 : middle].mean(1) - losses[:, half:].mean(1)
            facts["late_gain"] = [late.mean().item(), late.std().item() / math.sqrt(len(late))]
            facts |= {"context": by_context(losses), "config": asdict(config)}
            stages.append(facts | {"greedy": generate(trained, "", 500, temperature=0.0)})
        data = load_manifest(trained.data)
    corpus = {"name": data.source, "sha256": data.sha256}
    modules = ["speedrun.measure.samples"]
    return {"stages": stages}, stamp(command, modules, 1, [config.seed], corpus)


# %%
result = load_result("samples", "cpu")
stages = result["data"]["stages"]
for stage in stages:
    stage["text"] = "\n".join(stage["texts"])
shares = [known_word_fraction(stage["text"], known) for stage in stages]
mixed = list(stages[-1]["text"])
random.Random(0).shuffle(mixed)
shuffled = known_word_fraction("".join(mixed), known)
assert shares == [stage["known_share"] for stage in stages], "counted again"
assert shares == sorted(shares) and abs(shares[-1] - 0.8) < 0.05 and shuffled < 0.02
for share, stage in zip(shares, stages):
    count = len(words_of(stage["text"]))
    print(
        f"step {stage['step']:>5}: {stage['val_loss']:.2f} nats; {share:.0%} of {count} words known"
    )
print(f"the last text's characters, shuffled: {shuffled:.0%}")

# %% [markdown]
# Sixteen samples are enough to ask two more things of the finished model: whether its text falls apart on the way, and whether it recites.

# %%
texts = stages[-1]["texts"]
halves = ([text[: len(text) // 2] for text in texts], [text[len(text) // 2 :] for text in texts])
early, late = (known_word_fraction("\n".join(half), known) for half in halves)
recited = verbatim_fraction(stages[-1]["text"], training)
groups = [verbatim_fraction("\n".join(texts[n : n + 4]), training) for n in range(0, 16, 4)]
assert len(texts) == 16 and max(groups) < theirs and recited < 0.6 * theirs
assert abs(late - early) < 0.06, "no decay that sixteen samples could show"
print(f"known words in first halves {early:.0%}, in second halves {late:.0%}")
print(f"pieces that stand in the training text: {recited:.0%}, a held-out file's {theirs:.0%}")
print(f"by groups of four samples: {', '.join(f'{share:.0%}' for share in groups)}")


def without_unknown(text: str) -> str:
    """The text with hashes for words of four or more letters that the training text does not have."""
    return re.sub(r"[A-Za-z]{4,}", lambda w: w[0] if w[0] in known else "#" * len(w[0]), text)


def recited_of_known(text: str, length: int = 16) -> float:
    """As `verbatim_fraction`, of those pieces alone that hold no unknown word, nor a part of one."""
    shown = without_unknown(text)
    pairs = [(text[i : i + length], shown[i : i + length]) for i in range(0, len(text), length)]
    return verbatim_fraction("".join(a for a, b in pairs if a == b), training, length)


spelt = [recited_of_known(text) for text in (stages[-1]["text"], real)]
assert spelt[0] < 0.5 * spelt[1], "nor is it the misspelt words alone"
print(f"of pieces without an unknown word: {spelt[0]:.0%}, and {spelt[1]:.0%}")

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
# Orange words occur nowhere in the training text. Indentation comes first, because a few tokens are enough for it. Words come later: four in five of the last text's are real, where the same characters in random order give next to none. It does not get them by reciting long passages, as far as pieces of 16 characters can show: what it shares with the training text is well below what a held-out file shares. (A misspelt word breaks a piece, and it has many. But of the pieces without one it shares less than half as many, too.) And it does not fall apart, as far as spelling goes: the second halves are nearly as good as the first. Some of it repeats itself; how much, we shall count below.
#
# What it does not have is anything to say. A name that is used was not defined; an argument that is documented does not exist. That, too, is knowledge, about what a loss of this size means. Between this loss and a program that runs lies everything that a larger model learns later and slower.

# %% [markdown]
# How far back does it look? Two tables set the scale. One knows how often each token occurs in the training text, the other how often each follows each.

# %%
import numpy as np

train_tokens = read_shard(data_folder("data/embedded") / "train_000000.bin", embedded.vocab_size)
before, after = train_tokens[:-1].astype(int), train_tokens[1:].astype(int)
counts = np.bincount(before * 288 + after, minlength=288 * 288).reshape(288, 288) + 1
pair = np.log(counts / counts.sum(1, keepdims=True))
single = np.log(counts.sum(0) / counts.sum())
seen, following = tokens[: scored - 1].astype(int), tokens[1:scored].astype(int)
tables = {"pairs": -pair[seen, following].mean(), "tokens": -single[following].mean()}
contexts = [[step["mean"] for step in stage["context"]] for stage in stages]
flat = max(contexts[0][4:]) - min(contexts[0][4:])
assert stages[0]["val_loss"] < tables["pairs"] < tables["tokens"] and flat < 0.05
gain, error = stages[-1]["late_gain"]
long = contexts[-1][4] - contexts[-1][-1]
assert long > 10 * flat and gain > 5 * error, "what comes late is there"
assert contexts[-1][4:] == sorted(contexts[-1][4:], reverse=True)
assert max(contexts[1][4:]) - min(contexts[1][4:]) < 0.06
print(f"a table of tokens {tables['tokens']:.2f} nats, of pairs {tables['pairs']:.2f}")
print(f"step {stages[0]['step']}: {stages[0]['val_loss']:.2f}")
print(f"finished: 257 to 512 tokens seen save {long:.2f} over 9 to 16,")
print(f"and {gain:.2f} ± {2 * error:.2f} over 33 to 64")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Loss against the number of tokens seen, for the model after three lengths of training, with standard errors"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, axis = plt.subplots(figsize=(5.5, 3.6))
for n, (stage, means) in enumerate(zip(stages, contexts)):
    errors = [2 * step["error"] for step in stage["context"]]
    axis.errorbar(range(len(means)), means, errors, color=f"C{n}", marker="o", ms=4, capsize=2)
    axis.annotate(
        f"step {stage['step']:,}",
        (len(means) - 1, means[-1]),
        (0, 9),
        textcoords="offset points",
        ha="right",
        color=f"C{n}",
    )
axis.axhline(tables["pairs"], color="0.5", ls=":")
axis.annotate(
    "a table of pairs",
    (len(stages[0]["context"]) - 1, tables["pairs"]),
    (0, 4),
    textcoords="offset points",
    ha="right",
    color="0.4",
)
labels = [
    f"{a}" if a == b else f"{a}–{b}" for a, b in (step["seen"] for step in stages[0]["context"])
]
axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
axis.set_xlabel("tokens seen")
axis.set_ylabel("loss (nats a token), ±2 standard errors")
axis.set_title(f"from 16 to 512 tokens of context\nsave {long:.2f} nats a token, in the end")
plt.show()

# %% [markdown]
# After 125 steps the curve is flat from the ninth token on: the model beats a table that counts pairs, and has no use for anything further back. After 500 steps it is flat still. In the end it falls all the way to the right. (A likely reason is that names are used again, and a longer text holds more of them.) A single number at the end of a log
# cannot say such a thing, and it matters when one number is compared with another: an idea that needs more context than a model was trained on cannot show in it at all.
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
drawn = [[fresh_share(text) for text in stage["texts"]] for stage in stages]
stuck = [sum(share < 0.6 for share in shares) for shares in drawn]
assert fresh_share(greedy) < 0.1 < min(drawn[-1]) and stuck == [0, 0, 5] and min(drawn[1]) > 0.9
print(greedy[-240:])
print(
    f"\nnew: {fresh_share(greedy):.0%} of it at temperature 0; at 0.8 from {min(drawn[-1]):.0%} to {max(drawn[-1]):.0%}"
)
print(
    f"samples that are stuck, at 0.8: {stuck[1]} of {len(drawn[1])} after 500 steps, {stuck[2]} of {len(drawn[2])} in the end"
)

# %% [markdown]
# It loops. The likeliest continuation of a phrase is often the phrase once more, a repeated phrase makes its own repetition likelier still, and nothing ever breaks the circle. The likeliest token at each step is not the likeliest text; it is not even a typical one. (At temperature 0.8 five of the sixteen samples get stuck as well. None of the four after 500 steps did, but four are too few to tell.) A typical text of $n$ tokens has about $n$ times the entropy of one token of surprise in it, and this one has next to none. GPT-2 Large, with its 762 million parameters some 900 times this one's size, still loops when it is read out this way {cite}`holtzman2020`.

# %% tags=["hide-input"]
assert 880 < 762e6 / run["parameters"] < 940

# %% [markdown]
#
# ## When it fails
#
# Known words are a floor, not a ceiling. A model that repeats the word `return` scores 100%. The count sees spelling and nothing above it. For GPT-2's vocabulary it is weaker still, because most tokens *are* words. There multiple-choice questions about what happens next, with GPT-2's own score as a control, would say more; this book has not asked them.
#
# ## The command
#
# `make speedrun` ends by writing a sample. By hand, with any run and any prompt:
#
# ```bash
# python -m speedrun.sample runs/RUN --prompt "def " --tokens 600 --temperature 0.8
# ```


# %%
#| export sample
@dataclass(frozen=True)
class SampleCommand:
    """Let the model of a run write."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, with a checkpoint."""
    prompt: str = ""
    """How the text begins; empty: the beginning of a document."""
    tokens: Annotated[int, Interval(ge=1, le=10**7)] = 600
    """Tokens to write."""
    temperature: Annotated[float, Interval(ge=0, le=100)] = 0.8
    """Below 1: more of what is likely. 0: always the likeliest."""
    top_k: Annotated[int, Ge(0)] = 40
    """Choose among this many likeliest tokens; 0: among all."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Of the random choices."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


# %%
#| export sample
def run_command(arguments: list[str]) -> None:
    """Print a sample and keep it in the run's folder; count its known words, if its training text is there."""
    setup()
    check_words(arguments)
    command = tyro.cli(SampleCommand, args=arguments, prog="python -m speedrun.sample")
    check_ranges(command)
    if command.device == "cuda" and not torch.cuda.is_available():
        what = "--device cuda, but PyTorch sees no GPU"
        raise UserError(what, "make doctor says why; or --device cpu")
    trained = load_trained(command.run, command.device)
    knobs = (command.temperature, command.top_k, command.seed)
    text = command.prompt + generate(trained, command.prompt, command.tokens, *knobs)
    print(text)
    try:
        (command.run / "sample.txt").write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:  # it has been printed
        print(f"\nnot kept in sample.txt: {explained(error) or error}", file=sys.stderr)
    try:
        known, count = set(words_of(training_text(trained.data))), len(words_of(text))
    except UserError as problem:
        print(f"\nits words were not counted: {problem}", file=sys.stderr)
        return
    share = known_word_fraction(text, known)
    print(f"\n{share:.0%} of its {count} words of four or more letters occur in the training text")


def main(arguments: list[str]) -> int:
    """`python -m speedrun.sample RUN`: print a sample, keep it in RUN/sample.txt, and count its known words.

    Of a large training text, the first twenty million tokens count.
    """
    return run_main(lambda: run_command(arguments))


if __name__ == "__main__" and __spec__ is not None:
    sys.exit(main(sys.argv[1:]))

# %%
assert main([str(scratch), "--prompt", "import ", "--tokens", "60"]) == 0
assert (scratch / "sample.txt").read_text().startswith("import ")
assert main([str(scratch / "nothing")]) == 1 and main([str(scratch), "--temperature", "nan"]) == 1
if not torch.cuda.is_available():
    assert main([str(scratch), "--device", "cuda"]) == 1

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
coins = entropy(torch.tensor([0.0, math.log(3)]), 1.0)
assert abs(coins - 0.8113) < 1e-3, (
    f"probabilities of 1/4 and 3/4 have an entropy of 0.811 bits, not {coins:.4g}"
)
begun = [trained.tokenizer.document, *b"def gcd(a, b):"]
logits = trained.model(torch.tensor([begun], device=tier.device))[0, -1].detach()
hot, cold = entropy(logits, 1e4), entropy(logits, 1e-3)
assert abs(hot - math.log2(288)) < 0.01, (
    f"at a temperature of 10,000 all 288 tokens are alike: {math.log2(288):.2f} bits, not {hot:.4g}"
)
assert cold < 0.1, f"at a temperature of 0.001 one token is left, so almost 0 bits, not {cold:.4g}"
even, usual = entropy(logits, 1.0), entropy(logits, 0.8)
assert usual < even, (
    f"a lower temperature leaves less surprise: {usual:.3f} at 0.8, {even:.3f} at 1"
)
print(f"after “def gcd(a, b):” {even:.2f} bits of surprise; at temperature 0.8 {usual:.2f}")

# %% [markdown]
# 2. How unfair was the comparison with xz? Write `bits_per_byte(text, before)`: the bits a byte that LZMA needs for `text` when it has already packed `before`, that is, the difference of two archives. Then take its memory away (pieces as long as our longest documents, nothing before), and give it some of our training text.


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
noise = np.random.default_rng(0).bytes(20_000)
fresh = bits_per_byte(noise[:10_000], noise[10_000:])
assert 7.9 < fresh < 8.3, f"random bytes after other random bytes take 8 bits each, not {fresh:.2f}"
row = round(1024 * run["bytes_per_token"])
short_pieces = [held_out[i : i + row] for i in range(0, 20_000, row)]
packed = sum(bits_per_byte(piece) * len(piece) for piece in short_pieces)
forgetful = packed / sum(map(len, short_pieces))
informed = bits_per_byte(scored_text, training[:2_000_000].encode())
assert forgetful > 3, (
    f"pieces of {row} bytes, with nothing before, take more than 3 bits a byte, not {forgetful:.2f}"
)
usual = bits_per_byte(scored_text)
assert ours < informed < usual - 0.2, (
    f"our training text should help xz, which takes {usual:.2f} bits without it, not {informed:.2f}"
)
saved, behind = usual - informed, informed - ours
assert 0.25 < saved < 0.35 and 0.15 < behind < 0.25, (
    f"it should save xz about 0.28 bits a byte and leave it 0.22 behind our model, not {saved:.2f} and {behind:.2f}"
)
print(f"xz with a memory of {row} bytes: {forgetful:.1f} bits a byte; our model {ours:.2f}")
print(f"xz after two megabytes of our training text: {informed:.2f}")

# %% [markdown]
# It was unfair to xz. With our memory it is hopeless. Two megabytes of the training text, a tenth of it and somewhat less than our model has read, save it more than a quarter of a bit, and leave it a fifth of a bit behind: on this text remembering is worth much, and learning from about as much was worth more.

# %%
import shutil

shutil.rmtree(scratch)
