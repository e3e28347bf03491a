# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% SOAP: Adam in Shampoo's eigenbases
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedrun.params import ParamSpec


@dataclass(frozen=True)
class SoapConfig:
    """SOAP's constants, its authors' defaults."""

    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the running mean, and of the squares and covariances."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    every: int = 10
    """Steps between two looks at the eigenbases."""


def adam_in(basis: tuple[Tensor, Tensor], g: Tensor, state: dict, options: SoapConfig) -> Tensor:
    """Adam's update L (m̂ / (√v̂ + eps)) Rᵀ of matrices with gradient g, (matrices, rows, cols); m and v are the moments of Lᵀ g R.

    basis: L, (matrices, rows, rows), and R, (matrices, cols, cols). The moments in `state` change in place.
    """
    (left, right), (beta1, beta2) = basis, options.betas
    turned = left.mT @ g @ right
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].lerp_(turned.square(), 1 - beta2)
    state["step"] += 1
    done = state["step"].max().item()
    mean = state["exp_avg"] / (1 - beta1**done)
    root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt()
    return left @ (mean / (root + options.eps)) @ right.mT


def eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices, (matrices, d, d), as columns; the largest eigenvalue first."""
    return torch.linalg.eigh(covariance)[1].flip(-1)


def follow(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from an old eigenbasis to the new one: (basis, order of its old columns)."""
    values = (basis * (covariance @ basis)).sum(-2)
    order = values.argsort(-1, descending=True)
    basis = basis.gather(-1, order[..., None, :].expand_as(basis))
    return torch.linalg.qr(covariance @ basis)[0], order


def turn(state: dict) -> None:
    """Move SOAP's bases after its covariances, and its moments along with them."""
    for side, axis in (("left", -2), ("right", -1)):
        old = state[f"{side}_basis"]
        new, order = follow(state[side], old)
        index = order.unsqueeze(-1 if axis == -2 else -2).expand_as(state["exp_avg_sq"])
        state["exp_avg_sq"].copy_(state["exp_avg_sq"].gather(axis, index))
        mean, change = state["exp_avg"], new.mT @ old
        mean.copy_(change @ mean if side == "left" else mean @ change.mT)
        old.copy_(new)


def soap_state(like: Tensor) -> dict[str, Tensor]:
    """SOAP's state for matrices of the shape of `like`, (matrices, rows, cols): moments, covariances, eigenbases.

    step, (matrices, 1, 1): how many were taken; -1 before the first gradient was seen.
    """
    n, *sides = like.shape
    state = {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
    for side, size in zip(("left", "right"), sides):
        state |= {key: like.new_zeros(n, size, size) for key in (side, f"{side}_basis")}
    return state | {"step": like.new_full((n, 1, 1), -1.0)}


def soap_update(
    g: Tensor, state: dict, skip: Tensor | None, options: SoapConfig = SoapConfig()
) -> Tensor:
    """SOAP's update at a learning rate of 1 for matrices with gradient g, (matrices, rows, cols). The first one only takes the bases, and is zero.

    skip: as elsewhere, but the host waits for it.
    """
    if skip is not None and skip.item():
        return torch.zeros_like(g)
    pairs, beta2 = {"left": g @ g.mT, "right": g.mT @ g}, options.betas[1]
    if state["step"].min() < 0:  # of matrices, not of padding, whose saved state is 0
        for side, pair in pairs.items():
            state[side].copy_((1 - beta2) * pair)
            state[f"{side}_basis"].copy_(eigenbasis(pair))
        state["step"].zero_()
        return torch.zeros_like(g)
    update = adam_in((state["left_basis"], state["right_basis"]), g, state, options)
    for side, pair in pairs.items():
        state[side].lerp_(pair, 1 - beta2)
    if state["step"].max().item() % options.every == 0:
        turn(state)
    return update


class SoapRule:
    """SOAP as a rule of chapter 20's optimizer, on the whole matrices that this rank updates, (matrices, rows, cols)."""

    graphable = False  # it asks the device

    def __init__(self, specs: Sequence[ParamSpec], comm: Any, config: Any, fuse: bool):
        self.comm, self.state = comm, soap_state(comm.shard)
        self.weight_decay = config.adam.weight_decay * specs[0].wd_mul

    def update(self, scalars: Any, skip: Tensor, updates: Tensor) -> None:
        """One step: p ← p − lr · (update + weight_decay · p), unless skip is 1. scalars: numbers of this step, by name."""
        update = soap_update(self.comm.grad, self.state, skip)
        lr = scalars["matrix_lr"] * (1 - skip)
        self.comm.shard.mul_(1 - lr * self.weight_decay).sub_(lr * update)
