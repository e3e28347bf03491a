"""The speedrun: execute the final notebook with papermill, watch it live, and keep everything it made.

    python scripts/run_speedrun.py [--preset NAME] [--gpus N] [--data DIR] [--target LOSS] [--out DIR] [--yes] [FLAG …]

Further flags go to speedrun.train (--steps 100, --optim.lr 1e-3, …). The preset is chosen for the machine if none is named.
"""

import argparse
import logging
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path

import jupytext
import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError

from speedrun.config import Config, read_command
from speedrun.lab.errors import Problem
from speedrun.lab.hardware import setup
from speedrun.lab.provenance import root
from speedrun.launch import (
    LaunchCommand,
    TrainCommand,
    checkpoints,
    choose_preset,
    confirm,
    make_plan,
    measured_runs,
    memory_needed_gb,
    process_of,
    pulses,
)
from speedrun.report import write_html

NOTEBOOK = "24_speedrun"


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        default="",
        help="smoke, cpu, small, record or baseline (default: what fits the machine)",
    )
    parser.add_argument("--gpus", type=int, default=0, help="ranks to start (default: one per GPU)")
    parser.add_argument("--data", default="", help="data folder (default: the preset's)")
    parser.add_argument(
        "--target", type=float, default=0.0, help="validation loss to reach (default: the preset's)"
    )
    parser.add_argument(
        "--out", default="", help="folder for the run (default: runs/<date>-<preset>)"
    )
    parser.add_argument(
        "--yes", action="store_true", help="do not ask before long runs and large downloads"
    )
    return parser.parse_known_args(arguments)


def read_config(preset: str, data: str, flags: list[str]) -> Config:
    """The run that the flags describe."""
    given = ["--preset", preset, *(["--data.path", data] if data else []), *flags]
    make = lambda config: LaunchCommand(TrainCommand(config))  # noqa: E731
    return read_command(make, given, preset, "scripts/run_speedrun.py").train.config


def show_cells_live() -> None:
    """Print what cells print, as they print it: papermill passes it to a logger."""
    logger = logging.getLogger("papermill")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.terminator = ""
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logger.addFilter(
        lambda record: (
            not record.getMessage().startswith(
                ("Executing", "Ending Cell", "Input Notebook", "Output Notebook")
            )
        )
    )


def execute(parameters: dict, folder: Path) -> Path:
    """Execute the notebook with papermill into the run's folder; it is kept even when a cell fails."""
    source, notebook = folder / "source.ipynb", folder / "speedrun.ipynb"
    nbformat.write(jupytext.read(root() / "notebooks" / f"{NOTEBOOK}.py", fmt="py:percent"), source)
    try:
        papermill.execute_notebook(
            source,
            notebook,
            parameters,
            log_output=True,
            progress_bar=False,
            cwd=root(),
            request_save_on_cell_execute=True,
        )
    finally:
        source.unlink()
        if notebook.exists():
            write_html(notebook)
    return notebook


def main(arguments: list[str]) -> int:
    options, flags = read_arguments(arguments)
    folder: Path | None = None
    try:
        for flag, instead in {
            "--plan": "python -m speedrun.launch --plan",
            "--resume": "python -m speedrun.launch --resume RUN",
        }.items():
            if any(word.split("=")[0] == flag for word in flags):
                raise Problem(f"make speedrun does not take {flag}", instead)
        machine = setup()
        runs = measured_runs()
        preset, why = choose_preset(machine, memory_needed_gb("record", runs))
        preset, why = (options.preset, "as asked") if options.preset else (preset, why)
        print(f"preset {preset}: {why}")
        config = read_config(preset, options.data, flags)
        if config.compile and not machine.compiler:
            flags.append("--no-compile")
            config = read_config(preset, options.data, flags)
            print("there is no C++ compiler: training without torch.compile")
        plan = make_plan(config, machine, options.gpus, runs)
        print(plan)
        confirm(plan, options.yes or os.environ.get("YES") == "1")
        folder = Path(
            options.out or root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{preset}"
        ).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        show_cells_live()
        parameters = {
            "preset_name": preset,
            "gpus": options.gpus,
            "data": options.data,
            "target": options.target,
            "out": str(folder),
        }
        notebook = execute(parameters | {"changes": shlex.join(flags)}, folder)
    except Problem as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupted(folder, "interrupted")
    except DeadKernelError:  # what papermill makes of Ctrl-C, and of a kernel that was killed
        return interrupted(
            folder, "the notebook's process is gone (Ctrl-C, or killed for its memory)"
        )
    except papermill.PapermillExecutionError as error:
        print(
            f"\na cell failed: {error.ename}: {error.evalue}\n  → the notebook up to there: {(folder or Path()) / 'speedrun.html'}",
            file=sys.stderr,
        )
        return 1
    print_what_there_is(folder, notebook)
    return 0


def interrupted(folder: Path | None, why: str) -> int:
    """The notebook has ended early; its ranks notice that and save. Wait for them, and say how to go on."""
    if folder is None:
        print("\nnot started", flush=True)
        return 130
    # the cell that was cut off is an unawaited task: asyncio would print its traceback at exit
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    print(f"\n{why}: the ranks save", flush=True)
    ranks = [process for pulse in pulses(folder) if (process := process_of(pulse, folder))]
    try:
        psutil.wait_procs(ranks, timeout=20)
    except KeyboardInterrupt:
        print("\nnot waiting: the ranks still save by themselves", flush=True)
    again = f"to resume: python -m speedrun.launch --resume {os.path.relpath(folder)}"
    print(
        again if checkpoints(folder) else "nothing was saved: no training step was done", flush=True
    )
    return 130


def print_what_there_is(folder: Path, notebook: Path) -> None:
    kept = {
        "report": notebook.with_suffix(".html"),
        "notebook": notebook,
        "log": folder / "log.txt",
        "metrics": folder / "metrics.jsonl",
        "checkpoint": folder / "checkpoints",
        "sample": folder / "sample.txt",
    }
    print(f"\nall of it is in {folder}")
    for what, path in kept.items():
        print(
            f"  {what:11} {path.relative_to(folder)}" if path.exists() else f"  {what:11} missing"
        )
    print(f"more text from the model: python -m speedrun.sample {os.path.relpath(folder)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
