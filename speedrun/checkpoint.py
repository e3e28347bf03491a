# Tangled from notebooks/92_a_run_that_survives.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Checkpoints
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrun.lab.errors import UserError, quoted, visible
from speedrun.lab.files import atomic_write, file_sha256, sync


KEPT = 2


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: of the folder's entries those that `save_checkpoint` names."""
    found = {
        int(step[1]): path
        for path in (folder / "checkpoints").glob("step-*")
        if (step := re.fullmatch(r"step-(\d{7,})", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors to the disk; returns the file's SHA-256."""
    # copies, since small parameters may be views of one storage
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)
    path.chmod((path.parent / "state.json").stat().st_mode)  # safetensors shuts out all other users
    sync(path)
    return file_sha256(path)


def save_checkpoint(folder: Path, step: int, weights: dict, moments: dict, facts: dict) -> Path:
    """Save named tensors and facts, whole or not at all; keeps the last two. Raises OSError, leaving no rest."""
    path = folder / "checkpoints" / f"step-{step:07d}"
    part = path.with_suffix(".part")
    try:
        for rest in path.parent.glob("step-*.part"):  # of a process that was killed
            shutil.rmtree(rest, ignore_errors=True)
        part.mkdir(parents=True)
        atomic_write(part / "state.json", "")
        tensors = {"model": weights, "optimizer": moments}
        hashes = {k: write_tensors(part / f"{k}.safetensors", v) for k, v in tensors.items()}
        facts = {"step": step, **facts, "sha256": hashes}
        atomic_write(part / "state.json", json.dumps(facts, indent=1))
        retire(path)
        os.replace(part, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        full = (
            errno.ENOSPC if "No space left" in str(error) else None
        )  # safetensors gives no number
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", full), why, str(path)) from None
    others = [other for other in checkpoints(folder) if other != path]
    for old in others[: 1 - KEPT]:
        retire(old)
    return path


def retire(path: Path) -> None:
    """Remove a checkpoint, under another name, so that a half-removed one is never taken for a whole one."""
    if path.exists():
        aside = path.with_name(f"{path.name}-old.part")
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


RESUMABLE_FIELDS = (
    "max_steps",
    "data.path",
    "device",
    "backend",
)  # what may change when a run goes on
FACTS: dict[str, Any] = {
    "step": lambda v: type(v) is int and v >= 0,
    "config": lambda v: type(v) is dict,
    "position": lambda v: type(v) is list and len(v) == 3 and all(type(n) is int and n >= 0 for n in v),
    "train_time_ms": lambda v: type(v) in (int, float) and 0 <= v < math.inf,
    "data_sha256": lambda v: type(v) is str and re.fullmatch("[0-9a-f]{64}", v),
    "vocab_size": lambda v: type(v) is int and 0 < v <= 1 << 16,
    "tokenizer": lambda v: type(v) is str,
    "world": lambda v: v is None or type(v) is int and 0 < v <= 1 << 16,
}  # fmt: skip


def damaged(path: Path, why: object) -> UserError:
    """What to say about a checkpoint that is not whole, and the way on, which removes nothing."""
    run = path.parent.parent
    others = [other.name for other in checkpoints(run) if other != path]
    again = (
        f"then the run goes on from {others[-1]}"
        if others
        else "and begin again with another --out"
    )
    fix = f"put it aside (mv {quoted(path)} {quoted(run)}/), {again}"
    return UserError(f"{path} is not a whole checkpoint: {visible(why)}", fix)


def readable(path: Path) -> Path:
    """The path itself, after trying to open it: a file that may not be read is not a damaged one."""
    try:
        open(path, "rb").close()
    except PermissionError:
        fix = f"its owner can permit it: chmod -R a+rX {quoted(path.parent.parent.parent)}"
        raise UserError(f"{path} may not be read by this user", fix) from None
    except OSError as error:
        raise damaged(path.parent, f"{path.name}: {error.strerror}") from None
    return path


def load_facts(path: Path) -> dict:
    """What a checkpoint folder says about its run, each fact of its type. Raises UserError."""
    try:
        facts = {"world": None}  # which older checkpoints do not say
        facts |= json.loads(readable(path / "state.json").read_text(encoding="utf-8"))
        wrong = [name for name, holds in FACTS.items() if not holds(facts[name])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise damaged(path, f"state.json: {type(error).__name__} {error}") from None
    if wrong:
        raise damaged(path, f"state.json: {wrong[0]} is {facts[wrong[0]]!r}")
    if checkpoints(path.parent.parent) and path.name != f"step-{facts['step']:07d}":
        raise damaged(path, f"state.json is of step {facts['step']}")
    return facts


def load_tensors(path: Path, kind: str, facts: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU; kind: model or optimizer. Raises UserError where a bit has changed."""
    file, hashes = readable(path / f"{kind}.safetensors"), facts.get("sha256")
    whole = isinstance(hashes, dict) and file_sha256(file) == hashes.get(kind)
    if hashes is not None and not whole:  # checkpoints of before 28 November 2026 have none
        raise damaged(path, f"the SHA-256 of {file.name} is not the one in state.json")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise damaged(path, error) from None


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights, optimizer tensors and facts of a checkpoint folder, on the CPU."""
    facts = load_facts(path)
    return load_tensors(path, "model", facts), load_tensors(path, "optimizer", facts), facts


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        fix = "a run that ended before it saved begins again with another --out; its folder is not touched"
        raise UserError(
            f"{folder} has no checkpoint", fix if folder.exists() else "look for a misspelt name"
        )
    return found[-1]


def check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless two sets of named tensors have the same names, shapes and dtypes."""
    for name in sorted(found.keys() ^ wanted.keys()):
        raise damaged(path, f"{name} is {'missing' if name in wanted else 'not of this model'}")
    for name in found:
        here, right = (f"{tuple(t[name].shape)} {str(t[name].dtype)[6:]}" for t in (found, wanted))
        if here != right:
            raise damaged(path, f"{name} is {here}, and not {right}")
