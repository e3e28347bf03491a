# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.train import Marks, Run, accumulate, assemble, sum_over_ranks, update, warm_up


# %% The measurement
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
