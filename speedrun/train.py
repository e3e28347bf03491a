# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


# %% Who am I
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


# %% A clock that can be stopped
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


# %% One step
def build_model(config: Config, vocab_size: int, device: torch.device) -> tuple[nn.Module, dict[str, bool]]:
    """The model of a run on its device, and which of its parameters decay."""
    if config.architecture == "gpt":
        model = GPT(config.model, vocab_size, config.seed)
        return model.to(device), model.decays()
    from speedrun.history import build_rung

    model, decays = build_rung(config, vocab_size)
    return model.to(device), decays


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


# %% A number that is not one
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


# %% The run
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


# %% Stopping
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


# %% Warming up without a trace
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


# %% Validating
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


# %% The loop
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


# %% The command
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
