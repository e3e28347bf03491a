# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Plumbing

# %%
#| default_exp model.embedding
#| export
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

READS = 12  # how many of a vector's numbers a gate looks at
Value = int | Literal["first"] | None


@dataclass(frozen=True)
class EmbeddingOptions:
    """What a token brings into the model. The defaults are GPT-2's."""

    norm: bool = False
    """RMS norm behind the lookup, so that only a vector's direction counts."""
    std: float = 0.0
    """Deviation of the first vectors; 0: model.init_std."""
    rate: float = 1.0
    """The embedding's rate as a multiple of optim.lr."""
    smear: bool = False
    """Each token's vector gets a little of the one before, through a gate."""
    values: Literal["none", "first", "all", "mirror", "outer", "ends"] = "none"
    """What is mixed into attention's values: the first layer's, or rows of tables. all: a table a layer. mirror: one for first and last, and so on. outer: three, for the first and the last three layers. ends: five, for the first two and the last three."""
    value_mix: Literal["share", "free", "gates"] = "share"
    """share: two learned weights that add up to 1, from halves. free: two. gates: 1 for the values, and a gate for every token and head."""
    value_std: float = 0.01
    """Deviation of the tables' first entries."""
    value_rate: float = 1.0
    """The tables' rate as a multiple of optim.lr."""


# %%
#| export
def values_by_layer(layers: int, kind: str) -> list[Value]:
    """What each layer's values are mixed with: the number of a table, the first layer's values, or nothing."""
    if kind == "first":
        own: list[Value] = [None]
        return own + ["first"] * (layers - 1)
    if kind in ("all", "mirror"):
        return [n if kind == "all" else min(n, layers - 1 - n) for n in range(layers)]
    begin, end = {"outer": (3, 3), "ends": (2, 3)}.get(kind, (0, 0))
    begin = min(begin, layers // 2)
    end = min(end, begin if kind == "outer" else layers - begin)
    middle: list[Value] = [None] * (layers - begin - end)
    last = range(end) if kind == "outer" else range(begin, begin + end)
    return [*range(begin), *middle, *last]


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """A number between 0 and 2 for every vector of x, (…, width); with a weight of (heads, READS), and not (READS,), one a head."""
    return 2 * torch.sigmoid(F.linear(x[..., :READS], weight))


def smeared(x: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """x, (batch, tokens, width), with a share of every vector added to the next one."""
    share = weights["smear_weight"] * gate(x[:, 1:], weights["smear_gate"]) / 2
    return torch.cat([x[:, :1], x[:, 1:] + share[..., None] * x[:, :-1]], 1)


def looked_up(inputs: Tensor, table: Tensor, tables: int) -> tuple[Tensor, ...]:
    """Rows of value tables that stand on top of each other, in one gather: (batch, tokens, width) of each."""
    begins = len(table) // tables * torch.arange(tables, device=inputs.device)
    return F.embedding(inputs[..., None] + begins, table).unbind(-2)


def with_value(
    v: Tensor, other: Tensor, x: Tensor, weights: Mapping[str, Tensor], kind: str
) -> Tensor:
    """Attention's values, (batch, heads, tokens, head_dim), with others mixed in. x: (batch, tokens, width), what attention reads."""
    if kind == "gates":
        return v + gate(x, weights["value_gate"]).mT[..., None] * other
    weight = weights["value_mix"]
    own, others = (1 - weight, weight) if kind == "share" else weight.unbind()
    return own * v + others * other


# %%
#| default_exp model.plan
#| export
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlanOptions:
    """How the stream runs through the layers. The defaults are GPT-2's."""

    x0: bool = False
    """Before each layer the stream is mixed with x0, what the embedding gave; both weights are learned, x0's from 0."""
    residual: float = 1.0
    """x0: where the stream's own weights begin."""
    skips: Literal["none", "unet", "sigmoid", "one", "gated"] = "none"
    """Outputs of early layers that late ones get as well. unet: mirror-wise, weights from 1. sigmoid: of weights from -1.5. one: one of these. gated: times a gate for every token."""
    backout: bool = False
    """A share of the stream as it was after two thirds of the layers is taken out at the end; learned, from 0.5."""
    without: Literal["nothing", "attention", "mlp", "both"] = "nothing"
    """attention: the second layer of the later half has none. mlp: the first has none."""
    rate: float = 1.0
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
        source = min(layers // 3, half - 1)
        return {layers - 1 - source: source}
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


# %%
#| export
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
    """What the final norm gets: the stream, less a share of what it was after two thirds of the layers."""
    if weights.get("backout_weight") is None:
        return x
    return x - weights["backout_weight"] * outputs[min(2 * len(outputs) // 3, len(outputs) - 2)]
