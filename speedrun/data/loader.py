# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A shard, and the text in it
from speedrun.data.shards import data_folder, load_manifest, read_shard


# %% The loader: stream mode
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from speedrun.lab.bounds import NonNegativeInt, PositiveInt, check_ranges
from speedrun.lab.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """What a step reads. The vocabulary is not here: it stands in the data folder's manifest."""

    path: str = "data/embedded"
    """Data folder, with a manifest.json; relative to here or to the project."""
    mode: Literal["stream", "packed", "documents"] = "stream"
    """stream: rows cut from the stream wherever they fall. packed: long such rows, in which no document sees another. documents: whole documents, from their beginning."""
    seq_len: PositiveInt = 1024
    """stream: tokens a row. In the other modes a micro-batch is one row, and this is not used."""
    batch_tokens: PositiveInt = 524_288
    """The batch size: tokens a step, over all ranks."""
    micro_batches: PositiveInt = 8
    """Equal micro-batches a step; a multiple of the number of ranks. Gradient accumulation: each rank adds up micro_batches / ranks of them (grad_accum_steps elsewhere)."""
    max_doc_tokens: PositiveInt = 2048
    """Documents mode: the longest piece of a document that is used."""
    max_forward_tokens: NonNegativeInt = 0
    """A rank's micro-batches are joined up to this many tokens for a forward and backward pass (device_batch_size elsewhere); 0: never."""


def check_options(options: DataConfig, world: int = 1) -> int:
    """Tokens a micro-batch, after checking that everything divides."""
    check_ranges(options, "data.")
    count, tokens = options.micro_batches, options.batch_tokens
    if count % world:
        what = (
            f"{world} ranks cannot share {count} micro-batches a step evenly (data.micro_batches)"
        )
        fix = f"a divisor of {count} as the number of GPUs, or --data.micro-batches a multiple of {world}"
        raise UserError(what, fix)
    row = options.seq_len if options.mode == "stream" else 1
    if tokens % (count * row):
        what = f"data.batch_tokens={tokens} is no multiple of micro_batches × row = {count} × {row}"
        raise UserError(
            what, f"--data.batch-tokens {max(1, round(tokens / count / row)) * count * row}"
        )
    return tokens // count


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
            raise UserError(f"{self.folder}: the manifest lists no {split} shard", fix)
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
    """A micro-batch: inputs and targets, (rows, seq_len) int64; for packed documents their borders as well."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    """(slots + 1,) int32: where documents begin, and at the end, and in slots that are not used, the number of tokens."""
    longest: torch.Tensor | None = None
    """() int32: tokens of the longest document."""


def next_slice(total: int, options: DataConfig, at: Position) -> tuple[int, Position]:
    """Stream mode: where a step's tokens start, and the position after it; too short a rest begins a new epoch."""
    if options.batch_tokens + 1 > total:
        what = f"a step reads {options.batch_tokens + 1:,} tokens (data.batch_tokens), the training shards hold {total:,}"
        raise UserError(what, "add shards, or lower --data.batch-tokens")
    if at.offset + options.batch_tokens + 1 > total:
        at = Position(at.epoch + 1)
    return at.offset, Position(at.epoch, at.offset + options.batch_tokens)


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


def slots_for(tokens: int) -> int:
    """How many documents a row has room for: as many as would be 64 tokens long, and in short rows more."""
    return max(min(tokens, 256), tokens // 64)


def packed_batch(row: torch.Tensor, borders: np.ndarray) -> Batch:
    """A row of n + 1 tokens as n inputs and n targets. borders: where documents begin, from 0 on, in order."""
    count = len(row) - 1
    begins = np.unique(np.minimum(borders, count))
    ends = np.append(begins[begins < count], count)
    if len(ends) - 1 > slots_for(count):
        what = f"a row of {count} tokens has {len(ends) - 1} documents, and room for {slots_for(count)}"
        raise UserError(what, "--data.mode stream; or text whose documents have 64 tokens or more")
    cu_seqlens = np.full(slots_for(count) + 1, count, np.int32)
    cu_seqlens[: len(ends)] = ends
    longest = torch.tensor(int(np.diff(ends).max()), dtype=torch.int32)
    return Batch(row[None, :-1], row[None, 1:], torch.from_numpy(cu_seqlens), longest)


def packed_row(tokens: np.ndarray, document: int) -> Batch:
    """A piece of the stream, cut anywhere, as one row in which each document token begins a document."""
    begins = np.append(0, np.flatnonzero(tokens == document))
    return packed_batch(torch.from_numpy(tokens.astype(np.int64)), begins)


def document_batch(tokens: np.ndarray, slices: list[tuple[int, int]]) -> Batch:
    """A micro-batch of one row from slices of a shard: n + 1 tokens become n inputs and n targets."""
    row = torch.from_numpy(np.concatenate([tokens[a:b] for a, b in slices]).astype(np.int64))
    return packed_batch(row, np.cumsum([0] + [b - a for a, b in slices]))


def plan_documents(shards: Shards, options: DataConfig, at: Position) -> tuple[list, int, Position]:
    """Documents mode: slices for each micro-batch of the next step, the shard they are in, and the position after it."""
    need = options.batch_tokens // options.micro_batches + 1
    for _ in range(len(shards.files) + 1):
        tokens, starts = shards.shard(at.offset)
        stops, document, plan = np.append(starts[1:], len(tokens)), at.document, []
        while len(plan) < options.micro_batches:
            filled = fill(starts, stops, document, need, options.max_doc_tokens)
            if filled is None:
                break
            plan.append(filled[0])
            document = filled[1]
        if len(plan) == options.micro_batches:
            return plan, at.offset, Position(at.epoch, at.offset, document)
        last = at.offset + 1 == len(shards.files)
        at = Position(at.epoch + last, 0 if last else at.offset + 1)
    raise UserError(
        f"no shard of {shards.folder} holds the documents of one step", "lower --data.batch-tokens"
    )


def joined_micro_batches(options: DataConfig, share: int) -> int:
    """How many of a rank's `share` micro-batches make one batch: as many as fit max_forward_tokens, and divide them evenly."""
    micro = options.batch_tokens // options.micro_batches
    most = options.max_forward_tokens // micro
    return next(n for n in range(max(1, min(most, share)), 0, -1) if share % n == 0)


def pinned(batch: Batch) -> Batch:
    """A batch in page-locked memory, which a GPU can fetch while Python goes on."""
    borders = None if batch.cu_seqlens is None else batch.cu_seqlens.pin_memory()
    return Batch(batch.inputs.pin_memory(), batch.targets.pin_memory(), borders, batch.longest)


def next_stream(loader: "Loader", options: DataConfig) -> list[Batch]:
    """A rank's part of the next slice of the stream."""
    start, loader.position = next_slice(loader.shards.total, options, loader.position)
    micro, mine = options.batch_tokens // options.micro_batches, loader.mine
    own = loader.shards.read(start + mine[0] * micro, len(mine) * micro + 1)
    size = micro * joined_micro_batches(options, len(mine))
    cuts = range(0, len(mine) * micro, size)
    return [rows(own[at : at + size + 1], options.seq_len) for at in cuts]


def next_packed(loader: "Loader", options: DataConfig) -> list[Batch]:
    """A rank's part of the next slice of the stream, a row for each micro-batch."""
    start, loader.position = next_slice(loader.shards.total, options, loader.position)
    micro, document = options.batch_tokens // options.micro_batches, loader.shards.manifest.document
    pieces = [loader.shards.read(start + i * micro, micro + 1) for i in loader.mine]
    return join_batches([packed_row(piece, document) for piece in pieces], options)


def next_documents(loader: "Loader", options: DataConfig) -> list[Batch]:
    """A rank's part of the next documents."""
    plan, number, loader.position = plan_documents(loader.shards, options, loader.position)
    tokens, _ = loader.shards.shard(number)
    return join_batches([document_batch(tokens, plan[i]) for i in loader.mine], options)


def join_batches(batches: list[Batch], options: DataConfig) -> list[Batch]:
    """Micro-batches of one row each, as many joined as make a pass."""
    size = joined_micro_batches(options, len(batches))
    return [joined_rows(batches[at : at + size]) for at in range(0, len(batches), size)]


def joined_rows(batches: list[Batch]) -> Batch:
    """Packed rows as one. No document goes from one to the next."""
    if len(batches) == 1:
        return batches[0]
    inputs = torch.cat([batch.inputs for batch in batches], 1)
    targets = torch.cat([batch.targets for batch in batches], 1)
    count, ends, longest = batches[0].inputs.shape[1], [torch.zeros(1, dtype=torch.int32)], 0
    for number, batch in enumerate(batches):
        assert batch.cu_seqlens is not None and batch.longest is not None
        ends.append(batch.cu_seqlens[1:] + number * count)
        longest = max(longest, int(batch.longest))
    return Batch(inputs, targets, torch.cat(ends), torch.tensor(longest, dtype=torch.int32))


class Loader:
    """This rank's micro-batches, one step after the other. `position` is all its state: keep it to resume.

    rank, world: this rank's number, and how many share a step. pin: page-locked memory, for copies to a GPU.
    """

    def __init__(self, options: DataConfig, rank: int = 0, world: int = 1, pin: bool = False):
        check_options(options, world)
        self.options, self.pin = options, pin
        self.shards, self.position = Shards(options.path, "train"), Position()
        share = options.micro_batches // world
        self.mine = range(rank * share, (rank + 1) * share)

    def step_options(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> DataConfig:
        """The options of one step. 0: batch_tokens, and max_doc_tokens, as they are."""
        tokens = batch_tokens or self.options.batch_tokens
        longest = max_doc_tokens or self.options.max_doc_tokens
        return replace(self.options, batch_tokens=tokens, max_doc_tokens=longest)

    def check(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> None:
        """Raise UserError where the training shards hold no step of that size."""
        options = self.step_options(batch_tokens, max_doc_tokens)
        check_options(options)
        if options.mode == "documents":
            plan_documents(self.shards, options, Position())
        else:
            next_slice(self.shards.total, options, Position())

    def next(self, batch_tokens: int = 0, max_doc_tokens: int = 0) -> list[Batch]:
        """The next step's micro-batches for this rank, as many at a time as fit max_forward_tokens. 0: as in the options."""
        options = self.step_options(batch_tokens, max_doc_tokens)
        make = {"stream": next_stream, "packed": next_packed, "documents": next_documents}
        batches = make[options.mode](self, options)
        return [pinned(batch) if self.pin else batch for batch in batches]


VAL_ROW = 262_144  # tokens of a packed row in validation, at most


def validation_batches(
    shards: Shards, options: DataConfig, tokens: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of the first `tokens` validation tokens, as micro-batches like those of training."""
    micro, there = check_options(options, world), min(tokens, shards.total - 1)
    packed = options.mode != "stream"
    if packed:  # longer rows, of as many tokens on each rank
        micro = max(micro, min(VAL_ROW, 16 * micro, there // world))
    if there < micro:
        what = (
            f"validation reads micro-batches of {micro:,} tokens; {there:,} are asked for or there"
        )
        raise UserError(what, "raise --val-tokens, or lower --data.batch-tokens")
    for number in range(rank, there // micro, world):
        own, document = shards.read(number * micro, micro + 1), shards.manifest.document
        yield packed_row(own, document) if packed else rows(own, options.seq_len)
