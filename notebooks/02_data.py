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
# # The data: tokens, shards, documents
#
# ```{admonition} Cost box
# Any machine: about fifteen seconds, and nothing for a GPU to do; 40 MB of disk for the text that the CPU runs train on, made from two Python packages. A network on the first run, for
# GPT-2's vocabulary and perhaps a few megabytes of wheel. Ideas of records 12, 26, 29 and 33 (\@KoszarskyB, \@classiclarryd, \@varunneal); the shard format is that of llm.c, by Andrej Karpathy and its contributors {cite}`llmc`.
# ```
#
# ## The problem
#
# Training data looks like a solved problem: a long stream of integers, read from the left. That is how llm.c reads it and how the contest began. The stream is a
# concatenation of documents, though, and a batch cut from it every 1,024 tokens knows nothing of where they begin. The model sees the second half of a recipe, is asked
# to continue it, and has no way to find out that it is a recipe.
#
# Record 12 let each GPU read one sequence of 64 thousand tokens instead, masked attention at the borders of documents and limited it to 1,024 tokens back. Together these changes made **1,875 steps of 3,000**; one record cannot say which of them did how much. With them only one document per GPU and step was cut off from its beginning. Record 26 moved that cut to where a document begins, lengthened the cooldown, and
# took **20 of 1,770 steps** off. Record 29 clipped documents at 2,048 tokens, among other things, and 25 more went. How much of these gains came from nothing but another way to read the same text, neither record says. (Outside the contest, Ding and others report better models when fewer documents are cut {cite}`ding2024`.)

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %% [markdown]
# ```{admonition} Prediction
# The documents of FineWeb {cite}`penedo2024` are on average 690 GPT-2 tokens long, with a median of 403, as the pull request of record 78 says (\@ChrisJMcCormick). Cut the stream blindly into rows of 1,024. **What share of all tokens stands
# in a document whose beginning is in another row?** (A document of 400 tokens is whole more often than not, one of 3,000 never. Which kind holds most of the tokens?)
# ```
#
# First there have to be tokens.
#
# ## Text becomes numbers
#
# A model reads and writes integers, each the number of a piece of text in a *vocabulary*. This book knows two. (Their names stand with the format of the files, [in the workshop](94_sources.py), since whoever reads tokens has to know of which vocabulary they are.)


# %%
#| default_exp data.tokenizer
#| export
from speedrun.data.shards import TOKENIZERS

# %%
assert TOKENIZERS == ("bytes", "gpt2")
print("vocabularies:", ", ".join(TOKENIZERS))

# %% [markdown]
# The contest uses GPT-2's vocabulary: 50,257 byte sequences, found by merging frequent pairs. On two CPU cores a vocabulary of that size is a burden, since nearly all the arithmetic of a small
# model would go into its output layer. So the small runs in this book read **bytes**, with one concession. Their text is Python source, and Python source is indented.
# A run of $n$ spaces, $2 \le n \le 32$, becomes one token. That makes $256 + 31$ tokens, and one more that opens a new document: 288. The encoder below finds the edges of each run of spaces, keeps the first of every 32, and gives it
# the token that says how long its run is.

# %%
#| export
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from speedrun.lab.errors import UserError

SPACE, LONGEST_RUN = 32, 32
FIRST_RUN = 256  # two spaces; 286 is thirty-two
BYTE_DOCUMENT = 287
RUNS = [b" " * n for n in range(2, LONGEST_RUN + 1)]
PIECES = [bytes([byte]) for byte in range(256)] + RUNS + [b""]


# %%
#| export
def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens, (tokens,) uint16: a byte is its value, a run of 2 to 32 spaces one token of its own."""
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    space = tokens == SPACE
    edges = np.diff(space.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    where, run = np.flatnonzero(space), np.repeat(np.arange(len(starts)), stops - starts)
    first = (where - starts[run]) % LONGEST_RUN == 0  # opens a token; runs beyond 32 need several
    length = np.minimum(stops[run] - where, LONGEST_RUN)[first]
    tokens[where[first]] = np.where(length == 1, SPACE, FIRST_RUN - 2 + length)
    keep = np.ones(len(tokens), dtype=bool)
    keep[where[~first]] = False
    return tokens[keep]


def decode_bytes(tokens) -> bytes:
    """The inverse of `encode_bytes`; document tokens vanish."""
    return b"".join(PIECES[token] for token in tokens)


# %% [markdown]
# A tokenizer that loses anything is not a tokenizer. The claim is $\mathrm{decode}(\mathrm{encode}(x)) = x$ for *all* bytes, so random ones are a better test than nice
# ones, especially random ones with many spaces:

# %%
generator = np.random.default_rng(0)
alphabet = np.array([32, 32, 32, 10, 65, 200], dtype=np.uint8)
for length in range(300):
    noise = generator.choice(alphabet, length).tobytes() + b" " * int(generator.integers(100))
    assert decode_bytes(encode_bytes(noise)) == noise
line = b"        return x\n"
assert list(encode_bytes(line)[:2]) == [FIRST_RUN + 6, ord("r")]
assert len(encode_bytes(line)) == len(line) - 7 and max(encode_bytes(b" " * 1000)) < BYTE_DOCUMENT
print(f"{len(line)} bytes → {len(encode_bytes(line))} tokens: {encode_bytes(line).tolist()}")

# %% [markdown]
# Two tokenizers, one interface. GPT-2's comes from OpenAI's `tiktoken`, which fetches the vocabulary once and keeps it.


# %%
#| export
@dataclass(frozen=True)
class Tokenizer:
    """`encode`: str → uint16 (tokens,); `decode`: back; `piece`: one token's bytes; `document`: opens a document."""

    name: str
    vocab_size: int
    document: int
    encode: Callable[[str], np.ndarray]
    decode: Callable
    piece: Callable[[int], bytes]


def byte_tokenizer() -> Tokenizer:
    """Bytes and runs of spaces: 288 tokens."""

    def decode(tokens) -> str:
        return decode_bytes(tokens).decode(errors="replace")

    def encode(text: str) -> np.ndarray:
        return encode_bytes(text.encode())

    return Tokenizer("bytes", BYTE_DOCUMENT + 1, BYTE_DOCUMENT, encode, decode, PIECES.__getitem__)


# %%
#| export
GPT2_DOCUMENT = 50256


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 tokens, of which the last opens a document. Needs its vocabulary, once."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fix = "run this once with a network; or set TIKTOKEN_CACHE_DIR to a folder with tiktoken's files"
        raise UserError(f"the GPT-2 vocabulary could not be loaded: {error}", fix) from None

    def encode(text: str) -> np.ndarray:
        return np.array(bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(tokens) -> str:
        return bpe.decode([int(token) for token in tokens if token != GPT2_DOCUMENT])

    def piece(token: int) -> bytes:
        return b"" if token == GPT2_DOCUMENT else bpe.decode_single_token_bytes(token)

    return Tokenizer("gpt2", bpe.n_vocab, GPT2_DOCUMENT, encode, decode, piece)


# %%
#| export
MAKERS = dict(zip(TOKENIZERS, (byte_tokenizer, gpt2_tokenizer)))


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a manifest names."""
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokenizer “{name}”", f"known are {', '.join(TOKENIZERS)}")
    return MAKERS[name]()


# %%
sample = "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n"
for tokenizer in (get_tokenizer("bytes"), get_tokenizer("gpt2")):
    tokens = tokenizer.encode(sample)
    assert tokenizer.decode(tokens) == sample
    assert b"".join(tokenizer.piece(token) for token in tokens.tolist()) == sample.encode()
    assert tokenizer.document == tokenizer.vocab_size - 1 and tokens.max() < tokenizer.document
    print(
        f"{tokenizer.name:5}: {len(sample)} bytes → {len(tokens)} tokens of {tokenizer.vocab_size:,}"
    )

# %% [markdown]
# A loss in nats *per token* therefore means different things in the two. Whenever runs with different vocabularies meet, the book divides by bytes: nats per byte are the mean loss of a token,
# divided by the bytes of text that a validation token stands for on average.
#
# ## A shard, and the text in it
#
# Tokens are kept in *shards*, in llm.c's format, which is as plain as a format can be. A header of 256 32-bit integers, of which three mean something (a magic number, a version, the number of tokens), then the tokens as
# 16-bit integers. Our shards of bytes and of GPT-2 tokens have the same magic number, so a *manifest* lies beside the shards and says which vocabulary they index: tokenizer, vocabulary size, document token, and for each file its tokens, its bytes of text and its SHA-256.
#
# The contest's text is FineWeb, tokenised, on the Hugging Face hub: 103 shards of 200 MB. That is a large download for a first try. So the small runs of this book, and this page, read a text that every machine can make for itself, equal to the last bit: the Python source of two packages, SymPy and NetworkX, which PyTorch depends on. They are
# documented well and at length. A twentieth of the files, chosen by a hash of their names, validates. Files are cut at ends of lines into documents of at most 1,024 tokens, and these are shuffled. How all that is done, for FineWeb and for text of your own as well, is [a page of the workshop](94_sources.py). It also builds the functions by which shards and manifests are read, and which refuse whatever is damaged or is not what the manifest says:

# %%
#| export data.loader
from speedrun.data.shards import data_folder, load_manifest, read_shard

# %%
from speedrun.data.sources import build_embedded
from speedrun.lab.provenance import root

folder = root() / "data" / "embedded"
if not (folder / "manifest.json").exists():
    build_embedded(folder, root() / "data" / "wheels")
embedded = load_manifest(folder)
train, val = embedded.split("train")[0], embedded.split("val")[0]
stream = read_shard(folder / train.name, embedded.vocab_size, train)
header = np.fromfile(folder / train.name, dtype="<i4", count=256)
assert header[:3].tolist() == [20240520, 1, train.tokens] and not header[3:].any()
assert (np.fromfile(folder / train.name, dtype="<u2", offset=1024) == stream).all()
assert (embedded.tokenizer, embedded.vocab_size, embedded.document) == ("bytes", 288, BYTE_DOCUMENT)
assert 0.03 < val.tokens / (train.tokens + val.tokens) < 0.07
opens = np.flatnonzero(stream == BYTE_DOCUMENT)
first = stream[: opens[1]]
assert opens[0] == 0 and len(first) <= 1024 and decode_bytes(first).endswith(b"\n")
print(
    f"{train.tokens / 1e6:.2f}M training and {val.tokens / 1e6:.2f}M validation tokens of “{embedded.tokenizer}”"
)
print(
    f"{val.bytes / val.tokens:.3f} bytes a token: 2 nats a token are {2 * val.tokens / val.bytes:.3f} nats a byte"
)
print(
    f"the first of {len(opens):,} documents: token {first[0]}, then {len(first) - 1} tokens, which begin:\n"
)
print(decode_bytes(first)[:300].decode())

# %% [markdown]
# This one begins in the middle of a file, as do all but the first piece of every long file. So the fault that this chapter is about is in our own text, too: no piece but the first sees the file's beginning. For a small model we accept that.
#
# ## The measurement
#
# Now the prediction can be met. For a row length $T$, a token is **beheaded** if its document began before its row did. Count them for every $T$, by cutting the real stream:

# %%
lengths = np.diff(np.append(opens, len(stream)))
began = np.repeat(opens, lengths)  # for each token, where its document began


def beheaded(seq_len: int) -> float:
    """Share of the tokens whose document began in an earlier row."""
    return float((began < np.arange(len(stream)) // seq_len * seq_len).mean())


row_lengths = [64, 128, 256, 512, 1024, 2048, 4096]
lost = {seq_len: beheaded(seq_len) for seq_len in row_lengths}
assert list(lost.values()) == sorted(lost.values(), reverse=True) and 0.45 < lost[1024] < 0.5
print(
    f"mean document {lengths.mean():.0f} tokens; beheaded: {lost[1024]:.0%} at T = 1024, {lost[128]:.0%} at T = 128"
)

# %% [markdown]
# Nearly half. But these documents are of our own cutting, and nearly all of them are about as long as a row. What of FineWeb's, with their long tail? The share has a formula. A document of length $L$ that begins anywhere in a row of $T$ leaves, on average, $L^2/2T$ of its tokens beheaded if it is shorter than the row, and $L - T/2$ if it is longer. Check the formula where it can be
# checked, then use it where we have only a mean and a median, and have to assume a form. A log-normal is a usual one for lengths of texts:


# %%
def expected(lengths: np.ndarray, T: int) -> float:
    """Share of beheaded tokens if documents of these lengths begin anywhere in rows of T."""
    return float(
        np.where(lengths <= T, lengths**2 / (2 * T), lengths - T / 2).sum() / lengths.sum()
    )


spread = np.sqrt(2 * np.log(690 / 403))  # the log-normal with FineWeb's mean and median
fineweb = np.exp(np.random.default_rng(0).normal(np.log(403), spread, 1_000_000))
assert abs(expected(lengths, 1024) - lost[1024]) < 0.005
assert abs(fineweb.mean() - 690) < 7 and abs(np.median(fineweb) - 403) < 4
print(f"the formula here: {expected(lengths, 1024):.1%}, counted {lost[1024]:.1%}")
print(f"FineWeb, if its lengths are log-normal: {expected(fineweb, 1024):.0%} at T = 1024")

# %% [markdown]
# Half of FineWeb's documents are shorter than 403 tokens. If their lengths are log-normal, more than half of its *tokens* have lost their beginning all the same, because the few long documents hold most of the text. But that is llm.c's row. Before record 26 each of the eight GPUs read one row of 49,152 tokens. What was left to repair, and what did the repair bring?

# %%
from speedrun.lab.results import public_table

history = {row["record"]: row for row in public_table("records")}
STEPS = {number: int(history[number]["steps"]) for number in ("11", "12", "25", "26", "28", "29")}
long_row = int(history["25"]["tokens_per_step_end"]) // 8
saved = 1 - STEPS["26"] / STEPS["25"]
assert (STEPS["11"], STEPS["12"]) == (3000, 1875) and STEPS["28"] - STEPS["29"] == 25
assert (STEPS["25"], STEPS["25"] - STEPS["26"], long_row) == (1770, 20, 49_152)
assert expected(fineweb, 1024) > 0.5 and 0.02 < expected(fineweb, long_row) < 0.022
assert 0.01 < saved < 0.012
print(f"beheaded at T = {long_row:,}: {expected(fineweb, long_row):.1%}")
print(f"record 26, where no row begins in the middle: {saved:.1%} fewer steps")

# %% [markdown]
# By the log-normal, long rows alone leave two tokens of a hundred without their beginning; record 26 repaired that and needed one step of a hundred less. (It lengthened the cooldown as well, so not all of that need be the data's.)
#
# ## The loader: stream mode
#
# A training step consumes `batch_tokens` tokens, and must consume the *same* ones however many GPUs share the work. If two GPUs saw another stream than eight, no experiment made on two
# would say anything about eight. So a step is cut into `micro_batches` equal **micro-batches**, eight for the contest, and a machine with $w$ *ranks*, processes with a GPU each, gives each of them $8/w$. What depends on the number
# of ranks is who computes a micro-batch, never, in training, what is in it.

# %%
#| default_exp data.loader
#| export
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


# %%
#| export
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


# %%
assert check_options(DataConfig()) == 65_536 and check_options(DataConfig(), world=4) == 65_536
for bad, world in (
    (DataConfig(), 3),
    (DataConfig(batch_tokens=500_000), 1),
    (DataConfig(seq_len=100), 1),
):
    try:
        check_options(bad, world)
        raise AssertionError("accepted")
    except UserError as problem:
        assert "data." in problem.what and problem.fix
        print(problem)

# %% [markdown]
# A split may be a hundred files of 200 MB. We want to see one long stream of tokens, hold at most a few of the files in memory, and never wait for the disk in the middle of a step. So while one shard is
# being read from, a thread loads the next. The upstream trainer measured that wait at a second and a half per run, and removed it in record 33.


# %%
#| export
def read_row(shards: "Shards", start: int, count: int) -> np.ndarray:
    """Tokens start … start + count of the stream, (count,) uint16, across shard borders."""
    parts, number = [], int(np.searchsorted(shards.ends, start, side="right"))
    while count:
        begin = start - (int(shards.ends[number - 1]) if number else 0)
        parts.append(shards.shard(number)[0][begin : begin + count])
        start, count, number = start + len(parts[-1]), count - len(parts[-1]), number + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# %%
#| export
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


# %%
import shutil
import tempfile

from speedrun.data.sources import write_corpus

scratch = Path(tempfile.mkdtemp())
letters = np.random.default_rng(0)
lines = [(letters.integers(97, 123, 40 + i).astype(np.uint16), 40 + i) for i in range(30)]
write_corpus(scratch / "tiny", {"train": lines, "val": lines[:3]}, byte_tokenizer(), "A", "…", 500)
shards = Shards(scratch / "tiny", "train")
whole = np.concatenate([read_shard(scratch / "tiny" / file.name, 288) for file in shards.files])
assert shards.total == len(whole) and (shards.read(0, shards.total) == whole).all()
for start in range(0, shards.total - 900, 37):
    assert (shards.read(start, 900) == whole[start : start + 900]).all(), (
        "a read may cross two borders"
    )
assert len(shards.held) <= 3
print(f"{len(shards.files)} shards, {shards.total:,} tokens, {len(shards.held)} shards in memory")

# %% [markdown]
# In stream mode a step is then a slice: `batch_tokens` tokens and one more, for the last target. Where the stream ends, another **epoch** begins at its start, and says so; the upstream
# loader runs out of files there and stops with an error. The position in the data is three numbers, and they are all that a checkpoint has to keep.


# %%
#| export
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


# %%
#| export
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


# %%
options = DataConfig(str(scratch / "tiny"), seq_len=16, batch_tokens=16 * 4 * 2, micro_batches=4)
at, starts = Position(), []
while at.epoch < 2:
    start, at = next_slice(shards.total, options, at)
    starts.append(start)
per_epoch = (shards.total - 1) // options.batch_tokens
assert starts[: per_epoch + 1] == [step * options.batch_tokens for step in range(per_epoch)] + [0]
batch = rows([shards.read(0, 33)], 16)
assert batch.inputs.shape == (2, 16) and (batch.inputs[:, 1:] == batch.targets[:, :-1]).all()
assert batch.targets[0, -1] == batch.inputs[1, 0], (
    "the last target of a row is the first input of the next"
)
print(f"{per_epoch} steps an epoch, then from the start again")

# %% [markdown]
# ## Reading by documents
#
# The other mode fills a micro-batch with documents, each from its beginning, one after the other in the order of the corpus. A document longer than `max_doc_tokens` is clipped and its rest
# skipped; the last one is clipped where the micro-batch is full. The batch is one long row, and `cu_seqlens`, the cumulative lengths, tell attention ([chapter 11](11_attention_backends.py)) where documents begin, so
# that no token looks across a border. It has room for a fixed number of documents, since a tensor of another length would be another program to compile; slots that are not used lie at the end and are empty.
#
# Between the two modes there is a third, *packed*, which was the contest's from record 12 to record 25: a micro-batch is one long row, cut from the stream wherever it falls, with the borders of the documents in it. Nothing is skipped, and only the first document of a row begins in its middle. (Records 26 to 28 let each GPU's row begin with a document and clipped nothing; no mode here is exactly theirs.)


# %%
#| export
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


# %%
heads = np.flatnonzero(whole == BYTE_DOCUMENT)
ends = np.append(heads[1:], len(whole))
slices, after = fill(heads, ends, first=3, need=141, longest=40)
batch = packed_row([np.concatenate([whole[a:b] for a, b in slices])], BYTE_DOCUMENT)
borders = batch.cu_seqlens.unique().tolist()
assert len(batch.cu_seqlens) == slots_for(140) + 1 and batch.longest == max(np.diff(borders))
assert (
    batch.inputs.shape == (1, 140)
    and borders[0] == 0
    and borders[-1] == 140
    and after == 3 + len(slices)
)
assert (batch.inputs[0, borders[:-1]] == BYTE_DOCUMENT).all(), (
    "every document begins at its beginning"
)
assert max(np.diff(borders)) <= 40 and fill(heads, ends, len(heads) - 1, 10_000, 40) is None
print(f"{len(borders) - 1} documents in 140 tokens, borders {borders}")

# %% [markdown]
# The next micro-batch goes on with the next document. So where a rank's part begins depends on how many documents all the others consumed. Each rank therefore plans the *whole* step, from an index of the documents that the loading thread made, and reads only its own part. A step stays inside one
# shard; the documents at its end that do not fill a step are left out. Our writer never splits a document between shards. FineWeb's does, and the piece before a shard's first document token is skipped.


# %%
#| export
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


# %%
options = DataConfig(
    str(scratch / "tiny"), "documents", batch_tokens=96, micro_batches=2, max_doc_tokens=30
)
plan, number, at = plan_documents(shards, options, Position())
assert number == 0 and at.document == sum(len(slices) for slices in plan)
assert [sum(b - a for a, b in slices) for slices in plan] == [49, 49]
print(f"two micro-batches of 48 tokens: {plan}")

# %% [markdown]
# The loader itself is thin: it holds the position and hands each rank its part. Eight micro-batches are right for eight GPUs, and may be too small for one: if a pass of the model takes less time than Python needs to start its kernels, the GPU waits. So a rank may read several of its micro-batches as one larger batch (`max_forward_tokens`). The step remains the same mean over the same tokens.
#
# A schedule may want more tokens in later steps, or longer pieces of documents ([chapter 14](14_schedule.py)). Then `next` is told so. There are as many micro-batches as before, each larger, and the stream goes on where it was.


# %%
#| export
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


# %%
#| export
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


# %% [markdown]
# Now the promise can be kept: one stream, whoever reads it. For all modes, the steps that 1, 2, 4 and 8 ranks read are concatenated and compared, through an epoch's end and a batch that doubles:


# %%
def read_by(world: int, options: DataConfig, steps: int) -> tuple[torch.Tensor, Loader]:
    """All that `world` ranks read in some steps (inputs, targets, borders), and the first rank's loader. Batches double half-way."""
    loaders = [Loader(options, rank, world) for rank in range(world)]
    tokens = [options.batch_tokens * (1 + (2 * n >= steps)) for n in range(steps)]
    batches = [batch for size in tokens for loader in loaders for batch in loader.next(size)]
    return torch.cat([t.flatten() for batch in batches for t in batch if t is not None]), loaders[0]


sizes = letters.integers(5, 60, 200).tolist()
many = [(letters.integers(97, 123, n).astype(np.uint16), n) for n in sizes]
write_corpus(scratch / "many", {"train": many, "val": many}, byte_tokenizer(), "letters", "…", 2500)
for mode in ("stream", "packed", "documents"):
    options = DataConfig(
        str(scratch / "many"), mode, seq_len=8, batch_tokens=512, max_doc_tokens=30
    )
    (alone, loader), *shared = (read_by(world, options, 40) for world in (1, 2, 4, 8))
    assert all(torch.equal(alone, stream) for stream, _ in shared) and loader.position.epoch >= 1
    resumed = Loader(options)
    resumed.position = loader.position
    first, again = loader.next(), resumed.next()
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again)), "position is all"
    assert len({tuple(batch.inputs.flatten().tolist()) for batch in first}) == 8, "all different"
    apart, larger = (Loader(replace(options, max_forward_tokens=n)).next() for n in (0, 128))
    whole = [
        [torch.cat([b[n].flatten() for b in each]) for n in (0, 1)] for each in (apart, larger)
    ]
    assert len(larger) == 4 and all(map(torch.equal, *whole)), "joined: the same tokens"
    print(f"{mode}: 40 steps, {loader.position.epoch + 1} epochs, the same on 1, 2, 4 and 8 ranks")
joined = Loader(
    DataConfig(str(scratch / "many"), seq_len=8, batch_tokens=512, max_forward_tokens=300)
)
assert [len(batch.inputs) for batch in joined.next()] == [32, 32], "two passes of 256 tokens"
assert [len(batch.inputs) for batch in joined.next(1024)] == [
    32
] * 4 and joined.position.offset == 1536

# %% [markdown]
# Validation reads the plain stream in all modes, a fixed number of tokens from the start, micro-batch $j$ on rank $j \bmod w$. Where training reads packed rows, a micro-batch is one long row, of up to 262,144 tokens as in the contest, and documents are whole in it, but for those that its two ends cut:


# %%
#| export
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


# %%
held_out = Shards(folder, "val")
options = DataConfig(seq_len=256, batch_tokens=16_384, micro_batches=4)
alone = [batch.inputs.sum().item() for batch in validation_batches(held_out, options, 50_000)]
shared = [
    batch.inputs.sum().item()
    for rank in range(2)
    for batch in validation_batches(held_out, options, 50_000, rank, 2)
]
assert len(alone) == 50_000 // 4096 and sorted(alone) == sorted(shared)
print(f"{len(alone)} micro-batches of 4,096 tokens, each on one rank")

# %% [markdown]
# ## Rows cut from the stream, and rows of documents

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: share of tokens whose document began in an earlier row, against row length. Right: six rows of a naive and of an aligned batch, coloured by document."}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), width_ratios=[1, 1.3])
left.semilogx(row_lengths, [100 * lost[seq_len] for seq_len in row_lengths], "o-", base=2)
left.set_xticks(row_lengths, [str(seq_len) for seq_len in row_lengths])
left.set_ylim(0, 100)
left.set_xlabel("row length T (tokens)")
left.set_ylabel("share of tokens (%)")
left.set_title(f"tokens whose document began in an\nearlier row: {lost[1024]:.0%} at T = 1024")
T, colors = 1024, plt.get_cmap("Set2").colors[:7]  # the eighth is grey
picked = np.random.default_rng(0).integers(0, len(stream) // T, 6) * T


def pieces_of_row(start: int) -> list[tuple[int, int]]:
    """A blind row as pieces: (where the piece's document begins, length of the piece)."""
    inside = opens[(opens > start) & (opens < start + T)].tolist()
    edges = [start, *inside, start + T]
    return [(int(began[a]), b - a) for a, b in zip(edges, edges[1:])]


blind = [[(at, n, at >= start) for at, n in pieces_of_row(start)] for start in picked]
aligned = []
for start in picked:
    cuts, _ = fill(opens, opens + lengths, int(np.searchsorted(opens, start)), T, 1024)
    aligned.append([(a, b - a, True) for a, b in cuts])
assert all(whole_head for row in aligned for *_, whole_head in row)
for group, (name, picture) in enumerate((("stream", blind), ("documents", aligned))):
    for y, row in enumerate(picture):
        x = 0
        for at, length, has_head in row:
            color = colors[int(np.searchsorted(opens, at)) % 7] if has_head else "0.85"
            right.barh(
                -y - group * 7.5, length, left=x, height=0.8, color=color, edgecolor="white", lw=0.8
            )
            x += length
    right.text(0, 0.75 - group * 7.5, name, fontsize=9)
right.set_yticks([])
right.set_ylim(-13.2, 1.9)
right.grid(False)
right.set_xlabel("position in the row")
right.set_title("six rows of 1,024: cut from the\nstream, and filled by documents")
plt.show()

# %% [markdown]
# *The embedded text: Python source of SymPy and NetworkX, documents cut at 1,024 tokens. Six rows drawn at random; grey is the rest of a document that began in an earlier row, and a change of colour is a change of document (the seven colours repeat).*
#
# ## What it costs, and when it fails
#
# Reading by documents skips text. What a clipped document had left is never seen, unless the settings change, and the last document of each micro-batch is clipped where the micro-batch is full:


# %%
def skipped(longest: int, need: int = 16_384) -> float:
    """Share of the tokens passed over while filling micro-batches of `need` tokens."""
    first, used = 0, 0
    while (filled := fill(opens, opens + lengths, first, need, longest)) is not None:
        first, used = filled[1], used + need
    return 1 - used / opens[first]


few, many = skipped(1024), skipped(512)
clipped = {most: np.maximum(fineweb - most, 0).sum() / fineweb.sum() for most in (896, 2048)}
share_read = float(history["89"]["merged_total_tokens"]) / 10.3e9  # 103 shards
assert few < 0.05 and 0.4 < many < 0.55 and lengths.max() <= 1024
assert 0.3 < clipped[896] < 0.35 and 0.1 < clipped[2048] < 0.15 and 30 < 1 / share_read < 31
print(f"cutting where a micro-batch is full passes over {few:.1%} of this text;")
print(f"clipping documents at 512 tokens as well, over {many:.1%}")
for most, share in clipped.items():
    print(f"clipped at {most:,}, FineWeb would lose {share:.0%} if its lengths are log-normal")

# %% [markdown]
# Record 89 clips at 896 tokens in its first third and at 2,048 afterwards. It reads a thirtieth of the ten billion tokens that the contest's files hold, and can afford that; on a corpus that is read more than once, skipped text is fresh text given up for repeated text. And an aligned batch is only half of the idea. Without the borders in `cu_seqlens`, a token would still look into the tail of somebody else's document. That needs a mask, and masks are [chapter 09](09_flex_attention.py)'s. GPT-2's presets read the
# plain stream, as llm.c does; `record` reads documents.
#
# ## Exercises
#
# 1. The contest's validation loss is a mean over tokens, but is every token equally hard? Write `position_in_document(tokens, document)`: for each token, how many tokens of its document come before it. (With it you can plot loss against
#    position, once you have a model.)


# %% tags=["solution"]
def position_in_document(tokens: np.ndarray, document: int) -> np.ndarray:
    """For each token the number of tokens since its document's opening one; before the first, since the start."""
    where = np.arange(len(tokens))
    return where - np.maximum.accumulate(np.where(tokens == document, where, 0))


# %%
for piece, right in (([9, 1, 2, 9, 9, 4], [0, 1, 2, 0, 0, 1]), ([1, 2, 9, 4], [0, 1, 0, 1])):
    got = np.asarray(position_in_document(np.array(piece), 9)).tolist()
    assert got == right, f"a 9 opens a document: positions in {piece} are {right}, not {got}"
positions = position_in_document(stream, BYTE_DOCUMENT)
assert positions.max() == lengths.max() - 1, (
    f"the longest document has {lengths.max()} tokens, so the largest position is one less, not {positions.max()}"
)
starts = (positions == 0).sum()
assert starts == len(opens), f"{len(opens)} documents begin, but {starts} tokens have position 0"
print(f"half of all tokens stand within the first {int(np.median(positions))} of their document")

# %% [markdown]
# 2. Somebody proposes to shuffle *rows* instead of documents: cut the stream into rows of $T$ once, then visit the rows in random order. Write `torn(opens, lengths, seq_len)`: the share of documents that end up in more than one
#    row. What happens to those under the proposal?


# %% tags=["solution"]
def torn(opens: np.ndarray, lengths: np.ndarray, seq_len: int) -> float:
    """Share of the documents that a cut into rows of `seq_len` tears apart."""
    return float((opens // seq_len != (opens + lengths - 1) // seq_len).mean())


# %%
for at, long, right in (
    ([0, 4], [4, 4], 0.0),
    ([0, 3], [3, 5], 0.5),
    ([2, 5], [3, 3], 0.5),
    ([0, 9], [9, 3], 0.5),
):
    got = torn(np.array(at), np.array(long), 4)
    assert got == right, (
        f"rows of 4, documents of {long} tokens that open at {at}: {right:.0%} are torn, not {got:.0%}"
    )
share = torn(opens, lengths, 1024)
assert 0.9 < share < 1, f"nearly all of our documents are torn at T = 1024, not {share:.0%}"
print(
    f"at T = 1024, {share:.0%} of the documents are torn, and their halves would be read at random times"
)

# %% tags=["remove-cell"]
shutil.rmtree(scratch)
