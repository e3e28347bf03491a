# Tangled from notebooks/93_errors_and_files.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.lab.errors import UserError


# %% Atomic writes
import hashlib
import os
from pathlib import Path

from filelock import FileLock, Timeout


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in memory."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it appears whole or not at all, and lasts. Raises OSError, leaving no rest."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


# %% Creating a folder without a race
def new_folder(path: Path) -> Path:
    """Make a folder that did not exist: `path`, or `path-2`, `path-3`, … where that is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 1
    while True:
        try:
            chosen = path if count == 1 else path.with_name(f"{path.name}-{count}")
            chosen.mkdir()
            return chosen
        except FileExistsError:
            count += 1


# %% Locking a run's folder
def claim(folder: Path, role: str) -> FileLock:
    """Be the only process with this role (`launch` or `train`) in a run's folder until it ends or lets go (`release()`).

    Raises UserError where another process has it. Touches nothing else in the folder.
    """
    lock = FileLock(folder / f".{role}.lock", timeout=0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        what = f"another process is at work in {folder}"
        raise UserError(what, "wait until it ends, or stop it; or choose another --out") from None
    return lock
