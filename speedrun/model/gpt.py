# Tangled from notebooks/21_model.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTOptions:
    """The shape of the package's model. The vocabulary comes from the data."""

    layers: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads; they share the width evenly."""
    width: int = 768
    """Length of the residual stream's vectors."""
    context: int = 1024
    """Longest row of tokens: the number of learned positions."""
    init_std: float = 0.02
    """Standard deviation of the initial weights: 0.02 for a width of 768, more for a narrower model."""


@dataclass(frozen=True)
class Parameter:
    """A row of the parameter table. It starts as normal(mean, std).

    decay: whether AdamW decays it. multiplies: whether it costs one multiply-add a weight and token.
    matrices: how many matrices stand on top of each other in each slice of a bank; 0: it is no bank of matrices.
    """

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0
    decay: bool = False
    multiplies: bool = False
    matrices: int = 0


def parameter_table(options: GPTOptions, vocab_size: int) -> tuple[Parameter, ...]:
    """Every parameter of the model. What begins with the number of layers is a bank: one slice a layer."""
    n, d, std = options.layers, options.width, options.init_std
    adds = std / math.sqrt(2 * n)  # matrices whose output is added to the stream, 2n times in all
    table: dict[str, Any] = {"decay": True, "multiplies": True}
    matrix: dict[str, Any] = table | {"matrices": 1}
    return (
        Parameter("token_embedding", (vocab_size, d), std=std, **table),  # multiplies as the head
        Parameter("position_embedding", (options.context, d), std=std, decay=True),
        Parameter("attention_norm_gain", (n, d), mean=1.0),
        Parameter("attention_norm_bias", (n, d)),
        Parameter("attention_qkv", (n, 3 * d, d), std=std, **matrix | {"matrices": 3}),
        Parameter("attention_qkv_bias", (n, 3 * d)),
        Parameter("attention_out", (n, d, d), std=adds, **matrix),
        Parameter("attention_out_bias", (n, d)),
        Parameter("mlp_norm_gain", (n, d), mean=1.0),
        Parameter("mlp_norm_bias", (n, d)),
        Parameter("mlp_up", (n, 4 * d, d), std=std, **matrix),
        Parameter("mlp_up_bias", (n, 4 * d)),
        Parameter("mlp_down", (n, d, 4 * d), std=adds, **matrix),
        Parameter("mlp_down_bias", (n, d)),
        Parameter("final_norm_gain", (d,), mean=1.0),
        Parameter("final_norm_bias", (d,)),
    )


# %% Beginning
def init_parameter(row: Parameter, seed: int) -> Tensor:
    """The initial values of one row, float32 on the CPU: a function of the seed and the row alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{row.name}".encode()))
    values = torch.full(row.shape, row.mean)
    return values + row.std * torch.randn(row.shape, generator=generator) if row.std else values


# %% The forward pass
def attention(
    x: Tensor, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor, *, heads: int
) -> Tensor:
    """Causal self-attention, (batch, tokens, width) → the same. qkv: (3 · width, width), out: (width, width)."""
    batch, tokens, width = x.shape
    shape = (batch, tokens, 3, heads, width // heads)
    q, k, v = F.linear(x, qkv, qkv_bias).view(shape).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
    return F.linear(y.transpose(1, 2).reshape(batch, tokens, width), out, out_bias)


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """Two linear layers with a GELU between them. up: (4 · width, width), down: (width, 4 · width)."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the last dimension."""
    return F.layer_norm(x, gain.shape, gain, bias)


NORM = ("attention_norm_gain", "attention_norm_bias")
ATTENTION = (*NORM, "attention_qkv", "attention_qkv_bias", "attention_out", "attention_out_bias")
MLP = ("mlp_norm_gain", "mlp_norm_bias", "mlp_up", "mlp_up_bias", "mlp_down", "mlp_down_bias")


def gpt_forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Logits (batch, tokens, vocab) of inputs, (batch, tokens) int64; with targets the mean cross-entropy, nats."""
    x = F.embedding(inputs, self.token_embedding) + self.position_embedding[: inputs.shape[1]]
    banks = [getattr(self, name).unbind() for name in ATTENTION + MLP]
    for weights in zip(*banks):
        gain, bias, *matrices = weights[: len(ATTENTION)]
        x = x + attention(norm(x, gain, bias), *matrices, heads=self.options.heads)
        gain, bias, *matrices = weights[len(ATTENTION) :]
        x = x + mlp(norm(x, gain, bias), *matrices)
    x = norm(x, self.final_norm_gain, self.final_norm_bias)
    logits = F.linear(x, self.token_embedding)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class GPT(nn.Module):
    """The package's model: banks of weights, and the table that describes them."""

    def __init__(self, options: GPTOptions, vocab_size: int, seed: int = 0):
        super().__init__()
        if options.width % options.heads:
            raise ValueError(f"width {options.width} is not a multiple of heads {options.heads}")
        self.options, self.table = options, parameter_table(options, vocab_size)
        for row in self.table:
            self.register_parameter(row.name, nn.Parameter(init_parameter(row, seed)))

    forward = gpt_forward

    def decays(self) -> dict[str, bool]:
        """Which parameters decay, by name."""
        return {row.name: row.decay for row in self.table}

    def matrices(self) -> dict[str, int]:
        """The banks of matrices, by name, and how many each of their slices holds."""
        return {row.name: row.matrices for row in self.table if row.matrices}


# %% The same model
INSIDE = {
    "attention_norm": "norm_1",
    "attention_qkv": "attention.qkv",
    "attention_out": "attention.out",
    "mlp_norm": "norm_2",
    "mlp_up": "mlp.up",
    "mlp_down": "mlp.down",
}


def banks_from_blocks(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of chapter 03's GPT2 (weights or gradients, by name) as banks: those of all blocks stacked."""
    banks = {
        "token_embedding": state["tokens.weight"],
        "position_embedding": state["positions.weight"],
    }
    for bank, layer in INSIDE.items():
        for part, suffix in (("weight", "_gain" if "norm" in bank else ""), ("bias", "_bias")):
            banks[bank + suffix] = torch.stack(
                [state[f"blocks.{i}.{layer}.{part}"] for i in range(layers)]
            )
    return banks | {"final_norm_gain": state["norm.weight"], "final_norm_bias": state["norm.bias"]}


# %% The measurement
def model_flops_per_token(options: GPTOptions, vocab_size: int, seq_len: int) -> float:
    """FLOPs of a token, forward and backward: 6 a weight that multiplies, 6 · seq_len · width a layer for attention.

    Attention counts what causality leaves: on average a token sees half of the row.
    """
    weights = sum(
        math.prod(row.shape) for row in parameter_table(options, vocab_size) if row.multiplies
    )
    return 6.0 * weights + 6.0 * options.layers * seq_len * options.width
