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
#     modules: [speedrun.train]
# ---

# %% [markdown]
# # The loop, and what the clock counts
#
# ```{admonition} Cost box
# Any machine: about forty seconds on two CPU cores, no GPU. The rules of the clock are those of the contest since record 21 was re-timed (Keller Jordan).
# ```
#
# ## The problem
#
# In February 2025 record 21 was timed again. Nothing in the program had changed; two sentences in the rules had. The first ten steps now counted, and a compiler option that searched for faster kernels before the clock started was banned. The same training
# took **3.8 seconds longer**. In the four months after that, six records were set for less than that much each.

# %%
from speedrun.lab.results import public_table

timings = {row["date"]: float(row["record_time_s"]) for row in public_table("records") if row["record"] == "21"}
before, after = timings["2025-01-26"], timings["2025-02-01"]
rows = [row for row in public_table("records") if 21 < int(row["record"]) <= 27]
gains = [float(a["record_time_s"]) - float(b["record_time_s"]) for a, b in zip(rows, rows[1:])]
assert round(after - before, 1) == 3.8
print(f"{before} s under the old rules, {after} s under the new; records 23 to 27 gained {', '.join(f'{gain:.1f}' for gain in gains)} s")

# %% [markdown]
# A clock is a definition. Whoever writes the loop decides what it counts, and can win or lose more there than with a kernel. So before any loop, the contract:
#
# - **Counted:** every training step, reading data, changing the schedule, logging.
# - **Not counted:** building the model, compiling, warming up, validating, saving. For these the clock is stopped, after waiting for the GPU, and started again.
# - Warm-up may run real steps, but must leave no trace: weights, optimizer and data stream are put back.
#
# ```{admonition} Prediction
# Python hands work to a GPU and goes on without waiting. **If you read a clock in Python after a step and forget to wait for the GPU, what do you measure?** And in the other direction: a loop that asks for the loss after every step has to wait for the GPU every time. On one that needs 100 ms a step, is that a disaster, a nuisance or nothing?
# ```
#
# ## The code
#
# ### Who am I
#
# A rank needs to know its number, how many there are, and its device. `torchrun` tells it in environment variables; without them there is one rank. On GPUs ranks talk through NCCL, on CPUs through gloo, which can also let several ranks share one GPU: useless for speed, precious for testing.

# %%
#| default_exp train
#| export
import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from speedrun.config import Config, check_config, config_from_json, read_command
from speedrun.data.loader import Batch, Loader, Position, Shards, validation_batches
from speedrun.lab.hardware import Problem, setup
from speedrun.lab.results import module_file, module_hashes, root, stamp
from speedrun.lab.runlog import RunLog, format_line, parse_line
from speedrun.model.baseline import learning_rate, make_adamw
from speedrun.model.gpt import GPT, model_flops_per_token


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

# %%
#| export
def join_ranks(device: str, backend: str) -> Ranks:
    """Join the other ranks of this run, if torchrun started any. device: auto, cpu or cuda; backend: auto, nccl or gloo."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise Problem("--device cuda, but PyTorch sees no GPU", "make doctor says why; or --device cpu")
        if local >= gpus and backend != "gloo":
            raise Problem(f"rank {rank} has no GPU of its own: {gpus} for {local + 1} or more ranks", f"--gpus {gpus}, or --backend gloo to share")
        torch.cuda.set_device(local % gpus)
    if world > 1 and not dist.is_initialized():
        backend = backend if backend != "auto" else "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return Ranks(rank, world, torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu"))

# %%
ranks = join_ranks("cpu", "auto")
assert ranks == Ranks(0, 1, torch.device("cpu"))
if not torch.cuda.is_available():
    try:
        join_ranks("cuda", "auto")
        raise AssertionError("accepted")
    except Problem as problem:
        print(problem)

# %% [markdown]
# ### A clock that can be stopped
#
# Waiting for the GPU at both ends is what makes it honest. `synchronize` does nothing on a CPU, which is never ahead of itself.

# %%
#| export
class Clock:
    """Training time in milliseconds, stopped for whatever does not count. `elapsed_ms` may carry on from a checkpoint."""

    def __init__(self, device: torch.device, elapsed_ms: float = 0.0):
        self.device, self.elapsed_ms, self.since = device, elapsed_ms, None

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.synchronize()
        self.since = time.perf_counter()

    def stop(self) -> float:
        """Stop, and return the training time so far."""
        self.synchronize()
        self.elapsed_ms, self.since = self.ms, None
        return self.elapsed_ms

    @property
    def ms(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.elapsed_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0.0)

    @contextlib.contextmanager
    def paused(self):
        """What happens in this block is not training time. A clock that stands still afterwards still does."""
        running = self.since is not None
        self.stop()
        yield
        if running:
            self.start()

# %%
clock = Clock(torch.device("cpu"))
clock.start()
time.sleep(0.05)
with clock.paused():
    time.sleep(0.2)
time.sleep(0.05)
assert 100 <= clock.stop() < 150, "two naps count, the pause does not"
time.sleep(0.05)
assert clock.ms == clock.elapsed_ms, "a stopped clock stands still"
print(f"{clock.ms:.0f} ms of training in 300 ms of life")

# %% [markdown]
# Single steps are timed by marks. On a GPU a mark is an event in its queue of work, read later, so that looking at the time does not take any.

# %%
#| export
class Marks:
    """Durations of single steps: `mark` after each, `drain` now and then. On a GPU marks are events and cost no waiting."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def drain(self) -> list[float]:
        """Milliseconds between successive marks since the last drain. The device must have been waited for."""
        pairs, self.marks = list(zip(self.marks, self.marks[1:])), self.marks[-1:]
        return [a.elapsed_time(b) if self.device.type == "cuda" else 1000 * (b - a) for a, b in pairs]

# %%
marks = Marks(torch.device("cpu"))
for nap in (0.0, 0.02, 0.04):
    time.sleep(nap)
    marks.mark()
first = marks.drain()
assert len(first) == 2 and 20 <= first[0] < 35 and 40 <= first[1] < 60 and marks.drain() == []

# %% [markdown]
# ### One step
#
# The model first. The package's, or for the historic rung the plain one of chapter 03; both take the same shape.

# %%
#| export
def build_model(config: Config, vocab_size: int, device: torch.device) -> tuple[nn.Module, dict[str, bool]]:
    """The model of a run on its device, and which of its parameters decay."""
    if config.architecture == "gpt":
        model = GPT(config.model, vocab_size, config.seed)
        return model.to(device), model.decays()
    from speedrun.history import build_rung

    model, decays = build_rung(config, vocab_size)
    return model.to(device), decays

# %% [markdown]
# A step is `grad_shards` micro-batches. Their losses are means over equally many tokens, so the gradient of the whole batch is the mean of their gradients; dividing each loss by `grad_shards` before going backward, and *summing* over micro-batches and ranks, gives exactly that, however they are dealt out.

# %%
#| export
def accumulate(forward, batches: list[Batch], grad_shards: int, device: torch.device, precision: str) -> Tensor:
    """Forward and backward through this rank's micro-batches. Gradients add up; returns this rank's part of the mean loss."""
    total = torch.zeros((), device=device)
    for batch in batches:
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch[:2])
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward(inputs, targets) / grad_shards
        loss.backward()
        total += loss.detach()
    return total


def sum_over_ranks(tensors: list[Tensor], world: int) -> None:
    """Add up each tensor over all ranks, in place."""
    if world > 1:
        for handle in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            handle.wait()

# %%
from speedrun.data.loader import DataOptions
from speedrun.data.shards import data_folder
from speedrun.data.sources import build_embedded
from speedrun.model.gpt import GPTOptions

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
gradients = {}
for grad_shards in (1, 2, 4, 8):
    loader = Loader(DataOptions(seq_len=64, step_tokens=1024, grad_shards=grad_shards))
    model = GPT(GPTOptions(2, 2, 32, 64), 288).double()
    loss = accumulate(model, loader.next(), grad_shards, ranks.device, "float32")
    gradients[grad_shards] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
for grad_shards, gradient in gradients.items():
    assert (gradient - gradients[1]).norm() < 1e-12 * gradients[1].norm()
print(f"one batch of 1,024 tokens in 1, 2, 4 or 8 parts: the same gradient, to {1e-12:.0e} of its length")

# %% [markdown]
# This is double precision. In single precision the parts are rounded separately, sums in another order differ in the seventh digit, and after some hundred steps two machines with different numbers of ranks have different losses in the third. Nobody is wrong. The README says how much.
#
# ### A number that is not one
#
# A gradient that overflows makes a parameter infinite, which makes the loss NaN, which makes everything NaN, within one step. By the time somebody looks, the culprit cannot be told from its victims. So a step whose gradient is not finite *updates nothing*: the fused AdamW takes a flag for that, made for loss scaling, which costs no waiting. What is broken then stays in the state in which it broke, and can
# be named.

# %%
#| export
def update(run: "Run") -> Tensor:
    """Clip, set the rate, step. Returns the gradient's length; where that is not finite, nothing is updated."""
    optim = run.config.optim
    total = nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
    finite = torch.isfinite(total)
    nn.utils.clip_grads_with_norm_(run.model.parameters(), optim.grad_clip or math.inf, torch.where(finite, total, 0.0))
    rate = learning_rate(run.step, run.config.steps, optim)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.found_inf, run.optimizer.grad_scale = (~finite).float(), None
    run.optimizer.step()
    run.skipped += run.optimizer.found_inf
    return total


def culprits(model: nn.Module) -> str:
    """The parameters that hold a number that is none; failing that, the gradients that do."""
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        return f"parameter {', '.join(broken)}"
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return f"the gradient of {', '.join(broken[-3:])}" if broken else "a gradient of an earlier step"

# %% [markdown]
# ### The run
#
# What a run consists of, while it is one:

# %%
#| export
@dataclass
class Run:
    """Everything that changes while training, and what it needs. `skipped` counts steps whose gradient was not finite."""

    config: Config
    folder: Path
    ranks: Ranks
    model: nn.Module
    forward: Any
    optimizer: torch.optim.Optimizer
    loader: Loader
    clock: Clock
    log: RunLog
    heart: "Heartbeat"
    interrupts: "Interrupts"
    skipped: Tensor
    step: int = 0
    stop_at: int | None = None
    marks: Marks | None = None

    def train_step(self) -> Tensor:
        """One step: read, forward and backward, sum over ranks, update. Returns this rank's part of the loss."""
        self.model.zero_grad()
        loss = accumulate(self.forward, self.loader.next(), self.config.data.grad_shards, self.ranks.device, self.config.precision)
        sum_over_ranks([p.grad for p in self.model.parameters()], self.ranks.world)
        update(self)
        self.step += 1
        return loss

# %% [markdown]
# Whoever watches a run from outside, and chapter 24 will, must be able to tell a rank that thinks from a rank that hangs. A ten-minute compilation is not a hang; ten minutes without a training step are. So each rank keeps a small file that says in which phase it is, and touches it whenever something happened.

# %%
#| export
class Heartbeat:
    """A file per rank that says what it is doing; its time of modification says when something last happened."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / "heartbeat" / f"rank{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.phase("start")
        if hasattr(signal, "SIGUSR1"):  # asked by this signal, even a rank that hangs writes down where
            self.stack = open(self.path.with_suffix(".stack"), "w")
            faulthandler.register(signal.SIGUSR1, file=self.stack)

    def phase(self, name: str, step: int = 0) -> None:
        """Enter a phase: start, data, build, compile, train, validate, checkpoint or end."""
        facts = {"phase": name, "step": step, "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(facts))
            os.replace(part, self.path)

    def beat(self) -> None:
        """Something happened. Touching a file needs no room on a disk."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

# %%
import tempfile

scratch = Path(tempfile.mkdtemp())
heart = Heartbeat(scratch, 3)
heart.phase("compile")
assert json.loads((scratch / "heartbeat" / "rank3.json").read_text()) == {"phase": "compile", "step": 0, "pid": os.getpid()}
then = (scratch / "heartbeat" / "rank3.json").stat().st_mtime_ns
time.sleep(0.02)
heart.beat()
assert (scratch / "heartbeat" / "rank3.json").stat().st_mtime_ns > then

# %% [markdown]
# ### Stopping
#
# Ctrl-C should save. With several ranks that is harder than it sounds: the signal reaches them at slightly different moments, and a rank that stops before step 500 while another enters it leaves that one waiting for a sum that never comes. So a rank that was asked to stop first writes down at which step it is, waits
# until all have, and all go on to the largest of those numbers. Whoever is behind catches up, and nobody waits for a sum in vain.

# %%
#| export
class Interrupts:
    """SIGINT and SIGTERM as a request, looked at between steps. A second signal insists."""

    def __init__(self):
        self.signal: int | None = None

    def install(self) -> None:
        """Take over the two signals of this process (main thread only)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is not None:
            sys.exit(128 + number)
        self.signal = number


def agree_on_stop(folder: Path, ranks: Ranks, step: int, patience_s: float = 20.0) -> int:
    """The step before which all ranks stop, once all were asked to: the largest of the steps that they are at."""
    own = folder / "heartbeat" / f"stop{ranks.rank}"
    own.with_suffix(".part").write_text(str(step))
    os.replace(own.with_suffix(".part"), own)
    end = time.monotonic() + patience_s
    while len(found := [p for p in (folder / "heartbeat").glob("stop*") if not p.suffix]) < ranks.world:
        if time.monotonic() > end:
            raise Problem(f"rank {ranks.rank} was asked to stop, but only {len(found)} of {ranks.world} ranks were", "interrupt the launcher, not a rank")
        time.sleep(0.02)
    return max(int(path.read_text()) for path in found)

# %%
answers = {}
workers = [threading.Thread(target=lambda r=r, s=s: answers.update({r: agree_on_stop(scratch, Ranks(r, 3, ranks.device), s)})) for r, s in ((0, 7), (1, 8), (2, 7))]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert answers == {0: 8, 1: 8, 2: 8}
print("ranks at steps 7, 8 and 7 all stop before step 8")

# %% [markdown]
# ### Checkpoints
#
# A checkpoint is a folder: weights and optimizer state as *safetensors*, a format that holds numbers and cannot hold code, and a JSON file with the rest. It is written under another name and renamed when it is complete, so a checkpoint either exists or does not. If there is no room, the run goes on and says so; the previous
# checkpoint is deleted only once the next one stands.

# %%
#| default_exp checkpoint
#| export
import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedrun.lab.hardware import Problem


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, `parameter/moment`."""
    return {f"{name}/{key}": value for name, p in parameters.items() for key, value in optimizer.state[p].items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Put named tensors back as the state of an optimizer, on each parameter's device."""
    optimizer.state.clear()
    for label, value in saved.items():
        name, key = label.rsplit("/", 1)
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)

# %%
#| export
KEPT = 2


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if not path.suffix)


def save_checkpoint(folder: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], facts: dict) -> Path | str:
    """Save under `folder/checkpoints/step-…`, whole or not at all. Returns its path, or the reason why there is none."""
    path = folder / "checkpoints" / f"step-{step:07d}"
    part = path.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, part / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in moments.items()}, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        if path.exists():
            shutil.rmtree(path)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        return str(error)
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path

# %%
#| export
def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Weights, optimizer tensors and facts of a checkpoint folder, on the CPU."""
    try:
        facts = json.loads((path / "state.json").read_text())
        return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"), facts
    except (OSError, ValueError, SafetensorError) as error:
        older = [str(other) for other in checkpoints(path.parent.parent) if other != path]
        fix = f"delete it; the run then resumes from {older[-1]}" if older else "start the run again: it has no other checkpoint"
        raise Problem(f"{path} is not a whole checkpoint: {error}", fix) from None


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise Problem(f"{folder} has no checkpoint", "give the folder of a run, such as runs/…; a run saves one when it ends or is interrupted")
    return found[-1]

# %%
weights = {"w": torch.randn(3, 4), "b": torch.zeros(4)}
for step in (10, 20, 30):
    saved = save_checkpoint(scratch, step, weights, {"w/exp_avg": torch.ones(3, 4)}, {"epoch": 1})
assert [path.name for path in checkpoints(scratch)] == ["step-0000020", "step-0000030"] and latest_checkpoint(scratch) == saved
back, moments, facts = load_checkpoint(saved)
assert all(torch.equal(back[name], weights[name]) for name in weights) and facts == {"step": 30, "epoch": 1}
(saved / "model.safetensors").write_bytes(b"short")
try:
    load_checkpoint(saved)
    raise AssertionError("accepted")
except Problem as problem:
    assert "step-0000020" in problem.fix
    print(str(problem).replace(str(scratch), "runs/example"))

# %% [markdown]
# ### Warming up without a trace
#
# The first step compiles, allocates and tunes. So a few real steps and one validation batch are run before the clock starts, and then undone: weights and moments are put back, the data stream is set to where it was.

# %%
#| export train
def warm_up(run: Run, validation: Shards) -> float:
    """Run a few real steps and a validation batch, undo them, and return the seconds that it took."""
    begin = time.perf_counter()
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    named = dict(run.model.named_parameters())
    moments = {label: value.clone() for label, value in optimizer_tensors(run.optimizer, named).items()}
    step, position = run.step, run.loader.position
    for _ in range(run.config.warmup):
        run.train_step()
        run.heart.beat()
    first = next(validation_batches(validation, run.config.data, 1 << 62, run.ranks.rank, run.ranks.world))
    evaluate(run, [first])
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(weights[name])
    restore_optimizer(run.optimizer, named, moments)
    run.model.zero_grad()
    run.step, run.loader.position, run.skipped = step, position, torch.zeros_like(run.skipped)
    run.clock.synchronize()
    return time.perf_counter() - begin

# %% [markdown]
# ### Validating
#
# The mean over a fixed number of tokens; each rank takes its share of the micro-batches, and two numbers are summed over the ranks.

# %%
#| export train
@torch.no_grad()
def evaluate(run: Run, batches) -> float:
    """Mean loss, nats a token, over validation micro-batches that are dealt out to the ranks."""
    device, total = run.ranks.device, torch.zeros(2, dtype=torch.float64, device=run.ranks.device)
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.config.precision == "bfloat16"):
            total[0] += run.forward(inputs, targets)
        total[1] += 1
        run.heart.beat()
    sum_over_ranks([total], run.ranks.world)
    return (total[0] / total[1]).item()


def validate(run: Run, validation: Shards) -> float:
    """Validate and log, with the clock stopped."""
    with run.clock.paused():
        run.heart.phase("validate", run.step)
        state = gpu_state(run.ranks.device)
        batches = validation_batches(validation, run.config.data, run.config.val_tokens, run.ranks.rank, run.ranks.world)
        loss = evaluate(run, batches)
        run.log.line(format_line(run.step, run.config.steps, run.clock.ms, val_loss=loss))
        average = run.clock.ms / max(run.step, 1)
        run.log.record("val", step=run.step, val_loss=loss, train_time_ms=run.clock.ms, step_avg_ms=average, **state)
        run.heart.phase("train", run.step)
    return loss

# %% [markdown]
# ### The loop
#
# What is left is short.

# %%
#| export train
def run_loop(run: Run, validation: Shards) -> str:
    """Train from `run.step` to the end. Returns why it ended: finished or interrupted."""
    last, loss = run.config.max_steps or run.config.steps, None
    run.marks = Marks(run.ranks.device)
    run.heart.phase("train", run.step)
    run.clock.start()
    run.marks.mark()
    while True:
        if run.step % run.config.val_every == 0 or run.step == last:
            validate(run, validation)
        if run.step == last:
            return "finished"
        if run.interrupts.signal and run.stop_at is None:
            run.stop_at = agree_on_stop(run.folder, run.ranks, run.step)
        if run.step == run.stop_at:
            return "interrupted"
        loss = run.train_step()
        run.marks.mark()
        run.heart.beat()
        if run.step % run.config.log_every == 0:
            log_step(run, loss)
        if run.config.checkpoint_every and run.step % run.config.checkpoint_every == 0 and run.step < last:
            keep(run)

# %%
#| export train
def log_step(run: Run, loss: Tensor) -> None:
    """Log the training loss of the last step, as the mean over all ranks; stop the run if a number was not one."""
    together = torch.stack([loss, run.skipped])
    sum_over_ranks([together], run.ranks.world)
    loss, skipped = together.tolist()
    if skipped or not math.isfinite(loss):
        what = f"step {run.step}: {culprits(run.model)} is not finite; nothing has been updated since"
        saved = [path.name for path in checkpoints(run.folder)]
        fix = "a lower --optim.lr or a longer --optim.warmup-steps"
        raise Problem(what, f"--resume {run.folder} goes back to {saved[-1]}; {fix}" if saved else fix)
    run.log.line(format_line(run.step, run.config.steps, run.clock.ms, train_loss=loss))
    epoch, rate = run.loader.position.epoch, run.optimizer.param_groups[0]["lr"]
    steps_ms = [round(duration, 3) for duration in run.marks.drain()]
    run.log.record("step", step=run.step, train_loss=loss, lr=rate, epoch=epoch, train_time_ms=run.clock.ms, steps_ms=steps_ms)


def keep(run: Run) -> Path | None:
    """Save a checkpoint (rank 0), with the clock stopped. None where there was no room, which is said and survived."""
    saved = None
    with run.clock.paused():
        run.heart.phase("checkpoint", run.step)
        if run.ranks.rank == 0:
            facts = {"config": dataclasses.asdict(run.config), "position": run.loader.position, "train_time_ms": run.clock.ms}
            facts |= {"data_sha256": run.loader.shards.manifest.sha256, "vocab_size": run.loader.shards.manifest.vocab_size}
            facts |= {"tokenizer": run.loader.shards.manifest.tokenizer}
            named = dict(run.model.named_parameters())
            saved = save_checkpoint(run.folder, run.step, named, optimizer_tensors(run.optimizer, named), facts)
            if isinstance(saved, str):
                run.log.line(f"no checkpoint at step {run.step}, going on without: {saved}")
                return None
            run.log.record("checkpoint", step=run.step, path=str(saved))
        run.heart.phase("train", run.step)
    return saved

# %% [markdown]
# Around the loop stands the function that puts a run together. It is the only long list in this chapter, and reads from top to bottom: ranks, data, model, optimizer, an earlier checkpoint if there is one.

# %%
#| export train
def assemble(config: Config, folder: Path, echo=print) -> tuple[Run, Shards]:
    """Everything a run needs, on this rank, at step 0; and the validation data."""
    ranks = join_ranks(config.device, config.backend)
    check_config(config, ranks.world)
    heart = Heartbeat(folder, ranks.rank)
    heart.phase("data")
    loader = Loader(config.data, ranks.rank, ranks.world, pin=ranks.device.type == "cuda")
    validation = Shards(config.data.path, "val")
    heart.phase("build")
    model, decays = build_model(config, loader.shards.manifest.vocab_size, ranks.device)
    forward = torch.compile(model, dynamic=False, fullgraph=True) if config.compile else model
    optimizer = make_adamw(dict(model.named_parameters()), decays, config.optim)
    log = RunLog(folder, echo) if ranks.rank == 0 else SilentLog()
    skipped = torch.zeros((), device=ranks.device)
    run = Run(config, folder, ranks, model, forward, optimizer, loader, Clock(ranks.device), log, heart, Interrupts(), skipped)
    return run, validation


class SilentLog:
    """The log of the other ranks: they have nothing to say that rank 0 does not."""

    def record(self, kind: str, **fields) -> None:
        pass

    def line(self, text: str) -> None:
        pass

# %%
#| export train
def resume(run: Run) -> None:
    """Go back to the latest checkpoint of the run's folder: weights, moments, position in the data, clock."""
    path = latest_checkpoint(run.folder)
    weights, moments, facts = load_checkpoint(path)
    if facts["data_sha256"] != run.loader.shards.manifest.sha256:
        what = f"{path} was trained on other data than {run.loader.shards.folder}"
        raise Problem(what, f"--data.path of the folder whose SHA-256 begins with {facts['data_sha256'][:12]}")
    named = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(weights[name])
    restore_optimizer(run.optimizer, named, moments)
    run.step, run.loader.position = facts["step"], Position(*facts["position"])
    run.clock.elapsed_ms = facts["train_time_ms"]
    run.log.line(f"resumed from {path} at step {run.step}")

# %%
#| export train
def describe_run(run: Run, command: str) -> dict:
    """The first record of a log: config, source and hash of every module, versions, machine, data, size of the model."""
    names, manifest = module_hashes(["speedrun.train"]), run.loader.shards.manifest
    source = {name: {"hash": digest, "source": module_file(name).read_text(encoding="utf-8")} for name, digest in names.items()}
    commit = subprocess.run(["git", "-C", str(root()), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    data = {"source": manifest.source, "sha256": manifest.sha256, "tokenizer": manifest.tokenizer}
    where = stamp(command, ["speedrun.train"], n=1, seeds=[run.config.seed], corpus={"name": manifest.source, "sha256": manifest.sha256})
    size = sum(p.numel() for p in run.model.parameters())
    held_out = manifest.split("val")
    bytes_per_token = sum(f.bytes or 0 for f in held_out) / sum(f.tokens for f in held_out) or None
    flops = model_flops_per_token(run.config.model, manifest.vocab_size, run.config.data.seq_len)
    return {"config": dataclasses.asdict(run.config), "modules": source, "commit": commit, "data": data, "stamp": where, "world": run.ranks.world,
            "device": str(run.ranks.device), "parameters": size, "bytes_per_token": bytes_per_token, "flops_per_token": flops}  # fmt: skip


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clock (MHz), power (W) and temperature (°C) of a GPU at this moment, for whoever wonders why theirs is slower."""
    if device.type != "cuda":
        return {}
    try:
        watts = torch.cuda.power_draw(device) / 1000
        return {"clock_mhz": torch.cuda.clock_rate(device), "power_w": watts, "temperature_c": torch.cuda.temperature(device)}
    except (ImportError, RuntimeError):  # without nvidia-ml-py, or where the driver does not tell
        return {}


def memory_mb(device: torch.device) -> dict[str, int]:
    """Peak memory of this rank in MiB: allocated and reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(device) >> 20, "reserved": torch.cuda.max_memory_reserved(device) >> 20}
    return {"resident": psutil.Process().memory_info().rss >> 20}

# %%
#| export train
def train(config: Config, folder: Path, again: bool = False, interrupts: Interrupts | None = None, echo=print, command: str = "") -> Run:
    """Train a run into `folder`, or resume it (`again`). Returns the Run; all of its numbers are in the folder's log."""
    run, validation = assemble(config, folder, echo)
    run.interrupts = interrupts or run.interrupts
    if again:
        resume(run)
    run.log.record("run", again=again, step=run.step, **describe_run(run, command))
    run.heart.phase("compile")
    seconds = warm_up(run, validation) if config.warmup else 0.0
    run.log.record("phase", phase="compile and warm-up", seconds=seconds)
    run.log.line(f"compile and warm-up: {seconds:.1f} s, not counted")
    why = run_loop(run, validation)
    run.clock.stop()
    saved = keep(run)
    memory = memory_mb(run.ranks.device)
    run.log.record("end", step=run.step, reason=why, train_time_ms=run.clock.ms, memory_mb=memory, checkpoint=str(saved))
    run.log.line(f"{why} at step {run.step}: {run.clock.ms / 1000:.1f} s of training, peak memory {memory} MiB")
    if why == "interrupted":
        run.log.line(f"to resume: python -m speedrun.train --resume {folder}")
    run.heart.phase("end", run.step)
    return run

# %% [markdown]
# Train one, forty steps of the laptop's run without compiling, and look at what it says:

# %%
from speedrun.config import preset, vary

brief = vary(preset("cpu"), {"steps": 40, "compile": False, "val_every": 20, "val_tokens": 8192, "log_every": 10, "optim.warmup_steps": 5})
whole = train(brief, scratch / "whole")

# %%
from speedrun.lab.runlog import read_metrics, series

records = read_metrics(scratch / "whole" / "metrics.jsonl")
assert [record["kind"] for record in records][:2] == ["run", "phase"] and records[-1]["kind"] == "end"
assert abs(series(records, "val")[0]["val_loss"] - math.log(288)) < 0.3 and series(records, "val")[-1]["val_loss"] < 4.0
assert "speedrun.train" in records[0]["modules"] and "class Run" in records[0]["modules"]["speedrun.train"]["source"]
steps_ms = [duration for record in series(records, "step") for duration in record["steps_ms"]]
assert len(steps_ms) == 40 and sum(steps_ms) < 1.2 * records[-1]["train_time_ms"] + 200
assert whole.clock.ms > 0.8 * (sum(steps_ms) - max(steps_ms[20:21]))

# %% [markdown]
# ### Resuming is exact, or it is not resuming
#
# A run that was interrupted and resumed should end where it would have ended. Not nearly: on a CPU, every bit of every weight. Stop a second run after 23 steps, in the middle of everything, and let a third go on:

# %%
train(vary(brief, {"max_steps": 23}), scratch / "broken", echo=None)
resumed = train(brief, scratch / "broken", again=True, echo=None)
for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
    assert torch.equal(a, b), f"{name} differs after resuming"
curves = [series(read_metrics(scratch / name / "metrics.jsonl"), "val")[-1]["val_loss"] for name in ("whole", "broken")]
assert curves[0] == curves[1] and resumed.loader.position == whole.loader.position
print(f"stopped at 23, resumed to 40: every weight is equal, final loss {curves[1]:.6f} both times")

# %% [markdown]
# That is a strong test, because nearly everything can break it: a moment that was not saved, a position off by one batch, warm-up steps that left a trace.
#
# And the broken number? Put one infinity into one matrix at step 12, and see who is accused:

# %%
run, validation = assemble(brief, scratch / "poisoned", echo=None)
poison = run.train_step


def poisoned_step():
    if run.step == 12:
        with torch.no_grad():
            run.model.mlp_up[1, 5, 5] = math.inf
    return poison()


run.train_step = poisoned_step
try:
    run_loop(run, validation)
    raise AssertionError("an infinity went unnoticed")
except Problem as problem:
    assert problem.what.startswith("step 20: parameter mlp_up is not finite")
    print(problem)
assert all(torch.isfinite(p).all() for name, p in run.model.named_parameters() if name != "mlp_up"), "nobody else was harmed"

# %% [markdown]
# ### The command
#
# `python -m speedrun.train` is one rank: alone, or one of torchrun's. Under a launcher it also has a *lifeline*. A launcher that is killed cannot clean up after itself, and a GPU that is held by an orphan is found by the next user. So each rank ends itself when its standard input, a pipe that the launcher holds, comes to its end, or when its parent process is no longer the one that started it.

# %%
#| export train
def lifeline(interrupts: Interrupts | None = None, grace_s: float = 10.0) -> None:
    """End this process when its launcher dies: standard input ends, or the parent changes. Only under a launcher.

    With `interrupts` the run is asked to stop first, so that it can save, and has `grace_s` seconds for that.
    """
    if os.environ.get("SPEEDRUN_LIFELINE") != "1":
        return
    parent = os.getppid()

    def end() -> None:
        if interrupts is not None:
            interrupts.signal = signal.SIGTERM
            time.sleep(grace_s)
        os._exit(70)

    def listen() -> None:
        while os.read(0, 1):
            pass
        end()

    def look_up() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    for watch in (listen, look_up):
        threading.Thread(target=watch, daemon=True).start()

# %%
orphan = "from speedrun.train import lifeline; lifeline(); import time; print('up', flush=True); time.sleep(600)"
held = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"SPEEDRUN_LIFELINE": "1"}}
child = subprocess.Popen([sys.executable, "-c", orphan], **held)
assert child.stdout.readline() == b"up\n"
child.stdin.close()
assert child.wait(timeout=10) == 70
print("the launcher's end of the pipe closed; the rank ended itself")

# %%
#| export train
@dataclass(frozen=True)
class TrainCommand:
    """Train on this machine as one rank, or as one of torchrun's ranks. For several GPUs: python -m speedrun.launch."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The run."""
    out: str = ""
    """Folder for logs and checkpoints; empty: runs/<date>-<preset> in the project."""
    resume: str = ""
    """Folder of a run to go on with; its own settings are used, except for --max-steps."""


def run_folder(command: TrainCommand) -> Path:
    """Where a run writes: as told, or a new folder named by date and preset."""
    if command.out or command.resume:
        return Path(command.out or command.resume)
    return root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{command.config.preset}"


def saved_config(folder: Path, max_steps: int) -> Config:
    """The config that a run's latest checkpoint was saved with."""
    _, _, facts = load_checkpoint(latest_checkpoint(folder))
    return dataclasses.replace(config_from_json(facts["config"]), max_steps=max_steps)

# %%
#| export train
def main(arguments: list[str]) -> int:
    """`python -m speedrun.train`. Status: 0 finished, 1 a problem (printed with its fix), 130 or 143 interrupted and saved."""
    interrupts = Interrupts()
    try:
        setup()
        lifeline(interrupts)
        command = read_command(TrainCommand, arguments, "cpu", "python -m speedrun.train")
        folder = run_folder(command)
        config = saved_config(folder, command.config.max_steps) if command.resume else command.config
        interrupts.install()
        with progress(config) as echo:
            train(config, folder, bool(command.resume), interrupts, echo, shlex.join(["python", "-m", "speedrun.train", *arguments]))
    except Problem as problem:
        print(problem, file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 128 + interrupts.signal if interrupts.signal else 0


def say(line: str) -> None:
    """Print at once; if nobody is left to read it, go on."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


@contextlib.contextmanager
def progress(config: Config):
    """A way to show log lines: above a progress bar in a terminal, plainly elsewhere."""
    if not sys.stdout.isatty():
        yield say
        return
    with tqdm(total=config.max_steps or config.steps, unit="step", dynamic_ncols=True) as bar:

        def echo(line: str) -> None:
            numbers = parse_line(line)
            if numbers:
                bar.update(numbers["step"] - bar.n)
            if not numbers or "val_loss" in numbers:
                bar.write(line)
            else:
                bar.set_postfix_str(f"loss {numbers['train_loss']:.3f}")

        yield echo


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main(sys.argv[1:]))

# %% [markdown]
# Its whole life in one cell: start it as a user would, press Ctrl-C, read what it says, and do what it says.

# %%
command = [sys.executable, "-m", "speedrun.train", "--preset", "smoke", "--out", str(scratch / "live")]
live = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
said = []
for line in live.stdout:
    said.append(line.rstrip())
    if line.startswith("step:100/"):
        live.send_signal(signal.SIGINT)
assert live.wait() == 130 and said[-1].startswith("to resume: python -m speedrun.train --resume")
print("\n".join(said[-3:]).replace(str(scratch), "runs"))
advice = said[-1].removeprefix("to resume: python").split()
on = subprocess.run([sys.executable, *advice, "--max-steps", "150"], capture_output=True, text=True)
assert on.returncode == 0 and "finished at step 150" in on.stdout
print("…\n" + "\n".join(on.stdout.splitlines()[:1] + on.stdout.splitlines()[-1:]).replace(str(scratch), "runs"))

# %% [markdown]
# ## The measurement
#
# What does a step spend its time on, in the loop as it is? The pieces of `train_step` are called one by one here, with a wait after each. Beside them, two ways to time a whole step: one that waits for the device and one that does not.

# %%
#| export measure.training_loop
import tempfile
import time
from pathlib import Path

import torch

from speedrun.config import preset, vary
from speedrun.lab.results import stamp

NAMES = ("cpu", "gpu")
PRESET_OF = {"cpu": "cpu", "gpu": "small"}


def time_pieces(run: Run, repeats: int) -> dict[str, float]:
    """Milliseconds of each piece of a step, waiting for the device after each (medians)."""
    shards, device, precision = run.config.data.grad_shards, run.ranks.device, run.config.precision
    named, seen = list(run.model.parameters()), {}

    def timed(name, piece):
        begin = time.perf_counter()
        result = piece()
        run.clock.synchronize()
        seen.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
        return result

    for _ in range(repeats):
        run.model.zero_grad()
        run.clock.synchronize()
        batches = timed("reading", run.loader.next)
        timed("forward and backward", lambda batches=batches: accumulate(run.forward, batches, shards, device, precision))
        timed("sum over ranks", lambda: sum_over_ranks([p.grad for p in named], run.ranks.world))
        timed("clip and update", lambda: update(run))
        timed("heartbeat and mark", lambda: (run.heart.beat(), run.marks.mark()))
    return {name: sorted(times)[len(times) // 2] for name, times in seen.items()}

# %%
#| export measure.training_loop
def time_steps(run: Run, repeats: int) -> dict[str, float]:
    """Milliseconds a step: as Python sees it without waiting, and with one wait at the end of all (means)."""
    run.clock.synchronize()
    begin = time.perf_counter()
    run.train_step()
    one = 1000 * (time.perf_counter() - begin)
    run.clock.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run.train_step()
    run.clock.synchronize()
    return {"without waiting": one, "true": 1000 * (time.perf_counter() - begin) / repeats}


def time_reading_losses(run: Run, repeats: int) -> float:
    """Milliseconds a step (mean) if the loss is asked for after every one."""
    run.clock.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run.train_step().item()
    return 1000 * (time.perf_counter() - begin) / repeats


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Time the pieces of a step of a preset on this machine. Arguments: a data folder, if not the preset's."""
    config = vary(preset(PRESET_OF[name]), {"data.path": arguments[0]} if arguments else {})
    with tempfile.TemporaryDirectory() as folder:
        run, validation = assemble(config, Path(folder), echo=None)
        run.marks = Marks(run.ranks.device)
        warm_up(run, validation)
        repeats = 30 if name == "gpu" else 60
        data = {"steps": time_steps(run, repeats), "pieces": time_pieces(run, repeats), "asking": time_reading_losses(run, repeats)}
    manifest = run.loader.shards.manifest
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    data |= {"preset": config.preset, "tokens": config.data.step_tokens, "grad_shards": config.data.grad_shards}
    return data, stamp(command, ["speedrun.measure.training_loop"], n=repeats, corpus=corpus)

# %% [markdown]
# On a GPU, for a model of 51 million parameters, and on two CPU cores for the laptop's:

# %%
from speedrun.lab.results import figure_style, load_result, measured_on

results = {name: load_result("training_loop", name) for name in ("gpu", "cpu")}
gpu, cpu = (results[name]["data"] for name in ("gpu", "cpu"))
asking = gpu["asking"] / gpu["steps"]["true"] - 1
others = {name: 1 - data["pieces"]["forward and backward"] / sum(data["pieces"].values()) for name, data in (("gpu", gpu), ("cpu", cpu))}
assert gpu["steps"]["without waiting"] < gpu["steps"]["true"] and abs(asking) < 0.1
print(f"a GPU step looks like {gpu['steps']['without waiting']:.0f} ms to a clock that does not wait, and takes {gpu['steps']['true']:.0f}")
print(f"asking for the loss after every step costs {asking:.1%}")
for name in results:
    print(f"{name}: {measured_on(results[name])}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Shares of the pieces of a training step on a GPU and on a CPU"}}
import matplotlib.pyplot as plt

figure_style()
fig, axis = plt.subplots(figsize=(8.4, 2.5))
pieces = list(gpu["pieces"])
for y, data in enumerate((gpu, cpu)):
    left, total = 0.0, sum(data["pieces"].values())
    for n, piece in enumerate(pieces):
        share = 100 * data["pieces"][piece] / total
        axis.barh(-y, share, left=left, height=0.6, color=f"C{n}", label=piece if y == 0 else None)
        left += share
axis.set_yticks([0, -1], [f"GPU: {sum(gpu['pieces'].values()):.0f} ms", f"CPU: {sum(cpu['pieces'].values()):.0f} ms"])
axis.set_xlim(0, 100)
axis.set_xlabel("share of a step (%)")
axis.grid(axis="y", visible=False)
axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3)
axis.set_title(f"all that is not the model: {others['gpu']:.1%} of a step on the GPU, {others['cpu']:.1%} on the CPU")
plt.show()

# %% [markdown]
# So the answer to the prediction: a clock that does not wait measures how fast Python can *ask*, which is a number about Python. And asking for the loss after every step, the sin that every guide warns of, costs a per cent or so when a step takes a tenth of a second, because Python is quick to catch up. It would be a disaster for a step of two milliseconds. Rules of thumb have units.
#
# The loop itself is nearly free, and that is its whole ambition: heartbeats, marks, the check for finite numbers and the log together are lost in the width of a line. Nothing in this chapter will ever make a run faster. It makes sure that *faster* means something.
#
# ## What it costs, and when it fails
#
# One optimizer state per rank: every rank holds all weights and both moments and repeats the same update. For 124 million parameters that is one and a half gigabytes and two milliseconds, eight times over. Chapter 20 shards it.
#
# The check for finite numbers looks at gradients. A loss that runs away slowly, finite all the while, passes it. And a checkpoint is exact on a CPU only: on a GPU some sums are taken in whatever order the hardware finishes, so a resumed run is as close to the uninterrupted one as two uninterrupted runs are to each other.
#
# ## Exercises
#
# 1. The contest's `step_avg` divides all training time by the number of steps, the slow first ones included. Write `steady_ms(steps_ms, skip)`: the mean after leaving out the first `skip` steps, and the share of training time that the first `skip` steps took.

# %% tags=["solution"]
def steady_ms(steps_ms: list[float], skip: int) -> tuple[float, float]:
    """Mean duration after the first `skip` steps, and the share of all time that those first ones took."""
    rest = steps_ms[skip:]
    return sum(rest) / len(rest), sum(steps_ms[:skip]) / sum(steps_ms)

# %%
assert steady_ms([10.0, 10.0, 1.0, 1.0], 2) == (1.0, 20 / 22)
steady, share = steady_ms(steps_ms, 5)
print(f"the brief run above: {steady:.0f} ms a step after the fifth; the first five took {share:.0%} of its time")

# %% [markdown]
# 2. Eight micro-batches and three GPUs do not go together, and `check_options` refuses. Could the loop weight the gradients instead? Write `shares(micro_batches, ranks)`: how many micro-batches each rank would compute, as evenly as possible, and say what the two other ranks do while the unlucky one works.

# %% tags=["solution"]
def shares(micro_batches: int, ranks: int) -> list[int]:
    """Micro-batches per rank, differing by at most one, the larger first."""
    each, more = divmod(micro_batches, ranks)
    return [each + (rank < more) for rank in range(ranks)]

# %%
assert shares(8, 3) == [3, 3, 2] and shares(8, 4) == [2] * 4 and sum(shares(7, 5)) == 7
busy = sum(shares(8, 3)) / (3 * max(shares(8, 3)))
print(f"three GPUs would take as long as {8 / max(shares(8, 3)):.1f} and be busy for {busy:.0%} of it: possible, correct, and a poor bargain")

# %%
import shutil

shutil.rmtree(scratch)
