# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizers,
    save_checkpoint,
)


# %% Who am I
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from speedrun.config import Config, check_config, config_from_json, fields_of, preset
from speedrun.config import read_command, switches_of, vary
from speedrun.data.loader import Batch, Loader, Position, Shards, validation_batches
from speedrun.data.tokenizer import decode_bytes
from speedrun.lab.errors import Problem
from speedrun.lab.hardware import setup
from speedrun.lab.provenance import module_file, module_hashes, root, stamp
from speedrun.lab.runlog import RunLog, format_line, parse_line
from speedrun.optim.adamw import make_adamw
from speedrun.optim.muon import Muon, rate_factor
from speedrun.optim.newton_schulz import MatrixOptimizer, MatrixOptions
from speedrun.optim.schedule import between, learning_rate
from speedrun.model.gpt import GPT, model_flops_per_token


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device


def choose_device(device: str, backend: str, rank: int, local: int) -> torch.device:
    """The device of a rank; local: its number on this machine. device: auto, cpu or cuda."""
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise Problem(
            "--device cuda, but PyTorch sees no GPU", "make doctor says why; or --device cpu"
        )
    if not gpus:
        return torch.device("cpu")
    if local >= gpus and backend != "gloo":
        what = f"rank {rank} has no GPU of its own: there are {gpus}"
        raise Problem(what, f"--gpus {gpus}, or --backend gloo to share one, slowly")
    return torch.device("cuda", local % gpus)


def join_ranks(device: str, backend: str) -> Ranks:
    """Join the other ranks of this run, if torchrun started any. backend: auto, nccl or gloo."""
    rank, world, local = (
        int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    chosen = choose_device(device, backend, rank, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        auto = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(
            auto if backend == "auto" else backend, timeout=timedelta(minutes=30)
        )
    return Ranks(rank, max(world, 1), chosen)


# %% A clock that can be stopped
class Clock:
    """Training time in ms, stopped for whatever does not count. `elapsed_ms` may carry on from a checkpoint."""

    def __init__(self, device: torch.device, elapsed_ms: float = 0.0):
        self.device, self.elapsed_ms = device, elapsed_ms
        self.since: float | None = None

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        self.wait()
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.wait()
        self.elapsed_ms, self.since = self.ms, None

    @property
    def ms(self) -> float:
        """Training time so far, without waiting for the device."""
        return self.elapsed_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0.0)


@contextlib.contextmanager
def paused(clock: Clock, marks: "Marks | None" = None):
    """What happens in this block is not training time, nor part of a step for `marks`."""
    running = clock.since is not None
    clock.stop()
    yield
    if running:
        clock.start()
    if marks is not None:
        marks.restart()


class Marks:
    """Durations of single steps: `mark` after each, `drain` now and then. On a GPU a mark costs no waiting."""

    def __init__(self, device: torch.device):
        self.device, self.marks, self.done = device, [], []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def drain(self) -> list[float]:
        """Milliseconds between successive marks since the last drain. The device must have been waited for."""
        pairs, done = list(zip(self.marks, self.marks[1:])), self.done
        self.marks, self.done = self.marks[-1:], []
        gpu = self.device.type == "cuda"
        return done + [a.elapsed_time(b) if gpu else 1000 * (b - a) for a, b in pairs]

    def restart(self) -> None:
        """Leave out what happened since the last mark: a validation, say."""
        self.done, self.marks = self.drain(), []
        self.mark()


# %% One step
def build_model(
    config: Config, vocab_size: int, device: torch.device
) -> tuple[nn.Module, dict[str, bool]]:
    """The model of a run on its device, and which of its parameters decay."""
    if config.architecture == "gpt":
        model = GPT(config.model, vocab_size, config.seed, switches_of(config))
        return model.to(device), model.decays()
    from speedrun.history import build_rung

    rung, decays = build_rung(config, vocab_size)
    return rung.to(device), decays


def matrix_optimizer(
    config: Config, banks: list[tuple[Tensor, int]], rate: float
) -> torch.optim.Optimizer:
    """Muon or SOAP for banks of matrices, as the run says."""
    if config.matrix.rule == "muon":
        return Muon(banks, config.matrix, config.muon, rate, config.optim.weight_decay)
    from speedrun.optim.soap import soap_update

    return MatrixOptimizer(banks, soap_update, rate, config.optim.weight_decay)


def make_optimizers(config: Config, model: nn.Module, decays: dict[str, bool]) -> list[Any]:
    """AdamW for all parameters; or for most, and then the rule that the run names for the banks of matrices; or one that is shared."""
    chosen, optim = config.matrix, config.optim
    named: dict[str, Tensor] = dict(model.named_parameters())
    rates = {row.name: row.rate for row in model.table} if isinstance(model, GPT) else {}
    if config.sharing.on:
        return [shared_optimizer(config, model)]
    if chosen == MatrixOptions():
        return [make_adamw(named, decays, optim, rates)]
    assert isinstance(model, GPT)  # check_config has refused all others
    rate, matrices = chosen.lr or optim.lr, model.matrices()
    banks = {name: named.pop(name) for name in matrices}
    first = make_adamw(named, {name: decays[name] for name in named}, optim, rates)
    if chosen.rule == "adamw":
        alone = dataclasses.replace(optim, lr=rate)
        second: Any = make_adamw(banks, {name: decays[name] for name in banks}, alone)
    else:
        pairs = [(bank, matrices[name]) for name, bank in banks.items()]
        second = matrix_optimizer(config, pairs, rate)
    for group in second.param_groups:
        group["share"] = rate / optim.lr
    return [first, second]


def optimizer_table(config: Config, model: GPT) -> list[Any]:
    """How each parameter is updated when ranks share the work; what Muon updates comes first, since it takes longest."""
    from speedrun.optim.optimizer import Entry

    found, betas = [], config.optim.betas
    for row in model.table:
        if row.matrices:
            shape = row.shape[1] // row.matrices, row.shape[2]
            factor = rate_factor(*shape, config.matrix, config.muon)
            decay = 1 / factor if config.muon.decay == "plain" else 1.0  # which has no factor in it
            found.append(Entry(row.name, "muon", "sharded", factor, decay, matrices=row.matrices))
        else:
            large = row.decay  # tables of embeddings do, gains and biases do not
            comm: Any = "sharded" if large else "replicated"
            known: dict[str, Any] = {"rate": row.rate, "betas": betas, "tied": row.tied}
            found.append(Entry(row.name, "adam", comm, decay=150.0 * large, **known))
    return sorted(found, key=lambda entry: entry.rule == "adam")


def shared_optimizer(config: Config, model: nn.Module) -> Any:
    """One optimizer for all ranks, as the run says."""
    from speedrun.optim.optimizer import BankOptimizer, OptimizerOptions

    assert isinstance(model, GPT)  # check_config has refused all others
    matrix, sharing = config.matrix, config.sharing
    options = OptimizerOptions(
        muon=config.muon,
        iterations=matrix.iterations,
        nesterov=matrix.nesterov,
        eps=config.optim.eps,
        adam_decay=sharing.adam_decay,
        adam_every=sharing.adam_every,
        compile=config.compile,
    )
    return BankOptimizer(dict(model.named_parameters()), optimizer_table(config, model), options)


def accumulate(
    forward, batches: list[Batch], grad_shards: int, device: torch.device, precision: str
) -> Tensor:
    """Forward and backward through this rank's batches. Gradients add up; returns its part of the mean loss.

    grad_shards: how many batches the step has, on all ranks together.
    """
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
def gradients_of(model: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, in the parameters' order."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def rates_of(run: "Run") -> dict[str, float]:
    """This step's rates of Adam and Muon, the momentum that Muon keeps, and its plain decay."""
    config, steps, muon = run.config, run.config.steps, run.config.muon
    rate = learning_rate(run.step, steps, config.optim, config.schedule)
    high = config.matrix.momentum
    momentum = between(run.step, steps, (muon.low_momentum or high, high), muon.momentum_steps)
    share = (config.matrix.lr or config.optim.lr) / config.optim.lr
    decay = config.optim.weight_decay
    return {"adam": rate, "muon": rate * share, "momentum": momentum, "muon_decay": decay}


def update(run: "Run") -> Tensor:
    """Clip, set the rate, step. Returns the gradient's length; where that is not finite, nothing is updated."""
    optim, parameters = run.config.optim, list(run.model.parameters())
    total = nn.utils.get_total_norm(gradients_of(run.model))
    finite = torch.isfinite(total)
    length = torch.where(finite, total, 0.0)  # a broken gradient is not scaled: it stays what it is
    nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip or math.inf, length)
    rates, broken = rates_of(run), (~finite).float()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rates["adam"] * group.get("share", 1.0)
            group["momentum"] = rates["momentum"]
        optimizer.found_inf, optimizer.grad_scale = broken, None
        optimizer.step()
    run.skipped += broken
    return total


def update_shared(run: "Run") -> None:
    """The step of an optimizer that sums, guards and clears by itself, and does not clip."""
    (optimizer,) = run.optimizers
    if optimizer.tied and run.step >= run.config.head.split_at * run.config.steps:
        from speedrun.optim.optimizer import untie

        for name in list(optimizer.tied):
            untie(optimizer, name)
    optimizer.step(run.step, rates_of(run))
    run.skipped += optimizer.skip


def not_finite(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of parameters, and of gradients, that hold a number that is none."""
    named = list(model.named_parameters())
    weights = [name for name, p in named if not torch.isfinite(p).all()]
    grads = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    return weights, grads


def broken(run: "Run") -> Problem:
    """What to say about steps that were left out: who is to blame, what still happened, and the way on."""
    weights, gradients = not_finite(run.model)
    if run.config.sharing.on:  # then they are cleared by now
        gradients += run.optimizers[0].blamed()
    if weights:
        what = f"parameter {', '.join(weights)} is not finite; nothing has been updated since"
    elif gradients:
        what = f"the gradient of {', '.join(gradients)} is not finite; that step was left out"
    else:
        what = f"{int(run.skipped)} steps had a gradient that is not finite; they were left out, the others taken"
    fix = "a lower --optim.lr, or a longer --optim.warmup-steps"
    saved = [path.name for path in checkpoints(run.folder)]
    back = f"--resume {run.folder} goes back to {saved[-1]}; or begin again with " if saved else ""
    return Problem(f"step {run.step}: {what}", back + fix)


# %% Signs of life
class Heartbeat:
    """A file per rank that says what it is doing; its time of modification says when something last happened."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / "heartbeat" / f"rank{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name(f"stop{rank}").unlink(missing_ok=True)  # of an earlier attempt
        self.phase("start")
        if hasattr(
            signal, "SIGUSR1"
        ):  # asked by this signal, even a rank that hangs writes down where
            self.stack = open(self.path.with_suffix(".stack"), "w")
            faulthandler.register(signal.SIGUSR1, file=self.stack)

    def phase(self, name: str, step: int = 0) -> None:
        """Enter a phase: start, data, build, compile, train, validate, checkpoint or end."""
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"phase": name, "step": step, "pid": os.getpid()}))
            os.replace(part, self.path)

    def beat(self) -> None:
        """Something happened. Touching a file needs no room on a disk."""
        with contextlib.suppress(OSError):
            os.utime(self.path)


# %% Stopping
class Interrupts:
    """SIGINT and SIGTERM as a request, looked at between steps. A second signal insists."""

    signal: int | None = None

    def install(self) -> None:
        """Take over the two signals of this process (main thread only)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        if self.signal is not None:
            sys.exit(128 + number)
        self.signal = number


def agree_on_stop(folder: Path, ranks: Ranks, step: int, patience_s: float = 20.0) -> int | None:
    """The step before which all ranks stop; None while some have not been asked. Never waits: ask again next step."""
    if ranks.world == 1:
        return step
    every = [folder / "heartbeat" / f"stop{rank}" for rank in range(ranks.world)]
    own = every[ranks.rank]
    try:
        if not own.exists():
            own.with_suffix(".part").write_text(str(step))
            os.replace(own.with_suffix(".part"), own)
    except OSError as error:
        raise Problem(f"cannot stop: {error}", "free some space, and interrupt again") from None
    found = [path for path in every if path.exists()]
    if len(found) == ranks.world:
        return max(int(path.read_text()) for path in found) + 1
    if time.time() - own.stat().st_mtime > patience_s:
        what = f"rank {ranks.rank} was asked to stop, but only {len(found)} of {ranks.world} ranks were"
        raise Problem(what, "interrupt the launcher, not a rank")
    return None


# %% The run
@dataclass
class Run:
    """Everything that changes while training, and what it needs.

    optimizers: of torch.optim.Optimizer, or the one that all ranks share. skipped: how many steps had a gradient that was not finite.
    """

    config: Config
    folder: Path
    ranks: Ranks
    model: nn.Module
    forward: Any
    optimizers: list[Any]
    loader: Loader
    validation: Shards
    clock: Clock
    log: Any
    heart: Heartbeat
    skipped: Tensor
    interrupts: Interrupts
    step: int = 0
    stop_at: int | None = None


def train_step(run: Run) -> Tensor:
    """One step: read, forward and backward, sum over ranks, update. Returns this rank's part of the loss."""
    batches, device, precision = run.loader.next(), run.ranks.device, run.config.precision
    shared = run.config.sharing.on
    if not shared:
        run.model.zero_grad()
    loss = accumulate(run.forward, batches, len(batches) * run.ranks.world, device, precision)
    if shared:
        update_shared(run)
    else:
        sum_over_ranks(gradients_of(run.model), run.ranks.world)
        update(run)
    run.step += 1
    return loss


class SilentLog:
    """The log of the other ranks."""

    def record(self, kind: str, **fields) -> None:
        pass

    def line(self, text: str) -> None:
        pass


def compiled(model: nn.Module) -> Any:
    """The model under torch.compile, without the fusion that breaks gradients of a bank's slices (pytorch#193061)."""
    safe: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(model, dynamic=False, fullgraph=True, options=safe)


def assemble(config: Config, folder: Path, echo=print) -> Run:
    """Everything that a run needs, on this rank, at step 0."""
    heart = Heartbeat(folder, int(os.environ.get("RANK", 0)))  # before anything that could hang
    ranks = join_ranks(config.device, config.backend)
    check_config(config, ranks.world)
    device = ranks.device
    heart.phase("data")
    loader = Loader(config.data, ranks.rank, ranks.world, pin=device.type == "cuda")
    validation = Shards(config.data.path, "val")
    heart.phase("build")
    model, decays = build_model(config, loader.shards.manifest.vocab_size, device)
    forward = compiled(model) if config.compile else model
    optimizers = make_optimizers(config, model, decays)
    log = open_log(config, folder, echo) if ranks.rank == 0 else SilentLog()
    parts = (
        loader,
        validation,
        Clock(device),
        log,
        heart,
        torch.zeros((), device=device),
        Interrupts(),
    )
    return Run(config, folder, ranks, model, forward, optimizers, *parts)


def open_log(config: Config, folder: Path, echo) -> RunLog:
    """Rank 0's log: two files, and Weights & Biases as well if the run names a project."""
    if not config.wandb:
        return RunLog(folder, echo)
    try:
        import wandb
    except ImportError:
        raise Problem(
            f"--wandb {config.wandb}, but wandb is not installed", "pip install wandb"
        ) from None

    class TrackedLog(RunLog):
        """A log that also sends its numbers to a Weights & Biases project."""

        def record(self, kind: str, **fields) -> None:
            super().record(kind, **fields)
            if kind in ("step", "val"):
                numbers = {
                    name: value for name, value in fields.items() if isinstance(value, (int, float))
                }
                wandb.log(numbers, step=fields["step"])

    wandb.init(project=config.wandb, name=folder.name, config=dataclasses.asdict(config))
    return TrackedLog(folder, echo)


# %% Checkpoints
def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy named weights into a model, in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def resume(run: Run) -> None:
    """Go back to the latest checkpoint of the run's folder."""
    path = latest_checkpoint(run.folder)
    weights, moments, facts = load_checkpoint(path)
    if facts["data_sha256"] != run.loader.shards.manifest.sha256:
        what = f"{path} was trained on other data than {run.loader.shards.folder}"
        raise Problem(
            what, f"--data.path of the text whose SHA-256 begins with {facts['data_sha256'][:12]}"
        )
    put_weights(run.model, weights)
    restore_optimizers(run.optimizers, dict(run.model.named_parameters()), moments)
    run.step, run.loader.position = facts["step"], Position(*facts["position"])
    run.clock.elapsed_ms = facts["train_time_ms"]
    run.log.line(f"resumed from {path} at step {run.step}")


def keep(run: Run) -> Path | None:
    """Save a checkpoint (rank 0), off the clock. None where there was no room, which is said and survived.

    Raises Problem on every rank if a number is broken: such a state is not worth going back to.
    """
    if run.skipped.item():
        raise broken(run)
    named = dict(run.model.named_parameters())
    moments = optimizer_tensors(run.optimizers, named)
    if run.ranks.rank != 0:
        return None
    manifest = run.loader.shards.manifest
    facts = {
        "config": dataclasses.asdict(run.config),
        "position": run.loader.position,
        "train_time_ms": run.clock.ms,
        "data_sha256": manifest.sha256,
        "vocab_size": manifest.vocab_size,
        "tokenizer": manifest.tokenizer,
    }
    run.heart.phase("checkpoint", run.step)
    saved = save_checkpoint(run.folder, run.step, named, moments, facts)
    run.heart.phase("train", run.step)
    if isinstance(saved, str):
        run.log.line(f"no checkpoint at step {run.step}, going on without: {saved}")
        return None
    run.log.record("checkpoint", step=run.step, path=str(saved))
    return saved


# %% Validating, and warming up without a trace
@torch.no_grad()
def evaluate(run: Run, batches) -> float:
    """Mean loss, nats a token, over validation micro-batches that are dealt out to the ranks."""
    device, sums = run.ranks.device, torch.zeros(2, dtype=torch.float64, device=run.ranks.device)
    for batch in batches:
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=run.config.precision == "bfloat16"
        ):
            sums += torch.stack([run.forward(inputs, targets).double(), torch.ones_like(sums[0])])
        run.heart.beat()
    sum_over_ranks([sums], run.ranks.world)
    return (sums[0] / sums[1]).item()


def held_out(run: Run, tokens: int):
    """This rank's share of the first `tokens` validation tokens."""
    return validation_batches(
        run.validation, run.config.data, tokens, run.ranks.rank, run.ranks.world
    )


def warm_up(run: Run) -> float:
    """Run a few real steps and a validation batch, undo them, and return the seconds that it took."""
    begin = time.perf_counter()
    named, step, position = dict(run.model.named_parameters()), run.step, run.loader.position
    weights = {name: p.detach().clone() for name, p in named.items()}
    moments = {label: t.clone() for label, t in optimizer_tensors(run.optimizers, named).items()}
    if run.config.sharing.on:
        run.optimizers[0].warm_up()
    for _ in range(run.config.warmup):
        train_step(run)
        run.heart.beat()
    evaluate(run, itertools.islice(held_out(run, run.config.val_tokens), 1))
    put_weights(run.model, weights)
    restore_optimizers(run.optimizers, named, moments)
    if not run.config.sharing.on:
        run.model.zero_grad()
    run.step, run.loader.position, run.skipped = step, position, torch.zeros_like(run.skipped)
    run.clock.wait()
    return time.perf_counter() - begin


# %% Writing it down
def log_step(run: Run, loss: Tensor, marks: Marks) -> None:
    """Log the last step's training loss, as the mean over all ranks. A number that is none ends the run here."""
    together = torch.stack([loss, run.skipped])
    sum_over_ranks([together], run.ranks.world)
    mean, skipped = together.tolist()
    if skipped or not math.isfinite(mean):
        raise broken(run)
    run.log.line(format_line(run.step, run.config.steps, run.clock.ms, train_loss=mean))
    steps_ms = [round(ms, 3) for ms in marks.drain()]
    rate = learning_rate(run.step - 1, run.config.steps, run.config.optim, run.config.schedule)
    where = {"epoch": run.loader.position.epoch, "train_time_ms": run.clock.ms}
    run.log.record("step", step=run.step, train_loss=mean, lr=rate, steps_ms=steps_ms, **where)


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clock (MHz), power (W) and temperature (°C) of a GPU now, for whoever wonders why theirs is slower."""
    if device.type != "cuda":
        return {}
    try:
        watts = torch.cuda.power_draw(device) / 1000
        clock, celsius = torch.cuda.clock_rate(device), torch.cuda.temperature(device)
        return {"clock_mhz": clock, "power_w": watts, "temperature_c": celsius}
    except (ImportError, RuntimeError):  # without nvidia-ml-py, or where the driver does not tell
        return {}


def validate(run: Run) -> float:
    """Validate and log, off the clock."""
    run.heart.phase("validate", run.step)
    state = gpu_state(run.ranks.device)
    loss, ms = evaluate(run, held_out(run, run.config.val_tokens)), run.clock.ms
    run.log.line(format_line(run.step, run.config.steps, ms, val_loss=loss))
    average = ms / max(run.step, 1)
    run.log.record(
        "val", step=run.step, val_loss=loss, train_time_ms=ms, step_avg_ms=average, **state
    )
    run.heart.phase("train", run.step)
    return loss


# %% The loop
def run_loop(run: Run, step=train_step) -> str:
    """Train from `run.step` to the end. Returns why it ended: finished or interrupted."""
    config, marks = run.config, Marks(run.ranks.device)
    last = min(config.max_steps or config.steps, config.steps)
    run.clock.start()
    marks.restart()
    while True:
        if run.step % config.val_every == 0 or run.step >= last:
            with paused(run.clock, marks):
                validate(run)
            if run.step >= last:
                return "finished"
        if run.interrupts.signal and run.stop_at is None:
            run.clock.wait()  # else this rank may be many steps ahead of its GPU
            run.stop_at = agree_on_stop(run.folder, run.ranks, run.step)
        if run.step == run.stop_at:
            return "interrupted"
        loss = step(run)
        marks.mark()
        run.heart.beat()
        if run.step % config.log_every == 0 or run.step == last:
            log_step(run, loss, marks)
        if run.step % (config.checkpoint_every or last) == 0 and run.step < last:
            with paused(run.clock, marks):
                keep(run)


def describe_code() -> dict:
    """The commit, and each module of the trainer with its hash and its source."""
    git = subprocess.run(
        ["git", "-C", str(root()), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    hashes = module_hashes(["speedrun.train"])
    files = {name: file for name in hashes if (file := module_file(name))}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    modules = {name: {"hash": hashes[name], "source": text} for name, text in texts.items()}
    return {"commit": git.stdout.strip(), "modules": modules}


def bytes_per_token(validation: Shards, tokens: int) -> float | None:
    """Bytes of text a validation token: of the first `tokens` if tokens are bytes, else the files' mean, if known."""
    files = validation.files
    if validation.manifest.tokenizer == "bytes":
        read = validation.read(0, min(tokens, validation.total))
        return len(decode_bytes(read.tolist())) / len(read)
    if any(file.bytes is None for file in files):
        return None
    return sum(file.bytes or 0 for file in files) / sum(file.tokens for file in files)


def describe_run(run: Run, command: str) -> dict:
    """The first record: config, source and hash of every module, versions, machine, data, size of the model."""
    manifest, config = run.loader.shards.manifest, run.config
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    return {
        "config": dataclasses.asdict(config),
        **describe_code(),
        "data": {
            **corpus,
            "tokenizer": manifest.tokenizer,
            "train_tokens": run.loader.shards.total,
        },
        "stamp": stamp(command, ["speedrun.train"], 1, [config.seed], corpus),
        "world": run.ranks.world,
        "threads": torch.get_num_threads(),
        "device": str(run.ranks.device),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "bytes_per_token": bytes_per_token(run.validation, config.val_tokens),
        "flops_per_token": model_flops_per_token(
            config.model, manifest.vocab_size, config.data.seq_len, switches_of(config)
        ),
    }


def epochs_line(run: Run) -> str | None:
    """A sentence about repeated data; None if the data suffice."""
    steps, there = run.config.max_steps or run.config.steps, run.loader.shards.total
    wanted = steps * run.config.data.step_tokens
    if wanted < there:
        return None
    return f"the data run short: {wanted:,} tokens are {wanted / there:.2f} epochs of the {there:,} there are"


def memory_mb(device: torch.device) -> dict[str, int]:
    """Peak memory of this rank in MiB: allocated and reserved on a GPU; on a CPU, resident now."""
    if device.type == "cuda":
        allocated, reserved = (
            torch.cuda.max_memory_allocated(device),
            torch.cuda.max_memory_reserved(device),
        )
        return {"allocated": allocated >> 20, "reserved": reserved >> 20}
    return {"resident": psutil.Process().memory_info().rss >> 20}


def finish(run: Run, why: str) -> None:
    """Save, and write down how it ended: finished or interrupted."""
    saved, memory, ms = keep(run), memory_mb(run.ranks.device), run.clock.ms
    facts = {"train_time_ms": ms, "memory_mb": memory, "checkpoint": str(saved)}
    run.log.record("end", step=run.step, reason=why, **facts)
    used = ", ".join(f"{amount:,} MiB {kind}" for kind, amount in memory.items())
    run.log.line(f"{why} at step {run.step}: {ms / 1000:.1f} s of training, memory {used}")
    if why == "interrupted" and saved:
        run.log.line(f"to resume: python -m speedrun.train --resume {run.folder}")
    run.heart.phase("end", run.step)


def train(
    config: Config, folder: Path, again=False, interrupts=None, echo=print, command: str = ""
) -> Run:
    """Train a run into `folder`, or resume it (`again`). All its numbers are in the folder's log."""
    run = assemble(config, folder, echo)
    run.interrupts = interrupts or run.interrupts
    if again:
        resume(run)
    elif run.ranks.rank == 0 and (folder / "metrics.jsonl").exists():
        raise Problem(f"{folder} holds a run already", f"--resume {folder}, or another --out")
    run.log.record("run", again=again, step=run.step, **describe_run(run, command))
    for line in filter(None, [epochs_line(run)]):
        run.log.line(line)
    run.heart.phase("compile")
    seconds = warm_up(run) if config.warmup else 0.0
    run.log.record("phase", phase="compile and warm-up", seconds=seconds)
    run.log.line(f"compile and warm-up: {seconds:.1f} s, not counted")
    run.heart.phase("train", run.step)
    why = run_loop(run)
    run.clock.stop()
    finish(run, why)
    return run


# %% The command
def lifeline(interrupts: Interrupts | None = None, grace_s: float = 10.0) -> None:
    """End this process when its launcher dies: standard input ends, or the parent changes. Only under a launcher.

    With `interrupts` the run is asked to stop first, so that it can save, and has `grace_s` seconds for that.
    """
    if os.environ.get("SPEEDRUN_LIFELINE") != "1":
        return
    parent = os.getppid()

    def end_when(launcher_is_gone) -> None:
        while not launcher_is_gone():
            pass
        if interrupts is not None:
            interrupts.signal = signal.SIGTERM
            time.sleep(grace_s)
        os._exit(70)

    def parent_changed() -> bool:
        time.sleep(0.5)
        return os.getppid() != parent

    for sign in (lambda: not os.read(0, 1), parent_changed):
        threading.Thread(target=end_when, args=(sign,), daemon=True).start()


@dataclass(frozen=True)
class TrainCommand:
    """Train as one rank, alone or one of torchrun's. For several GPUs: python -m speedrun.launch."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    """The run."""
    out: str = ""
    """Folder for logs and checkpoints; empty: runs/<date>-<preset> in the project."""
    resume: str = ""
    """Folder of a run to go on with: its own settings, but for --max-steps, --data.path, --device, --backend."""


def run_folder(command: TrainCommand) -> Path:
    """Where a run writes: as told, or a new folder named by date and preset."""
    if command.out or command.resume:
        return Path(command.out or command.resume)
    return root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{command.config.preset}"


FREE = ("max_steps", "data.path", "device", "backend")  # what may change when a run goes on


def run_config(command: TrainCommand) -> Config:
    """The run that a command asks for: the one on the command line, or the one that a checkpoint was saved with."""
    if not command.resume:
        return command.config
    facts = load_checkpoint(latest_checkpoint(Path(command.resume)))[2]
    given, usual = fields_of(command.config), fields_of(preset(command.config.preset))
    said = {name: value for name, value in given.items() if value != usual[name]}
    ignored = ", ".join(sorted(set(said) - set(FREE)))
    if ignored:
        what = f"--resume goes on with the run's own settings: {ignored} would be ignored"
        raise Problem(what, "leave them out, or start another run")
    own = {name: said[name] for name in FREE if name in said}
    return vary(config_from_json(facts["config"]), {"max_steps": 0} | own)


def say(line: str) -> None:
    """Print a line in one piece, at once; if nobody is left to read it, go on."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(line + "\n")  # print() writes the line's end apart, and ranks get mixed up
        sys.stdout.flush()


@contextlib.contextmanager
def progress(config: Config):
    """A way to show log lines: above a progress bar in a terminal, plainly elsewhere."""
    if not sys.stdout.isatty():
        yield say
        return
    with tqdm(total=config.max_steps or config.steps, unit="step", dynamic_ncols=True) as bar:

        def echo(line: str) -> None:
            numbers = parse_line(line) or {}
            bar.update(max(0, numbers.get("step", 0) - bar.n))
            if "train_loss" in numbers:
                bar.set_postfix_str(f"loss {numbers['train_loss']:.3f}")
            else:
                bar.write(line)

        yield echo


def main(arguments: list[str]) -> int:
    """`python -m speedrun.train`. Status 0: finished; 1: a problem, printed; 130, 143: interrupted, and saved."""
    interrupts = Interrupts()
    try:
        setup()
        lifeline(interrupts)
        command = read_command(TrainCommand, arguments, "cpu", "python -m speedrun.train")
        folder, config = run_folder(command), run_config(command)
        interrupts.install()
        words = shlex.join(["python", "-m", "speedrun.train", *arguments])
        with progress(config) as echo:
            train(config, folder, bool(command.resume), interrupts, echo, words)
    except Problem as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 128 + interrupts.signal if interrupts.signal else 0


if __name__ == "__main__" and __spec__ is not None:  # python -m, not a notebook
    sys.exit(main(sys.argv[1:]))
