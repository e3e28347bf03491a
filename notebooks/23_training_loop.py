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
#     modules: [speedrun.train]
# ---

# %% [markdown]
# # The loop, and what the clock counts
#
# ```{admonition} Cost box
# Under a minute on two CPU cores; within three minutes on one GPU. The rules of the clock are those of the contest since record 21 was re-timed (Keller Jordan). Record 47, whose warm-up covers all that is compiled: \@roeeshenberg.
# ```
#
# ## The problem
#
# In February 2025 record 21 was timed again. Nothing in the training had changed; two sentences in the rules had. The first ten steps now counted, and a compiler option that searched for faster kernels before the clock started was banned. The same training
# took **3.8 seconds longer**. Of the six records that followed, five gained less than that; the other, record 25, was an upgrade of PyTorch.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.results import public_table

ladder = public_table("records")
timed = {row["date"]: float(row["record_time_s"]) for row in ladder if row["record"] == "21"}
longer = timed["2025-02-01"] - timed["2025-01-26"]
later = [float(row["record_time_s"]) for row in ladder if 22 <= int(row["record"]) <= 27]
times = [timed["2025-05-24"], *later]  # record 21 once more, with the PyTorch that record 22 used
gains = [before - after for before, after in zip(times, times[1:])]
assert round(longer, 1) == 3.8 and sum(gain < longer for gain in gains) == 5
print(f"{longer:.1f} s from two sentences")
print(f"records 22 to 27 gained {', '.join(f'{gain:.1f}' for gain in gains)} s")

# %% [markdown]
# A clock is a definition. Whoever writes the loop decides what it counts, and can win or lose more there than with a kernel. So before any loop, the contract:
#
# - **Counted:** every training step, reading data, changing the schedule, logging.
# - **Not counted:** building the model, compiling, warming up, validating, saving. For these the clock is stopped, after waiting for the GPU, and started again.
# - Warm-up may run real steps, but must leave no trace: weights, optimizer and data stream are put back.
#
# The loop that keeps this contract fits on half a page, and comes soon. The rest of this chapter is what it calls: a step, a validation, a saved state, a log. What lets a run survive a signal, a full disk and a dead launcher is [the workshop's](92_a_run_that_survives.py).
#
# ```{admonition} Prediction
# Python hands work to a GPU and goes on without waiting. **If you read a clock in Python after a step and forget to wait for the GPU, what do you measure?** And in the other direction: a loop that asks for the loss after every step has to wait for the GPU every time. Where a step takes about 100 ms, is that a disaster, a nuisance or nothing?
# ```
#
# ## The code
#
# ### Rank, world size and device
#
# A *rank* is one of the processes that train together, one per GPU. It needs to know its own number (also called its rank), how many there are (the *world size*), and its device. `torchrun`, PyTorch's starter of ranks, tells it in environment variables; without them there is one rank. A variable that a batch system left behind must not be believed: with `RANK=1` and nothing else, a single process once trained to the end, saved nothing (saving is rank 0's work) and reported success. On GPUs ranks talk through NVIDIA's library NCCL, on CPUs through gloo, which can also let several ranks share one GPU: useless for speed, precious for testing.

# %%
#| default_exp ranks
#| export
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.lab.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device


# %%
#| export
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


# %%
#| export
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


def all_reduce_sum(tensor: Tensor, world: int) -> Tensor:
    """The tensor, added up over all ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


# %%
ranks = join_ranks("cpu", "auto")
assert ranks == Ranks(0, 1, torch.device("cpu"))
have = torch.cuda.device_count() if torch.cuda.is_available() else 0
try:
    choose_device("cuda", "nccl", rank=have, local=have)  # one rank more than there are GPUs
    raise AssertionError("accepted")
except UserError as problem:
    print(problem)
for words in ({"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "two"}, {"RANK": "0", "WORLD_SIZE": "2"}):
    os.environ |= words
    try:
        join_ranks("cpu", "auto")
        raise AssertionError(f"{words} was believed")
    except UserError as problem:
        print(problem.what)
    for name in words:
        del os.environ[name]

# %% [markdown]
# ### The training clock
#
# [Chapter 04](04_measuring.py) has the clock: `TrainClock` waits for the GPU before it is started and before it is stopped, and whatever happens `off_the_clock` is not training time. Single steps are timed by the marks of a `StepTimer`, which on a GPU are events in its queue of work, read later, so that looking at the time does not take any.


# %%
import time

from speedrun.lab.timer import StepTimer, TrainClock, off_the_clock

clock, marks = TrainClock(ranks.device), StepTimer(ranks.device)
clock.start()
marks.mark()
time.sleep(0.05)
marks.mark()
with off_the_clock(clock, marks):
    time.sleep(0.2)  # validating, say
clock.stop()
(nap,) = marks.drain()
assert 50 <= nap <= clock.ms < 250, "a step counts, on both; the pause does not"
print(f"{clock.ms:.0f} ms of training in 250 ms")

# %% [markdown]
# ### The state of a run
#
# What a run consists of, while it is one, stands in one place. Its parts come from the chapters before this one, and two from the workshop: the heartbeat, by which others see that a rank is alive, and the interrupts, by which they ask it to stop. (`attn_settings` has one entry for each stage of the schedule, from [chapter 21](21_model.py)'s `attention_settings`.)

# %%
#| default_exp run
#| export
import dataclasses
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from speedrun.config import Config
from speedrun.data.loader import Loader, Shards
from speedrun.heartbeat import Heartbeat, Interrupts
from speedrun.lab.compile import Recorder
from speedrun.lab.provenance import commit, module_file, module_hashes, stamp
from speedrun.lab.runlog import RunLog
from speedrun.lab.timer import TrainClock
from speedrun.model.attention import AttentionSettings
from speedrun.model.gpt import GPT, flops_per_token
from speedrun.optim.optimizer import MuonAdam
from speedrun.schedule import Schedule


# %%
#| export
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
    attn_settings: list[AttentionSettings]
    loader: Loader
    validation: Shards
    clock: TrainClock
    log: RunLog
    heartbeat: Heartbeat
    nonfinite_steps: Tensor
    interrupts: Interrupts
    recorder: Recorder
    step: int = 0
    stop_at: int | None = None
    saved: Path | None = None


# %%
fields = dataclasses.fields(Run)
begins = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
assert begins == {"step": 0, "stop_at": None, "saved": None}
print(
    f"a run has {len(fields)} parts; nothing is done, nobody has asked it to stop, nothing is saved"
)

# %% [markdown]
# ### The training loop
#
# Now the whole of it. A step has four parts:
#
# 1. Ask the schedule for the step's batch, learning rates and momentum ([chapter 14](14_schedule.py)).
# 2. Read this rank's micro-batches.
# 3. Go forward and backward through each; gradients add up. (Where the head computes in eight bits, the schedule also says over how many words its softmax runs: [chapter 19](19_head_and_loss.py).)
# 4. Let the optimizer take its step: it sums gradients over ranks, checks that they are finite, clips them, updates this rank's share of the parameters, gathers what the other ranks have updated, and sets gradients to zero ([chapter 20](20_many_gpus.py)).
#
# And around the steps: validate now and then, look whether somebody has asked to stop, log, save. Whatever the contract does not count stands under `off_the_clock`. (What is called here and not yet defined comes further down.)

# %%
#| default_exp train
#| export
if __name__ == "__main__" and __spec__ is not None:  # python -m: before what takes seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()

# %%
#| export
import importlib
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun.checkpoint import (
    check_tensors,
    damaged,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from speedrun.config import Config, check_config, schedule_of
from speedrun.data.loader import Loader, Position, Shards, validation_batches
from speedrun.heartbeat import Heartbeat, Interrupts, agree_on_stop, lifeline
from speedrun.lab.errors import quoted, run_main
from speedrun.lab.compile import Recorder
from speedrun.lab.hardware import setup
from speedrun.lab.runlog import format_line
from speedrun.lab.timer import StepTimer, TrainClock, off_the_clock
from speedrun.kernels.fp8 import has_fp8
from speedrun.model.attention import AttentionSettings, choose_backend
from speedrun.model.compiled import can_record, compile_model
from speedrun.model.gpt import GPT, attention_settings
from speedrun.optim.optimizer import MuonAdam
from speedrun.optim.state import assign_optimizers
from speedrun.presets import read_command


# %%
#| export
def train_step(run: Run) -> Tensor:
    """One step: read, forward and backward, update. Returns this rank's part of the loss."""
    now = run.schedule.at(run.step)
    batches = run.loader.next(now.batch_tokens, now.max_doc_tokens)
    parts, record = len(batches) * run.ranks.world, partial(run.recorder, now.stage)
    joined = run.config.data.micro_batches // parts
    few = torch.tensor([now.candidates, joined]) if run.config.model.head.fp8 else None
    settings = run.ranks.device, run.config.precision, run.attn_settings[now.stage], few
    loss = accumulate(run.forward, run.heartbeat.over(batches), parts, *settings, record=record)
    run.optimizer.step(now)
    run.nonfinite_steps += run.optimizer.skip
    run.step += 1
    return loss


# %%
#| export train
def choose_stop(run: Run) -> None:
    """Agree with the other ranks on the step before which all stop, if this one was asked to."""
    if run.interrupts.signal and run.stop_at is None:
        run.clock.wait()  # else this rank may be many steps ahead of its GPU
        asked = run.step, run.interrupts.since, run.config.optim.adam.every
        run.stop_at = agree_on_stop(run.folder, run.ranks, *asked)


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
        run.heartbeat.beat(run.step)
        if run.step % config.log_every == 0 or run.step == last:
            log_step(run, loss, marks)
        if run.step % (config.checkpoint_every or last) == 0 and run.step < last:
            with off_the_clock(run.clock, marks):
                save(run)


# %% [markdown]
# Does it keep the contract? Its code can be run with stand-ins for all that it calls, which only note when they were called, and whether the clock was running. Five steps, a validation after every third, a line after every second, a checkpoint after every fourth:

# %%
from types import FunctionType, SimpleNamespace

happened = []


def stand_in(name: str, steps: int = 0):
    """A function that notes its name, the step, and whether the clock runs."""

    def note(run, *_) -> None:
        happened.append((name, run.step, "counted" if run.clock.since else "not counted"))
        run.step += steps

    return note


parts = {name: stand_in(name) for name in ("validate", "log_step", "save")}
toy = SimpleNamespace(step=0, stop_at=None, ranks=ranks, clock=TrainClock(ranks.device))
toy.config = SimpleNamespace(last_step=5, val_every=3, log_every=2, checkpoint_every=4)
toy.interrupts = SimpleNamespace(signal=None)
toy.loader = SimpleNamespace(position=SimpleNamespace(epoch=0))
toy.heartbeat = SimpleNamespace(beat=lambda step: None)
bare_loop = FunctionType(run_loop.__code__, globals() | parts)
assert bare_loop(toy, stand_in("step", 1)) == "finished"
steps = [step for name, step, clock in happened if name == "step"]
assert steps == [0, 1, 2, 3, 4]
for name, at, clock in (
    ("validate", [0, 3, 5], "not counted"),
    ("log_step", [2, 4, 5], "counted"),
    ("save", [4], "not counted"),
):
    assert [(step, on) for what, step, on in happened if what == name] == [(n, clock) for n in at]
print(*(f"{name:8} at step {step}, {clock}" for name, step, clock in happened), sep="\n")

# %% [markdown]
# ### A training step, and gradient accumulation
#
# The model first, and then the optimizer, [chapter 20's](20_many_gpus.py). It wants a table that says of each parameter how it is updated. The model has one already; what the run decides is filled in: by which rule each is updated (the blocks' matrices may have one of their own), and the matrices' learning rates as multiples of the rule's.


# %%
#| export
def build_optimizer(config: Config, model: GPT) -> MuonAdam:
    """The optimizer of a run. The model's parameters become views of its storage."""
    specs = assign_optimizers(model.specs, config.optim)
    return MuonAdam(dict(model.named_parameters()), specs, config.optim, config.compile)


# %%
from collections import Counter

from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.presets import preset


laptop = at_cpu_size(preset("cpu_gpt2"))
for matrices in ("adam", "muon", "soap"):
    model = GPT(laptop.model, 288).to(ranks.device)
    optimizer = build_optimizer(vary(laptop, {"optim.matrices": matrices}), model)
    assert len(optimizer.specs) == len(list(model.parameters())) == 16
    counts = Counter(spec.optim for spec in optimizer.specs)
    assert counts == ({"adamw": 16} if matrices == "adam" else {matrices: 4, "adamw": 12})
    print(f"optim.matrices={matrices}: {dict(counts)}, in {len(optimizer.states)} updates")

# %% [markdown]
# A step is `micro_batches` micro-batches, of which a rank reads its share in equal parts. Their losses are means over equally many tokens, so the gradient of the whole batch is the mean of the parts' gradients. Dividing each loss by the number of parts of the whole step before going backward, and *summing* over parts and ranks, gives exactly that, however they are dealt out. (The first of these sums is `accumulate`'s, the second the optimizer's.)


# %%
#| export passes
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedrun.data.loader import Batch
from speedrun.model.attention import AttentionSettings, Packed


def forward_loss(
    forward,
    batch: Batch,
    device: torch.device,
    precision: str,
    attn_settings: AttentionSettings | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """The model's mean loss on a batch, nats a token. attn_settings: of this stage, for packed documents. candidates: the FP8 head's."""
    there: list[Any] = [tensor.to(device, non_blocking=True) for tensor in batch[:2]]
    if batch.cu_seqlens is not None and batch.longest is not None and attn_settings is not None:
        borders = batch.cu_seqlens.to(device, non_blocking=True)
        there.append(Packed(borders, batch.longest, *attn_settings))
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return forward(*there, candidates=candidates)


def forward_backward(
    forward, micro_batches: int, longest: Tensor | None, settings: tuple, *tensors: Any
) -> Tensor:
    """Forward and backward through one batch's tensors; its gradients are added to those that are there. Returns its part of the mean loss."""
    inputs, targets, *borders = tensors
    batch = Batch(inputs, targets, borders[0] if borders else None, longest)
    loss = forward_loss(forward, batch, *settings) / micro_batches
    loss.backward()
    return loss.detach()


def accumulate(
    forward, batches: Iterable[Batch], micro_batches: int, *settings: Any, record=None
) -> Tensor:
    """Forward and backward through this rank's batches. Gradients add up; returns its part of the mean loss.

    micro_batches: how many batches the step has, on all ranks together. settings: the device, the precision, and what else `forward_loss` is told.
    record: calls a function with a batch's tensors, as a CUDA graph.
    """
    total = torch.zeros((), device=settings[0])
    for batch in batches:
        one_pass = partial(forward_backward, forward, micro_batches, batch.longest, settings)
        tensors = batch[: 2 if batch.cu_seqlens is None else 3]
        total += record(one_pass, tensors) if record else one_pass(*tensors)
    return total


# %%
from speedrun.data.loader import DataConfig
from speedrun.data.shards import data_folder
from speedrun.data.sources import build_embedded
from speedrun.lab.provenance import root
from speedrun.model.gpt import GPTConfig

if not (data_folder("data/embedded") / "manifest.json").exists():
    build_embedded(root() / "data" / "embedded", root() / "data" / "wheels")
gradients = {}
for parts in (1, 2, 4, 8):
    loader = Loader(DataConfig(seq_len=64, batch_tokens=1024, micro_batches=parts))
    model = GPT(GPTConfig(2, 2, 32, 64), 288).double()
    accumulate(model, loader.next(), parts, ranks.device, "float32")
    gradients[parts] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
worst = max(
    (gradient - gradients[1]).norm() / gradients[1].norm() for gradient in gradients.values()
)
assert worst < 1e-12
print(f"1,024 tokens in 1, 2, 4 or 8 parts: the gradients differ by {worst:.0e} of their length")

# %% [markdown]
# This is double precision. In single precision a sum in another order differs in the seventh digit, and in bfloat16 much sooner. Two runs of `record_200m` with one seed, on two GPUs and on four, end this far apart (runs with head and MLP in bfloat16; today's `record_200m` ends 0.006 higher, [chapter 24](24_speedrun.py)):

# %%
from speedrun.lab.results import load_result

ends = {}
for name in ("record_200m_plain_head", "record_200m_4gpu"):
    for one in load_result("speedrun", name)["data"]["runs"]:
        ends[one["world"], one["config"]["seed"]] = one["curve"][-1]["val_loss"]
assert {world for world, _ in ends} == {2, 4}
for seed in (0, 1):
    assert 0 < abs(ends[2, seed] - ends[4, seed]) < 0.002
    print(f"seed {seed}: {ends[2, seed]:.4f} on two GPUs, {ends[4, seed]:.4f} on four")

# %% [markdown]
# Neither is wrong. (Two runs on the same GPUs differ, too; how much of this is the number's is not measured.)
#
# ### Non-finite gradients
#
# An infinite gradient makes its weight NaN, and a step later every loss, gradient and weight is NaN. A NaN gradient needs only one step, because clipping divides all gradients by their common norm. By the time somebody looks, the culprit cannot be told from its victims. So the optimizer *leaves out* a step whose gradient is not finite on any one rank, and counts by parameter how often that happened. Python does not wait to find out: `train_step` adds up on the device how many steps were left out, and at its next log line or checkpoint the run ends and says what broke.


# %%
#| export trouble
import contextlib
import json
from pathlib import Path

import torch

from speedrun.checkpoint import RESUMABLE_FIELDS, checkpoints, damaged
from speedrun.config import config_from_json, fields_of
from speedrun.lab.errors import UserError, quoted, visible


def nonfinite_error(run: Run, loss: float = 0.0) -> UserError:
    """What to say about a loss, or steps left out, that are not finite: which parameter, what still happened, the way on."""
    gradients = run.optimizer.nonfinite_params()
    weights = [n for n, p in run.model.named_parameters() if not torch.isfinite(p).all()]
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


# %% [markdown]
# What there is to say of a run that cannot go on is a module of its own, `speedrun.trouble`, which is imported when it is needed.


# %%
#| export
def in_trouble() -> Any:
    """The module with what there is to say of a run that cannot go on."""
    return importlib.import_module("speedrun.trouble")


# %% [markdown]
# One tensor's gradient is NaN, the others' are fine; none may move, and the next good step must move all.

# %%
model = GPT(laptop.model, 288)
optimizer = build_optimizer(laptop, model)
before = {name: p.detach().clone() for name, p in model.named_parameters()}
for bad in (math.nan, 1.0):
    for p in model.parameters():
        p.grad.fill_(1.0)
    model.mlp_up.grad[0, 3, 1] = bad
    optimizer.step(schedule_of(laptop).at(0))
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == (0 if math.isnan(bad) else 16)
assert optimizer.nonfinite_params() == ["mlp_up"]
print("one NaN, nothing moved; no NaN, everything did")

# %% [markdown]
# ### Building a run
#
# The function that puts a run together reads from top to bottom: ranks, data, model, optimizer, log. Only rank 0 has something to say: in the two files of [the workshop's log](96_logs_and_stamps.py), and to Weights & Biases, a web service for such logs, if the run names a project there (`wandb`). Only then is the module `tracking` imported.


# %%
#| export run
class SilentLog(RunLog):
    """The log of the other ranks: it writes nothing."""

    def append(self, name: str, line: str) -> None:
        pass


# %%
#| export tracking
import contextlib
import dataclasses

from speedrun.config import Config
from speedrun.lab.errors import visible
from speedrun.lab.runlog import RunLog


def track(log: RunLog, config: Config, name: str) -> None:
    """Let a log's steps and validations go to Weights & Biases as well, under a name, if it answers."""
    try:
        import wandb

        wandb.init(project=config.wandb, name=name, config=dataclasses.asdict(config))
    except Exception as error:  # not installed, no key, no network: a log is not worth a run
        log.line(f"no Weights & Biases, going on without: {visible(error)}")
        return
    write = log.record

    def record(kind: str, **fields) -> None:
        write(kind, **fields)
        if kind in ("step", "val"):
            numbers = {k: v for k, v in fields.items() if isinstance(v, int | float)}
            with contextlib.suppress(Exception):
                wandb.log(numbers, step=fields["step"])

    log.record = record  # type: ignore[method-assign]


# %%
#| export run
def open_log(config: Config, folder: Path, echo) -> RunLog:
    """Rank 0's log: two files, and Weights & Biases as well if the run names a project and it answers."""
    log = RunLog(folder, echo)
    if config.wandb:
        importlib.import_module("speedrun.tracking").track(log, config, folder.name)
    return log


# %% [markdown]
# [Chapter 16](16_compile.py) compiles the forward pass in parts, and records forward and backward pass of each stage as a CUDA graph, which a GPU replays without waiting for Python. Both have to know the device and the way in which attention is computed, so this is where they are decided.


# %%
#| export
def prepare_attention(config: Config, model: GPT, device: torch.device) -> list[AttentionSettings]:
    """Attention's settings in each stage. For packed documents the model's backend is chosen, too."""
    if config.data.mode != "stream":
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        head_dim = config.model.model_dim // config.model.num_heads
        asked = config.model.attention.backend
        model.backend = choose_backend(asked, device, dtype, head_dim)
    model.fp8 = model.fp8 and (device.type != "cuda" or has_fp8(device))
    windows = [stage.windows for stage in config.schedule.stages]
    return attention_settings(config.model, windows, device)


# %%
#| export
def build_run(config: Config, folder: Path, echo=print) -> Run:
    """Everything that a run needs, on this rank, at step 0."""
    heartbeat = Heartbeat(folder, rank_numbers()[0])  # before anything that could hang
    ranks = join_ranks(config.device, config.backend)
    check_config(config, ranks.world)
    device = ranks.device
    heartbeat.phase("data")
    schedule = schedule_of(config)
    loader = Loader(config.data, ranks.rank, ranks.world, pin=device.type == "cuda")
    for stage in map(schedule.at, schedule.starts):
        loader.check(stage.batch_tokens, stage.max_doc_tokens)
    validation = Shards(config.data.path, "val")
    heartbeat.phase("build")
    with ThreadPoolExecutor() as pool:  # the compiler's import takes seconds, as does the drawing
        if config.compile:
            pool.submit(importlib.import_module, "torch._inductor.compile_fx")
        model = GPT(config.model, loader.shards.manifest.vocab_size, config.seed).to(device)
    return Run(
        config,
        folder,
        ranks,
        model,
        compile_model(model) if config.compile else model,
        build_optimizer(config, model),
        schedule,
        prepare_attention(config, model, device),
        loader,
        validation,
        TrainClock(device),
        open_log(config, folder, echo) if ranks.rank == 0 else SilentLog(folder, None),
        heartbeat,
        torch.zeros((), device=device),
        Interrupts(),
        Recorder(device, config.compile and can_record(model, config.data.mode)),
    )


# %%
import tempfile

scratch = Path(tempfile.mkdtemp())
brief = {"steps": 40, "compile": False, "val_every": 20, "val_tokens": 8192, "log_every": 10}
brief |= {"device": "cpu"}  # a GPU adds in another order each time: no two runs there are equal
brief = vary(preset("cpu_gpt2"), brief | {"schedule.warmup_steps": 5})
run = build_run(brief, scratch / "step", echo=None)
before = run.model.mlp_up.detach().clone()
loss = train_step(run)
assert (
    run.step == 1
    and run.loader.position.offset == 1024
    and not torch.equal(before, run.model.mlp_up)
)
assert abs(loss.item() - math.log(288)) < 0.3
print(f"one step: loss {loss.item():.3f}, position {run.loader.position}")

# %% [markdown]
# ### Saving and resuming
#
# A checkpoint is a folder of tensors and facts; [the workshop](92_a_run_that_survives.py) writes it whole or not at all, and believes nothing in it. Here is what a run puts in and takes out. All ranks gather the optimizer's state, and rank 0 writes. If there is no room, the run goes on and says so.
#
# Going back restores weights, moments, the position in the data and the clock. It refuses a folder of other data, on which "the same run" would be a lie, and a checkpoint whose settings are not those that the folder's log began with. The optimizer's state is named by `parameter/key` and is whole, the same for any number of ranks: each takes its own share of it, and refuses a state of other parameters or of other settings.


# %%
#| export run
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


# %%
#| export trouble
def check_same_run(path: Path, facts: dict, run: Run) -> None:
    """Raise UserError where a checkpoint is of other data, or of other settings, than the folder that it lies in."""
    folder, now = run.loader.shards.folder, facts_of(run)
    if facts["data_sha256"] != now["data_sha256"]:
        what = f"{path} was trained on other data than {folder} lists now"
        count = facts.get("train_shards", "N")
        again = f"shards fetched since: python -m speedrun.data fineweb --shards {count} lists those of then"
        raise UserError(what, f"{again}; other text: --data.path FOLDER")
    for name in ("vocab_size", "tokenizer", "train_shards"):
        if facts.get(name, now[name]) != now[name]:
            raise damaged(path, f"{name} is {facts[name]!r}, and in {folder} {now[name]!r}")
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        first = json.loads((run.folder / "metrics.jsonl").open(encoding="utf-8").readline())
        begun = fields_of(config_from_json(first["config"]))
        for name, value in fields_of(config_from_json(facts["config"])).items():
            if name not in RESUMABLE_FIELDS and value != begun[name]:
                values = visible(f"{name} is {value}, and was {begun[name]}")
                what = f"{path} is of another run: {values}"
                raise UserError(what, f"put it aside: mv {quoted(path)} {quoted(run.folder)}/")


# %%
#| export
def resume(run: Run) -> None:
    """Go back to the latest checkpoint of the run's folder."""
    path = latest_checkpoint(run.folder)
    weights, moments, facts = load_checkpoint(path)
    in_trouble().check_same_run(path, facts, run)
    check_tensors(path, weights, run.model.state_dict())
    for name, tensor in (weights | moments).items():
        if not torch.isfinite(tensor.float()).all():
            raise damaged(path, f"{name} is not finite")
    run.model.load_state_dict(weights)
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


# %%
#| export train
def save(run: Run, patience_s: float = 0.0) -> Path | None:
    """Save a checkpoint (rank 0), off the clock; tries again for `patience_s`. None where it failed, which is said. Raises UserError on every rank if a number is broken: such a state is not worth going back to."""
    if run.nonfinite_steps.item():
        raise in_trouble().nonfinite_error(run)
    end, moments, saved = time.monotonic() + patience_s, run.optimizer.state_dict(), None
    if run.ranks.rank != 0:
        return None
    if run.saved and run.saved.name == f"step-{run.step:07d}":  # nothing has happened since
        return run.saved
    run.heartbeat.phase("checkpoint")
    while saved is None:
        try:
            weights, facts = run.model.state_dict(), facts_of(run)
            saved = save_checkpoint(run.folder, run.step, weights, moments, facts)
        except OSError as error:
            if time.monotonic() >= end:
                run.log.line(f"no checkpoint at step {run.step}, going on without: {error}")
                break
            time.sleep(1.0)
            run.heartbeat.beat()
    run.heartbeat.phase("train")
    if saved:
        run.saved = saved
        run.log.record("checkpoint", step=run.step, path=str(saved))
    return saved


# %%
train_step(run)
run.folder = Path("/dev/null")  # no folder can be made there
assert save(run) is None and (scratch / "step" / "log.txt").read_text().startswith(
    "no checkpoint at step 2"
)
run.folder = scratch / "step"
kept = save(run)
train_step(run)
resume(run)
assert run.step == 2 and load_checkpoint(kept)[2]["position"] == list(run.loader.position)
print((scratch / "step" / "log.txt").read_text().replace(str(scratch), "runs"))

# %% [markdown]
# ### Validation and warm-up
#
# The validation loss is the mean over a fixed number of tokens. Each rank takes its share of the micro-batches, and two numbers are summed over the ranks. Between two steps the memory of recorded passes ([chapter 16](16_compile.py)) lies idle: a validation borrows it for its logits.


# %%
#| export train
def attn_settings_now(run: Run) -> AttentionSettings:
    """Attention's settings in a validation: those of the next step, and after the last one with windows that may be wider."""
    steps, wide = run.config.steps, run.config.schedule.val_windows
    settings = run.attn_settings[run.schedule.at(min(run.step, steps - 1)).stage]
    if run.step < steps or not any(wide):
        return settings
    windows = [new or old for new, old in zip(wide, settings.windows.tolist())]
    return settings._replace(windows=torch.tensor(windows, dtype=torch.int32))


@contextmanager
def graphs_memory(recorder: Recorder) -> Iterator[None]:
    """Inside, what is computed lies in the memory of recorded passes, if there are any, and in their stream, since the allocator gives each stream blocks of its own. The next replay overwrites it."""
    own, pool = recorder.stream, SimpleNamespace(id=recorder.pool)  # a MemPool may not outlive it
    if own is None or not recorder.calls:
        yield
        return
    torch.cuda.empty_cache()  # as the allocator does before it gives up, but not inside
    usual = torch.cuda.current_stream()
    own.wait_stream(usual)
    try:
        with torch.cuda.stream(own), torch.cuda.use_mem_pool(cast(Any, pool)):
            yield
    finally:
        usual.wait_stream(own)


@torch.no_grad()
def validation_loss(run: Run, batches) -> float:
    """Mean loss, nats a token, over validation micro-batches that are dealt out to the ranks."""
    device, settings = run.ranks.device, attn_settings_now(run)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with graphs_memory(run.recorder):
        for batch in batches:
            loss = forward_loss(run.forward, batch, device, run.config.precision, settings)
            sums += torch.stack([loss.double(), torch.ones_like(sums[0])])
            run.heartbeat.beat()
    all_reduce_sum(sums, run.ranks.world)
    return (sums[0] / sums[1]).item()


def val_batches(run: Run, tokens: int):
    """This rank's share of the first `tokens` validation tokens."""
    return validation_batches(
        run.validation, run.config.data, tokens, run.ranks.rank, run.ranks.world
    )


# %%
by_hand = [run.model(batch.inputs, batch.targets).item() for batch in val_batches(run, 8192)]
assert (
    len(by_hand) == 16
    and abs(validation_loss(run, val_batches(run, 8192)) - sum(by_hand) / 16) < 1e-5
)

# %% [markdown]
# The first step compiles, allocates and tunes. So, as in the contest's later records, a few real steps of each stage (another batch is another shape), the longest first, and a validation batch are run before the clock starts, and then undone: weights and the optimizer's state are put back, the data stream is set to where it was. (On a GPU the optimizer before them compiles and records all of its updates, those of later steps as well, and updates nothing; and a step more of each stage is recorded as CUDA graphs.) In one thing our clock is kinder than upstream's: there the loader is made anew after the warm-up, so that reading the first shard and finding its documents is timed, and here the shard stays in memory.


# %%
#| export train
def take_steps(run: Run, start: int, count: int) -> None:
    """Steps from `start` on, the run's last one at the latest."""
    for step in range(start, start + count):
        run.step = min(step, run.config.last_step - 1)
        train_step(run)
        run.heartbeat.beat()


def warm_up(run: Run) -> float:
    """Run a few real steps of each stage to come and a validation batch, record a step of each, undo them all, and return the seconds that it took."""
    begin = time.perf_counter()
    step, position = run.step, run.loader.position
    weights = {name: p.clone() for name, p in run.model.state_dict().items()}
    moments = {  # zeros, as before the first step, need no memory
        key: each if each.any() else each.new_zeros(()).expand_as(each)
        for key, each in run.optimizer.state_dict().items()
    }
    run.optimizer.warm_up()
    last = run.config.last_step - 1
    starts = [min(step, last), *(start for start in run.schedule.starts if step < start <= last)]
    longest = sorted(starts, key=lambda start: -run.schedule.at(start).batch_tokens)
    for start in longest:  # shorter passes fit into its memory
        take_steps(run, start, run.config.warmup)
    validation_loss(run, itertools.islice(val_batches(run, run.config.val_tokens), 1))
    run.recorder.recording = run.recorder.stream is not None
    for start in starts if run.recorder.recording else ():  # in the order of their replays
        take_steps(run, start, 1)
    run.recorder.recording = False
    run.model.load_state_dict(weights)
    run.optimizer.load_state_dict(moments)
    run.step, run.loader.position = step, position
    run.nonfinite_steps.zero_()
    run.clock.wait()
    torch.cuda.empty_cache()  # what the first calls have left is not the graphs'
    return time.perf_counter() - begin


# %%
before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
at, moments = run.loader.position, run.optimizer.state_dict()
moments = {label: tensor.clone() for label, tensor in moments.items()}
seconds = warm_up(run)
assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
assert all(torch.equal(t, moments[label]) for label, t in run.optimizer.state_dict().items())
assert run.step == 2 and run.loader.position == at
print(f"{run.config.warmup} steps were taken and taken back, in {seconds:.1f} s")

# %% [markdown]
# ### Logging
#
# Two kinds of lines, each with its record: a training loss every now and then, a validation loss rarely. The former is also where a NaN is found out. Nowhere else on the clock does the loop look at the device.


# %%
#| export train
def log_step(run: Run, loss: Tensor, marks: StepTimer) -> None:
    """Log the last step's training loss, as the mean over all ranks. Raises UserError if the loss or a step that was left out was not finite."""
    together = all_reduce_sum(torch.stack([loss, run.nonfinite_steps]), run.ranks.world)
    mean, left_out = together.tolist()
    if left_out or not math.isfinite(mean):
        raise in_trouble().nonfinite_error(run, mean)
    run.log.line(format_line(run.step, run.config.steps, run.clock.ms, train_loss=mean))
    run.log.record(
        "step",
        step=run.step,
        train_loss=mean,
        lr=run.schedule.at(run.step - 1).lr,
        steps_ms=[round(ms, 3) for ms in marks.drain()],
        epoch=run.loader.position.epoch,
        train_time_ms=run.clock.ms,
    )


# %%
#| export
def validate(run: Run) -> float:
    """Validate and log, off the clock. A loss that is not finite ends the run, like any other such number."""
    run.heartbeat.phase("validate")
    state = gpu_state(run.ranks.device)
    loss, ms = validation_loss(run, val_batches(run, run.config.val_tokens)), run.clock.ms
    if not math.isfinite(loss):
        raise in_trouble().nonfinite_error(run, loss)
    run.log.line(format_line(run.step, run.config.steps, ms, val_loss=loss))
    run.log.record(
        "val",
        step=run.step,
        val_loss=loss,
        train_time_ms=ms,
        step_avg_ms=ms / max(run.step, 1),
        **state,
    )
    run.heartbeat.phase("train")
    return loss


# %% [markdown]
# The first record of a log says what this run is: what we know that can make a difference next time.


# %%
#| export run
def describe_code() -> dict:
    """The commit, and each module of the trainer with its hash and its source."""
    modules = {
        name: {"hash": digest, "source": file.read_text(encoding="utf-8")}
        for name, digest in module_hashes(["speedrun.train"]).items()
        if (file := module_file(name))
    }
    return {"commit": commit(), "modules": modules}


def bytes_per_token(validation: Shards, tokens: int) -> float | None:
    """Bytes of text a validation token: of the first `tokens` if tokens are bytes, else the files' mean, if known."""
    if validation.manifest.tokenizer == "bytes":
        read = validation.read(0, min(tokens, validation.total))
        from speedrun.data.tokenizer import decode_bytes

        return len(decode_bytes(read.tolist())) / len(read)
    known = [file.bytes for file in validation.files if file.bytes is not None]
    return sum(known) / validation.total if len(known) == len(validation.files) else None


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


# %%
#| export run
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


# %%
facts = describe_run(run, "…")
assert "def run_loop" in facts["modules"]["speedrun.train"]["source"] and facts[
    "parameters"
] == sum(math.prod(spec.shape) for spec in run.model.specs)
assert facts["data"]["tokenizer"] == "bytes" and 1.1 < facts["bytes_per_token"] < 1.3
print(f"{len(facts['modules'])} modules with their source, {len(json.dumps(facts)) / 1e3:.0f} kB")

# %% [markdown]
# A run whose data are shorter than its plan says so before it starts, in epochs. (None of the presets repeats; a folder of your own may. Repeating without knowing it is how one publishes a training loss of 0.3.) How much a run skips of documents that are longer than their cap is known only when it has read them, so the loop says as well when the data begin again.


# %%
#| export run
def epochs_line(run: Run) -> str | None:
    """A sentence about repeated data; None if the data suffice."""
    wanted, there = run.schedule.tokens_before(run.config.last_step), run.loader.shards.total
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


# %%
assert epochs_line(run) is None
longer = vary(brief, {"steps": 31_000})
long = dataclasses.replace(run, config=longer, schedule=schedule_of(longer))
assert "2.00 epochs" in epochs_line(long) and memory_mb(ranks.device)["resident"] > 50
print(epochs_line(long))

# %% [markdown]
# ### Training from start to finish
#
# A run's folder has one owner (the lock is [a workshop's](93_errors_and_files.py)): rank 0, and the launcher above it, if there is one. It is asked for before anything is touched. Whoever starts a second run or a second resume there is refused, and the first does not notice.

# %%
#| default_exp command
#| export
import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from speedrun.checkpoint import RESUMABLE_FIELDS, checkpoints, latest_checkpoint, load_facts
from speedrun.config import Config, config_from_json, fields_of, vary
from speedrun.lab.errors import UserError, quoted
from speedrun.lab.files import claim, new_folder
from speedrun.lab.hardware import Machine
from speedrun.lab.provenance import root
from speedrun.lab.runlog import parse_line
from speedrun.presets import preset


@contextlib.contextmanager
def sole_owner(folder: Path, again: bool):
    """A run's folder, rank 0's alone in this block. Without a launcher above, it takes that one's part as well.

    again: a run goes on there. Otherwise it must hold none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if rank_numbers()[0] == 0:
            for role in ("train",) if os.environ.get("SPEEDRUN_LIFELINE") else ("launch", "train"):
                held.callback(claim(folder, role).release)
            if not again:
                refuse_old_run(folder)
        yield


def refuse_old_run(folder: Path) -> None:
    """Raise UserError if a folder holds a run: a new one never writes over it."""
    if (folder / "metrics.jsonl").exists():
        resumed = f"--resume {quoted(folder)}, or another --out"
        fix = (
            resumed if checkpoints(folder) else "another --out (that run ended before it had saved)"
        )
        raise UserError(f"{folder} holds a run already", fix)


# %% [markdown]
# A disk that is full in the middle of a run may have room again later, so the run goes on. At the end there is no later. Then saving is tried for half a minute, and a model that still is not on the disk is a problem with status 1, never "finished".


# %%
#| export train
def finish(run: Run, why: str) -> None:
    """Save, and write down how it ended: finished or interrupted. Raises UserError (rank 0) if that is not on the disk."""
    kept = save(run, 30.0 if why == "finished" else 5.0)
    memory, ms = memory_mb(run.ranks.device), run.clock.ms
    run.log.record(
        "end", step=run.step, reason=why, train_time_ms=ms, memory_mb=memory, checkpoint=str(kept)
    )
    used = ", ".join(f"{amount:,} MiB {kind}" for kind, amount in memory.items())
    run.log.line(f"{why} at step {run.step}: {ms / 1000:.1f} s of training, memory {used}")
    run.heartbeat.phase("end")
    lost = run.log.lacking() + ["the checkpoint"] * (kept is None and run.ranks.rank == 0)
    if lost:
        raise in_trouble().unsaved(run, lost)
    if why == "interrupted" and kept:
        run.log.line(f"to resume: python -m speedrun.train --resume {quoted(run.folder)}")


# %%
#| export trouble
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


# %%
#| export train
def train(
    config: Config, folder: Path, again=False, interrupts=None, echo=print, command: str = ""
) -> Run:
    """Train a run into `folder`, or resume it (`again`). All its numbers are in the folder's log."""
    with sole_owner(folder, again):
        run = build_run(config, folder, echo)
        run.interrupts = interrupts or run.interrupts
        if again:
            resume(run)
        run.log.record("run", again=again, step=run.step, **describe_run(run, command))
        if line := epochs_line(run):
            run.log.line(line)
        run.heartbeat.phase("compile", run.step)
        seconds = warm_up(run) if config.warmup else 0.0
        run.log.record("phase", phase="compile and warm-up", seconds=seconds)
        run.log.line(f"compile and warm-up: {seconds:.1f} s, not counted")
        run.heartbeat.phase("train")
        why = run_loop(run)
        run.clock.stop()
        finish(run, why)
        return run


# %% [markdown]
# Train one, forty steps of the laptop's run without compiling, and look at what it says:

# %%
whole = train(brief, scratch / "whole")

# %%
from speedrun.lab.metrics import read_metrics, series

records = read_metrics(scratch / "whole" / "metrics.jsonl")
assert [record["kind"] for record in records[:2]] == ["run", "phase"] and records[-1][
    "kind"
] == "end"
curve = [record["val_loss"] for record in series(records, "val")]
assert abs(curve[0] - math.log(288)) < 0.3 and curve[-1] < 4.0
steps_ms = [ms for record in series(records, "step") for ms in record["steps_ms"]]
counted = records[-1]["train_time_ms"]
assert len(steps_ms) == 40 and abs(sum(steps_ms) / counted - 1) < 0.1, (
    "marks and clock tell one story"
)
print(f"40 steps of {sorted(steps_ms)[20]:.0f} ms (median), {counted:.0f} ms on the clock")

# %% [markdown]
# ### Exact resumption
#
# A run that was interrupted and resumed should end where it would have ended. Not nearly: on a CPU, without compiling and with as many threads and ranks as before, every bit of every weight. Stop a second run after 23 steps, in the middle of everything, and let a third go on:

# %%
train(vary(brief, {"max_steps": 23}), scratch / "broken", echo=None)
resumed = train(brief, scratch / "broken", again=True, echo=None)
for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
    assert torch.equal(a, b), f"{name} differs after resuming"
final = series(read_metrics(scratch / "broken" / "metrics.jsonl"), "val")[-1]["val_loss"]
assert final == curve[-1] and resumed.loader.position == whole.loader.position
print(f"stopped at 23, resumed to 40: every weight is equal, final loss {final:.6f} both times")

# %% [markdown]
# It is a strong test, because nearly everything can break it: a moment that was not saved, a position off by one batch, warm-up steps that left a trace, a schedule that counts from the restart.
#
# Two things cannot be put back bit by bit, and then the log says so. A run that goes on with another number of ranks adds up in another order. And where Adam updates in every second step only (`optim.adam.every`, [chapter 20](20_many_gpus.py)), a checkpoint between two updates holds the sum over all ranks of the gradients that wait, and no longer what each rank had.
#
# And the broken number? Put one infinity into one matrix at step 12; the error has to name that matrix:

# %%
run = build_run(vary(brief, {"checkpoint_every": 4}), scratch / "poisoned", echo=None)


def poisoned_step(run: Run) -> Tensor:
    """A training step; at the twelfth, one weight is infinite."""
    if run.step == 12:
        assert json.loads(run.heartbeat.path.read_text())["phase"] == "train", "saved, and on"
        with torch.no_grad():
            run.model.mlp_up[1, 5, 5] = math.inf
    return train_step(run)


try:
    run_loop(run, step=poisoned_step)
    raise AssertionError("an infinity went unnoticed")
except UserError as problem:
    assert problem.what.startswith("step 16: parameter mlp_up is not finite"), "found when saving"
    assert "goes back to step-0000012" in problem.fix, "no broken state was saved"
    print(str(problem).replace(str(scratch), "runs"))
saved, _, _ = load_checkpoint(scratch / "poisoned" / "checkpoints" / "step-0000012")
others = {name: p for name, p in run.model.named_parameters() if name != "mlp_up"}
assert all(torch.equal(p, saved[name]) for name, p in others.items()), "nothing was updated since"

# %% [markdown]
# ### The command line
#
# `python -m speedrun.train` is one rank: alone, or one of torchrun's. The first half of it says which run is meant, and where it writes; the launcher of [chapter 24](24_speedrun.py) reads its command line with the same functions.


# %%
#| export command
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
    if not Path(path).exists():
        return path
    there = root() / path
    ours = ".." not in path and there.exists() and there.samefile(path)
    return path if ours else str(Path(path).absolute())


def run_config(command: TrainCommand) -> Config:
    """The run that a command asks for: the one on the command line, or the one that a checkpoint was saved with."""
    if not command.resume:
        return vary(command.config, {"data.path": settled(command.config.data.path)})
    facts = load_facts(latest_checkpoint(Path(command.resume)))
    usual = fields_of(preset(command.config.preset))
    said = dict(fields_of(command.config).items() - usual.items())
    if ignored := ", ".join(sorted(said.keys() - RESUMABLE_FIELDS)):
        what = f"--resume goes on with the run's own settings: {ignored} would be ignored"
        raise UserError(what, "leave them out, or start another run")
    if "data.path" in said:
        said["data.path"] = settled(said["data.path"])
    return vary(config_from_json(facts["config"]), {"max_steps": 0} | said)


# %%
assert run_folder(TrainCommand(brief, out="x")) == Path("x")
assert settled("data/embedded") == "data/embedded" and settled("no such folder") == "no such folder"
assert settled("speedrun") == "speedrun" and Path(settled("..")).is_absolute()
later = TrainCommand(preset("smoke"), resume=str(scratch / "whole"))
assert run_config(later) == brief, "a resumed run has its own settings, whatever preset is named"
moved = dataclasses.replace(later, config=vary(later.config, {"data.path": "/elsewhere"}))
assert run_config(moved) == vary(brief, {"data.path": "/elsewhere"})
try:
    run_config(dataclasses.replace(later, config=vary(later.config, {"optim.adam.lr": 1.0})))
    raise AssertionError("ignored in silence")
except UserError as problem:
    print(problem)

# %% [markdown]
# In a terminal there is a progress bar, and only validations and other news leave a line. Everywhere else every line is printed at once, and whatever may be wrong with the output, the run goes on.


# %%
#| export command
def print_line(line: str) -> None:
    """Print a line in one piece, at once; if that fails, go on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.write(line + "\n")  # print() writes the line's end apart, and ranks get mixed up
        sys.stdout.flush()


@contextlib.contextmanager
def progress(config: Config):
    """A way to show log lines: above a progress bar in a terminal, plainly elsewhere."""
    if sys.stdout is None or not sys.stdout.isatty():
        yield print_line
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


# %%
#| export train
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

# %% [markdown]
# Its whole life in one cell: start it as a user would, press Ctrl-C, read what it says, and do what it says.

# %%
import signal
import subprocess

command = [
    sys.executable,
    "-m",
    "speedrun.train",
    "--preset",
    "smoke",
    "--log-every",
    "10",
    "--out",
    str(scratch / "live"),
]
live = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
said = []
for line in live.stdout:
    said.append(line.rstrip())
    if line.startswith("step:20/"):
        live.send_signal(signal.SIGINT)
assert live.wait() == 130 and said[-1].startswith("to resume: python -m speedrun.train --resume")
advice = said[-1].removeprefix("to resume: python").split()
on = subprocess.run([sys.executable, *advice, "--max-steps", "30"], capture_output=True, text=True)
assert on.returncode == 0 and "finished at step 30" in on.stdout, on.stderr
answer = on.stdout.splitlines()
print("\n".join([*said[-3:], "…", answer[0], answer[-1]]).replace(str(scratch), "runs"))

# %% [markdown]
# ## The measurement
#
# What does a step spend its time on? The pieces of `train_step` are called one by one here, with a wait after each. Beside them, three ways to time a whole step: one that does not wait for the device, one that does, and one that asks for the loss after every step.

# %% tags=["hide-input"]
#| export measure.training_loop
import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path

from speedrun.config import Config, vary
from speedrun.lab.bench import clocked, sample_in_turn
from speedrun.lab.provenance import stamp
from speedrun.lab.timer import StepTimer
from speedrun.lab.results import load_result
from speedrun.measure.runs import corpus_of, cpu_base, train_arms
from speedrun.presets import preset

NAMES = ("cpu", "gpu", "adam_rates", "adam")
PRESET_OF = {"cpu": "cpu", "gpu": "small_gpt2"}


def pieces_of(run: Run) -> dict:
    """What a training step does, one after the other: name → function."""
    device, precision, world = run.ranks.device, run.config.precision, run.ranks.world
    marks, batches = StepTimer(device), []

    def model() -> None:
        parts = len(batches[-1]) * world
        accumulate(run.forward, batches.pop(), parts, device, precision)

    def heartbeat_and_mark() -> None:
        run.heartbeat.beat()
        marks.mark()

    return {
        "reading": lambda: batches.append(run.loader.next()),
        "forward and backward": model,
        "clip and update": lambda: run.optimizer.step(run.schedule.at(run.step)),
        "heartbeat and mark": heartbeat_and_mark,
    }


# %% tags=["hide-input"]
#| export measure.training_loop
def time_pieces(run: Run, repeats: int) -> dict[str, float]:
    """Milliseconds of each piece of a step, waiting for the device after each (medians)."""
    taken = sample_in_turn(pieces_of(run), run.ranks.device.type, repeats, warm_up=0)
    return {name: statistics.median(times) for name, times in taken.items()}


# %% tags=["hide-input"]
#| export measure.training_loop
def time_steps(run: Run, repeats: int, steps: int = 4) -> dict[str, list[float]]:
    """Milliseconds a step, in turn: as Python sees one without waiting, truly, and asking for the loss each time.

    Each sample is of `steps` steps and begins when the device has nothing to do.
    """

    def take(ask: bool) -> None:
        for _ in range(steps):
            loss = train_step(run)
            if ask:
                loss.item()

    done, python = 0, 1  # which of the two times of `clocked`
    kinds = {"without waiting": (False, python), "true": (False, done), "asking": (True, done)}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, (ask, which) in kinds.items():
            ms = clocked(partial(take, ask), run.ranks.device.type)[which]
            taken[kind].append(ms / steps)
    return taken


# %% tags=["hide-input"]
#| export measure.training_loop
EVERY = (1, 2)  # steps from one update by Adam to the next
GRID = [(every, rate, other) for every in EVERY for rate in (0.008, 0.016, 0.032) for other in (0.002, 0.004, 0.008, 0.016)]  # fmt: skip


def adam_run(every: int, rate: float, other: float) -> Config:
    """The laptop's run of 600 steps under record 89's Muon, with the record's Adam: cautious decay, no clipping."""
    adam = {"optim.adam.cautious": True, "optim.adam.weight_decay": 0.75, "optim.adam.every": every}
    rates = {"optim.matrix_lr": rate, "optim.adam.lr": other, "optim.grad_clip": 0.0}
    return vary(cpu_base(), adam | rates)


def adam_arms(name: str) -> dict[str, Config]:
    """adam_rates: all points of the grid. adam: AdamW, and Adam in every step at the best of them, each clipped and not; and in every second."""
    points = {" ".join(f"{n:g}" for n in point): adam_run(*point) for point in GRID}
    if name == "adam_rates":
        return points
    arms = load_result("training_loop", "adam_rates")["data"]["arms"]
    loss = {point: runs[0]["val_loss"] for point, runs in arms.items()}
    best = {n: points[min((p for p in points if p.startswith(f"{n} ")), key=loss.__getitem__)] for n in EVERY}  # fmt: skip
    clipped, free = {"optim.grad_clip": 1.0}, {"optim.grad_clip": 0.0}
    return {
        "AdamW, clipped": vary(cpu_base(), clipped),
        "AdamW": vary(cpu_base(), free),
        "every step, clipped": vary(best[1], clipped),
        "every step": best[1],
        "every second step": best[2],
    }


# %%
assert len(GRID) == len(adam_arms("adam_rates")) == 24


# %% tags=["hide-input"]
#| export measure.training_loop
def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Time the pieces of a step of a preset on this machine. Arguments: a data folder, if not the preset's.

    adam_rates, adam: the laptop's run with the record's Adam on a grid of rates, and AdamW and it at the best, clipped and not, with nine seeds.
    """
    modules = ["speedrun.measure.training_loop"]
    if name.startswith("adam"):
        seeds, corpus = 9 if name == "adam" else 1, corpus_of(preset("cpu_gpt2"))
        facts = stamp(command, modules, seeds, range(seeds), corpus)
        return {"arms": train_arms(adam_arms(name), seeds, facts)}, facts
    config = vary(preset(PRESET_OF[name]), {"data.path": arguments[0]} if arguments else {})
    with tempfile.TemporaryDirectory() as folder:
        run, repeats = build_run(config, Path(folder), echo=None), 40
        warm_up(run)
        data = {"steps": time_steps(run, repeats), "pieces": time_pieces(run, repeats)}
    manifest = run.loader.shards.manifest
    data |= {"config": dataclasses.asdict(config), "tokens": config.data.batch_tokens}
    corpus = {"name": manifest.source, "sha256": manifest.sha256}
    return data, stamp(command, modules, repeats, corpus=corpus)


# %%
WIDE = {
    "model.num_layers": 12,
    "model.num_heads": 12,
    "model.model_dim": 768,
    "precision": "bfloat16",
}
timed_run = tier.pick(cpu={}, gpu=WIDE | {"data.batch_tokens": 4096}) | {"device": tier.device}
run = build_run(vary(brief, timed_run), scratch / "timed", echo=None)
pieces, whole_step = time_pieces(run, 5), statistics.median(time_steps(run, 2)["true"])
assert max(pieces, key=pieces.get) == "forward and backward"
assert 0.1 < sum(pieces.values()) / whole_step < 10, "the same units"

# %% [markdown]
# A GPU ran a model of 51 million parameters, eight micro-batches joined into two passes, under [chapter 13](13_muon.py)'s Muon; two CPU cores ran the laptop's. The three ways took turns, forty times:

# %%
from speedrun.lab.results import figure_style, load_result, measured_on
from speedrun.model.gpt import param_specs

size_of = {
    name: sum(math.prod(spec.shape) for spec in param_specs(preset(name).model, 50_257))
    for name in ("small_gpt2", "record1")
}
assert abs(size_of["small_gpt2"] - 51e6) < 1e6
results = {name: load_result("training_loop", name) for name in ("gpu", "cpu")}
gpu, cpu = (result["data"] for result in results.values())
quartiles = {kind: statistics.quantiles(ms, n=4) for kind, ms in gpu["steps"].items()}
middle = {kind: values[1] for kind, values in quartiles.items()}
asking = middle["asking"] / middle["true"] - 1
rest = {}
for name, data in (("gpu", gpu), ("cpu", cpu)):
    rest[name] = 1 - data["pieces"]["forward and backward"] / sum(data["pieces"].values())
blind = middle["without waiting"] / middle["true"]
of_update = gpu["pieces"]["clip and update"] / sum(gpu["pieces"].values())
assert 0.8 < blind < 0.9 and 0 < asking < 0.03 and 0.05 < of_update < 0.15
assert quartiles["without waiting"][2] < quartiles["true"][0] < quartiles["asking"][0]
assert rest["gpu"] - of_update < 0.02 and rest["cpu"] < 0.1 and len(gpu["steps"]["true"]) == 40
for pieces in (gpu["pieces"], cpu["pieces"]):
    assert pieces["reading"] + pieces["heartbeat and mark"] < 0.01 * sum(pieces.values())
print(f"a clock that does not wait sees {blind:.0%} of a GPU's step")
print(f"asking for every loss costs {asking:+.1%}")
for name, result in results.items():
    print(f"{name}: {measured_on(result)}")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Milliseconds of the pieces of a training step, of one model on a GPU and of a smaller one on a CPU"}}
import matplotlib.pyplot as plt

figure_style()
fig, axis = plt.subplots(figsize=(5.5, 3.2))
shown = [name for name in gpu["pieces"] if name != "sum over ranks"]
for n, (where, data) in enumerate((("GPU", gpu), ("CPU", cpu))):
    size = [data["pieces"][name] for name in shown]
    axis.plot(size, range(len(shown)), "os"[n], color=f"C{n}", ms=6, label=where)
    for y, ms in enumerate(size):
        axis.annotate(
            f"{ms:.2g}", (ms, y), (0, 7 - 21 * n), textcoords="offset points", ha="center"
        )
axis.set_xscale("log")
axis.set_ylim(len(shown) - 0.4, -0.7)
axis.set_yticks(range(len(shown)), shown)
axis.set_xlabel("ms in one step, median")
axis.legend(loc="lower right")
axis.set_title(
    f"all that is not the model:\n{rest['gpu']:.1%} of a step on the GPU, {rest['cpu']:.1%} on the CPU"
)
plt.show()

# %% [markdown]
# So the answer to the prediction. A clock that does not wait measures how long Python takes to *ask*. Here that is six sevenths of the step: Python is ahead of the GPU, but barely, perhaps because launching the kernels of so small a model takes nearly as long as running them. (This was measured before passes were replayed from CUDA graphs, [chapter 16](16_compile.py). A graph is launched in one call, so today a clock that does not wait sees far less of the step; how much less has not been measured.) And asking for the loss after every step costs one or two per cent (the quartiles of the forty samples do not overlap): on this machine, with this model, a nuisance. Another model, or another processor beside the GPU, can have another answer.
#
# The loop itself is nearly free, as it should be. Reading, heartbeats and marks together are less than one per cent of a step. The update is not free: on the GPU Muon's takes a tenth of the step. (It was measured with an optimizer that launched each of its small kernels by itself; [chapter 20](20_many_gpus.py)'s records them once and replays them.) (An earlier `pieces_of` timed the sum over ranks apart, 0.1 ms for one rank; the title counts it, the figure omits it.) What the sum costs, record 1's first fifty steps say, on one GPU and on two. (These runs and the GPU's measurement above were made while the model was one graph, in which a fusion of the compiler's left gradients unwritten ([chapter 16](16_compile.py)). So the two runs' losses are withdrawn, and all these times are of that program; today's, compiled in parts, has not been timed in their place.)

# %%
runs = {n: load_result("speedrun", f"record1_{n}gpu")["data"]["runs"][0] for n in (1, 2)}
took = {n: run["seconds"] for n, run in runs.items()}
efficiency = took[1] / (2 * took[2])
assert 0.95 < efficiency < 1.0 and {run["step"] for run in runs.values()} == {50}
dates = [load_result("speedrun", f"record1_{n}gpu")["stamp"]["date"] for n in (1, 2)]
assert {*dates, results["gpu"]["stamp"]["date"]} == {"2026-11-25"}, "the fusion went a day later"
assert abs(size_of["record1"] - 124e6) < 1e6 and 0.95 < 2 * 4 * size_of["record1"] / 1e9 < 1.05
print(
    f"fifty steps: {took[1]:.1f} s on one GPU, {took[2]:.1f} s on two; {efficiency:.1%} of a perfect half"
)

# %% [markdown]
# Nothing in this chapter will ever make a run faster. It makes sure that *faster* means something.
#
# ## What it costs, and when it fails
#
# The ranks share the optimizer's state, but each holds all weights and all gradients. For record 1's 124 million parameters in float32 that is one gigabyte, on each of eight GPUs. `record` has 346 million, most of them in tables of value embeddings.
#
# The check for finite numbers looks at gradients alone. A loss that runs away slowly, finite all the while, passes it. And resuming is exact on a CPU only, uncompiled: the code that torch.compile generates adds up an embedding's gradient in whatever order its threads come. On a GPU, too, some sums are taken in whatever order the hardware finishes, so a resumed run is as close to the uninterrupted one as two uninterrupted runs are to each other.
#
# ## Exercises
#
# 1. The contest's `step_avg` divides all training time by the number of steps, the slow first ones included. Write `steady_ms(steps_ms, skip)`: the mean after leaving out the first `skip` steps, and the share of all time that those took.


# %% tags=["solution"]
def steady_ms(steps_ms: list[float], skip: int) -> tuple[float, float]:
    """Mean duration after the first `skip` steps, and the share of all time that those first ones took."""
    rest = steps_ms[skip:]
    return sum(rest) / len(rest), sum(steps_ms[:skip]) / sum(steps_ms)


# %%
mean, share = steady_ms([10.0, 10.0, 1.0, 1.0, 4.0], 2)
assert mean == 2.0, f"10, 10, 1, 1 and 4 ms: the mean without the first two is 2, not {mean}"
assert math.isclose(share, 20 / 26), (
    f"the first two took 20 of 26 ms, a share of {20 / 26:.3f}, not {share}"
)
steady, share = steady_ms(steps_ms, 5)
print(f"the brief run: {steady:.0f} ms a step after the fifth")
print(f"the first five of forty took {share:.1%} of its time; an even share is {5 / 40:.1%}")

# %% [markdown]
# 2. Eight micro-batches and three GPUs do not go together, and `check_options` refuses. Could the loop deal them out unevenly instead? Write `shares(micro_batches, ranks)`: how many each rank would compute, as evenly as possible, and see how long the third GPU waits for the other two.


# %% tags=["solution"]
def shares(micro_batches: int, ranks: int) -> list[int]:
    """Micro-batches per rank, differing by at most one, the larger first."""
    each, more = divmod(micro_batches, ranks)
    return [each + (rank < more) for rank in range(ranks)]


# %%
for count, ranks, right in (
    (8, 3, [3, 3, 2]),
    (8, 4, [2] * 4),
    (7, 5, [2, 2, 1, 1, 1]),
    (2, 3, [1, 1, 0]),
):
    got = shares(count, ranks)
    assert got == right, (
        f"{count} micro-batches on {ranks} ranks, as evenly as possible: {right}, not {got}"
    )
used = 8 / (3 * max(shares(8, 3)))
print(
    f"three GPUs would be busy for {used:.0%} of the time: possible and correct, but the third GPU is idle a third of it"
)

# %%
import shutil

shutil.rmtree(scratch)
