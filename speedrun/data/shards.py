# Tangled from notebooks/94_sources.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% A shard
TOKENIZERS = ("bytes", "gpt2")  # what a manifest may name: reading shards needs no tokenizer


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


# %% A manifest beside the shards
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


def data_folder(path: str) -> Path:
    """A data folder by its name: as given if it exists from here, else inside the project."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else root() / path


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


def no_manifest(folder: Path) -> UserError:
    """The complaint about a folder without a manifest, or about no folder; it names every place that was looked at."""
    if folder.is_dir():
        fix = f"if it has shards: python -m speedrun.data manifest {quoted(folder)} --tokenizer gpt2 (or bytes); if not: … embedded, fineweb or pack"
        return UserError(f"{folder} holds no manifest.json", fix)
    here = Path.cwd() / folder.relative_to(root()) if folder.is_relative_to(root()) else folder
    places = " nor ".join(dict.fromkeys([str(here.absolute()), str(folder.absolute())]))
    fix = "look for a misspelt name; python -m speedrun.data --help says what makes a data folder"
    return UserError(f"there is no folder {visible(places, 4096)}", fix)


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


# %% What the reader checks
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


# %% Checking SHA-256, once a file
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
