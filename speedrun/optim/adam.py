# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Adam, on whatever share
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun.lab.bounds import NonNegativeFloat, PositiveInt

Number = float | Tensor


@dataclass(frozen=True)
class SharingOptions:
    """Whether ranks share the update, each doing its part, and what Adam is if they do."""

    on: bool = False
    """Chapter 20's optimizer, which does not clip. Off: PyTorch's AdamW, with chapter 12's or 13's rule beside it, on every rank."""
    adam_every: PositiveInt = 2
    """Steps from one update by Adam to the next."""
    adam_decay: NonNegativeFloat = 0.005
    """Decay of weights that a step makes smaller anyway, as a multiple of the rate's square."""


def adam_step(
    p: Tensor,
    g: Tensor,
    mean: Tensor,
    square: Tensor,
    rate: Number,
    betas: tuple[Number, Number],
    fixes: tuple[Number, Number],
    eps: float,
    decay: Number,
    skip: Tensor | None = None,
) -> None:
    """One step of Adam in place, computed in float32 whatever p and g are; decay where step and weight agree.

    fixes: 1 − betaᵗ after t steps. decay: what such a weight loses, as a share, beside the step. skip: where not zero, nothing happens.
    """
    g = g.float()
    squared = g.square()
    if skip is not None:
        g, squared = torch.where(skip > 0, mean, g), torch.where(skip > 0, square, squared)
        rate, decay = rate * (1 - skip), decay * (1 - skip)
    mean.add_((g - mean) * (1 - betas[0]))
    square.add_((squared - square) * (1 - betas[1]))
    step = rate * (mean / fixes[0]) / ((square / fixes[1]).sqrt() + eps)
    whole = p.float()
    p.copy_(whole - step - decay * whole * (step * whole > 0))
