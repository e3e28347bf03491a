# Tangled from notebooks/23_training_loop.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.passes import accumulate
from speedrun.run import Run
from speedrun.train import build_run, train_step, warm_up


# %% The measurement
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


def time_pieces(run: Run, repeats: int) -> dict[str, float]:
    """Milliseconds of each piece of a step, waiting for the device after each (medians)."""
    taken = sample_in_turn(pieces_of(run), run.ranks.device.type, repeats, warm_up=0)
    return {name: statistics.median(times) for name, times in taken.items()}


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
