# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.checkpoint import (
    check_tensors,
    checkpoints,
    damaged,
    latest_checkpoint,
    load_checkpoint,
    load_facts,
    save_checkpoint,
)


# %% Rank, world size and device
if (
    __name__ == "__main__" and __spec__ is not None
):  # python -m: before the imports that take seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()


import contextlib
import dataclasses
import faulthandler
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
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

from speedrun.config import Config, check_config, config_from_json, fields_of, schedule_of, vary
from speedrun.data.loader import Batch, Loader, Position, Shards, validation_batches
from speedrun.lab.errors import UserError, quoted, run_main, visible
from speedrun.lab.files import claim, new_folder
from speedrun.lab.hardware import Machine, setup
from speedrun.lab.provenance import commit, module_file, module_hashes, root, stamp
from speedrun.lab.runlog import RunLog, format_line, parse_line
from speedrun.model.attention import AttentionSettings, Packed, choose_backend
from speedrun.model.gpt import GPT, attention_settings, flops_per_token
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.state import assign_optimizers
from speedrun.schedule import Schedule
from speedrun.presets import preset, read_command


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
        raise UserError(
            "--device cuda, but PyTorch sees no GPU", "make doctor says why; or --device cpu"
        )
    if not gpus:
        return torch.device("cpu")
    if local >= gpus and backend != "gloo":
        what = f"rank {rank} has no GPU of its own: there are {gpus}"
        raise UserError(what, f"--gpus {gpus}, or --backend gloo to share one, slowly")
    return torch.device("cuda", local % gpus)


def rank_numbers() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; (0, 1, 0) without it. An empty variable is not set."""
    said = {name: os.environ.get(name) or None for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        rank, world = int(said["RANK"] or 0), int(said["WORLD_SIZE"] or 1)
        local = int(said["LOCAL_RANK"] or rank)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world or local < 0:
        what = "the environment names no rank: " + ", ".join(
            f"{k}={v}" for k, v in said.items() if v
        )
        raise UserError(
            what, "unset RANK WORLD_SIZE LOCAL_RANK; python -m speedrun.launch starts ranks"
        )
    return rank, world, local


def join_ranks(device: str, backend: str) -> Ranks:
    """Join the other ranks of this run, if there are any. backend: auto, nccl or gloo.

    They meet in a file that the launcher names, or else, under a torchrun of one's own, at its address.
    """
    rank, world, local = rank_numbers()
    planned = os.environ.get("SPEEDRUN_DEVICE") if device == "auto" else None
    chosen = choose_device(planned or device, backend, rank, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1 and not dist.is_initialized():
        meeting = os.environ.get("SPEEDRUN_STORE")
        if not meeting and not os.environ.get("MASTER_ADDR"):
            what = f"WORLD_SIZE={world}, but nobody says where the ranks meet (MASTER_ADDR)"
            raise UserError(
                what, "unset RANK WORLD_SIZE; or python -m speedrun.launch, which starts them"
            )
        auto = "nccl" if chosen.type == "cuda" else "gloo"
        store: dict[str, Any] = {"store": dist.FileStore(meeting, world)} if meeting else {}
        numbers: dict[str, Any] = {
            "rank": rank,
            "world_size": world,
            "timeout": timedelta(minutes=30),
        }
        dist.init_process_group(auto if backend == "auto" else backend, **numbers, **store)
    return Ranks(rank, world, chosen)


# %% A clock that can be stopped
from speedrun.lab.timer import StepTimer, TrainClock, off_the_clock


# %% One step
def build_optimizer(config: Config, model: GPT) -> MuonAdam:
    """The optimizer of a run. The model's parameters become views of its storage."""
    specs = assign_optimizers(model.specs, config.optim)
    return MuonAdam(dict(model.named_parameters()), specs, config.optim, config.compile)


def forward_loss(
    forward,
    batch: Batch,
    device: torch.device,
    precision: str,
    told: AttentionSettings | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """The model's mean loss on a batch, nats a token. told: what attention is told in this stage, for packed documents. candidates: for the FP8 head."""
    there: list[Any] = [tensor.to(device, non_blocking=True) for tensor in batch[:2]]
    if batch.cu_seqlens is not None and batch.longest is not None and told is not None:
        borders = batch.cu_seqlens.to(device, non_blocking=True)
        there.append(Packed(borders, batch.longest, *told))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return forward(*there, candidates=candidates) if candidates is not None else forward(*there)


def accumulate(
    forward,
    batches: Iterable[Batch],
    micro_batches: int,
    device: torch.device,
    precision: str,
    told: AttentionSettings | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Forward and backward through this rank's batches. Gradients add up; returns its part of the mean loss.

    micro_batches: how many batches the step has, on all ranks together.
    """
    total = torch.zeros((), device=device)
    for batch in batches:
        loss = forward_loss(forward, batch, device, precision, told, candidates) / micro_batches
        loss.backward()
        total += loss.detach()
    return total


def all_reduce_sum(tensor: Tensor, world: int) -> Tensor:
    """The tensor, added up over all ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


# %% Non-finite gradients
def nonfinite_error(run: "Run", loss: float = 0.0) -> UserError:
    """What to say about a loss, or steps left out, that are not finite: which parameter, what still happened, the way on."""
    named, gradients = run.model.named_parameters(), run.optimizer.nonfinite_params()
    weights = [name for name, p in named if not torch.isfinite(p).all()]
    if weights:
        what = f"parameter {', '.join(weights)} is not finite; nothing has been updated since"
    elif gradients:
        what = f"the gradient of {', '.join(gradients)} is not finite; that step was left out"
    elif run.nonfinite_steps:
        what = f"in {int(run.nonfinite_steps)} steps the gradient's norm was not finite; they were left out, the others taken"
    else:
        what = f"the loss is {loss}, with weights and gradients that are finite"
    fix = "a lower --optim.adam.lr, or a longer --schedule.warmup-steps"
    if saved := checkpoints(run.folder):
        back = f"--resume {quoted(run.folder)} goes back to {saved[-1].name}"
        fix = f"{back}; or begin again with {fix}"
    return UserError(f"step {run.step}: {what}", fix)


# %% Heartbeats
class Heartbeat:
    """A file per rank: phase, step, process, and a count of whatever has happened. Raises OSError if it cannot be made.

    Beside it lies the rank's slot for `agree_on_stop`, empty, and the file for the stack that SIGUSR1 asks for.
    """

    def __init__(self, folder: Path, rank: int):
        self.path = folder / "heartbeat" / f"rank{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name(f"stop{rank}").write_text(" " * SLOT)
        if hasattr(signal, "SIGUSR1"):  # even a rank that hangs writes down where
            self.stack = open(self.path.with_suffix(".stack"), "w")
            faulthandler.register(signal.SIGUSR1, file=self.stack)
        self.file = open(self.path, "wb", buffering=0)
        self.name, self.step, self.count = "start", 0, 0
        self.beat()

    def phase(self, name: str, step: int = 0) -> None:
        """Enter a phase: start, data, build, compile, train, validate, checkpoint or end."""
        self.name = name
        self.beat(step)

    def beat(self, step: int | None = None) -> None:
        """Something happened (microseconds)."""
        self.step, self.count = self.step if step is None else step, self.count + 1
        facts = {"phase": self.name, "step": self.step, "pid": os.getpid(), "count": self.count}
        with contextlib.suppress(OSError):  # a folder that is gone must not stop a run
            self.file.seek(0)
            self.file.write(json.dumps(facts).ljust(120).encode())

    def over(self, batches: Iterable) -> Iterator:
        """The same batches, with a beat after each."""
        for batch in batches:
            yield batch
            self.beat()


SLOT = 20  # characters of a step's number


# %% Stopping
class Interrupts:
    """SIGINT, SIGTERM and SIGHUP (a terminal that closes) as a request, looked at between steps.

    A second Ctrl-C, a second later or more, insists. Other repetitions do not: a terminal that closes may say so twice.
    """

    signal: int | None = None
    since: float = 0.0
    training: bool = False  # there is something to save

    def install(self) -> None:
        """Take over the signals of this process (main thread only); SIGHUP not where it is ignored, as under nohup."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            ignored = number is None or signal.getsignal(number) is signal.SIG_IGN
            if number is not None and not (ignored and name == "SIGHUP"):
                signal.signal(number, self.note)

    def note(self, number: int, frame=None) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            os._exit(
                128 + number
            )  # no exception, which could get lost; files are whole or not there


def agree_on_stop(
    folder: Path, ranks: Ranks, step: int, since: float, every: int = 1, patience_s: float = 20.0
) -> int | None:
    """The step before which all ranks stop; None while some have not been asked. Never waits: ask again next step.

    since: when this rank was asked (time.monotonic). every: steps from one at which all ranks meet to the next. A slot is written over in place, which works on a full disk, too.
    """
    if ranks.world == 1:
        return step
    slots = [folder / "heartbeat" / f"stop{rank}" for rank in range(ranks.world)]
    told = [path.read_text().strip() if path.exists() else "" for path in slots]
    if not told[ranks.rank]:
        told[ranks.rank] = str(step)
        with contextlib.suppress(OSError), open(slots[ranks.rank], "r+") as slot:
            slot.write(f"{step:{SLOT}d}")
    if all(told):
        return max(map(int, told)) + every
    if time.monotonic() - since > patience_s:
        found = sum(map(bool, told))
        what = f"rank {ranks.rank} was asked to stop, but only {found} of {ranks.world} ranks were"
        raise UserError(what, "interrupt the launcher, not a rank")
    return None


# %% The run
@dataclass
class Run:
    """Everything that changes while training, and what it needs.

    nonfinite_steps: how many steps had a gradient that was not finite, and were left out.
    saved: the checkpoint that was last written or read.
    """

    config: Config
    folder: Path
    ranks: Ranks
    model: GPT
    forward: Any
    optimizer: MuonAdam
    schedule: Schedule
    told: list[AttentionSettings]
    loader: Loader
    validation: Shards
    clock: TrainClock
    log: Any
    heart: Heartbeat
    nonfinite_steps: Tensor
    interrupts: Interrupts
    step: int = 0
    stop_at: int | None = None
    saved: Path | None = None


def train_step(run: Run) -> Tensor:
    """One step: read, forward and backward, update. Returns this rank's part of the loss."""
    now, device, precision = run.schedule.at(run.step), run.ranks.device, run.config.precision
    batches = run.loader.next(now.batch_tokens, now.max_doc_tokens)
    parts, beating = len(batches) * run.ranks.world, run.heart.over(batches)
    stage = (
        run.told[now.stage],
        torch.tensor(now.candidates) if run.config.model.head.fp8 else None,
    )
    loss = accumulate(run.forward, beating, parts, device, precision, *stage)
    run.optimizer.step(now)
    run.nonfinite_steps += run.optimizer.skip
    run.step += 1
    return loss


class SilentLog:
    """The log of the other ranks."""

    def record(self, kind: str, **fields) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def lacking(self) -> list[str]:
        return []


def compile_model(model: nn.Module) -> Any:
    """The model under torch.compile, without the fusion that breaks gradients of a bank's slices (pytorch#193061)."""
    safe: dict[str, Any] = {"triton.mix_order_reduction": False}
    return torch.compile(model, dynamic=False, fullgraph=True, options=safe)


def prepare_attention(config: Config, model: GPT, device: torch.device) -> list[AttentionSettings]:
    """What attention is told in each stage. For packed documents the model's backend is chosen, too."""
    if config.data.mode != "stream":
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        head_dim = config.model.width // config.model.heads
        asked = config.model.attention.backend
        model.backend = choose_backend(asked, device, dtype, head_dim)
    windows = [stage.windows for stage in config.schedule.stages]
    return attention_settings(config.model, windows, device)


def assemble(config: Config, folder: Path, echo=print) -> Run:
    """Everything that a run needs, on this rank, at step 0."""
    heart = Heartbeat(folder, rank_numbers()[0])  # before anything that could hang
    ranks = join_ranks(config.device, config.backend)
    check_config(config, ranks.world)
    device = ranks.device
    heart.phase("data")
    schedule = schedule_of(config)
    loader = Loader(config.data, ranks.rank, ranks.world, pin=device.type == "cuda")
    for stage in map(schedule.at, schedule.starts):
        loader.check(stage.batch_tokens, stage.max_doc_tokens)
    validation = Shards(config.data.path, "val")
    heart.phase("build")
    vocab_size = loader.shards.manifest.vocab_size
    model = GPT(config.model, vocab_size, config.seed).to(device)
    forward = compile_model(model) if config.compile else model
    optimizer = build_optimizer(config, model)
    log = open_log(config, folder, echo) if ranks.rank == 0 else SilentLog()
    told = prepare_attention(config, model, device)
    clock, nonfinite_steps = TrainClock(device), torch.zeros((), device=device)
    parts = (schedule, told, loader, validation, clock, log, heart, nonfinite_steps, Interrupts())
    return Run(config, folder, ranks, model, forward, optimizer, *parts)


def open_log(config: Config, folder: Path, echo) -> RunLog:
    """Rank 0's log: two files, and Weights & Biases as well if the run names a project and it answers."""
    log = RunLog(folder, echo)
    if not config.wandb:
        return log
    try:
        import wandb

        wandb.init(project=config.wandb, name=folder.name, config=dataclasses.asdict(config))
    except Exception as error:  # not installed, no key, no network: a log is not worth a run
        log.line(f"no Weights & Biases, going on without: {visible(error)}")
        return log
    write = log.record

    def record(kind: str, **fields) -> None:
        write(kind, **fields)
        if kind in ("step", "val"):
            numbers = {k: v for k, v in fields.items() if isinstance(v, int | float)}
            with contextlib.suppress(Exception):
                wandb.log(numbers, step=fields["step"])

    log.record = record  # type: ignore[method-assign]
    return log


# %% Checkpoints
def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy named weights into a model, in place."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def facts_of(run: Run) -> dict:
    """What a checkpoint says about its run beside the tensors."""
    manifest = run.loader.shards.manifest
    return {
        "config": dataclasses.asdict(run.config),
        "position": run.loader.position,
        "train_time_ms": run.clock.ms,
        "data_sha256": manifest.sha256,
        "train_shards": len(manifest.split("train")),
        "vocab_size": manifest.vocab_size,
        "tokenizer": manifest.tokenizer,
        "world": run.ranks.world,
    }


FREE = ("max_steps", "data.path", "device", "backend")  # what may change when a run goes on


def check_same_run(path: Path, facts: dict, run: Run) -> None:
    """Raise UserError where a checkpoint is of other data, or of other settings, than the folder that it lies in."""
    manifest, folder = run.loader.shards.manifest, run.loader.shards.folder
    if facts["data_sha256"] != manifest.sha256:
        what = f"{path} was trained on other data than {folder} lists now"
        count = facts.get("train_shards", "N")
        again = f"shards fetched since: python -m speedrun.data fineweb --shards {count} lists those of then"
        raise UserError(what, f"{again}; other text: --data.path FOLDER")
    now = facts_of(run)
    for name in ("vocab_size", "tokenizer", "train_shards"):
        value = now[name]
        if facts.get(name, value) != value:
            raise damaged(path, f"{name} is {facts[name]!r}, and in {folder} {value!r}")
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        first = json.loads((run.folder / "metrics.jsonl").open(encoding="utf-8").readline())
        begun = fields_of(config_from_json(first["config"]))
        now = fields_of(config_from_json(facts["config"]))
        other = [name for name in now if name not in FREE and now[name] != begun[name]]
        if other:
            values = f"{other[0]} is {now[other[0]]}, and was {begun[other[0]]}"
            what = f"{path} is of another run: {visible(values)}"
            raise UserError(what, f"put it aside: mv {quoted(path)} {quoted(run.folder)}/")


def resume(run: Run) -> None:
    """Go back to the latest checkpoint of the run's folder."""
    path, named = latest_checkpoint(run.folder), dict(run.model.named_parameters())
    weights, moments, facts = load_checkpoint(path)
    check_same_run(path, facts, run)
    check_tensors(path, weights, named)
    tensors = (weights | moments).items()
    broken = [name for name, t in tensors if not torch.isfinite(t.float()).all()]
    if broken:
        raise damaged(path, f"{', '.join(broken)} is not finite")
    put_weights(run.model, weights)
    try:
        run.optimizer.load_state_dict(moments)
    except ValueError as error:
        raise damaged(path, error) from None
    run.step, run.loader.position = facts["step"], Position(*facts["position"])
    run.clock.elapsed_ms, run.saved = facts["train_time_ms"], path
    run.log.line(f"resumed from {path} at step {run.step}")
    world, then = run.ranks.world, facts["world"] or run.ranks.world
    if then != world or (world > 1 and moments.get("optimizer/pending", 0)):
        why = (
            "gradients that waited on each rank come back as one sum"
            if then == world
            else f"{world} ranks, not {then}"
        )
        run.log.line(f"it goes on as it would have up to rounding: {why}")


def save(run: Run, patience_s: float = 0.0) -> Path | None:
    """Save a checkpoint (rank 0), off the clock; tries again for `patience_s`. None where it failed, which is said.

    Raises UserError on every rank if a number is broken: such a state is not worth going back to.
    """
    if run.nonfinite_steps.item():
        raise nonfinite_error(run)
    if run.saved and run.saved.name == f"step-{run.step:07d}":  # nothing has happened since
        return run.saved
    named, end = dict(run.model.named_parameters()), time.monotonic() + patience_s
    moments = run.optimizer.state_dict()
    if run.ranks.rank != 0:
        return None
    run.heart.phase("checkpoint", run.step)
    while (reason := try_to_save(run, named, moments)) and time.monotonic() < end:
        time.sleep(1.0)
        run.heart.beat()
    run.heart.phase("train", run.step)
    if reason:
        run.log.line(f"no checkpoint at step {run.step}, going on without: {reason}")
        return None
    run.log.record("checkpoint", step=run.step, path=str(run.saved))
    return run.saved


def try_to_save(run: Run, named: dict, moments: dict) -> OSError | None:
    """Save once; returns why it failed, if it did."""
    try:
        run.saved = save_checkpoint(run.folder, run.step, named, moments, facts_of(run))
    except OSError as error:
        return error
    return None


# %% Validation, and warm-up without a trace
def told_now(run: Run) -> AttentionSettings:
    """What attention is told in a validation: what the next step says, and after the last one with windows that may be wider."""
    steps, wide = run.config.steps, run.config.schedule.val_windows
    told = run.told[run.schedule.at(min(run.step, steps - 1)).stage]
    if run.step < steps or not any(wide):
        return told
    windows = [new or old for new, old in zip(wide, told.windows.tolist())]
    return told._replace(windows=torch.tensor(windows, dtype=torch.int32))


@torch.no_grad()
def evaluate(run: Run, batches) -> float:
    """Mean loss, nats a token, over validation micro-batches that are dealt out to the ranks."""
    device, sums = run.ranks.device, torch.zeros(2, dtype=torch.float64, device=run.ranks.device)
    told = told_now(run)
    for batch in batches:
        loss = forward_loss(run.forward, batch, device, run.config.precision, told)
        sums += torch.stack([loss.double(), torch.ones_like(sums[0])])
        run.heart.beat()
    all_reduce_sum(sums, run.ranks.world)
    return (sums[0] / sums[1]).item()


def held_out(run: Run, tokens: int):
    """This rank's share of the first `tokens` validation tokens."""
    return validation_batches(
        run.validation, run.config.data, tokens, run.ranks.rank, run.ranks.world
    )


def warm_up(run: Run) -> float:
    """Run a few real steps of each stage to come and a validation batch, undo them, and return the seconds that it took."""
    begin = time.perf_counter()
    named, step, position = dict(run.model.named_parameters()), run.step, run.loader.position
    weights = {name: p.detach().clone() for name, p in named.items()}
    moments = run.optimizer.state_dict()
    run.optimizer.warm_up()
    last = run.config.last_step - 1
    for begin_step in [step, *(start for start in run.schedule.starts if step < start <= last)]:
        for ahead in range(run.config.warmup):
            run.step = min(begin_step + ahead, last)
            train_step(run)
            run.heart.beat()
    evaluate(run, itertools.islice(held_out(run, run.config.val_tokens), 1))
    put_weights(run.model, weights)
    run.optimizer.load_state_dict(moments)
    run.step, run.loader.position = step, position
    run.nonfinite_steps.zero_()
    run.clock.wait()
    return time.perf_counter() - begin


# %% Logging
def log_step(run: Run, loss: Tensor, marks: StepTimer) -> None:
    """Log the last step's training loss, as the mean over all ranks. Raises UserError if the loss or a step that was left out was not finite."""
    together = all_reduce_sum(torch.stack([loss, run.nonfinite_steps]), run.ranks.world)
    mean, left_out = together.tolist()
    if left_out or not math.isfinite(mean):
        raise nonfinite_error(run, mean)
    run.log.line(format_line(run.step, run.config.steps, run.clock.ms, train_loss=mean))
    steps_ms = [round(ms, 3) for ms in marks.drain()]
    rate = run.schedule.at(run.step - 1).lr
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
    """Validate and log, off the clock. A loss that is not finite ends the run, like any other such number."""
    run.heart.phase("validate", run.step)
    state = gpu_state(run.ranks.device)
    loss, ms = evaluate(run, held_out(run, run.config.val_tokens)), run.clock.ms
    if not math.isfinite(loss):
        raise nonfinite_error(run, loss)
    run.log.line(format_line(run.step, run.config.steps, ms, val_loss=loss))
    average = ms / max(run.step, 1)
    run.log.record(
        "val", step=run.step, val_loss=loss, train_time_ms=ms, step_avg_ms=average, **state
    )
    run.heart.phase("train", run.step)
    return loss


# %% The loop
def choose_stop(run: Run) -> None:
    """Agree with the other ranks on the step before which all stop, if this one was asked to."""
    if run.interrupts.signal and run.stop_at is None:
        run.clock.wait()  # else this rank may be many steps ahead of its GPU
        every, since = run.config.optim.adam.every, run.interrupts.since
        run.stop_at = agree_on_stop(run.folder, run.ranks, run.step, since, every)


def run_loop(run: Run, step=train_step) -> str:
    """Train from `run.step` to the end. Returns why it ended: finished or interrupted."""
    config, marks = run.config, StepTimer(run.ranks.device)
    last, run.interrupts.training = config.last_step, True
    run.clock.start()
    marks.restart()
    while True:
        if run.step % config.val_every == 0 or run.step >= last:
            with off_the_clock(run.clock, marks):
                validate(run)
            if run.step >= last:
                return "finished"
        choose_stop(run)
        if run.step == run.stop_at:
            return "interrupted"
        epoch, loss = run.loader.position.epoch, step(run)
        marks.mark()
        if run.loader.position.epoch > epoch:
            run.log.line(f"step {run.step}: the data begin again, epoch {epoch + 2}")
        run.heart.beat(run.step)
        if run.step % config.log_every == 0 or run.step == last:
            log_step(run, loss, marks)
        if run.step % (config.checkpoint_every or last) == 0 and run.step < last:
            with off_the_clock(run.clock, marks):
                save(run)


def describe_code() -> dict:
    """The commit, and each module of the trainer with its hash and its source."""
    hashes = module_hashes(["speedrun.train"])
    files = {name: file for name in hashes if (file := module_file(name))}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    modules = {name: {"hash": hashes[name], "source": text} for name, text in texts.items()}
    return {"commit": commit(), "modules": modules}


def bytes_per_token(validation: Shards, tokens: int) -> float | None:
    """Bytes of text a validation token: of the first `tokens` if tokens are bytes, else the files' mean, if known."""
    files = validation.files
    if validation.manifest.tokenizer == "bytes":
        read = validation.read(0, min(tokens, validation.total))
        from speedrun.data.tokenizer import decode_bytes

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
        "flops_per_token": flops_per_token(config.model, manifest.vocab_size, config.data.seq_len),
    }


def epochs_line(run: Run) -> str | None:
    """A sentence about repeated data; None if the data suffice."""
    steps, there = run.config.last_step, run.loader.shards.total
    wanted = run.schedule.tokens_before(steps)
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
    """Save, and write down how it ended: finished or interrupted. Raises UserError (rank 0) if that is not on the disk."""
    kept = save(run, 30.0 if why == "finished" else 5.0)
    memory, ms = memory_mb(run.ranks.device), run.clock.ms
    facts = {"train_time_ms": ms, "memory_mb": memory, "checkpoint": str(kept)}
    run.log.record("end", step=run.step, reason=why, **facts)
    used = ", ".join(f"{amount:,} MiB {kind}" for kind, amount in memory.items())
    run.log.line(f"{why} at step {run.step}: {ms / 1000:.1f} s of training, memory {used}")
    run.heart.phase("end", run.step)
    lost = run.log.lacking() + ["the checkpoint"] * (kept is None and run.ranks.rank == 0)
    if lost:
        raise unsaved(run, lost)
    if why == "interrupted" and kept:
        run.log.line(f"to resume: python -m speedrun.train --resume {quoted(run.folder)}")


def unsaved(run: Run, lost: list[str]) -> UserError:
    """What to say where the end of a run could not be written."""
    size = sum(p.numel() * p.element_size() for p in run.model.parameters()) * 3 / 1e6
    older = [path.name for path in checkpoints(run.folder)]
    room = f"free {size + 1:.0f} MB where {run.folder} lies, or see that it can be written to"
    on = (
        f"--resume {quoted(run.folder)} then goes on from {older[-1]}"
        if older
        else "then train again"
    )
    return UserError(
        f"step {run.step} is reached, but not saved: {', '.join(lost)}", f"{room}; {on}"
    )


@contextlib.contextmanager
def sole_owner(folder: Path):
    """A run's folder, rank 0's alone in this block. Without a launcher above, it takes that one's part as well."""
    launched = bool(os.environ.get("SPEEDRUN_LIFELINE"))
    roles = ("train",) if launched else ("launch", "train")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for role in roles if rank_numbers()[0] == 0 else ():
            held.callback(claim(folder, role).release)
        yield


def refuse_old_run(folder: Path) -> None:
    """Raise UserError if a folder holds a run: a new one never writes over it."""
    if (folder / "metrics.jsonl").exists():
        resumed = f"--resume {quoted(folder)}, or another --out"
        fix = (
            resumed if checkpoints(folder) else "another --out (that run ended before it had saved)"
        )
        raise UserError(f"{folder} holds a run already", fix)


def train(
    config: Config, folder: Path, again=False, interrupts=None, echo=print, command: str = ""
) -> Run:
    """Train a run into `folder`, or resume it (`again`). All its numbers are in the folder's log."""
    with sole_owner(folder):
        if not again and rank_numbers()[0] == 0:
            refuse_old_run(folder)
        run = assemble(config, folder, echo)
        run.interrupts = interrupts or run.interrupts
        if again:
            resume(run)
        run.log.record("run", again=again, step=run.step, **describe_run(run, command))
        for line in filter(None, [epochs_line(run)]):
            run.log.line(line)
        run.heart.phase("compile", run.step)
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

    With `interrupts` a run that trains is asked to stop first, so that it can save, and has `grace_s` seconds for that.
    The launcher's number is in SPEEDRUN_LIFELINE: a parent that is not its child by now was lost while we were imported.
    """
    launcher, parent = os.environ.get("SPEEDRUN_LIFELINE"), os.getppid()
    if not launcher:
        return
    with contextlib.suppress(psutil.Error):
        parent = parent if psutil.Process(parent).ppid() == int(launcher) else -1

    def end_when(launcher_is_gone) -> None:
        while not launcher_is_gone():
            pass
        if interrupts is not None and interrupts.training:
            if interrupts.signal is None:
                interrupts.note(signal.SIGTERM)
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
    """Where a run writes: as told, or a folder, made here, that is named by date and preset."""
    if command.out or command.resume:
        return Path(command.out or command.resume)
    if rank_numbers()[1] > 1:
        raise UserError(
            "several ranks need one folder", "--out runs/NAME; or python -m speedrun.launch"
        )
    return new_folder(root() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{command.config.preset}")


def settled(path: str) -> str:
    """A data folder's name that means the same from everywhere: the project's own stays relative, others are absolute."""
    if Path(path).is_absolute() or not Path(path).exists():
        return path
    ours = (root() / path).exists() and (root() / path).samefile(path) and ".." not in path
    return path if ours else str(Path(path).absolute())


def run_config(command: TrainCommand) -> Config:
    """The run that a command asks for: the one on the command line, or the one that a checkpoint was saved with."""
    if not command.resume:
        return vary(command.config, {"data.path": settled(command.config.data.path)})
    facts = load_facts(latest_checkpoint(Path(command.resume)))
    given, usual = fields_of(command.config), fields_of(preset(command.config.preset))
    said = {name: value for name, value in given.items() if value != usual[name]}
    ignored = ", ".join(sorted(set(said) - set(FREE)))
    if ignored:
        what = f"--resume goes on with the run's own settings: {ignored} would be ignored"
        raise UserError(what, "leave them out, or start another run")
    own = {name: said[name] for name in FREE if name in said}
    if "data.path" in own:
        own["data.path"] = settled(own["data.path"])
    return vary(config_from_json(facts["config"]), {"max_steps": 0} | own)


def say(line: str) -> None:
    """Print a line in one piece, at once; if that fails, go on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.write(line + "\n")  # print() writes the line's end apart, and ranks get mixed up
        sys.stdout.flush()


@contextlib.contextmanager
def progress(config: Config):
    """A way to show log lines: above a progress bar in a terminal, plainly elsewhere."""
    if sys.stdout is None or not sys.stdout.isatty():
        yield say
        return
    with tqdm(total=config.last_step, unit="step", dynamic_ncols=True) as bar:

        def echo(line: str) -> None:
            numbers = parse_line(line) or {}
            bar.update(max(0, numbers.get("step", 0) - bar.n))
            if "train_loss" in numbers:
                bar.set_postfix_str(f"loss {numbers['train_loss']:.3f}")
            else:
                bar.write(line)

        yield echo


def check_compiler(config: Config, machine: Machine) -> None:
    """Refuse to begin what torch.compile cannot end: it writes C++, on GPUs as well."""
    if config.compile and not machine.compiler:
        fix = "--no-compile; or install a C++ compiler: make doctor says how"
        raise UserError("compile=True, and there is no C++ compiler here", fix)


def run_command(arguments: list[str], interrupts: Interrupts) -> int:
    """Train as the arguments say. Returns 0, or 128 and the number of the signal that ended it."""
    machine = setup()
    lifeline(interrupts)
    command = read_command(TrainCommand, arguments, "cpu", "python -m speedrun.train")
    config = check_config(run_config(command), rank_numbers()[1])
    check_compiler(config, machine)
    folder = run_folder(command)
    interrupts.install()
    words = shlex.join(["python", "-m", "speedrun.train", *arguments])
    with progress(config) as echo:
        train(config, folder, bool(command.resume), interrupts, echo, words)
    return 128 + interrupts.signal if interrupts.signal else 0


def main(arguments: list[str]) -> int:
    """`python -m speedrun.train`. Status 0: finished; 1: a problem, printed; 129, 130, 143: interrupted, and saved."""
    interrupts = Interrupts()
    try:
        return run_main(lambda: run_command(arguments, interrupts))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__" and __spec__ is not None:
    sys.exit(main(sys.argv[1:]))
