# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from speedrun.config import Config, vary
from speedrun.presets import preset
from speedrun.lab.provenance import stamp
from speedrun.lab.results import load_result
from speedrun.measure.runs import SHORT, gpu_base, corpus_of, step_times, train_arms

NAMES = ("grid", "low", "winners", "pace", "clock", "parts", "long")
RULES = {"adamw": "adam", "soap": "soap", "muon": "muon"}
GRIDS = tuple(f"corpus_{rule}" for rule in RULES)
CORPUS = (*GRIDS, "corpus_winners")  # on GPUs, with a data folder
KEYS = ("optim.matrices", "optim.matrix_lr", "optim.adam.lr")
RATES = tuple(0.00025 * 2**n for n in range(10))
OTHERS = (0.002, 0.004, 0.008, 0.016)
PARTS: dict[str, dict[str, Any]] = {
    "exact factor": {"optim.muon.ns_steps": 0},
    "three iterations": {"optim.muon.ns_steps": 3},
    "no Nesterov": {"optim.muon.nesterov": False},
    "no momentum": {"optim.muon.momentum": 0.0, "optim.muon.nesterov": False},
    "no shape factor": {"optim.muon.scale_by_shape": False},
}


def grid(base: Config, rates=RATES, others=OTHERS) -> dict[str, Config]:
    """A run under every rule at every rate of the matrices and every rate of the rest, by its three numbers."""
    points = [(rule, rate, other) for rule in RULES for rate in rates for other in others]
    return {
        f"{rule} {rate:g} {other:g}": vary(base, dict(zip(KEYS, (RULES[rule], rate, other))))
        for rule, rate, other in points
    }


def short() -> Config:
    """The laptop's run, made short."""
    return vary(preset("cpu_gpt2"), SHORT | {"optim.muon.weight_decay": 0.1})


def losses_of_grid(names=("grid", "low")) -> dict[str, float]:
    """The loss at each point of the committed grid; its lowest rates were added when AdamW's best lay at the edge."""
    halves = [load_result("newton_schulz", name)["data"]["arms"] for name in names]
    return {name: runs[0]["val_loss"] for half in halves for name, runs in half.items()}


def winners(loss: dict[str, float], points: dict[str, Config]) -> dict[str, Config]:
    """Each rule at the point of the committed grid with the lowest loss."""
    of_rule = {rule: [name for name in loss if name.split()[0] == rule] for rule in RULES}
    return {rule: points[min(names, key=loss.__getitem__)] for rule, names in of_rule.items()}


def corpus_arms(name: str, data: str) -> dict[str, Config]:
    """The arms of a measurement on a GPU, by the name that they have on a CPU."""
    points = grid(gpu_base(data), RATES[:8], OTHERS[1:3])
    if name in RULES:
        return {point: run for point, run in points.items() if run.optim.matrices == RULES[name]}
    return winners(losses_of_grid(GRIDS), points)


def in_muons_time(best: dict[str, Config]) -> dict[str, Config]:
    """AdamW and SOAP for as many steps as fit into the time of Muon's run, by measured step times."""
    ms = load_result("newton_schulz", "pace")["data"]["median"]
    steps = {rule: best[rule].steps * ms["muon"] / ms[rule] for rule in ("adamw", "soap")}
    return {rule: vary(best[rule], {"steps": round(count)}) for rule, count in steps.items()}


def laptop_arms(name: str) -> dict[str, Config]:
    """The arms of a measurement on a CPU."""
    halves = {"grid": RATES[2:], "low": RATES[:2]}
    if name in halves:
        return grid(short(), halves[name])
    best = winners(losses_of_grid(), grid(short()))
    if name == "clock":
        return in_muons_time(best)
    if name == "long":
        return {rule: vary(run, {"steps": 2000}) for rule, run in best.items()}
    if name == "parts":
        return {part: vary(best["muon"], change) for part, change in PARTS.items()}
    return best


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}. pace: step times, {"ms": {arm: [ms, …]}}.

    clock: as many steps as Muon leaves time for. long: more steps. parts: Muon without one of its parts.
    """
    place, _, kind = name.rpartition("_")
    seeds = {"winners": 9, "clock": 9, "long": 3, "parts": 3}.get(kind, 1)
    arms = corpus_arms(kind, arguments[0]) if place else laptop_arms(kind)
    modules = ["speedrun.measure.newton_schulz", "speedrun.train"]
    corpus = corpus_of(next(iter(arms.values())))
    facts = stamp(command, modules, seeds, range(seeds), corpus)
    if kind == "pace":
        took = step_times(arms)
        return {"ms": took, "median": {a: statistics.median(ms) for a, ms in took.items()}}, facts
    one_control = place and kind == "winners"
    counts = {arm: 3 if one_control and arm != "muon" else seeds for arm in arms}
    return {"arms": train_arms(arms, counts, facts, bool(place))}, facts
