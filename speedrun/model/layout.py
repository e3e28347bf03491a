# Tangled from notebooks/07_plumbing.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.model.embedding import EmbeddingConfig, GATE_CHANNELS, Value, gate, value_table_layout


# %% The layout of the layers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, PositiveFloat
from speedrun.params import ParamSpec


@dataclass(frozen=True)
class LayoutConfig:
    """How the stream runs through the layers. The defaults are GPT-2's."""

    x0: bool = False
    """Before each layer the stream is mixed with x0, what the embedding gave; both weights are learned, x0's from 0."""
    resid_lambda_init: NonNegativeFloat = 1.0
    """x0: what the stream's own weights, resid_lambdas, begin with."""
    skips: Literal["none", "unet", "unet_sigmoid", "single", "single_gated"] = "none"
    """Outputs of early layers that late ones get as well. unet: layer i to layer L-1-i, weights from 1. unet_sigmoid: the same, sigmoids of weights from -1.5. single: one skip, to the second layer of the later half. single_gated: times a gate for every token."""
    backout: bool = False
    """A share of the stream as it was after three quarters of the layers is taken out at the end; learned, from 0.5."""
    skip_sublayers: Literal["none", "attn", "mlp", "both"] = "none"
    """attn: attention is skipped in the second layer of the later half. mlp: the MLP is skipped in the first. both: both."""
    lr_mul: PositiveFloat = 1.0
    """The learning rate of all weights that mix, as a multiple of optim.adam.lr."""
    stream_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the residual stream; bfloat16: from the embedding on."""


@dataclass(frozen=True)
class LayerSpec:
    """A row of the layout: what one layer is made of."""

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
    if kind in ("single", "single_gated"):
        return {min(half + 1, layers - 1): min(layers // 3, half - 1)}
    return pairs if kind != "none" else {}


def make_layout(
    layers: int, options: LayoutConfig, embedding: EmbeddingConfig
) -> tuple[LayerSpec, ...]:
    """One row for each layer."""
    skips, values = skip_pairs(layers, options.skips), value_table_layout(layers, embedding.values)
    no_attn = (
        min(layers // 2 + 1, layers - 1) if options.skip_sublayers in ("attn", "both") else None
    )
    no_mlp = 0 if options.skip_sublayers in ("mlp", "both") else None
    if no_attn is not None:
        values[no_attn] = None
    used = sorted({value for value in values if isinstance(value, int)})
    values = [used.index(value) if isinstance(value, int) else value for value in values]
    return tuple(
        LayerSpec(n != no_attn, n != no_mlp, skips.get(n), values[n]) for n in range(layers)
    )


def num_value_tables(layout: Sequence[LayerSpec]) -> int:
    """How many value tables a layout needs."""
    return len({spec.value for spec in layout if isinstance(spec.value, int)})


def scalar_specs(
    layout: Sequence[LayerSpec], heads: int, config: LayoutConfig, embedding: EmbeddingConfig
) -> list[ParamSpec]:
    """All weights by which vectors are mixed."""
    skipping = tuple(n for n, spec in enumerate(layout) if spec.skip is not None)
    valued = tuple(n for n, spec in enumerate(layout) if spec.value is not None)
    everyone = tuple(range(len(layout)))
    row: Any = partial(ParamSpec, lr_mul=config.lr_mul, is_scalar=True)
    specs = (
        [row("smear_lambda", (1,)), row("smear_gate", (GATE_CHANNELS,))] if embedding.smear else []
    )
    if config.x0:
        specs.append(
            row("resid_lambdas", (len(layout),), everyone, init_mean=config.resid_lambda_init)
        )
        specs.append(row("x0_lambdas", (len(layout),), everyone))
    if skipping:
        mean = 1.0 if config.skips == "unet" else -1.5
        specs.append(row("skip_lambdas", (len(skipping),), skipping, init_mean=mean))
    if config.skips == "single_gated":
        specs.append(row("skip_gate", (1, GATE_CHANNELS), skipping))
    if valued and embedding.value_residual == "gate":
        specs.append(row("ve_gate", (len(valued), heads, GATE_CHANNELS), valued))
    elif valued:
        shape = (len(valued),) if embedding.value_residual == "lambda" else (len(valued), 2)
        specs.append(row("ve_lambdas", shape, valued, init_mean=0.5))
    if config.backout:
        specs.append(row("backout_lambda", (1,), init_mean=0.5))
    return specs


def mix_residual(
    x: Tensor, x0: Tensor, skip: Tensor | None, weights: Mapping[str, Tensor], skips: str
) -> Tensor:
    """What a layer gets, (batch, tokens, width): the stream, with an earlier layer's output (skip) and x0 mixed in."""
    if skip is not None:
        weight = weights["skip_lambdas"]
        weight = weight if skips == "unet" else torch.sigmoid(weight)
        if skips == "single_gated":
            weight = weight * gate(x0, weights["skip_gate"])[..., None]
        x = x + weight * skip
    if "x0_lambdas" in weights:
        x = weights["resid_lambdas"] * x + weights["x0_lambdas"] * x0
    return x


def backout_layer(layers: int) -> int:
    """The layer behind which three quarters of the layers are over: a share of its output is taken out at the end."""
    return min(2 * layers // 3, layers - 2)


def apply_backout(x: Tensor, early: Tensor, weights: Mapping[str, Any]) -> Tensor:
    """What the final norm gets: the stream, less a share of what it was behind `backout_layer` (early)."""
    return x - weights["backout_lambda"] * early
