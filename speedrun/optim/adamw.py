# Tangled from notebooks/03_baseline.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The optimizer
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclass(frozen=True)
class AdamWOptions:
    """AdamW, and the ends of its rate. The defaults are llm.c's for the 124M model."""

    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the running mean of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices, as a multiple of the learning rate."""
    grad_clip: Annotated[NonNegativeFloat, "0 switches clipping off"] = 1.0
    """Longest gradient, over all parameters together; 0 switches clipping off."""
    warmup_steps: NonNegativeInt = 700
    """Steps in which the rate climbs to its peak."""
    final_lr: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Rate at the last step, as a share of the peak."""


def make_adamw(
    parameters: dict[str, Tensor],
    decays: dict[str, bool],
    options: AdamWOptions,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """torch's fused AdamW over named parameters, in groups: those that decay, and those that do not.

    rates: multiples of the rate, by name; where there is one, it is the group's “share”.
    """
    odd = sorted(set(parameters) ^ set(decays))
    if odd:
        raise ValueError(
            f"parameters and decays must name the same tensors; only one names {', '.join(odd)}"
        )
    kinds = {name: (decays[name], (rates or {}).get(name, 1.0)) for name in parameters}
    groups: list[dict] = []
    for decay, share in sorted(set(kinds.values()), reverse=True):
        members = [p for name, p in parameters.items() if kinds[name] == (decay, share)]
        groups.append({"params": members, "weight_decay": options.weight_decay if decay else 0.0})
        if share != 1:
            groups[-1] |= {"share": share, "lr": share * options.lr}
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )
