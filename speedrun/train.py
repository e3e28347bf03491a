# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The training loop
if __name__ == "__main__" and __spec__ is not None:  # python -m: before what takes seconds
    from speedrun.lab.errors import prepare_command

    prepare_command()


from speedrun.command import (
    TrainCommand,
    check_compiler,
    progress,
    run_config,
    run_folder,
    sole_owner,
)
from speedrun.passes import accumulate, forward_loss
from speedrun.ranks import all_reduce_sum, join_ranks, rank_numbers
from speedrun.run import (
    Run,
    SilentLog,
    describe_run,
    epochs_line,
    facts_of,
    gpu_state,
    memory_mb,
    open_log,
)


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


# %% A training step, and gradient accumulation
def build_optimizer(config: Config, model: GPT) -> MuonAdam:
    """The optimizer of a run. The model's parameters become views of its storage."""
    specs = assign_optimizers(model.specs, config.optim)
    return MuonAdam(dict(model.named_parameters()), specs, config.optim, config.compile)


# %% Non-finite gradients
def in_trouble() -> Any:
    """The module with what there is to say of a run that cannot go on."""
    return importlib.import_module("speedrun.trouble")


# %% Building a run
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


# %% Saving and resuming
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


# %% Validation and warm-up
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


# %% Logging
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


# %% Training from start to finish
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


# %% The command line
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
