# Tangled from notebooks/06_rotary.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from speedrun.lab.bounds import PositiveFloat


@dataclass(frozen=True)
class RotaryConfig:
    """How attention learns where tokens are. The defaults are GPT-2's."""

    pos: Literal["learned", "rope", "half_rope"] = "learned"
    """learned: a vector for every position. rope: rotary embeddings, turn queries and keys. half_rope: half-truncated, turn half of their pairs."""
    base: PositiveFloat = 10_000.0
    """The slowest pair turns by about 1/base a token; record 17's is 1024."""
    interleaved: bool = False
    """Two numbers that stand side by side are a pair (GPT-J), and not one of the first half with one of the second (GPT-NeoX)."""


def frequencies(head_dim: int, options: RotaryConfig) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), float32, falling; half_rope: the second half of them zeros."""
    if options.pos == "half_rope":
        turning = (1 / options.base) ** torch.linspace(0, 1, head_dim // 4)
        return torch.cat([turning, torch.zeros(head_dim // 2 - len(turning))])
    return options.base ** -(torch.arange(head_dim // 2) / (head_dim // 2))


def rotary_tables(tokens: int, head_dim: int, options: RotaryConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair, (tokens, head_dim / 2) each, float32."""
    angles = torch.outer(torch.arange(tokens).float(), frequencies(head_dim, options))
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Queries or keys, (…, tokens, head_dim), each pair turned by its angle (Su and others 2021)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
