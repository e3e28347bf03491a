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

    positions: Literal["learned", "rotary", "half"] = "learned"
    """learned: a vector for every position. rotary: turn queries and keys. half: turn half of their pairs."""
    base: PositiveFloat = 10_000.0
    """The slowest pair turns by about 1/base a token; record 17's is 1024."""
    pairs: Literal["halves", "neighbours"] = "halves"
    """Which numbers are a pair: one of the first half with one of the second, or two that stand side by side."""


def frequencies(head_dim: int, options: RotaryConfig) -> Tensor:
    """Radians a token of each pair, (head_dim / 2,), float32, falling; half: the second half of them zeros."""
    if options.positions == "half":
        turning = (1 / options.base) ** torch.linspace(0, 1, head_dim // 4)
        return torch.cat([turning, torch.zeros(head_dim // 2 - len(turning))])
    return options.base ** -(torch.arange(head_dim // 2) / (head_dim // 2))


def rotation_tables(tokens: int, head_dim: int, options: RotaryConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angle for every pair, (tokens, head_dim / 2) each, float32."""
    angles = torch.outer(torch.arange(tokens).float(), frequencies(head_dim, options))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """Queries or keys, (…, tokens, head_dim), each pair turned by its angle (Su and others 2021)."""
    halves = pairs == "halves"
    a, b = x.chunk(2, -1) if halves else x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[: x.shape[-2]].to(x.dtype), sin[: x.shape[-2]].to(x.dtype)
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)
