# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speedrun.model.gpt import GPTConfig


# %% Attention
class Attention(nn.Module):
    """Causal self-attention, (batch, tokens, width) → the same."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.num_heads = options.num_heads
        self.qkv = nn.Linear(options.model_dim, 3 * options.model_dim)
        self.out = nn.Linear(options.model_dim, options.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1 / sqrt(head_dim)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


# %% MLP and block
class MLP(nn.Module):
    """Two linear layers with a GELU between them, (…, width) → the same."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.up = nn.Linear(options.model_dim, 4 * options.model_dim)
        self.down = nn.Linear(4 * options.model_dim, options.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer, (batch, tokens, width) → the same: attention and MLP, each on a normed copy of the stream, each added to it."""

    def __init__(self, options: GPTConfig):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(options.model_dim), nn.LayerNorm(options.model_dim)
        self.attention, self.mlp = Attention(options), MLP(options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


# %% The model
def init_gpt2(model: nn.Module, options: GPTConfig) -> None:
    """Normal weights of `init_std`, biases zero; smaller by sqrt(2 · layers) where a matrix adds to the stream."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif "norm" not in name:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(
                weight, std=options.init_std / (math.sqrt(2 * options.num_layers) if adds else 1.0)
            )


class GPT2(nn.Module):
    """GPT-2, embedding and head tied. `model(inputs)`: logits (batch, tokens, vocab); with targets the mean loss."""

    def __init__(self, options: GPTConfig, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, options.model_dim)
        self.positions = nn.Embedding(options.max_seq_len, options.model_dim)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(options.model_dim)
        init_gpt2(self, options)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return gpt2_forward(self, inputs, targets)


def gpt2_forward(model: GPT2, inputs: Tensor, targets: Tensor | None) -> Tensor:
    """Logits, (batch, tokens, vocab), or with targets their mean cross-entropy in nats. inputs and targets: (batch, tokens) int64."""
    x = model.tokens(inputs) + model.positions.weight[: inputs.shape[1]]
    for block in model.blocks:
        x = block(x)
    logits = F.linear(model.norm(x), model.tokens.weight)
    if targets is None:
        return logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


# %% Three checks: parameters, FLOPs, the first loss
def parameter_count(options: GPTConfig, vocab_size: int) -> int:
    """Parameters by formula: embeddings, then per block 12 width² of matrices and 13 width of biases and norms."""
    d = options.model_dim
    return (
        (vocab_size + options.max_seq_len) * d + options.num_layers * (12 * d * d + 13 * d) + 2 * d
    )


# %% The optimizer
def decay_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of torch's: tensors of two or more dimensions decay (llm.c's rule), all others do not."""
    parameters = list(model.parameters())
    large, small = ([p for p in parameters if (p.ndim >= 2) == yes] for yes in (True, False))
    return [{"params": large, "weight_decay": weight_decay}, {"params": small, "weight_decay": 0.0}]
