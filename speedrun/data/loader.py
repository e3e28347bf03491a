# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A shard, and the text in it
from speedrun.data.shards import data_folder, load_manifest, read_shard


# %% The loader: stream mode
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

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


def rows(pieces: Sequence[np.ndarray], seq_len: int) -> Batch:
    """Pieces of n · seq_len + 1 tokens each as a batch of rows: the targets are the inputs shifted by one."""
    tokens = torch.from_numpy(np.stack(pieces).astype(np.int64))
    inputs, targets = (part.flatten().view(-1, seq_len) for part in (tokens[:, :-1], tokens[:, 1:]))
    return Batch(inputs, targets)


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


def packed_row(pieces: Sequence[np.ndarray], document: int) -> Batch:
    """Pieces of n + 1 tokens each as one row of n inputs from each, in which each piece and each document token begins a document."""
    count = len(pieces[0]) - 1
    inputs, targets, *_ = rows(pieces, count)
    begins = inputs == document
    begins[:, 0] = True
    ends = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=inputs.numel()).int()
    room = len(pieces) * slots_for(count)
    if len(ends) - 1 > room:
        what = (
            f"a row of {inputs.numel()} tokens has {len(ends) - 1} documents, and room for {room}"
        )
        raise UserError(what, "--data.mode stream; or text whose documents have 64 tokens or more")
    cu_seqlens = F.pad(ends, (0, room + 1 - len(ends)), value=inputs.numel())
    return Batch(inputs.view(1, -1), targets.view(1, -1), cu_seqlens, ends.diff().max())


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
    return Batch._make(each if each is None else each.pin_memory() for each in batch)


def next_pieces(loader: "Loader", options: DataConfig) -> list[np.ndarray]:
    """The tokens of a rank's micro-batches in the next step, one more each than it has inputs. Moves the loader on."""
    if options.mode == "documents":
        plan, number, loader.position = plan_documents(loader.shards, options, loader.position)
        tokens, _ = loader.shards.shard(number)
        return [np.concatenate([tokens[a:b] for a, b in plan[i]]) for i in loader.mine]
    start, loader.position = next_slice(loader.shards.total, options, loader.position)
    micro = options.batch_tokens // options.micro_batches
    return [loader.shards.read(start + i * micro, micro + 1) for i in loader.mine]


def batch_of(pieces: Sequence[np.ndarray], options: DataConfig, document: int) -> Batch:
    """Micro-batches of n + 1 tokens each as one batch: rows of the stream, or one packed row."""
    if options.mode == "stream":
        return rows(pieces, options.seq_len)
    return packed_row(pieces, document)


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
        pieces, document = next_pieces(self, options), self.shards.manifest.document
        size = joined_micro_batches(options, len(pieces))
        groups = [pieces[n : n + size] for n in range(0, len(pieces), size)]
        batches = [batch_of(group, options, document) for group in groups]
        return [pinned(batch) if self.pin else batch for batch in batches]


VAL_ROW = 262_144  # tokens of a packed row in validation, at most


def validation_batches(
    shards: Shards, options: DataConfig, tokens: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of the first `tokens` validation tokens, as micro-batches like those of training."""
    micro, there = check_options(options, world), min(tokens, shards.total - 1)
    if options.mode != "stream":  # longer rows, of as many tokens on each rank
        micro = max(micro, min(VAL_ROW, 16 * micro, there // world))
    if there < micro:
        what = (
            f"validation reads micro-batches of {micro:,} tokens; {there:,} are asked for or there"
        )
        raise UserError(what, "raise --val-tokens, or lower --data.batch-tokens")
    for number in range(rank, there // micro, world):
        yield batch_of([shards.read(number * micro, micro + 1)], options, shards.manifest.document)
