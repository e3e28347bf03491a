# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% SOAP, from the other side
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoapOptions:
    """SOAP's constants, its authors' defaults."""

    betas: tuple[float, float] = (0.95, 0.95)
    """Decay of the running mean, and of the squares and covariances."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    every: int = 10
    """Steps between two looks at the eigenbases."""


def adam_in(basis: tuple[Tensor, Tensor], g: Tensor, state: dict, options: SoapOptions) -> Tensor:
    """One step of Adam on matrices (n, rows, cols), taken in another pair of bases and turned back."""
    (left, right), (beta1, beta2) = basis, options.betas
    turned = left.mT @ g @ right
    state["exp_avg"].lerp_(turned, 1 - beta1)
    state["exp_avg_sq"].lerp_(turned.square(), 1 - beta2)
    state["step"] += 1
    done = state["step"].item()
    mean = state["exp_avg"] / (1 - beta1**done)
    root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt()
    return left @ (mean / (root + options.eps)) @ right.mT


def eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices (n, d, d) as columns, the largest eigenvalue first."""
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


def soap_update(
    g: Tensor, state: dict, skip: Tensor | None, options: SoapOptions = SoapOptions()
) -> Tensor:
    """The update at rate 1 of matrices with gradient g, (matrices, rows, cols). The first step only looks."""
    if skip is not None and skip.item():
        return torch.zeros_like(g)
    pairs, beta2 = {"left": g @ g.mT, "right": g.mT @ g}, options.betas[1]
    if not state:
        state |= {side: (1 - beta2) * pair for side, pair in pairs.items()}
        state |= {f"{side}_basis": eigenbasis(pair) for side, pair in pairs.items()}
        state |= {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        state["step"] = torch.zeros(())
        return torch.zeros_like(g)
    update = adam_in((state["left_basis"], state["right_basis"]), g, state, options)
    for side, pair in pairs.items():
        state[side].lerp_(pair, 1 - beta2)
    if state["step"].item() % options.every == 0:
        turn(state)
    return update
