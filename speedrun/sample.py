# Tangled from notebooks/25_samples.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
if (
    __name__ == "__main__" and __spec__ is not None
):  # python -m: before the imports that take seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()


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


# %% Counting words
def words_of(text: str) -> list[str]:
    """Runs of four or more letters, in order."""
    return re.findall(r"[A-Za-z]{4,}", text)


def known_word_fraction(text: str, known: set[str]) -> float:
    """Share of the words of a text that are known; nan where it has none."""
    found = words_of(text)
    return sum(word in known for word in found) / len(found) if found else float("nan")


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


# %% Does it recite?
def verbatim_fraction(text: str, training: str, length: int = 16) -> float:
    """Share of a text's pieces of `length` characters, half of them letters, that stand in the training text."""
    pieces = [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
    pieces = [piece for piece in pieces if 2 * sum(map(str.isalpha, piece)) >= length]
    return sum(piece in training for piece in pieces) / len(pieces) if pieces else float("nan")


# %% How far back does it look?
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


# %% The command
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
