# Tangled from notebooks/07_plumbing.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat

GATE_CHANNELS = 12  # how many of a vector's numbers a gate looks at
Value = int | Literal["first"] | None


@dataclass(frozen=True)
class EmbeddingConfig:
    """What a token brings into the model. The defaults are GPT-2's."""

    norm: bool = False
    """RMS norm behind the lookup, so that only a vector's direction counts."""
    std: NonNegativeFloat = 0.0
    """Deviation of the first vectors; 0: model.init_std."""
    lr_mul: PositiveFloat = 1.0
    """The embedding's learning rate as a multiple of optim.adam.lr."""
    smear: bool = False
    """Each token's vector gets a little of the one before, through a gate."""
    values: Literal["none", "first", "all", "mirror", "outer", "ends"] = "none"
    """What is mixed into attention's values: the first layer's, or rows of tables. all: a table a layer. mirror: one for first and last, and so on. outer: three, for the first and the last three layers. ends: five, for the first two and the last three."""
    value_residual: Literal["lambda", "lambdas", "gate"] = "lambda"
    """lambda: two learned weights that add up to 1, from halves. lambdas: two. gate: 1 for the values, and a gate for every token and head."""
    value_std: NonNegativeFloat = 0.01
    """Deviation of the tables' first entries; record 70's is 0.01, record 14's was 1."""
    value_lr_mul: PositiveFloat = 1.0
    """The tables' learning rate as a multiple of optim.adam.lr."""
    value_decay: NonNegativeFloat = 1.0
    """The tables' weight decay as a multiple of optim.adam.weight_decay."""


def value_table_layout(layers: int, kind: str) -> list[Value]:
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


# %% Gates and smear
def gate(x: Tensor, weight: Tensor) -> Tensor:
    """A number between 0 and 2 for every vector of x, (…, width); with a weight of (heads, GATE_CHANNELS), and not (GATE_CHANNELS,), one a head."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], weight))


def apply_smear(x: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """x, (batch, tokens, width), with a share of every vector added to the next one."""
    share = weights["smear_lambda"] * gate(x[:, 1:], weights["smear_gate"]) / 2
    return torch.cat([x[:, :1], x[:, 1:] + share[..., None] * x[:, :-1]], 1)


def lookup_value_embeds(inputs: Tensor, table: Tensor, tables: int) -> tuple[Tensor, ...]:
    """Rows of value tables that stand on top of each other, in one gather: (batch, tokens, width) of each."""
    begins = len(table) // tables * torch.arange(tables, device=inputs.device)
    return F.embedding(inputs[..., None] + begins, table).unbind(-2)


def add_value_embed(
    v: Tensor, ve: Tensor, x: Tensor, weights: Mapping[str, Tensor], kind: str
) -> Tensor:
    """Attention's values, (batch, heads, tokens, head_dim), with others mixed in. x: (batch, tokens, width), what attention reads."""
    if kind == "gate":
        return v + gate(x, weights["ve_gate"]).mT[..., None] * ve
    weight = weights["ve_lambdas"]
    own, others = (1 - weight, weight) if kind == "lambda" else weight.unbind()
    return own * v + others * ve
