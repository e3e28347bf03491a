# Tangled from notebooks/05_modern_block.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The measurement
import math
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.config import Config, vary
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import best_of, corpus_of, cpu_base, step_times, train_arms

if TYPE_CHECKING:
    from speedrun.run import Run

NAMES = ("rates", "without", "alone", "other_rates", "long", "inside", "pace")
GPT2: dict[str, Any] = {
    "model.block.norm": "layer",
    "model.block.biases": True,
    "model.block.qk_norm": False,
}
GPT2 |= {
    "model.block.activation": "gelu",
    "model.block.zero_init_proj": False,
    "model.block.fan_in_init": False,
}
MODERN: dict[str, Any] = {
    "model.block.norm": "rms",
    "model.block.biases": False,
    "model.block.qk_norm": True,
}
MODERN |= {
    "model.block.activation": "relu2",
    "model.block.zero_init_proj": True,
    "model.block.fan_in_init": True,
}
CHANGES = {
    "plain norms": "model.block.norm",
    "no biases": "model.block.biases",
    "QK-norm": "model.block.qk_norm",
    "ReLU²": "model.block.activation",
    "zeros": "model.block.zero_init_proj",
    "scale by width": "model.block.fan_in_init",
}
GRID = [(rate, other) for rate in (0.002, 0.004, 0.008, 0.016) for other in (0.004, 0.008, 0.016)]


LONG: dict[str, Any] = {"steps": 2000, "schedule.momentum_ramp": (460, 80)}


def at_others_rates() -> dict[str, Config]:
    """What lacks one change at the rates of GPT-2's block, and what has one alone at those of the modern block."""
    old, new = (
        {"optim.matrix_lr": run.optim.matrix_lr, "optim.adam.lr": run.optim.adam.lr}
        for run in (cpu_base(), tuned())
    )
    without = {f"without {arm}": vary(run, old) for arm, run in arms_of("without").items()}
    alone = {"GPT-2": cpu_base()} | arms_of("alone")
    return without | {f"alone {arm}": vary(run, new) for arm, run in alone.items()}


def points() -> dict[str, Config]:
    """The modern block at every point of the grid."""
    modern = vary(cpu_base(), MODERN)
    return {
        f"{r:g} {o:g}": vary(modern, {"optim.matrix_lr": r, "optim.adam.lr": o}) for r, o in GRID
    }


def tuned() -> Config:
    """The modern block at the rates that did best in the committed grid."""
    return best_of("modern_block", "rates")


def arms_of(name: str) -> dict[str, Config]:
    """The arms of a measurement, by name."""
    if name == "rates":
        return points()
    if name == "alone":
        return {change: vary(cpu_base(), {key: MODERN[key]}) for change, key in CHANGES.items()}
    modern = tuned()
    if name == "pace":
        return {"GPT-2": cpu_base(), "modern": modern} | arms_of("alone")
    if name == "other_rates":
        return at_others_rates()
    if name == "long":
        some = {"GPT-2": cpu_base()} | arms_of("without")
        kept = ("GPT-2", "modern", "zeros", "QK-norm", "ReLU²")
        return {arm: vary(some[arm], LONG) for arm in kept}
    without = {change: vary(modern, {key: GPT2[key]}) for change, key in CHANGES.items()}
    return {"modern": modern} | without | {"one head": vary(modern, {"model.num_heads": 1})}


@torch.no_grad()
def look_inside(live: "Run") -> dict:
    """In one row of validation text of a trained run: the largest score, its bound, and the share of activations at zero."""
    from speedrun.train import val_batches

    found: dict[str, Any] = {"scores": [], "zeros": []}
    attend, relu = F.scaled_dot_product_attention, F.relu

    def attend_and_note(
        q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None
    ) -> Tensor:
        factor = scale or 1 / math.sqrt(q.shape[-1])
        found["scores"].append((factor * q @ k.mT).tril().abs().max().item())
        found["bound"] = factor * q.shape[-1]
        return attend(q, k, v, is_causal=is_causal, scale=scale)

    def relu_and_note(x: Tensor) -> Tensor:
        found["zeros"].append((x <= 0).float().mean().item())
        return relu(x)

    batch = next(val_batches(live, live.config.val_tokens))
    noted = patch.object(F, "scaled_dot_product_attention", attend_and_note)
    with noted, patch.object(F, "relu", relu_and_note):
        live.model(batch.inputs, batch.targets)
    return found


def inside() -> dict[str, Config]:
    """With and without QK-norm, at the tuned rate of the matrices and at twice that."""
    rate = tuned().optim.matrix_lr
    return {
        f"{'with' if norm else 'without'} {times}": vary(
            tuned(), {"optim.matrix_lr": times * rate, "model.block.qk_norm": norm}
        )
        for times in (1, 2)
        for norm in (True, False)
    }


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """Train arms with paired seeds, {"arms": {arm: [run, …]}}: the modern block nine times, each change five times.

    rates: its grid. pace: step times, {"ms": {arm: [ms, …]}}. inside: also what a trained model's attention and MLP do.
    """
    seeds = {"without": 9, "alone": 5, "inside": 3, "other_rates": 3, "long": 3}.get(name, 1)
    modules = ["speedrun.measure.modern_block", "speedrun.train"]
    facts = stamp(command, modules, seeds, range(seeds), corpus_of(cpu_base()))
    arms = inside() if name == "inside" else arms_of(name)
    if name == "pace":
        return {"ms": step_times(arms)}, facts
    counts = {arm: seeds if arm == "modern" else min(seeds, 5) for arm in arms}
    after = look_inside if name == "inside" else None
    return {"arms": train_arms(arms, counts, facts, after=after)}, facts
