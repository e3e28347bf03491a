# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from speedrun.config import Config, preset, vary
from speedrun.lab.results import load_result, stamp
from speedrun.measure.runs import corpus_of, train_many

NAMES = ("grid", "low", "winners", "pace", "clock", "parts", "long")
RULES = ("adamw", "soap", "muon")
KEYS = ("matrix.rule", "matrix.lr", "optim.lr")
RATES = tuple(0.00025 * 2**n for n in range(10))
OTHERS = (0.002, 0.004, 0.008, 0.016)
SHORT: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}
PARTS: dict[str, dict[str, Any]] = {
    "exact factor": {"matrix.iterations": 0},
    "three iterations": {"matrix.iterations": 3},
    "no Nesterov": {"matrix.nesterov": False},
    "no momentum": {"matrix.momentum": 0.0, "matrix.nesterov": False},
    "no shape factor": {"matrix.shape_factor": False},
}


def grid(rates: tuple[float, ...] = RATES) -> dict[str, Config]:
    """Every rule at every rate of the matrices and every rate of the rest, by its three numbers."""
    points = [(rule, rate, other) for rule in RULES for rate in rates for other in OTHERS]
    return {
        f"{p[0]} {p[1]:g} {p[2]:g}": vary(preset("cpu"), SHORT | dict(zip(KEYS, p))) for p in points
    }


def losses_of_grid() -> dict[str, float]:
    """The loss at each point of the committed grid; its lowest rates were added when AdamW's best lay at the edge."""
    halves = [load_result("newton_schulz", name)["data"]["arms"] for name in ("grid", "low")]
    return {name: runs[0]["val_loss"] for half in halves for name, runs in half.items()}


def winners() -> dict[str, Config]:
    """Each rule at the point of the committed grid with the lowest loss."""
    loss, points = losses_of_grid(), grid()
    of_rule = {rule: [name for name in loss if name.split()[0] == rule] for rule in RULES}
    return {rule: points[min(names, key=loss.__getitem__)] for rule, names in of_rule.items()}


def step_times(
    arms: dict[str, Config], rounds: int = 12, steps: int = 10
) -> dict[str, list[float]]:
    """Milliseconds of single steps of each arm on one thread, the arms in turn."""
    from speedrun.train import assemble, train_step

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    live = {arm: assemble(run, folder / arm, echo=None) for arm, run in arms.items()}
    took: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run in live.items():
            begin = time.perf_counter()
            for _ in range(steps):
                train_step(run)
            took[arm].append(1000 * (time.perf_counter() - begin) / steps)
    return took


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}. pace: step times, {"ms": {arm: [ms, …]}}.

    clock: as many steps as Muon leaves time for. long: more steps. parts: Muon without one of its parts.
    """
    seeds = {"winners": 9, "clock": 9, "long": 3, "parts": 3}.get(name, 1)
    halves = {"grid": RATES[2:], "low": RATES[:2]}
    best = {} if name in halves else winners()
    arms = grid(halves[name]) if name in halves else best
    if name == "clock":
        ms = load_result("newton_schulz", "pace")["data"]["median"]
        steps = {rule: round(SHORT["steps"] * ms["muon"] / ms[rule]) for rule in ("adamw", "soap")}
        arms = {rule: vary(best[rule], {"steps": count}) for rule, count in steps.items()}
    if name == "long":
        arms = {rule: vary(run, {"steps": 2000}) for rule, run in best.items()}
    if name == "parts":
        arms = {part: vary(best["muon"], change) for part, change in PARTS.items()}
    modules = ["speedrun.measure.newton_schulz", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(preset("cpu")))
    if name == "pace":
        took = step_times(arms)
        return {"ms": took, "median": {a: statistics.median(ms) for a, ms in took.items()}}, facts
    runs = {
        (arm, seed): vary(run, {"seed": seed}) for arm, run in arms.items() for seed in range(seeds)
    }
    done = dict(zip(runs, train_many(list(runs.values()))))
    return {"arms": {arm: [done[arm, seed] for seed in range(seeds)] for arm in arms}}, facts
