# Tangled from notebooks/20_many_gpus.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The Adam step
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, PositiveFloat, PositiveInt

Number = float | Tensor


@dataclass(frozen=True)
class AdamConfig:
    """Adam, for everything but the blocks' matrices, and for those unless optim.matrices says otherwise. The defaults are llm.c's AdamW."""

    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices and tables, as a multiple of the learning rate; if cautious, of its square."""
    cautious: bool = False
    """Decay a weight only where the step makes it smaller anyway."""
    every: PositiveInt = 1
    """Steps from one update to the next; gradients add up meanwhile."""


def adam_step(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Number,
    betas: tuple[Number, Number],
    bias_corrections: tuple[Number, Number],
    eps: float,
    decay: Number,
    skip: Tensor | None = None,
) -> None:
    """One step of Adam with cautious decay, in place, in float32 whatever p and g are.

    bias_corrections: 1 − betaᵗ after t steps; eps is added after them, as in PyTorch, and upstream before. decay: the share that a decaying weight loses. skip: if not zero, nothing happens.
    """
    g = g.float()
    squared = g.square()
    if skip is not None:
        g, squared = torch.where(skip > 0, exp_avg, g), torch.where(skip > 0, exp_avg_sq, squared)
        lr, decay = lr * (1 - skip), decay * (1 - skip)
    exp_avg.add_((g - exp_avg) * (1 - betas[0]))
    exp_avg_sq.add_((squared - exp_avg_sq) * (1 - betas[1]))
    step = lr * (exp_avg / bias_corrections[0]) / ((exp_avg_sq / bias_corrections[1]).sqrt() + eps)
    weight = p.float()
    p.copy_(weight - step - decay * weight * (step * weight > 0))
