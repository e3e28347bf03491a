# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from speedrun.lab.bounds import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class GPT2Options:
    """The shape of a GPT-2. The defaults are the 124M model; the vocabulary comes from the data."""

    layers: Annotated[int, Interval(ge=1, le=1024)] = 12
    """Blocks."""
    heads: PositiveInt = 12
    """Attention heads; they share the width evenly."""
    width: Annotated[int, Interval(ge=1, le=2**16)] = 768
    """Length of the residual stream's vectors."""
    context: Annotated[int, Interval(ge=1, le=2**20)] = 1024
    """Longest row of tokens: the number of learned positions."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; GPT-2's 0.02 suits a width of 768."""


class Attention(nn.Module):
    """Causal self-attention, (batch, tokens, width) → the same."""

    def __init__(self, options: GPT2Options):
        super().__init__()
        self.heads = options.heads
        self.qkv = nn.Linear(options.width, 3 * options.width)
        self.out = nn.Linear(options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (…, width) → the same."""

    def __init__(self, options: GPT2Options):
        super().__init__()
        self.up = nn.Linear(options.width, 4 * options.width)
        self.down = nn.Linear(4 * options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention and perceptron, each on a normed copy of the stream, each added to it."""

    def __init__(self, options: GPT2Options):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(options.width), nn.LayerNorm(options.width)
        self.attention, self.mlp = Attention(options), MLP(options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


def init_gpt2(model: nn.Module, options: GPT2Options) -> None:
    """Normal weights of `init_std`, biases zero; smaller by sqrt(2 · layers) where a matrix adds to the stream."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif "norm" not in name:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(
                weight, std=options.init_std / (math.sqrt(2 * options.layers) if adds else 1.0)
            )


class GPT2(nn.Module):
    """GPT-2, embedding and head tied. `model(inputs)`: logits (batch, tokens, vocab); with targets the mean loss."""

    def __init__(self, options: GPT2Options, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, options.width)
        self.positions = nn.Embedding(options.context, options.width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.width)
        init_gpt2(self, options)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return gpt2_forward(self, inputs, targets)


def gpt2_forward(model: GPT2, inputs: Tensor, targets: Tensor | None) -> Tensor:
    """Embed, run the blocks, score. inputs and targets: (batch, tokens) int64."""
    x = model.tokens(inputs) + model.positions.weight[: inputs.shape[1]]
    for block in model.blocks:
        x = block(x)
    logits = F.linear(model.norm(x), model.tokens.weight)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# %% Three numbers that must come out
def parameter_count(options: GPT2Options, vocab_size: int) -> int:
    """Parameters by formula: embeddings, then per block 12 width² of matrices and 13 width of biases and norms."""
    d = options.width
    return (vocab_size + options.context) * d + options.layers * (12 * d * d + 13 * d) + 2 * d


def flops_per_token(
    options: GPT2Options, vocab_size: int, seq_len: int, causal: bool = True
) -> float:
    """FLOPs of a token, forward and backward: 6 a weight that multiplies, 12 · seq_len · width a layer for attention.

    causal: count half of attention, as a kernel does that skips what the mask hides.
    """
    weights = options.layers * 12 * options.width**2 + vocab_size * options.width
    attention = options.layers * 12 * seq_len * options.width
    return 6.0 * weights + attention * (0.5 if causal else 1.0)


# %% The optimizer
def decays_by_shape(model: nn.Module) -> dict[str, bool]:
    """llm.c's rule: tensors of two or more dimensions decay."""
    return {name: parameter.ndim >= 2 for name, parameter in model.named_parameters()}
