# Tangled from notebooks/94_sources.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.data.shards import Manifest, ShardFile, load_manifest, write_shard


# %% A manifest beside the shards
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


# %% Writing, split by split
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


# %% Replacing a corpus atomically
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
