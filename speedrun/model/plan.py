# Tangled from notebooks/07_plumbing.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.embedding import EmbeddingOptions, READS, Value, gate, values_by_layer


# %% The plan
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat


@dataclass(frozen=True)
class PlanOptions:
    """How the stream runs through the layers. The defaults are GPT-2's."""

    x0: bool = False
    """Before each layer the stream is mixed with x0, what the embedding gave; both weights are learned, x0's from 0."""
    residual: NonNegativeFloat = 1.0
    """x0: where the stream's own weights begin."""
    skips: Literal["none", "unet", "sigmoid", "one", "gated"] = "none"
    """Outputs of early layers that late ones get as well. unet: mirror-wise, weights from 1. sigmoid: of weights from -1.5. one: one, to the second layer of the later half. gated: times a gate for every token."""
    backout: bool = False
    """A share of the stream as it was after three quarters of the layers is taken out at the end; learned, from 0.5."""
    without: Literal["nothing", "attention", "mlp", "both"] = "nothing"
    """attention: the second layer of the later half has none. mlp: the first has none."""
    rate: PositiveFloat = 1.0
    """The rate of all weights that mix, as a multiple of optim.lr."""


@dataclass(frozen=True)
class LayerSpec:
    """A row of the plan: what one layer is made of."""

    attention: bool = True
    mlp: bool = True
    skip: int | None = None
    """The layer whose output is added before this one."""
    value: Value = None
    """The table whose rows, or the first layer's values, are mixed into attention's."""


def skip_pairs(layers: int, kind: str) -> dict[int, int]:
    """Late layers, and which early layer's output each gets."""
    half = layers // 2
    pairs = {layers - 1 - n: n for n in range(half)}
    if kind in ("one", "gated"):
        return {min(half + 1, layers - 1): min(layers // 3, half - 1)}
    return pairs if kind != "none" else {}


def make_plan(
    layers: int, options: PlanOptions, embedding: EmbeddingOptions
) -> tuple[LayerSpec, ...]:
    """One row for each layer."""
    skips, values = skip_pairs(layers, options.skips), values_by_layer(layers, embedding.values)
    deaf = min(layers // 2 + 1, layers - 1) if options.without in ("attention", "both") else None
    dull = 0 if options.without in ("mlp", "both") else None
    if deaf is not None:
        values[deaf] = None
    used = sorted({value for value in values if isinstance(value, int)})
    values = [used.index(value) if isinstance(value, int) else value for value in values]
    return tuple(LayerSpec(n != deaf, n != dull, skips.get(n), values[n]) for n in range(layers))


def tables_of(plan: Sequence[LayerSpec]) -> int:
    """How many value tables a plan needs."""
    return len({spec.value for spec in plan if isinstance(spec.value, int)})


def mixing_rows(
    plan: Sequence[LayerSpec], heads: int, options: PlanOptions, embedding: EmbeddingOptions
) -> list[dict[str, Any]]:
    """All weights that mix, as fields of their rows in the table."""
    skipping = tuple(n for n, spec in enumerate(plan) if spec.skip is not None)
    valued = tuple(n for n, spec in enumerate(plan) if spec.value is not None)
    everyone, rows = tuple(range(len(plan))), list[dict[str, Any]]()
    if embedding.smear:
        rows += [{"name": "smear_weight", "shape": (1,)}, {"name": "smear_gate", "shape": (READS,)}]
    if options.x0:
        kind: dict[str, Any] = {"shape": (len(plan),), "owners": everyone}
        rows += [{"name": "stream_weight", "mean": options.residual} | kind]
        rows += [{"name": "x0_weight"} | kind]
    if skipping:
        kind = {"shape": (len(skipping),), "owners": skipping}
        rows += [{"name": "skip_weight", "mean": 1.0 if options.skips == "unet" else -1.5} | kind]
    if options.skips == "gated":
        rows += [{"name": "skip_gate", "shape": (1, READS), "owners": skipping}]
    if valued and embedding.value_mix == "gates":
        shape: tuple[int, ...] = (len(valued), heads, READS)
        rows += [{"name": "value_gate", "shape": shape, "owners": valued}]
    elif valued:
        shape = (len(valued),) if embedding.value_mix == "share" else (len(valued), 2)
        rows += [{"name": "value_mix", "shape": shape, "mean": 0.5, "owners": valued}]
    if options.backout:
        rows += [{"name": "backout_weight", "shape": (1,), "mean": 0.5}]
    return [{"rate": options.rate, "mixes": True} | row for row in rows]


def enter(
    x: Tensor,
    x0: Tensor,
    outputs: Sequence[Tensor],
    spec: LayerSpec,
    weights: Mapping[str, Tensor],
    skips: str,
) -> Tensor:
    """What a layer gets, (batch, tokens, width): the stream, with an earlier layer's output and x0 mixed in."""
    if spec.skip is not None:
        weight = weights["skip_weight"]
        weight = weight if skips == "unet" else torch.sigmoid(weight)
        if skips == "gated":
            weight = weight * gate(x0, weights["skip_gate"])[..., None]
        x = x + weight * outputs[spec.skip]
    if "x0_weight" in weights:
        x = weights["stream_weight"] * x + weights["x0_weight"] * x0
    return x


def leave(x: Tensor, outputs: Sequence[Tensor], weights: Mapping[str, Any]) -> Tensor:
    """What the final norm gets: the stream, less a share of what it was after three quarters of the layers."""
    if weights.get("backout_weight") is None:
        return x
    return x - weights["backout_weight"] * outputs[min(2 * len(outputs) // 3, len(outputs) - 2)]
