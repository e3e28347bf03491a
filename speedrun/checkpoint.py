# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Checkpoints
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrun.lab.errors import Problem


Optimizers = Sequence[Any]  # of torch.optim.Optimizer, or chapter 20's alone


def is_shared(optimizers: Optimizers) -> bool:
    """Whether it is the one that all ranks share."""
    return not isinstance(optimizers[0], torch.optim.Optimizer)


def states_by_parameter(optimizers: Optimizers) -> dict[Tensor, dict[str, Tensor]]:
    """Each parameter's own state, from whichever optimizer it belongs to."""
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    return {p: optimizer.state[p] for optimizer, group in groups for p in group["params"]}


def optimizer_tensors(
    optimizers: Optimizers, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of optimizers as named tensors, `parameter/moment`. If it is shared, all ranks have to ask."""
    if is_shared(optimizers):
        return optimizers[0].tensors()
    states = states_by_parameter(optimizers)
    moments = {name: states[p].items() for name, p in parameters.items()}
    return {f"{name}/{key}": value for name, items in moments.items() for key, value in items}


def restore_optimizers(
    optimizers: Optimizers, parameters: Mapping[str, Tensor], saved: dict
) -> None:
    """Put named tensors back as the state of optimizers, on each parameter's device."""
    if is_shared(optimizers):
        return optimizers[0].load(saved)
    for optimizer in optimizers:
        optimizer.state.clear()
    states = states_by_parameter(optimizers)
    for label, value in saved.items():
        name, key = label.rsplit("/", 1)
        states[parameters[name]][key] = value.to(parameters[name].device)


KEPT = 2


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if not path.suffix)


def save_checkpoint(
    folder: Path, step: int, weights: dict, moments: dict, facts: dict
) -> Path | str:
    """Save named tensors and facts, whole or not at all. Returns the path, or the reason why there is none."""
    path = folder / "checkpoints" / f"step-{step:07d}"
    part = path.with_suffix(".part")
    if path.exists():  # a resumed run has come by here before
        return path
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in (("model", weights), ("optimizer", moments)):
            # copies, since small parameters may be views of one storage
            layout = torch.contiguous_format
            whole = {
                key: value.detach().clone(memory_format=layout) for key, value in tensors.items()
            }
            save_file(whole, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        return str(error)
    others = [other for other in checkpoints(folder) if other != path]
    for old in others[: len(others) - KEPT + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights, optimizer tensors and facts of a checkpoint folder, on the CPU."""
    try:
        facts = json.loads((path / "state.json").read_text())
        return (
            load_file(path / "model.safetensors"),
            load_file(path / "optimizer.safetensors"),
            facts,
        )
    except (OSError, ValueError, SafetensorError) as error:
        others = [str(other) for other in checkpoints(path.parent.parent) if other != path]
        again = "start the run again: it has no other checkpoint"
        fix = f"delete it; the run then resumes from {others[-1]}" if others else again
        raise Problem(f"{path} is not a whole checkpoint: {error}", fix) from None


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise Problem(
            f"{folder} has no checkpoint",
            "give the folder of a run, such as runs/…, that has saved one",
        )
    return found[-1]
