# Tangled from notebooks/13_muon.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
import dataclasses
from typing import Any

from speedrun.config import TODAY, Config, preset, vary
from speedrun.lab.results import load_result, stamp
from speedrun.measure.runs import bench, corpus_of, train_arms, train_many, train_on_gpus

NAMES = ("laptop_rates", "laptop")
CORPUS = ("rates", "parts")  # on a GPU, with a data folder
RATES = tuple(0.004 * 2**n for n in range(5))
OTHERS = (0.002, 0.004, 0.008)
LAPTOP: dict[str, Any] = {"steps": 600, "val_tokens": 131_072}
PARTS: dict[str, dict[str, Any]] = {
    "record 4's quintic": {"muon.polynomials": "quintic"},
    "three polynomials": {"matrix.iterations": 3},
    "no NorMuon": {"muon.beta2": 0.0},
    "momentum held": {"muon.low_momentum": 0.0},
    "no decay": {"muon.decay": "none"},
    "decay of all": {"muon.decay": "squared"},
    "plain decay": {"muon.decay": "plain"},
    "no wide factor": {"muon.wide_factor": 1.0},
    "no factors": {"muon.wide_factor": 1.0, "matrix.shape_factor": False},
}
WEIGHTS = {
    "float32 weights": {"muon.weights": "float32"},
    "bfloat16 weights": {"muon.weights": "bfloat16"},
}


def today(base: Config) -> Config:
    """A run under Muon as it runs today; momentum's ramps are as long a share of it as of the record's."""
    rises, falls = round(0.23 * base.steps), round(0.04 * base.steps)
    changes: dict[str, Any] = {"matrix.rule": "muon", "muon.momentum_steps": (rises, falls)}
    changes["muon.weights"] = "split" if base.precision == "bfloat16" else "float32"
    return vary(dataclasses.replace(base, muon=TODAY), changes)


def rates(base: Config) -> dict[str, Config]:
    """Today's Muon at every rate of the matrices and of the rest."""
    points = [(rate, other) for rate in RATES for other in OTHERS]
    return {f"{r:g} {o:g}": vary(today(base), {"matrix.lr": r, "optim.lr": o}) for r, o in points}


def tuned(name: str, base: Config) -> Config:
    """Today's Muon at the rates that did best in a committed grid."""
    arms = load_result("muon", name)["data"]["arms"]
    return rates(base)[min(arms, key=lambda arm: arms[arm][0]["val_loss"])]


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}. rates: one seed a point; else nine of all, three of each part."""
    laptop = name.startswith("laptop")
    base = vary(preset("cpu"), LAPTOP) if laptop else bench(arguments[0])
    facts = stamp(
        command, ["speedrun.measure.muon", "speedrun.train"], 9, range(9), corpus_of(base)
    )
    many = train_many if laptop else train_on_gpus
    if name.endswith("rates"):
        return {"arms": train_arms(rates(base), 1, many)}, facts | {"n": 1, "seeds": [0]}
    whole = tuned("laptop_rates" if laptop else "rates", base)
    parts = PARTS if laptop else PARTS | WEIGHTS
    arms = {part: vary(whole, change) for part, change in parts.items()}
    control = train_arms({"today": whole}, 9, many)
    return {"arms": control | train_arms(arms, 3, many)}, facts
