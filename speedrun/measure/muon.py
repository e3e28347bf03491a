# Tangled from notebooks/13_muon.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.optim.muon import MuonConfig


# %% The measurement
from typing import Any

from speedrun.config import Config, fields_of, vary
from speedrun.lab.provenance import stamp
from speedrun.lab.results import load_result
from speedrun.presets import preset
from speedrun.measure.runs import (
    SHORT,
    gpu_base,
    corpus_of,
    step_times,
    with_record_muon,
    train_arms,
)

NAMES = (
    "laptop_rates",
    "laptop",
    "laptop_record_4",
    "laptop_long",
    "laptop_long_rates",
    "laptop_weights",
    "laptop_pace",
)
CORPUS = ("rates", "parts")  # on a GPU, with a data folder
RATES = tuple(0.004 * 2**n for n in range(5))
OTHERS = (0.002, 0.004, 0.008)
PLAIN_DECAY = {
    "optim.muon.weight_decay": 0.1,
    "optim.muon.decay_with_lr": False,
    "optim.muon.cautious": False,
}
PARTS: dict[str, dict[str, Any]] = {
    "record 4's quintic": {"optim.muon.orthogonalizer": "quintic"},
    "three polynomials": {"optim.muon.ns_steps": 3},
    "no NorMuon": {"optim.muon.beta2": 0.0},
    "momentum held": {"schedule.momentum_min": 0.0},
    "no decay": {"optim.muon.weight_decay": 0.0},
    "decay of all": {"optim.muon.cautious": False},
    "plain decay": PLAIN_DECAY,
    "no wide factor": {"optim.muon.down_lr_mul": 1.0},
    "no factors": {"optim.muon.down_lr_mul": 1.0, "optim.muon.scale_by_shape": False},
}
RECORD_4 = fields_of(MuonConfig(weight_decay=0.1), "optim.muon.") | {"schedule.momentum_min": 0.0}
WEIGHTS = {
    "float32 weights": {"optim.muon.param_dtype": "float32"},
    "bfloat16 weights": {"optim.muon.param_dtype": "bfloat16"},
}


def rates(base: Config) -> dict[str, Config]:
    """Record 89's Muon at every rate of the matrices and of the rest."""
    points = [(rate, other) for rate in RATES for other in OTHERS]
    return {
        f"{r:g} {o:g}": vary(with_record_muon(base), {"optim.matrix_lr": r, "optim.adam.lr": o})
        for r, o in points
    }


def tuned(name: str, base: Config) -> Config:
    """Record 89's Muon at the rates that did best in a committed grid."""
    arms = load_result("muon", name)["data"]["arms"]
    return rates(base)[min(arms, key=lambda arm: arms[arm][0]["val_loss"])]


def arms_of(name: str, base: Config) -> dict[str, Config]:
    """The arms of a measurement: record 89's Muon, tuned, and what is compared with it."""
    whole = tuned("laptop_rates" if name.startswith("laptop") else "rates", base)
    if name == "laptop_weights":
        half = vary(whole, {"precision": "bfloat16"})
        return {
            name: vary(half, {"optim.muon.param_dtype": dtype})
            for name, dtype in {
                "split": "bf16_mantissa",
                "bfloat16": "bfloat16",
                "float32": "float32",
            }.items()
        }
    if name == "laptop_pace":
        adamw = vary(whole, RECORD_4 | {"optim.matrices": "adam"})
        return {"AdamW": adamw, "record 4": vary(whole, RECORD_4), "today": whole}
    if name == "laptop_record_4":
        return {"record 4": vary(whole, RECORD_4)}
    parts = PARTS if name.startswith("laptop") else PARTS | WEIGHTS
    return {"today": whole} | {part: vary(whole, change) for part, change in parts.items()}


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds: {"arms": {arm: [run, …]}}; laptop_pace: step times, {"ms": {arm: [ms, …]}}.

    rates: every point once. laptop and parts: record 89's Muon nine times, each part three times; laptop_record_4: chapter
    12's Muon at these rates, nine times; the rest: all three times.
    """
    laptop = name.startswith("laptop")
    base = vary(preset("cpu_gpt2"), SHORT) if laptop else gpu_base(arguments[0])
    base = vary(base, {"steps": 2000}) if "long" in name else base
    seeds = {"laptop": 9, "laptop_record_4": 9, "parts": 9}.get(name, 1)
    seeds = 3 if name in ("laptop_long", "laptop_weights") else seeds
    modules = ["speedrun.measure.muon", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(base))
    if name.endswith("rates"):
        points = rates(base)
        if "long" in name:  # around the best of the short runs
            points = {at: run for at, run in points.items() if run.optim.matrix_lr in RATES[1:3]}
        return {"arms": train_arms(points, 1, facts, not laptop)}, facts
    arms = arms_of(name, base)
    if name == "laptop_pace":
        return {"ms": step_times(arms)}, facts
    counts = {arm: seeds if arm in ("today", "record 4") else 3 for arm in arms}
    return {"arms": train_arms(arms, counts, facts, not laptop)}, facts
