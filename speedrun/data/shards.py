# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Shards
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speedrun.lab.errors import Problem
from speedrun.lab.provenance import note_opened, root

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write an llm.c shard: 256 int32 of header, then uint16 tokens. The file appears whole or not at all."""
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


def bad_shard(path: Path, at: int, what: str) -> Problem:
    """The complaint about one byte of one file, with its cure."""
    return Problem(f"{path}, byte {at}: {what}", how_to_mend(path))


def read_header(path: Path) -> tuple[int, np.ndarray]:
    """The size of a file in bytes and its first 256 integers (fewer if it is shorter)."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
        return path.stat().st_size, np.frombuffer(head[: len(head) // 4 * 4], dtype="<i4")
    except FileNotFoundError:
        raise Problem(f"{path} is missing", how_to_mend(path)) from None
    except PermissionError:
        raise Problem(f"{path} may not be read by this user", f"chmod u+r {path}") from None


def count_tokens(path: Path) -> int:
    """The number of tokens in a shard, after checking that it is one and that it is whole."""
    size, header = read_header(path)
    if len(header) < HEADER_BYTES // 4:
        raise bad_shard(
            path, size, f"the file ends here, expected a header of {HEADER_BYTES} bytes"
        )
    for name, found, wanted, at in (
        ("magic number", header[0], MAGIC, 0),
        ("version", header[1], VERSION, 4),
    ):
        if found != wanted:
            raise bad_shard(path, at, f"{name} {found}, expected {wanted}: not a shard of tokens")
    count, end = int(header[2]), HEADER_BYTES + 2 * int(header[2])
    if count <= 0:
        raise bad_shard(path, 8, f"the header announces {count} tokens, expected at least 1")
    if size != end:
        raise bad_shard(
            path, size, f"the file ends here, expected at byte {end} ({count:,} tokens)"
        )
    return count


def read_shard(path: str | Path, vocab_size: int) -> np.ndarray:
    """All tokens of a shard, (tokens,) uint16, each below `vocab_size`."""
    path = Path(path)
    tokens = np.fromfile(path, dtype="<u2", count=count_tokens(path), offset=HEADER_BYTES)
    note_opened(path)
    if int(tokens.max()) >= vocab_size:
        first = int(np.argmax(tokens >= vocab_size))
        what = f"token {tokens[first]}, expected below {vocab_size} (the vocabulary)"
        raise bad_shard(path, HEADER_BYTES + 2 * first, what)
    return tokens


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, in one step."""
    part = folder / f"manifest.{os.getpid()}.part"
    part.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "manifest.json")


def data_folder(path: str) -> Path:
    """A data folder by its name: as given if it exists from here, else inside the project."""
    return Path(path) if Path(path).is_absolute() or Path(path).exists() else root() / path


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a data folder."""
    path = Path(folder) / "manifest.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(
            files=tuple(ShardFile(**file) for file in fields.pop("files")), **fields
        )
    except FileNotFoundError:
        fix = f"if it has shards: python -m speedrun.data manifest {folder} --tokenizer gpt2 (or bytes); if not: … embedded, fineweb or pack"
        raise Problem(f"{folder} holds no manifest.json", fix) from None
    except PermissionError:
        raise Problem(
            f"{path} may not be read by this user", f"chmod u+rx {folder}; chmod u+r {path}"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fix = f"delete it, then: python -m speedrun.data manifest {folder} --tokenizer gpt2 (or bytes)"
        raise Problem(f"{path} is not a manifest: {error}", fix) from None
    note_opened(path)
    return manifest
