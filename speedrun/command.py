# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.ranks import rank_numbers


# %% Training from start to finish
import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from speedrun.checkpoint import RESUMABLE_FIELDS, checkpoints, latest_checkpoint, load_facts
from speedrun.config import Config, config_from_json, fields_of, vary
from speedrun.lab.errors import UserError, quoted
from speedrun.lab.files import claim, new_folder
from speedrun.lab.hardware import Machine
from speedrun.lab.provenance import root
from speedrun.lab.runlog import parse_line
from speedrun.presets import preset


@contextlib.contextmanager
def sole_owner(folder: Path, again: bool):
    """A run's folder, rank 0's alone in this block. Without a launcher above, it takes that one's part as well.

    again: a run goes on there. Otherwise it must hold none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if rank_numbers()[0] == 0:
            for role in ("train",) if os.environ.get("SPEEDRUN_LIFELINE") else ("launch", "train"):
                held.callback(claim(folder, role).release)
            if not again:
                refuse_old_run(folder)
        yield


def refuse_old_run(folder: Path) -> None:
    """Raise UserError if a folder holds a run: a new one never writes over it."""
    if (folder / "metrics.jsonl").exists():
        resumed = f"--resume {quoted(folder)}, or another --out"
        fix = (
            resumed if checkpoints(folder) else "another --out (that run ended before it had saved)"
        )
        raise UserError(f"{folder} holds a run already", fix)


# %% The command line
@dataclass(frozen=True)
class TrainCommand:
    """Train as one rank, alone or one of torchrun's. For several GPUs: python -m speedrun.launch."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The run."""
    out: str = ""
    """Folder for logs and checkpoints; empty: runs/<date>-<preset> in the project."""
    resume: str = ""
    """Folder of a run to go on with: its own settings, but for --max-steps, --data.path, --device, --backend."""


def run_folder(command: TrainCommand) -> Path:
    """Where a run writes: as told, or a folder, made here, that is named by date and preset."""
    if command.out or command.resume:
        return Path(command.out or command.resume)
    if rank_numbers()[1] > 1:
        raise UserError(
            "several ranks need one folder", "--out runs/NAME; or python -m speedrun.launch"
        )
    return new_folder(root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{command.config.preset}")


def settled(path: str) -> str:
    """A data folder's name that means the same from everywhere: the project's own stays relative, others are absolute."""
    if not Path(path).exists():
        return path
    there = root() / path
    ours = ".." not in path and there.exists() and there.samefile(path)
    return path if ours else str(Path(path).absolute())


def run_config(command: TrainCommand) -> Config:
    """The run that a command asks for: the one on the command line, or the one that a checkpoint was saved with."""
    if not command.resume:
        return vary(command.config, {"data.path": settled(command.config.data.path)})
    facts = load_facts(latest_checkpoint(Path(command.resume)))
    usual = fields_of(preset(command.config.preset))
    said = dict(fields_of(command.config).items() - usual.items())
    if ignored := ", ".join(sorted(said.keys() - RESUMABLE_FIELDS)):
        what = f"--resume goes on with the run's own settings: {ignored} would be ignored"
        raise UserError(what, "leave them out, or start another run")
    if "data.path" in said:
        said["data.path"] = settled(said["data.path"])
    return vary(config_from_json(facts["config"]), {"max_steps": 0} | said)


def print_line(line: str) -> None:
    """Print a line in one piece, at once; if that fails, go on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.write(line + "\n")  # print() writes the line's end apart, and ranks get mixed up
        sys.stdout.flush()


@contextlib.contextmanager
def progress(config: Config):
    """A way to show log lines: above a progress bar in a terminal, plainly elsewhere."""
    if sys.stdout is None or not sys.stdout.isatty():
        yield print_line
        return
    with tqdm(total=config.last_step, unit="step", dynamic_ncols=True) as bar:

        def echo(line: str) -> None:
            numbers = parse_line(line) or {}
            bar.update(max(0, numbers.get("step", 0) - bar.n))
            if "train_loss" in numbers:
                bar.set_postfix_str(f"loss {numbers['train_loss']:.3f}")
            else:
                bar.write(line)

        yield echo


def check_compiler(config: Config, machine: Machine) -> None:
    """Refuse to begin what torch.compile cannot end: it writes C++, on GPUs as well."""
    if config.compile and not machine.compiler:
        fix = "--no-compile; or install a C++ compiler: make doctor says how"
        raise UserError("compile=True, and there is no C++ compiler here", fix)
