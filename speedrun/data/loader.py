# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import data_folder, load_manifest, read_shard


# %% Reading, the naive way
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from speedrun.lab.hardware import Problem


@dataclass(frozen=True)
class DataOptions:
    """What a step reads. The vocabulary is not here: it stands in the data folder's manifest."""

    path: str = "data/embedded"
    """Data folder, with a manifest.json; relative to here or to the project."""
    mode: Literal["stream", "documents"] = "stream"
    """stream: rows cut from the token stream wherever they fall. documents: rows of whole documents, from their beginning."""
    seq_len: int = 1024
    """Tokens a row; in the documents mode a micro-batch is one row, and this is not used."""
    step_tokens: int = 524_288
    """Tokens a step, over all ranks."""
    grad_shards: int = 8
    """Equal micro-batches a step; a multiple of the number of ranks."""
    max_document: int = 2048
    """Documents mode: the longest piece of a document that is used."""


def check_options(options: DataOptions, world: int = 1) -> int:
    """Tokens a micro-batch, after checking that everything divides. Raises Problem with the field and a way out."""
    if options.grad_shards % world:
        fix = f"run on a divisor of {options.grad_shards} GPUs, or set --data.grad-shards to a multiple of {world}"
        raise Problem(f"{world} ranks cannot share {options.grad_shards} micro-batches a step evenly (data.grad_shards)", fix)
    micro, rest = divmod(options.step_tokens, options.grad_shards)
    row = options.seq_len if options.mode == "stream" else 1
    if rest or micro % row or micro == 0:
        what = f"data.step_tokens={options.step_tokens} is no multiple of grad_shards × row = {options.grad_shards} × {row}"
        raise Problem(what, f"use {max(1, round(options.step_tokens / options.grad_shards / row)) * options.grad_shards * row}")
    return micro


class Shards:
    """One split of a data folder as one long row of tokens. Reads shards when needed, the next one ahead in a thread."""

    def __init__(self, folder: str | Path, split: str):
        self.folder, manifest = data_folder(str(folder)), load_manifest(data_folder(str(folder)))
        self.files, self.manifest, self.split = manifest.split(split), manifest, split
        if not self.files:
            raise Problem(f"{self.folder}: the manifest lists no {split} shard", manifest.command)
        self.ends = np.cumsum([file.tokens for file in self.files])
        self.total = int(self.ends[-1])
        self.thread, self.held = ThreadPoolExecutor(1), {}

    def shard(self, number: int) -> np.ndarray:
        """The tokens of one shard; starts loading its successor, and lets go of all others."""
        keep = {number, (number + 1) % len(self.files)}
        self.held = {n: loading for n, loading in self.held.items() if n in keep or n == number - 1}
        for n in sorted(keep, key=lambda n: n != number):
            if n not in self.held:
                path = self.folder / self.files[n].name
                self.held[n] = self.thread.submit(read_shard, path, self.manifest.vocab_size)
        return self.held[number].result()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count of the row, across shard borders."""
        parts, number = [], int(np.searchsorted(self.ends, start, side="right"))
        while count:
            begin = start - (int(self.ends[number - 1]) if number else 0)
            parts.append(self.shard(number)[begin : begin + count])
            start, count, number = start + len(parts[-1]), count - len(parts[-1]), number + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Position(NamedTuple):
    """Where the next step reads: the epoch, and the next token (stream) or shard and document (documents) in it."""

    epoch: int = 0
    offset: int = 0
    document: int = 0


def next_slice(total: int, options: DataOptions, at: Position) -> tuple[int, Position]:
    """Stream mode: where a step's tokens start, and the position after it. A new epoch begins where the rest is too short."""
    if options.step_tokens + 1 > total:
        what = f"a step reads {options.step_tokens + 1:,} tokens (data.step_tokens), the training shards hold {total:,}"
        raise Problem(what, "add shards, or lower --data.step-tokens")
    if at.offset + options.step_tokens + 1 > total:
        at = Position(at.epoch + 1)
    return at.offset, Position(at.epoch, at.offset + options.step_tokens)


class Batch(NamedTuple):
    """A micro-batch: inputs and targets, (rows, seq_len) int64; `cu_seqlens`, int32, document borders (documents mode)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None


def rows(tokens: np.ndarray, seq_len: int) -> Batch:
    """A slice of n·seq_len + 1 tokens as a batch of n rows: the targets are the inputs shifted by one."""
    tokens = torch.from_numpy(tokens.astype(np.int64))
    return Batch(tokens[:-1].view(-1, seq_len), tokens[1:].view(-1, seq_len))


# %% Reading by documents
def fill(starts: np.ndarray, stops: np.ndarray, first: int, need: int, longest: int) -> tuple[list[tuple[int, int]], int] | None:
    """Slices of consecutive documents from `first`, each clipped at `longest`, that hold exactly `need` tokens together.

    Returns the slices and the next document, or None where the documents run out.
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
    """A micro-batch of one row from the slices of a shard: n + 1 tokens become n inputs and n targets."""
    joined = torch.from_numpy(np.concatenate([tokens[start:stop] for start, stop in slices]).astype(np.int64))
    borders = np.cumsum([0] + [stop - start for start, stop in slices])
    borders = np.unique(np.minimum(borders, len(joined) - 1)).astype(np.int32)
    return Batch(joined[None, :-1], joined[None, 1:], torch.from_numpy(borders))


def plan_step(shards: Shards, options: DataOptions, at: Position, micro: int) -> tuple[list, int, Position]:
    """Documents mode: slices for each micro-batch of the next step, the shard they are in, and the position after it."""
    for _ in range(len(shards.files) + 1):
        tokens = shards.shard(at.offset)
        starts = np.flatnonzero(tokens == shards.manifest.document)
        stops, document, plan = np.append(starts[1:], len(tokens)), at.document, []
        while len(plan) < options.grad_shards:
            filled = fill(starts, stops, document, micro + 1, options.max_document)
            if filled is None:
                break
            plan.append(filled[0])
            document = filled[1]
        if len(plan) == options.grad_shards:
            return plan, at.offset, Position(at.epoch, at.offset, document)
        last = at.offset + 1 == len(shards.files)
        at = Position(at.epoch + last, 0 if last else at.offset + 1)
    raise Problem(f"no shard of {shards.folder} holds the documents of one step", "lower --data.step-tokens, or pack larger shards")


class Loader:
    """This rank's micro-batches of one step after the other. `position` is all its state: keep it to resume.

    rank, world: this rank's number and how many share a step. pin: page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(self, options: DataOptions, rank: int = 0, world: int = 1, pin: bool = False):
        self.micro, self.options, self.pin = check_options(options, world), options, pin
        self.shards, self.position = Shards(options.path, "train"), Position()
        share = options.grad_shards // world
        self.mine = range(rank * share, (rank + 1) * share)

    def next(self) -> list[Batch]:
        """The next step's micro-batches for this rank."""
        make = self.next_stream if self.options.mode == "stream" else self.next_documents
        return [Batch(*(t.pin_memory() if self.pin and t is not None else t for t in batch)) for batch in make()]

    def next_stream(self) -> list[Batch]:
        start, self.position = next_slice(self.shards.total, self.options, self.position)
        own = self.shards.read(start + self.mine[0] * self.micro, len(self.mine) * self.micro + 1)
        return [rows(own[i * self.micro : (i + 1) * self.micro + 1], self.options.seq_len) for i in range(len(self.mine))]

    def next_documents(self) -> list[Batch]:
        plan, number, self.position = plan_step(self.shards, self.options, self.position, self.micro)
        tokens = self.shards.shard(number)
        return [document_batch(tokens, plan[i]) for i in self.mine]


def validation_batches(shards: Shards, options: DataOptions, tokens: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This rank's share of the first `tokens` validation tokens, as micro-batches like those of training."""
    micro = check_options(options, world)
    count = min(tokens, shards.total - 1) // micro
    if count == 0:
        what = f"validation reads micro-batches of {micro:,} tokens; {min(tokens, shards.total - 1):,} are asked for or there"
        raise Problem(what, "raise --val-tokens, or lower --data.step-tokens")
    for number in range(rank, count, world):
        own = shards.read(number * micro, micro + 1)
        yield rows(own, options.seq_len if options.mode == "stream" else micro)
