# Tangled from notebooks/14_schedule.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.schedule import Schedule


# %% The table
def turning_points(schedule: Schedule) -> list[int]:
    """The steps at which something begins, ends or is last what it was."""
    edges, (rising, falling) = schedule.boundaries, schedule.config.momentum_ramp
    points = {schedule.config.warmup_steps, rising, edges[-1] - falling, schedule.scheduled}
    points |= {*edges, *(edge - 1 for edge in edges)}
    if schedule.config.shape == "trapezoid":
        points.add(schedule.cooldown_start)
    return sorted(point for point in points if 0 <= point < schedule.steps)


def schedule_table(schedule: Schedule) -> list[str]:
    """A heading, and a line for each turning point."""
    lines = [" step   batch     lr  mom.   cap    windows  ahead / prefix"]
    for step in turning_points(schedule):
        now = schedule.at(step)
        windows = "{}, {}".format(*now.windows)
        targets = " ".join(f"{weight:.2f}" for weight in now.mtp_weights)
        numbers = f"{step:5} {now.batch_tokens:7} {now.lr:6.3f} {now.momentum:5.3f}"
        lines.append(
            f"{numbers} {now.max_doc_tokens:5}  {windows:>9}  {targets} / {now.prefix_weight:.2f}"
        )
    return lines


# %% The measurement
from typing import Any

from speedrun.config import Config, vary
from speedrun.presets import preset
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import corpus_of, train_arms

NAMES = ("shapes",)
SEEDS = 3
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
MUON: dict[str, Any] = {
    "optim.matrices": "muon",
    "optim.matrix_lr": 0.016,
    "optim.adam.lr": 0.008,
    "steps": 1000,
}


def arms() -> dict[str, Config]:
    """The cosine, and the trapezoid by the share of steps in which it falls."""
    base = vary(preset("cpu_gpt2"), MUON)
    falls = {"schedule.shape": "trapezoid"}
    shapes = {
        f"{share:g}": vary(base, falls | {"schedule.cooldown_frac": share}) for share in SHARES
    }
    return {"cosine": base} | shapes


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train each arm with each seed: {"arms": {arm: [run, …]}}."""
    modules = ["speedrun.measure.schedule", "speedrun.train"]
    facts = stamp(command, modules, SEEDS, range(SEEDS), corpus_of(preset("cpu_gpt2")))
    return {"arms": train_arms(arms(), SEEDS, facts)}, facts
