"""The speedrun: execute the final notebook with papermill, watch it live, and keep everything it made.

    python scripts/run_speedrun.py [--preset NAME] [--gpus N] [--data DIR] [--target LOSS] [--out DIR] [--price DOLLARS] [--yes] [FLAG …]

Further flags go to speedrun.train (--steps 100, --optim.adam.lr 1e-3, …). The preset is chosen for the machine if none is named.
"""

from speedrun.lab.errors import prepare_command

if __name__ == "__main__":
    prepare_command()  # before the imports that take seconds

import argparse
import asyncio
import contextlib
import logging
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jupytext
import nbformat
import papermill
import psutil
from kernel import own_kernel
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from speedrun.checkpoint import checkpoints
from speedrun.command import TrainCommand, refuse_old_run, settled
from speedrun.config import Config
from speedrun.heartbeat import read_heartbeats
from speedrun.lab.errors import UserError, explained, quoted, run_main
from speedrun.lab.files import claim, new_folder
from speedrun.lab.hardware import setup
from speedrun.lab.provenance import root
from speedrun.launch import (
    Insisting,
    LaunchCommand,
    check_gpus,
    choose_preset,
    confirm,
    make_plan,
    measured_runs,
    memory_needed_gb,
    plan_cost,
)
from speedrun.presets import read_command
from speedrun.report import write_html, write_report
from speedrun.supervise import process_of

NOTEBOOK = "24_speedrun"


def read_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", default="", help="name of a preset (default: what fits the machine)"
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
        "--price",
        type=float,
        default=0.0,
        help="dollars for an hour of one GPU, to say what it costs",
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


class LiveClient(PapermillNotebookClient):
    """Prints what the cells tagged `live` print, as they print it. papermill itself would print every cell's."""

    def process_message(self, msg, cell, cell_index):
        output = super().process_message(msg, cell, cell_index)
        live = "live" in cell.metadata.get("tags", [])
        if live and output and output.output_type == "stream":
            sys.stdout.write("".join(output.text))
            sys.stdout.flush()
        return output


class LiveEngine(NBClientEngine):
    """papermill's engine with that client; a notebook that cannot be saved on the way does not end its run."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        save, told = nb_man.save, []

        def save_if_possible(**which) -> None:
            try:
                save(**which)
            except OSError as error:
                if not told:
                    print(f"the notebook cannot be saved, going on: {explained(error) or error}")
                told.append(error)

        nb_man.save = save_if_possible
        client = LiveClient(nb_man, kernel_name=kernel_name, startup_timeout=120, timeout=None)
        return client.execute()


def plain(text: str) -> str:
    """A chapter's Markdown as any viewer shows it: boxes become quotations, and links that lead to files beside it, words."""
    quoted_box = re.compile(r"^```\{[^}]+\} ?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = quoted_box.sub(lambda m: "> **" + m[1] + "**\n>\n" + re.sub("^", "> ", m[2].strip(), flags=re.M), text)  # fmt: skip
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)\s]+\)", r"\1", text)


def notebook_of_a_run() -> nbformat.NotebookNode:
    """The final chapter without the cells that demonstrate something and train nothing."""
    notebook = jupytext.read(root() / "notebooks" / f"{NOTEBOOK}.py", fmt="py:percent")
    tagged = [cell for cell in notebook.cells if "demonstration" in cell.metadata.get("tags", [])]
    notebook.cells = [cell for cell in notebook.cells if cell not in tagged]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source)
    return notebook


def execute(parameters: dict, folder: Path) -> Path:
    """Execute the notebook with papermill into the run's folder; it is kept even when a cell fails."""
    source, notebook = folder / "source.ipynb", folder / "speedrun.ipynb"
    nbformat.write(notebook_of_a_run(), source)
    papermill_engines.register("live", LiveEngine)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ |= own_kernel(root() / "_build" / "kernel")
    try:
        papermill.execute_notebook(
            source,
            notebook,
            parameters,
            engine_name="live",
            progress_bar=False,
            cwd=root(),
            request_save_on_cell_execute=True,
        )
    finally:
        source.unlink(missing_ok=True)
        if notebook.exists():
            with contextlib.suppress(
                OSError, ValueError
            ):  # no room; or it is not whole, for want of room
                write_html(notebook)
    return notebook


@contextlib.contextmanager
def folder_of_a_run(out: str, preset: str) -> Iterator[Path]:
    """The run's folder, in which nobody else executes a notebook: a new one, or the one that was named."""
    if out:
        folder = Path(out).resolve()
        refuse_old_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_folder(root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{preset}")
    lock = claim(folder, "notebook")
    try:
        yield folder
    finally:
        lock.release()


def run_command(arguments: list[str], interrupts: Insisting) -> int:
    """Plan, ask, execute, and say what there is. Returns the status."""
    options, flags = read_arguments(arguments)
    for flag, instead in {
        "--plan": "python -m speedrun.launch --plan",
        "--resume": "python -m speedrun.launch --resume RUN",
    }.items():
        if any(word.split("=")[0] == flag for word in flags):
            raise UserError(f"make speedrun does not take {flag}", instead)
    machine, runs = setup(), measured_runs()
    preset, why = choose_preset(machine, memory_needed_gb("record", runs))
    preset, why = (options.preset, "as asked") if options.preset else (preset, why)
    print(f"preset {preset}: {why}")
    data = settled(options.data) if options.data else ""
    config = read_config(preset, data, flags)
    if config.compile and not machine.compiler:
        flags.append("--no-compile")
        config = read_config(preset, data, flags)
        print("there is no C++ compiler: training without torch.compile")
    plan = make_plan(config, machine, options.gpus, runs)
    for said in (str(plan), plan_cost(plan, runs, options.price)):
        print(textwrap.fill(said, 80, subsequent_indent="  ", break_long_words=False), flush=True)
    check_gpus(plan, machine)
    confirm(plan, options.yes or os.environ.get("YES") == "1")
    interrupts.install()
    with folder_of_a_run(options.out, preset) as folder:
        parameters = {"preset_name": preset, "gpus": options.gpus, "data": data}
        parameters |= {"target": options.target, "out": str(folder)}
        try:
            execute(parameters | {"changes": shlex.join(flags)}, folder)
        except (KeyboardInterrupt, asyncio.CancelledError):
            return interrupted(folder, "interrupted")
        except DeadKernelError:  # what papermill makes of Ctrl-C, and of a kernel that was killed
            why = "the notebook's process is gone (Ctrl-C, or killed for its memory)"
            return interrupted(folder, why)
        except papermill.PapermillExecutionError as error:
            page = folder / "speedrun.html"
            where = f"the notebook up to there: {page}" if page.exists() else "see above"
            raise UserError(f"a cell failed: {error.ename}: {error.evalue}", where) from None
        except RuntimeError as error:
            if "Kernel died" not in str(error):
                raise
            raise UserError(
                f"{sys.executable} could not start a notebook: {error}", "make setup"
            ) from None
        with contextlib.suppress(OSError):  # no room: it is told as missing
            write_report(folder)  # again, since the notebook's page is there by now
        print_what_there_is(folder)
    return 0


def main(arguments: list[str]) -> int:
    interrupts = Insisting()
    status = run_main(lambda: run_command(arguments, interrupts))
    return 128 + interrupts.signal if interrupts.signal and status == 130 else status


def interrupted(folder: Path, why: str) -> int:
    """The notebook has ended early; its ranks notice that and save. Wait for them, and say how to go on."""
    # the cell that was cut off is an unawaited task: asyncio would print its traceback at exit
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    print(f"\n{why}: the ranks save", flush=True)
    ranks = [p for status in read_heartbeats(folder) if (p := process_of(status, folder))]
    try:
        psutil.wait_procs(ranks, timeout=20)
    except KeyboardInterrupt:
        print("\nnot waiting: the ranks still save by themselves", flush=True)
    again = f"to resume: python -m speedrun.launch --resume {quoted(os.path.relpath(folder))}"
    print(
        again if checkpoints(folder) else "nothing was saved: no training step was done", flush=True
    )
    return 130


def print_what_there_is(folder: Path) -> None:
    kept = {
        "report": folder / "report.html",
        "notebook": folder / "speedrun.ipynb",
        "its page": folder / "speedrun.html",
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
    print(f"more text from the model: python -m speedrun.sample {quoted(os.path.relpath(folder))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
