# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import data_folder, load_manifest, read_shard


# %% Reading, the naive way
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from speedrun.lab.bounds import NonNegativeInt, PositiveInt, check_ranges
from speedrun.lab.errors import Problem


@dataclass(frozen=True)
class DataConfig:
    """What a step reads. The vocabulary is not here: it stands in the data folder's manifest."""

    path: str = "data/embedded"
    """Data folder, with a manifest.json; relative to here or to the project."""
    mode: Literal["stream", "documents"] = "stream"
    """stream: rows cut from the stream wherever they fall. documents: whole documents, from their beginning."""
    seq_len: PositiveInt = 1024
    """Tokens a row; in the documents mode a micro-batch is one row, and this is not used."""
    step_tokens: PositiveInt = 524_288
    """Tokens a step, over all ranks."""
    grad_shards: PositiveInt = 8
    """Equal micro-batches a step; a multiple of the number of ranks."""
    max_document: PositiveInt = 2048
    """Documents mode: the longest piece of a document that is used."""
    pass_tokens: NonNegativeInt = 0
    """Stream mode: a rank's micro-batches are joined up to this many tokens for a pass of the model; 0: never."""


def check_options(options: DataConfig, world: int = 1) -> int:
    """Tokens a micro-batch, after checking that everything divides."""
    check_ranges(options, "data.")
    shards, tokens = options.grad_shards, options.step_tokens
    if shards % world:
        what = f"{world} ranks cannot share {shards} micro-batches a step evenly (data.grad_shards)"
        fix = f"a divisor of {shards} as the number of GPUs, or --data.grad-shards a multiple of {world}"
        raise Problem(what, fix)
    row = options.seq_len if options.mode == "stream" else 1
    if tokens % (shards * row):
        what = f"data.step_tokens={tokens} is no multiple of grad_shards × row = {shards} × {row}"
        raise Problem(
            what, f"--data.step-tokens {max(1, round(tokens / shards / row)) * shards * row}"
        )
    return tokens // shards


def read_row(shards: "Shards", start: int, count: int) -> np.ndarray:
    """Tokens start … start + count of the stream, (count,) uint16, across shard borders."""
    parts, number = [], int(np.searchsorted(shards.ends, start, side="right"))
    while count:
        begin = start - (int(shards.ends[number - 1]) if number else 0)
        parts.append(shards.shard(number)[0][begin : begin + count])
        start, count, number = start + len(parts[-1]), count - len(parts[-1]), number + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Shards:
    """One split of a data folder as one stream of tokens; shards are loaded when needed, the next one ahead."""

    def __init__(self, folder: str | Path, split: str):
        self.folder = data_folder(str(folder))
        self.manifest = load_manifest(self.folder)
        self.files = self.manifest.split(split)
        if not self.files:
            fix = "a data folder needs training and validation shards: pack its text into another"
            raise Problem(f"{self.folder}: the manifest lists no {split} shard", fix)
        self.ends = np.cumsum([file.tokens for file in self.files])
        self.total = int(self.ends[-1])
        self.thread, self.held = ThreadPoolExecutor(1), dict[int, Future]()

    def load(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard from the disk, held against the manifest: its tokens, and where documents begin among them."""
        file = self.files[number]
        tokens = read_shard(self.folder / file.name, self.manifest.vocab_size, file)
        return tokens, np.flatnonzero(tokens == self.manifest.document)

    def shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A loaded shard. Its successor starts loading; all but these and the one before are let go."""
        ahead = (number + 1) % len(self.files)
        self.held = {
            n: loading for n, loading in self.held.items() if n in (number - 1, number, ahead)
        }
        for n in (number, ahead):
            if n not in self.held:
                self.held[n] = self.thread.submit(self.load, n)
        return self.held[number].result()

    read = read_row


class Position(NamedTuple):
    """Where the next step reads: the epoch; then the next token (stream), or shard and document (documents)."""

    epoch: int = 0
    offset: int = 0
    document: int = 0


class Batch(NamedTuple):
    """A micro-batch: inputs and targets, (rows, seq_len) int64; cu_seqlens, int32, the borders of documents."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def next_slice(total: int, options: DataConfig, at: Position) -> tuple[int, Position]:
    """Stream mode: where a step's tokens start, and the position after it; too short a rest begins a new epoch."""
    if options.step_tokens + 1 > total:
        what = f"a step reads {options.step_tokens + 1:,} tokens (data.step_tokens), the training shards hold {total:,}"
        raise Problem(what, "add shards, or lower --data.step-tokens")
    if at.offset + options.step_tokens + 1 > total:
        at = Position(at.epoch + 1)
    return at.offset, Position(at.epoch, at.offset + options.step_tokens)


def rows(tokens: np.ndarray, seq_len: int) -> Batch:
    """A slice of n · seq_len + 1 tokens as a batch of n rows: the targets are the inputs shifted by one."""
    row = torch.from_numpy(tokens.astype(np.int64))
    return Batch(row[:-1].view(-1, seq_len), row[1:].view(-1, seq_len))


# %% Reading by documents
def fill(
    starts, stops, first: int, need: int, longest: int
) -> tuple[list[tuple[int, int]], int] | None:
    """Slices of consecutive documents from `first`, each clipped at `longest`, that hold `need` tokens together.

    starts, stops: where each document begins and ends. Returns the slices and the next document; None if they run out.
    """
    slices = []
    while need:
        if first == len(starts):
            return None
        start = int(starts[first])
        take = min(int(stops[first]) - start, longest, need)
        slices.append((start, start + take))
        need, first = need - take, first + 1
    return slices, first


def document_batch(tokens: np.ndarray, slices: list[tuple[int, int]]) -> Batch:
    """A micro-batch of one row from slices of a shard: n + 1 tokens become n inputs and n targets."""
    row = torch.from_numpy(np.concatenate([tokens[a:b] for a, b in slices]).astype(np.int64))
    borders = np.minimum(np.cumsum([0] + [b - a for a, b in slices]), len(row) - 1)
    return Batch(
        row[None, :-1], row[None, 1:], torch.from_numpy(np.unique(borders).astype(np.int32))
    )


def plan_step(shards: Shards, options: DataConfig, at: Position) -> tuple[list, int, Position]:
    """Documents mode: slices for each micro-batch of the next step, the shard they are in, and the position after it."""
    need = options.step_tokens // options.grad_shards + 1
    for _ in range(len(shards.files) + 1):
        tokens, starts = shards.shard(at.offset)
        stops, document, plan = np.append(starts[1:], len(tokens)), at.document, []
        while len(plan) < options.grad_shards:
            filled = fill(starts, stops, document, need, options.max_document)
            if filled is None:
                break
            plan.append(filled[0])
            document = filled[1]
        if len(plan) == options.grad_shards:
            return plan, at.offset, Position(at.epoch, at.offset, document)
        last = at.offset + 1 == len(shards.files)
        at = Position(at.epoch + last, 0 if last else at.offset + 1)
    raise Problem(
        f"no shard of {shards.folder} holds the documents of one step", "lower --data.step-tokens"
    )


def joined_micro_batches(options: DataConfig, share: int) -> int:
    """How many of a rank's `share` micro-batches make one batch: as many as fit pass_tokens, and divide them evenly."""
    micro = options.step_tokens // options.grad_shards
    most = options.pass_tokens // micro if options.mode == "stream" else 1
    return next(n for n in range(max(1, min(most, share)), 0, -1) if share % n == 0)


def pinned(batch: Batch) -> Batch:
    """A batch in page-locked memory, which a GPU can fetch while Python goes on."""
    borders = None if batch.cu_seqlens is None else batch.cu_seqlens.pin_memory()
    return Batch(batch.inputs.pin_memory(), batch.targets.pin_memory(), borders)


def next_stream(loader: "Loader", options: DataConfig) -> list[Batch]:
    """A rank's part of the next slice of the stream."""
    start, loader.position = next_slice(loader.shards.total, options, loader.position)
    micro, mine = options.step_tokens // options.grad_shards, loader.mine
    own = loader.shards.read(start + mine[0] * micro, len(mine) * micro + 1)
    size = micro * joined_micro_batches(options, len(mine))
    cuts = range(0, len(mine) * micro, size)
    return [rows(own[at : at + size + 1], options.seq_len) for at in cuts]


def next_documents(loader: "Loader", options: DataConfig) -> list[Batch]:
    """A rank's part of the next documents."""
    plan, number, loader.position = plan_step(loader.shards, options, loader.position)
    tokens, _ = loader.shards.shard(number)
    return [document_batch(tokens, plan[i]) for i in loader.mine]


class Loader:
    """This rank's micro-batches, one step after the other. `position` is all its state: keep it to resume.

    rank, world: this rank's number, and how many share a step. pin: page-locked memory, for copies to a GPU.
    """

    def __init__(self, options: DataConfig, rank: int = 0, world: int = 1, pin: bool = False):
        check_options(options, world)
        self.options, self.pin = options, pin
        self.shards, self.position = Shards(options.path, "train"), Position()
        share = options.grad_shards // world
        self.mine = range(rank * share, (rank + 1) * share)

    def step_options(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> DataConfig:
        """The options of one step. 0: step_tokens, and max_document, as they are."""
        tokens = batch_tokens or self.options.step_tokens
        longest = max_doc_tokens or self.options.max_document
        return replace(self.options, step_tokens=tokens, max_document=longest)

    def check(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> None:
        """Raise Problem where the training shards hold no step of that size."""
        options = self.step_options(batch_tokens, max_doc_tokens)
        check_options(options)
        if options.mode == "stream":
            next_slice(self.shards.total, options, Position())
        else:
            plan_step(self.shards, options, Position())

    def next(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> list[Batch]:
        """The next step's micro-batches for this rank, as many at a time as fit pass_tokens. 0: as in the options."""
        options = self.step_options(batch_tokens, max_doc_tokens)
        make = next_stream if options.mode == "stream" else next_documents
        return [pinned(batch) if self.pin else batch for batch in make(self, options)]


def validation_batches(
    shards: Shards, options: DataConfig, tokens: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of the first `tokens` validation tokens, as micro-batches like those of training."""
    micro, there = check_options(options, world), min(tokens, shards.total - 1)
    if there < micro:
        what = (
            f"validation reads micro-batches of {micro:,} tokens; {there:,} are asked for or there"
        )
        raise Problem(what, "raise --val-tokens, or lower --data.step-tokens")
    for number in range(rank, there // micro, world):
        own = shards.read(number * micro, micro + 1)
        yield rows(own, options.seq_len if options.mode == "stream" else micro)
