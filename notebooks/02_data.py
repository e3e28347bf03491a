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
# # The data: tokens, shards, documents
#
# ```{admonition} Cost box
# Any machine: about ten seconds, no GPU; 40 MB of disk for the text that the CPU runs train on, which is built from two Python packages and needs no data set.
# Ideas of records 26 and 29 (classiclarryd, varunneal); the shard format is llm.c's (Andrej Karpathy).
# ```
#
# ## The problem
#
# Training data looks like a solved problem: a long row of integers, read from the left. That is how llm.c reads it and how the contest began. The row is a concatenation of
# documents, though, and a batch cut from it every 1,024 tokens knows nothing of where they begin. The model sees the second half of a recipe, is asked
# to continue it, and has no way to find out that it is a recipe.
#
# When record 26 let every GPU's batch begin at the beginning of a document, and changed nothing else about the model, training got **20 steps** shorter. When
# record 29 did so for *every* document, some 25 more went. Nobody had written a kernel. They had stopped throwing away the first lines.

# %% [markdown]
# ```{admonition} Prediction
# The documents of FineWeb are on average 690 GPT-2 tokens long, with a median of 403. Cut the row of tokens blindly into rows of 1,024. **What share of all tokens stands
# in a document whose beginning is in another row?** (A document of 400 tokens is usually whole. One of 3,000 almost never is. Which kind holds most of the tokens?)
# ```
#
# We shall come back to that with a figure. First there have to be tokens.
#
# ## Text becomes numbers
#
# The contest uses GPT-2's vocabulary: 50,257 byte sequences found by merging frequent pairs. On two CPU cores a vocabulary of that size is a burden: nearly all the arithmetic of a small
# model would go into its output layer. So the small runs in this book read **bytes**, with one concession. Their text is Python source, and one byte in six of Python source is indentation.
# A run of $n$ spaces, $2 \le n \le 32$, becomes one token. That makes $256 + 31$ tokens, and one more that announces a new document: 288.

# %%
#| default_exp data.tokenizer
#| export
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from speedrun.lab.hardware import Problem

SPACE, LONGEST_RUN = 32, 32
FIRST_RUN = 256  # two spaces; 286 is thirty-two
BYTE_DOCUMENT = 287


def encode_bytes(text: bytes) -> np.ndarray:
    """Bytes as tokens, (tokens,) uint16: a byte is its value, a run of 2 to 32 spaces is one token of its own."""
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    space = tokens == SPACE
    edges = np.diff(space.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    where, run = np.flatnonzero(space), np.repeat(np.arange(len(starts)), stops - starts)
    first = (where - starts[run]) % LONGEST_RUN == 0  # this space opens a token; runs beyond 32 need several
    length = np.minimum(stops[run] - where, LONGEST_RUN)[first]
    tokens[where[first]] = np.where(length == 1, SPACE, FIRST_RUN - 2 + length)
    keep = np.ones(len(tokens), dtype=bool)
    keep[where[~first]] = False
    return tokens[keep]


PIECES = [bytes([byte]) for byte in range(256)] + [b" " * n for n in range(2, LONGEST_RUN + 1)] + [b""]


def decode_bytes(tokens) -> bytes:
    """The inverse of `encode_bytes`; document tokens vanish."""
    return b"".join(PIECES[token] for token in tokens)


# %% [markdown]
# A tokenizer that loses anything is not a tokenizer. The claim is $\mathrm{decode}(\mathrm{encode}(x)) = x$ for *all* bytes, so random ones are a better test than nice
# ones, especially random ones with many spaces:

# %%
generator = np.random.default_rng(0)
for length in range(300):
    noise = generator.choice(np.array([32, 32, 32, 10, 65, 200], dtype=np.uint8), length).tobytes() + b" " * int(generator.integers(100))
    assert decode_bytes(encode_bytes(noise)) == noise
line = b"        return x\n"
assert list(encode_bytes(line)[:2]) == [FIRST_RUN + 6, ord("r")] and len(encode_bytes(line)) == len(line) - 7
assert max(encode_bytes(b" " * 1000)) < BYTE_DOCUMENT == 287
print(f"{len(line)} bytes → {len(encode_bytes(line))} tokens: {encode_bytes(line).tolist()}")

# %% [markdown]
# Two tokenizers, one interface. GPT-2's comes from OpenAI's `tiktoken`, which fetches the vocabulary once and keeps it.

# %%
#| export
@dataclass(frozen=True)
class Tokenizer:
    """`encode` maps str → uint16 (tokens,), `decode` back; `document` is the token that opens every document."""

    name: str
    vocab_size: int
    document: int
    encode: Callable[[str], np.ndarray]
    decode: Callable
    piece: Callable[[int], bytes]


def byte_tokenizer() -> Tokenizer:
    """Bytes and runs of spaces: 288 tokens."""
    return Tokenizer(
        "bytes",
        BYTE_DOCUMENT + 1,
        BYTE_DOCUMENT,
        lambda text: encode_bytes(text.encode()),
        lambda tokens: decode_bytes(tokens).decode(errors="replace"),
        PIECES.__getitem__,
    )


# %%
#| export
GPT2_DOCUMENT = 50256


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's byte-pair encoding: 50,257 tokens, of which the last opens a document. Needs its vocabulary, once."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        fix = "run this once with a network; or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's two GPT-2 files"
        raise Problem(f"the GPT-2 vocabulary could not be loaded: {error}", fix) from None
    return Tokenizer(
        "gpt2",
        bpe.n_vocab,
        GPT2_DOCUMENT,
        lambda text: np.array(bpe.encode_ordinary(text), dtype=np.uint16),
        lambda tokens: bpe.decode([int(token) for token in tokens if token != GPT2_DOCUMENT]),
        lambda token: b"" if token == GPT2_DOCUMENT else bpe.decode_single_token_bytes(token),
    )


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a manifest names."""
    makers = {"bytes": byte_tokenizer, "gpt2": gpt2_tokenizer}
    if name not in makers:
        raise Problem(f"there is no tokenizer “{name}”", f"known are {', '.join(makers)}")
    return makers[name]()


# %%
bytes_, gpt2 = get_tokenizer("bytes"), get_tokenizer("gpt2")
text = "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n"
for tokenizer in (bytes_, gpt2):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and b"".join(map(tokenizer.piece, tokens.tolist())) == text.encode()
    assert tokenizer.document == tokenizer.vocab_size - 1 and tokens.max() < tokenizer.document
    print(f"{tokenizer.name:5}: {len(text)} bytes → {len(tokens)} tokens of {tokenizer.vocab_size:,}")

# %% [markdown]
# A loss in nats *per token* therefore means different things in the two. Whenever runs with different vocabularies meet, the book divides by bytes: nats per byte, the sum over the validation text divided by
# its length.
#
# ## Shards
#
# The format is as plain as a format can be. A header of 256 32-bit integers, of which three mean something (a magic number, a version, the number of tokens), then the tokens as 16-bit integers. It needs no library, and a
# file can be mapped into memory as it is.
#
# Plain formats have one weakness: everything is a valid file until it is too late. A download that broke off, an HTML error page saved as `.bin`, shards of another vocabulary: each of them trains, for a while. So reading *checks*,
# and each complaint says which file, at which byte, what stood there, what should have, and the command that mends it.

# %%
#| export data.shards
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speedrun.lab.hardware import Problem
from speedrun.lab.results import note_opened, root

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens as an llm.c shard: 256 int32 of header, then uint16 tokens. The file appears whole or not at all."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    part = Path(path).with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, dtype="<u2").tobytes())
    os.replace(part, path)


def how_to_mend(path: Path) -> str:
    """What to do about a bad shard: the command that made its folder, if the manifest beside it says so."""
    try:
        command = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        command = "python -m speedrun.data --help (to fetch or pack it again)"
    return f"delete {path.name}, then: {command}"


# %%
#| export data.shards
def count_tokens(path: Path) -> int:
    """The number of tokens in a shard, after checking that it is one and that it is whole."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4")
    except FileNotFoundError:
        raise Problem(f"{path} is missing", how_to_mend(path)) from None
    except PermissionError:
        raise Problem(f"{path} may not be read by this user", f"chmod u+r {path}") from None
    if size < HEADER_BYTES:
        raise Problem(f"{path}, byte {size}: the file ends here, expected a header of {HEADER_BYTES} bytes", how_to_mend(path))
    for name, found, wanted, offset in (("magic number", header[0], MAGIC, 0), ("version", header[1], VERSION, 4)):
        if found != wanted:
            raise Problem(f"{path}, byte {offset}: {name} {found}, expected {wanted}: not a shard of tokens", how_to_mend(path))
    count, expected = int(header[2]), HEADER_BYTES + 2 * int(header[2])
    if count <= 0:
        raise Problem(f"{path}, byte 8: the header announces {count} tokens, expected at least 1", how_to_mend(path))
    if size != expected:
        raise Problem(f"{path}, byte {size}: the file ends here, expected at byte {expected} ({count:,} tokens)", how_to_mend(path))
    return count


def read_shard(path: str | Path, vocab_size: int) -> np.ndarray:
    """All tokens of a shard, (tokens,) uint16, each below `vocab_size`."""
    path = Path(path)
    tokens = np.fromfile(path, dtype="<u2", count=count_tokens(path), offset=HEADER_BYTES)
    note_opened(path)
    if int(tokens.max()) >= vocab_size:
        index = int(np.argmax(tokens >= vocab_size))
        where = f"{path}, byte {HEADER_BYTES + 2 * index}"
        raise Problem(f"{where}: token {tokens[index]}, expected below {vocab_size} (the vocabulary)", how_to_mend(path))
    return tokens


# %% [markdown]
# Damage does not have to be imagined. Make a good shard, then hurt it in the six ways that files get hurt:

# %%
import tempfile

scratch = Path(tempfile.mkdtemp())
write_shard(scratch / "good.bin", np.arange(1000) % 288)
assert (read_shard(scratch / "good.bin", 288) == np.arange(1000) % 288).all()
good = (scratch / "good.bin").read_bytes()
damage = {
    "truncated": good[:-7],
    "empty": b"",
    "foreign": b"<html>404 Not Found</html>".ljust(2000),
    "newer": good[:4] + (2).to_bytes(4, "little") + good[8:],
    "hollow": good[:8] + bytes(4) + good[12:1024],
    "other_vocabulary": good[:1024] + (50256).to_bytes(2, "little") + good[1026:],
}
for name, content in damage.items():
    (scratch / f"{name}.bin").write_bytes(content)
    try:
        read_shard(scratch / f"{name}.bin", 288)
        raise AssertionError(f"{name} was accepted")
    except Problem as problem:
        assert f"{name}.bin" in problem.what and "expected" in problem.what and problem.fix
        print(str(problem.what).replace(str(scratch), "data"))

# %% [markdown]
# ### A manifest beside the shards
#
# Nothing in a shard says which vocabulary its integers index. Upstream, the reader is supposed to know. Here a `manifest.json` beside the shards says it: tokenizer, vocabulary size, document token, where the text came from, and for
# each file its tokens, its bytes of text and its SHA-256. The loader and the model read these numbers there and nowhere else.

# %%
#| export data.shards
@dataclass(frozen=True)
class ShardFile:
    """One shard of a manifest. `bytes` is the length of the text that its tokens stand for, None if nobody counted."""

    name: str
    split: str
    tokens: int
    bytes: int | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; `command` is how it was made and can be made again."""

    tokenizer: str
    vocab_size: int
    document: int
    source: str
    command: str
    files: tuple[ShardFile, ...]

    def split(self, name: str) -> tuple[ShardFile, ...]:
        """The shards of one split, `train` or `val`, in reading order."""
        return tuple(file for file in self.files if file.split == name)

    @property
    def sha256(self) -> str:
        """One hash for the whole corpus: of the hashes of its files."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()


# %%
#| export data.shards
def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, in one step."""
    part = folder / f"manifest.{os.getpid()}.part"
    part.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "manifest.json")


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a data folder."""
    path = Path(folder) / "manifest.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(ShardFile(**file) for file in fields.pop("files"))
        manifest = Manifest(files=files, **fields)
    except FileNotFoundError:
        fix = f"python -m speedrun.data manifest {folder} --tokenizer gpt2 (if it holds shards), embedded, fineweb or pack (if not)"
        raise Problem(f"{folder} holds no manifest.json", fix) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Problem(f"{path} is not a manifest: {error}", f"delete it, then: python -m speedrun.data manifest {folder}") from None
    note_opened(path)
    return manifest


def data_folder(path: str) -> Path:
    """A data folder by its name: as given if it exists from here, else inside the project."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else root() / path


# %%
for name in damage:
    (scratch / f"{name}.bin").unlink()
entry = ShardFile("good.bin", "train", 1000, 1000, file_sha256(scratch / "good.bin"))
save_manifest(scratch, Manifest("bytes", 288, 287, "counting", "python -m speedrun.data pack", (entry,)))
assert load_manifest(scratch).split("train") == (entry,) and load_manifest(scratch).split("val") == ()
for content in ("", '{"files": []}', '{"files": 7}', "[]"):
    (scratch / "manifest.json").write_text(content)
    try:
        load_manifest(scratch)
        raise AssertionError(f"{content!r} was accepted")
    except Problem as problem:
        assert "is not a manifest" in problem.what
print("four broken manifests, four explanations")

# %% [markdown]
# ## Text for everyone
#
# The contest's text is FineWeb, tokenised, on the Hugging Face hub: 200 MB a shard, 103 shards. That is no download for somebody who wants to see a loss go down on a train. So the book carries its own corpus without carrying it: the Python source of two
# packages, SymPy and NetworkX, which PyTorch depends on and which are therefore on every machine that can train anything. They are documented well and at length. Their wheels are pure Python, so the
# bytes are equal everywhere, and we hold them to that by SHA-256.

# %%
#| default_exp data.sources
#| export
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from speedrun.lab.hardware import Problem

WHEELS = {  # package → version, SHA-256 of its wheel, SHA-256 of the text that we take from it
    "sympy": (
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
        "684bdf4d4895c8f647270e237853e30faeba4aa0a05ee9f00bfc97f6a84b0d77",
    ),
    "networkx": (
        "3.6",
        "cdb395b105806062473d3be36458d8f1459a4e4b98e236a66c3a48996e07684f",
        "995bc646f7fe9d300d04bfefb19c48df2796846c1493b951e3fc77debdd05076",
    ),
}
LEFT_OUT = {"tests", "benchmarks"}


def wanted(package: str, name: str) -> bool:
    """Is this file of the wheel part of the text: Python of the package itself, outside tests and benchmarks?"""
    parts = name.split("/")
    return parts[0] == package and name.endswith(".py") and not LEFT_OUT & set(parts[:-1])


def text_digest(texts: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(name.encode() + b"\0" + texts[name] + b"\0")
    return digest.hexdigest()


# %% [markdown]
# The installed copy serves where its text is the right one, byte by byte. Where it is not (another version is installed, somebody patched it) the pinned wheel is
# fetched, without installing it, and pip checks its hash:

# %% tags=["hide-input"]
#| export
def installed_text(package: str) -> dict[str, bytes]:
    """The non-empty wanted files of an installed package, name → content; empty if it is not installed."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {str(file).replace("\\", "/"): Path(file.locate()) for file in files}
    texts = {name: path.read_bytes() for name, path in found.items() if wanted(package, name) and path.is_file()}
    return {name: text for name, text in texts.items() if text}


def wheel_text(wheel: Path, package: str) -> dict[str, bytes]:
    """The same from a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name) for name in archive.namelist() if wanted(package, name)}
    return {name: text for name, text in texts.items() if text}


# %% tags=["hide-input"]
#| export
def fetch_wheel(package: str, folder: Path) -> Path:
    """The pinned wheel of a package in `folder`, downloaded with pip if it is not there; pip checks its hash."""
    version, sha256, _ = WHEELS[package]
    found = list(folder.glob(f"{package}-{version}-*.whl"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    needs = folder / f"{package}.txt"
    needs.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-r", str(needs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        fix = f"with a network: pip download --no-deps {package}=={version} -d {folder}"
        raise Problem(f"{package} {version} is not installed here and could not be fetched: {reason}", fix)
    return next(folder.glob(f"{package}-{version}-*.whl"))


def package_text(package: str, wheels: Path) -> dict[str, bytes]:
    """The pinned text of a package: from the installed copy if it is the right one, else from a wheel, fetched if need be."""
    version, _, digest = WHEELS[package]
    texts = installed_text(package)
    if text_digest(texts) != digest:
        texts = wheel_text(fetch_wheel(package, wheels), package)
    if text_digest(texts) != digest:
        raise Problem(f"the text of {package} {version} has SHA-256 {text_digest(texts)}, expected {digest}", f"empty {wheels}")
    return texts


# %%
wheels = root() / "data" / "wheels"
text = {package: package_text(package, wheels) for package in WHEELS}
files = {name: content for package in text.values() for name, content in package.items()}
size = sum(map(len, files.values()))
indent = sum(len(content) - len(encode_bytes(content)) for content in files.values()) / size
assert len(files) == 1107 and size == 20_133_053
print(f"{len(files):,} files, {size / 1e6:.1f} MB of documented Python; merging spaces shortens it by {indent:.0%}")
print(files["networkx/algorithms/euler.py"][:212].decode())

# %% [markdown]
# ### From files to documents
#
# Three decisions turn files into a corpus, and each is a place where experiments have gone wrong before.
#
# *Which files validate?* Whole files, chosen by a hash of their **name**, before anything is cut. Splitting pieces of one file between training and validation
# would let the model recite.
#
# *How long is a document?* At most 1,024 tokens, cut at the end of a line, so that a short context still sees whole thoughts.
#
# *In what order?* Shuffled, but by sorting on a hash, not by a random number generator: a hash gives the same order on every machine and in every version of NumPy.

# %%
#| export
DOCUMENT_TOKENS = 1024


def is_validation(name: str, share: float) -> bool:
    """Whether a file or text validates: its hash, read as a number in [0, 1), is below `share`."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < share


def cut(tokens: np.ndarray, newline: int, limit: int) -> list[np.ndarray]:
    """Pieces of at most `limit` tokens that end after a `newline` where one is in reach; together they are `tokens`."""
    ends, pieces, start = np.flatnonzero(tokens == newline) + 1, [], 0
    while start < len(tokens):
        stop = start + limit
        if stop < len(tokens):
            last = int(np.searchsorted(ends, stop, side="right")) - 1
            stop = int(ends[last]) if last >= 0 and ends[last] > start else stop
        pieces.append(tokens[start:stop])
        start = stop
    return pieces


def shuffled(documents: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """The documents in an order that depends on `seed` and their number alone."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(len(documents))]
    return [documents[i] for i in sorted(range(len(documents)), key=keys.__getitem__)]


# %%
names = list(files)
share = sum(is_validation(name, 0.05) for name in names) / len(names)
pieces = cut(encode_bytes(b"x = 1\n" * 1000 + b"y" * 3000), ord("\n"), 100)
assert 0.03 < share < 0.07
assert b"".join(decode_bytes(piece) for piece in pieces) == b"x = 1\n" * 1000 + b"y" * 3000
assert max(map(len, pieces)) <= 100 and all(piece[-1] == 10 for piece in pieces[:60]), "cut at line ends while there are any"
assert sorted(map(len, shuffled(pieces))) == sorted(map(len, pieces)) and [len(p) for p in shuffled(pieces)] != [len(p) for p in pieces]
print(f"{share:.1%} of the files validate; {len(pieces)} pieces of at most {max(map(len, pieces))} tokens")

# %% [markdown]
# A document in a shard begins with the document token and goes on until the next one. The writer below takes any number of documents, opens each, fills shards of a given size, and counts what it wrote for the manifest.

# %%
#| export
def write_split(folder: Path, split: str, texts: list[tuple[np.ndarray, int]], tokenizer, shard_tokens: int) -> list[ShardFile]:
    """Write documents, given as (tokens, bytes of text), as shards `<split>_000000.bin`, …; returns their manifest entries."""
    entries, start = [], 0
    while start < len(texts):
        parts, size, length = [], 0, 0
        while start < len(texts) and (not parts or size + len(texts[start][0]) < shard_tokens):
            parts.append(np.concatenate([[tokenizer.document], texts[start][0]]).astype(np.uint16))
            size, length, start = size + len(parts[-1]), length + texts[start][1], start + 1
        path = folder / f"{split}_{len(entries):06d}.bin"
        write_shard(path, np.concatenate(parts))
        entries.append(ShardFile(path.name, split, size, length, file_sha256(path)))
    return entries


def write_corpus(folder: Path, documents: dict, tokenizer, source: str, command: str, shard_tokens: int = 100_000_000) -> Manifest:
    """Write {"train": […], "val": […]} of (tokens, bytes) as a data folder with its manifest."""
    if not documents["train"] or not documents["val"]:
        empty = "train" if not documents["train"] else "val"
        raise Problem(f"no document is left for the {empty} split of {folder}", "give more text, or another --validation share")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for split in ("train", "val") for entry in write_split(folder, split, documents[split], tokenizer, shard_tokens)]
    manifest = Manifest(tokenizer.name, tokenizer.vocab_size, tokenizer.document, source, command, tuple(entries))
    save_manifest(folder, manifest)
    return manifest


# %%
#| export
EMBEDDED_SHA256 = "e2c61cecf9911d12a51cad0878aeae3230f4f76014524881992c4dc951a4da85"


def build_embedded(folder: Path, wheels: Path) -> Manifest:
    """The offline corpus: the Python of SymPy and NetworkX as bytes, the same shards on every machine."""
    tokenizer, documents = byte_tokenizer(), {"train": [], "val": []}
    for package in WHEELS:
        for name, text in sorted(package_text(package, wheels).items()):
            pieces = cut(encode_bytes(text), ord("\n"), DOCUMENT_TOKENS - 1)
            documents["val" if is_validation(name, 0.05) else "train"] += [(piece, len(decode_bytes(piece))) for piece in pieces]
    documents = {split: shuffled(texts) for split, texts in documents.items()}
    source = ", ".join(f"{package} {version}" for package, (version, *_) in WHEELS.items())
    manifest = write_corpus(folder, documents, tokenizer, source, "python -m speedrun.data embedded")
    if manifest.sha256 != EMBEDDED_SHA256:
        raise Problem(f"{folder}: the corpus has SHA-256 {manifest.sha256}, expected {EMBEDDED_SHA256}", "this is a bug: please report it")
    return manifest


# %%
import time

begin = time.perf_counter()
embedded = build_embedded(scratch / "embedded", wheels)
train, val = embedded.split("train")[0], embedded.split("val")[0]
assert train.bytes + val.bytes == size and 0.03 < val.tokens / (train.tokens + val.tokens) < 0.07
print(f"{train.tokens / 1e6:.2f}M training and {val.tokens / 1e6:.2f}M validation tokens in {time.perf_counter() - begin:.1f} s")
print(f"{val.bytes / val.tokens:.3f} bytes a token: a loss of 2 nats a token is {2 * val.tokens / val.bytes:.3f} nats a byte")

# %% [markdown]
# ### FineWeb, and your own text
#
# The contest's shards are fetched with the hub's own library, which resumes what broke off and shows its progress. Before the first byte we ask how large they are and whether the disk has the room; after the last, each file is held against the size, the header and the
# SHA-256 that the hub states. A file that is already there and right is left alone.

# %% tags=["hide-input"]
#| export
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


def hub_files(shards: int) -> dict[str, tuple[int, str | None]]:
    """The FineWeb files of a run with that many training shards: name → size in bytes and SHA-256, as the hub states them."""
    from huggingface_hub import HfApi

    if not 1 <= shards <= FINEWEB_SHARDS:
        raise Problem(f"--shards {shards}: FineWeb-10B has training shards 1 to {FINEWEB_SHARDS}", f"choose a number from 1 to {FINEWEB_SHARDS}")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    try:
        found = {info.path: info for info in HfApi().get_paths_info(FINEWEB, names, repo_type="dataset")}
    except OSError as error:  # every network error of the library is one
        raise Problem(f"the Hugging Face hub did not answer for {FINEWEB}: {error}", "check the network, or set HF_ENDPOINT to a mirror") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise Problem(f"the hub's {FINEWEB} has no {missing[0]}", "choose fewer --shards")
    return {name: (found[name].size, found[name].lfs.sha256 if found[name].lfs else None) for name in names}


# %% tags=["hide-input"]
#| export
def is_right(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is there, whole, and what the hub says it is."""
    return path.is_file() and path.stat().st_size == size and (sha256 is None or file_sha256(path) == sha256)


def fetch_fineweb(folder: Path, shards: int, say=print) -> Manifest:
    """Fetch `shards` training shards and the validation shard of FineWeb-10B; keeps what is already there and right."""
    from huggingface_hub import hf_hub_download

    folder.mkdir(parents=True, exist_ok=True)
    files = hub_files(shards)
    todo = {name: facts for name, facts in files.items() if not is_right(folder / name, *facts)}
    need, free = sum(size for size, _ in todo.values()), shutil.disk_usage(folder).free
    say(f"{len(todo)} of {len(files)} files to fetch into {folder}: {need / 1e9:.2f} GB, {free / 1e9:.0f} GB free")
    if need > 0.95 * free:
        raise Problem(f"{folder} needs {need / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB", "choose fewer --shards or another --out")
    for name, (size, sha256) in todo.items():
        (folder / name).unlink(missing_ok=True)
        try:
            hf_hub_download(FINEWEB, name, repo_type="dataset", local_dir=folder)
        except OSError as error:
            raise Problem(f"fetching {name} failed: {error}", f"the same command again: it resumes. {how_to_mend(folder / name)}") from None
        if not is_right(folder / name, size, sha256):
            raise Problem(f"{folder / name}: {file_sha256(folder / name)} is not the hub's SHA-256 {sha256}", how_to_mend(folder / name))
    command = f"python -m speedrun.data fineweb --shards {shards}"
    return describe_folder(folder, gpt2_facts(), f"{FINEWEB} (FineWeb, Hugging Face)", command, sorted(files))


# %% tags=["hide-input"]
#| export
def gpt2_facts() -> tuple[str, int, int]:
    """Name, vocabulary size and document token of GPT-2's tokenizer, known without loading it."""
    return "gpt2", GPT2_DOCUMENT + 1, GPT2_DOCUMENT


def describe_folder(folder: Path, facts: tuple[str, int, int], source: str, command: str, names: list[str] | None = None) -> Manifest:
    """Write a manifest for shards that are already there: `*train*.bin` and `*val*.bin`, each checked whole."""
    names = names or sorted(path.name for path in folder.glob("*.bin"))
    entries = []
    for name in names:
        split = "train" if "train" in name else "val" if "val" in name else None
        if split:
            tokens = len(read_shard(folder / name, facts[1]))
            entries.append(ShardFile(name, split, tokens, None, file_sha256(folder / name)))
    for split in ("train", "val"):
        if not any(entry.split == split for entry in entries):
            raise Problem(f"{folder} has no shard for the {split} split", f"it needs files named *{split}*.bin: see python -m speedrun.data --help")
    manifest = Manifest(*facts, source, command, tuple(entries))
    save_manifest(folder, manifest)
    return manifest


# %% [markdown]
# Your own text works the same way: plain files, one document each, or JSON lines with a `text` field.

# %% tags=["hide-input"]
#| export
def read_documents(path: Path) -> list[tuple[str, str]]:
    """Documents of a text file (one) or a `.jsonl` (one a line, its `text` field), as (name, text)."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Problem(f"{path} is missing", "give paths of text or .jsonl files") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{path}, byte {error.start}: not UTF-8", f"convert it: iconv -t UTF-8 {path.name}") from None
    if path.suffix != ".jsonl":
        return [(str(path), content)]
    documents = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            documents.append((f"{path}:{number}", json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise Problem(f"{path}, line {number}: expected a JSON object with a “text” field", "mend or delete that line") from None
    return documents


def pack(files: list[Path], folder: Path, tokenizer: str = "gpt2", validation: float = 0.05, shard_tokens: int = 100_000_000) -> Manifest:
    """Turn text or JSON-lines files into a data folder. A document validates if the hash of its text says so."""
    encoder, documents = get_tokenizer(tokenizer), {"train": [], "val": []}
    for path in files:
        for _, text in read_documents(path):
            if text:
                split = "val" if is_validation(text, validation) else "train"
                documents[split].append((encoder.encode(text), len(text.encode())))
    documents = {split: shuffled(texts) for split, texts in documents.items()}
    command = f"python -m speedrun.data pack {' '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''}"
    return write_corpus(folder, documents, encoder, ", ".join(path.name for path in files[:5]), command, shard_tokens)


# %%
poems = scratch / "poems.jsonl"
poems.write_text("".join(json.dumps({"text": f"roses are red {i}\n" * (i % 7 + 1)}) + "\n" for i in range(200)))
packed = pack([poems], scratch / "packed", "bytes", validation=0.2, shard_tokens=2000)
assert sum(file.bytes for file in packed.files) == sum(len(json.loads(line)["text"]) for line in poems.open())
assert len(packed.split("train")) > 5 and 0.1 < sum(file.tokens for file in packed.split("val")) / sum(f.tokens for f in packed.files) < 0.3
again = describe_folder(scratch / "packed", ("bytes", 288, 287), packed.source, packed.command)
assert [file.sha256 for file in again.split("val")] == [file.sha256 for file in packed.split("val")]
print(f"200 poems → {len(packed.split('train'))} training and {len(packed.split('val'))} validation shards")

# %% [markdown]
# The command line is the same functions, explained by `--help`:

# %% tags=["hide-input"]
#| export data.__main__
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from speedrun.lab.hardware import Problem
from speedrun.lab.results import root

Files = Annotated[tuple[Path, ...], tyro.conf.Positional]
Folder = Annotated[Path, tyro.conf.Positional]


def make_embedded(out: Path | None = None, wheels: Path | None = None) -> None:
    """Build the offline corpus: 20 MB of documented Python from two packages, as bytes.

    Args:
        out: the data folder (default: data/embedded in the project).
        wheels: where the two wheels are, or are fetched to (default: data/wheels in the project).
    """
    out = out or root() / "data" / "embedded"
    report(build_embedded(out, wheels or root() / "data" / "wheels"), out)


def make_fineweb(shards: int = 9, out: Path | None = None) -> None:
    """Fetch FineWeb-10B as GPT-2 tokens: the validation shard and SHARDS training shards of 100M tokens, 200 MB each.

    Args:
        shards: training shards, 1 to 103.
        out: the data folder (default: data/fineweb10B in the project).
    """
    out = out or root() / "data" / "fineweb10B"
    report(fetch_fineweb(out, shards), out)


# %% tags=["hide-input"]
#| export data.__main__
def make_pack(files: Files, out: Path, tokenizer: Literal["gpt2", "bytes"] = "gpt2", validation: float = 0.05) -> None:
    """Turn text files, or .jsonl files with a “text” field, into a data folder.

    Args:
        files: text files (one document each) or .jsonl files (one document a line).
        out: the data folder.
        tokenizer: gpt2 (50,257 tokens) or bytes (288).
        validation: share of the documents that validates.
    """
    report(pack(list(files), out, tokenizer, validation), out)


def make_manifest(folder: Folder, tokenizer: Literal["gpt2", "bytes"] = "gpt2", source: str = "unknown") -> None:
    """Write manifest.json for a folder that already holds shards named *train*.bin and *val*.bin.

    Args:
        folder: the data folder.
        tokenizer: what its tokens index.
        source: where the text comes from.
    """
    facts = gpt2_facts() if tokenizer == "gpt2" else ("bytes", BYTE_DOCUMENT + 1, BYTE_DOCUMENT)
    report(describe_folder(folder, facts, source, f"python -m speedrun.data manifest {folder} --tokenizer {tokenizer}"), folder)


def verify(folder: Folder) -> None:
    """Check every shard of a data folder: header, size, vocabulary and SHA-256.

    Args:
        folder: the data folder.
    """
    found = load_manifest(folder)
    for file in found.files:
        read_shard(folder / file.name, found.vocab_size)
        if file_sha256(folder / file.name) != file.sha256:
            raise Problem(f"{folder / file.name}: its SHA-256 is not the manifest's {file.sha256}", how_to_mend(folder / file.name))
    report(found, folder)


# %% tags=["hide-input"]
#| export data.__main__
def report(manifest, folder: Path) -> None:
    """Say what a data folder holds."""
    for split in ("train", "val"):
        files = manifest.split(split)
        print(f"{folder}: {split}: {sum(file.tokens for file in files):,} {manifest.tokenizer} tokens in {len(files)} shards")


def main(arguments: list[str] | None = None) -> int:
    """`python -m speedrun.data COMMAND`: embedded, fineweb, pack, manifest or verify."""
    commands = {"embedded": make_embedded, "fineweb": make_fineweb, "pack": make_pack, "manifest": make_manifest, "verify": verify}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="python -m speedrun.data")
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main())

# %%
assert main(["verify", str(scratch / "embedded")]) == 0
assert main(["verify", str(scratch / "nowhere")]) == 1

# %% [markdown]
# ## Reading, the naive way
#
# A training step consumes `step_tokens` tokens, and must consume the *same* ones however many GPUs share the work. If two GPUs saw another stream than eight, no experiment made on two would say anything about eight. So a step is cut into `grad_shards` equal
# **micro-batches**, eight for the contest, and a machine with $w$ ranks gives each of them $8/w$. What depends on the number of ranks is who computes a micro-batch, never what is in it.

# %%
#| default_exp data.loader
#| export
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


# %%
#| export
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


# %%
assert check_options(DataOptions()) == 65_536 and check_options(DataOptions(), world=4) == 65_536
for bad, world in ((DataOptions(), 3), (DataOptions(step_tokens=500_000), 1), (DataOptions(seq_len=100), 1)):
    try:
        check_options(bad, world)
        raise AssertionError("accepted")
    except Problem as problem:
        assert "data." in problem.what and problem.fix
        print(problem)

# %% [markdown]
# A split may be a hundred files of 200 MB. We want to see one long row of tokens, hold at most a few of the files in memory, and never wait for the disk in the middle of a step: while one shard is being read from, a thread loads the next. The upstream trainer measured
# that wait at a second and a half per run (record 33).

# %%
#| export
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


# %%
shards = Shards(scratch / "packed", "train")
whole = np.concatenate([read_shard(scratch / "packed" / file.name, 288) for file in shards.files])
assert shards.total == len(whole) and (shards.read(0, shards.total) == whole).all()
for start in range(0, shards.total - 3000, 997):
    assert (shards.read(start, 3000) == whole[start : start + 3000]).all(), "a read may cross a border, or two"
assert len(shards.held) <= 3
print(f"{len(shards.files)} shards, {shards.total:,} tokens, {len(shards.held)} in memory")

# %% [markdown]
# In the naive mode a step is then a slice: `step_tokens` tokens and one more, for the last target. Where the row ends, another **epoch** begins at its start, and says so; the upstream loader runs out of files there and
# dies with a `TypeError`. The position in the data is two numbers, and they are all that a checkpoint has to keep.

# %%
#| export
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


# %%
options = DataOptions(str(scratch / "packed"), seq_len=16, step_tokens=16 * 4 * 2, grad_shards=4)
at, starts = Position(), []
while at.epoch < 2:
    start, at = next_slice(shards.total, options, at)
    starts.append(start)
per_epoch = (shards.total - 1) // options.step_tokens
assert starts[: per_epoch + 1] == [step * options.step_tokens for step in range(per_epoch)] + [0]
batch = rows(shards.read(0, 33), 16)
assert batch.inputs.shape == (2, 16) and (batch.inputs[:, 1:] == batch.targets[:, :-1]).all() and batch.targets[0, -1] == batch.inputs[1, 0]
print(f"{per_epoch} steps an epoch, then from the start again")

# %% [markdown]
# ## Reading by documents
#
# The other mode fills a micro-batch with documents, each from its beginning, one after the other in the order of the corpus. A document longer than `max_document` is clipped and its rest skipped; the last one is clipped where the micro-batch is full. The batch is one
# long row, and `cu_seqlens`, the cumulative lengths, tell the attention of later chapters where documents begin, so that no token looks across a border.
#
# The next micro-batch goes on with the next document. That makes the position a document number, and makes every rank's share depend on how many documents all the others consumed. Each rank therefore plans the *whole* step, which costs microseconds, and reads only its own part.

# %%
#| export
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


# %%
index = np.flatnonzero(whole == BYTE_DOCUMENT)
ends = np.append(index[1:], len(whole))
slices, after = fill(index, ends, first=3, need=101, longest=40)
batch = document_batch(whole, slices)
borders = batch.cu_seqlens.tolist()
assert batch.inputs.shape == (1, 100) and borders[0] == 0 and borders[-1] == 100 and after == 3 + len(slices)
assert (batch.inputs[0, borders[:-1]] == BYTE_DOCUMENT).all(), "every document begins at its beginning"
assert max(np.diff(borders)) <= 40 and fill(index, ends, len(index) - 1, 10_000, 40) is None
print(f"{len(borders) - 1} documents in 100 tokens, borders {borders}")

# %% [markdown]
# Documents do not span shards, so a step is planned inside one shard; the few at its end that do not fill a step are left for the next epoch's readers, who will leave them too.

# %%
#| export
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


# %% [markdown]
# The loader itself is thin: it holds the position and hands each rank its part.

# %%
#| export
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


# %% [markdown]
# Now the promise can be kept: one stream, whoever reads it. For both modes, the steps that 1, 2, 4 and 8 ranks read are concatenated and compared, through an epoch's end:

# %%
for mode in ("stream", "documents"):
    options = DataOptions(str(scratch / "packed"), mode, seq_len=16, step_tokens=16 * 8, grad_shards=8, max_document=50)
    streams = []
    for world in (1, 2, 4, 8):
        loaders = [Loader(options, rank, world) for rank in range(world)]
        streams.append(torch.cat([torch.cat([b.inputs for b in loader.next()]).flatten() for _ in range(150) for loader in loaders]))
    assert all(torch.equal(stream, streams[0]) for stream in streams) and loaders[0].position.epoch >= 1
    resumed = Loader(options)
    resumed.position = loaders[0].position
    assert torch.equal(resumed.next()[0].inputs, loaders[0].next()[0].inputs), "the position is all the state there is"
    print(f"{mode}: 150 steps of {options.step_tokens} tokens, {loaders[0].position.epoch + 1} epochs, equal on 1, 2, 4 and 8 ranks")

# %% [markdown]
# Validation reads the plain stream in both modes, a fixed number of tokens from the start, micro-batch $j$ on rank $j \bmod w$:

# %%
#| export
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


# %%
held_out = Shards(scratch / "embedded", "val")
options = DataOptions(str(scratch / "embedded"), seq_len=256, step_tokens=16_384, grad_shards=4)
alone = [batch.inputs for batch in validation_batches(held_out, options, 50_000)]
shared = [batch.inputs for rank in range(2) for batch in validation_batches(held_out, options, 50_000, rank, 2)]
assert sum(batch.numel() for batch in alone) == 50_000 // 4096 * 4096
assert sorted(batch.sum().item() for batch in alone) == sorted(batch.sum().item() for batch in shared)
print(f"{sum(batch.numel() for batch in alone):,} validation tokens in {len(alone)} micro-batches")

# %% [markdown]
# ## The measurement
#
# Back to the prediction, on the text at hand. For a row length $T$, a token is **beheaded** if its document began before its row did. Count them for every $T$, by cutting the real stream:

# %%
stream = Shards(scratch / "embedded", "train").read(0, train.tokens)
opens = np.flatnonzero(stream == BYTE_DOCUMENT)
lengths = np.diff(np.append(opens, len(stream)))
began = np.repeat(opens, lengths)  # for each token, where its document began


def beheaded(seq_len: int) -> float:
    """Share of the tokens whose document began in an earlier row."""
    row_start = np.arange(len(stream)) // seq_len * seq_len
    return float((began < row_start).mean())


rows_of = [64, 128, 256, 512, 1024, 2048, 4096]
shares = [beheaded(seq_len) for seq_len in rows_of]
assert shares == sorted(shares, reverse=True) and shares[rows_of.index(1024)] > 0.4
print(f"mean document {lengths.mean():.0f} tokens; at T = 1024, {shares[4]:.0%} of the tokens cannot see the beginning of theirs")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: share of tokens whose document began in an earlier row, against row length. Right: six rows of a naive and of an aligned batch, coloured by document."}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), width_ratios=[1, 1.3])
left.semilogx(rows_of, [100 * share for share in shares], "o-", base=2)
left.set_xticks(rows_of, [str(seq_len) for seq_len in rows_of])
left.set_ylim(0, 100)
left.set_xlabel("row length T (tokens)")
left.set_ylabel("beheaded tokens (%)")
left.set_title(f"at T = 1024, {shares[4]:.0%} lost their beginning")
T, colors = 1024, plt.get_cmap("Set2").colors
aligned, document = [], 40
for _ in range(6):
    pieces, document = fill(opens, opens + lengths, document, T, 1024)
    aligned.append([(stop - start, True) for start, stop in pieces])
naive = []
for row in range(6):
    inside = opens[(opens > 40 * T + row * T) & (opens < 41 * T + row * T)] - (40 + row) * T
    borders = [0, *inside.tolist(), T]
    naive.append([(b - a, (40 + row) * T + a in set(opens.tolist())) for a, b in zip(borders, borders[1:])])
for group, (name, batch) in enumerate((("naive", naive), ("by documents", aligned))):
    for row, pieces in enumerate(batch):
        x, y = 0, -(row + group * 7.5)
        for n, (length, whole_head) in enumerate(pieces):
            right.barh(y, length, left=x, height=0.8, color=colors[(row + n) % 8] if whole_head else "0.85", edgecolor="white", lw=0.8)
            x += length
    right.text(0, 0.75 - group * 7.5, name, fontsize=9)
right.set_yticks([])
right.set_ylim(-13.2, 1.9)
right.grid(False)
right.set_xlabel("position in the row")
right.set_title("grey: a document without its beginning")
plt.show()

# %% [markdown]
# *Embedded text (Python source of SymPy and NetworkX, documents cut at 1,024 tokens).*
#
# ## What it costs, and when it fails
#
# Reading by documents skips text. Whatever a clipped document had left is not seen in this epoch:

# %%
def skipped(longest: int, need: int = 16_384) -> float:
    """Share of the tokens passed over while filling micro-batches of `need` tokens."""
    first, used = 0, 0
    while (filled := fill(opens, opens + lengths, first, need, longest)) is not None:
        first, used = filled[1], used + need
    return 1 - used / opens[first]


few, many = skipped(1024), skipped(512)
assert few < 0.05 < many
print(f"clipping at 1,024 passes over {few:.1%} of this text, clipping at 512 {many:.1%}")

# %% [markdown]
# On ten billion tokens that is nothing; on a corpus that is read twice it is text you paid for. And an aligned batch is only half of the idea. The rows are aligned, but as long as attention runs across borders, a token still looks into the tail of somebody else's document. That needs a
# mask, and masks need [a chapter of their own](../book/credits.md). Until it is written, the trainer reads the plain stream, as llm.c does, and this mode waits.
#
# ## Exercises
#
# 1. The contest's validation loss is a mean over tokens, but is every token equally hard? Write `position_in_document(tokens, document)`: for each token, how many tokens of its document come before it. (With it you can plot loss against
#    position, once you have a model.)

# %% tags=["solution"]
def position_in_document(tokens: np.ndarray, document: int) -> np.ndarray:
    """For each token the number of tokens since its document's opening token; tokens before the first one count from the start."""
    where = np.arange(len(tokens))
    return where - np.maximum.accumulate(np.where(tokens == document, where, 0))


# %%
assert position_in_document(np.array([9, 1, 2, 9, 9, 4]), 9).tolist() == [0, 1, 2, 0, 0, 1]
positions = position_in_document(stream, BYTE_DOCUMENT)
assert positions.max() == lengths.max() - 1 and (positions == 0).sum() == len(opens)
print(f"half of all tokens stand within the first {int(np.median(positions))} of their document")

# %% [markdown]
# 2. Somebody proposes to shuffle *rows* instead of documents: cut the stream into rows of $T$ once, then visit the rows in random order. Write `rows_shared(opens, lengths, seq_len)`: the share of documents that end up in more than one
#    row. What happens to those under the proposal?

# %% tags=["solution"]
def rows_shared(opens: np.ndarray, lengths: np.ndarray, seq_len: int) -> float:
    """Share of the documents that a cut into rows of `seq_len` tears apart."""
    return float((opens // seq_len != (opens + lengths - 1) // seq_len).mean())


# %%
assert rows_shared(np.array([0, 4]), np.array([4, 4]), 4) == 0.0 and rows_shared(np.array([0, 3]), np.array([3, 5]), 4) == 0.5
print(f"at T = 1024, {rows_shared(opens, lengths, 1024):.0%} of the documents are torn, and their halves would be read at random times")

# %%
import shutil

shutil.rmtree(scratch)
