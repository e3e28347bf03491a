# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% What we want: the orthogonal factor
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from speedrun.lab.bounds import Beta, NonNegativeFloat


def orthogonal_factor(g: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ in g, (…, rows, cols), without the directions in which it is zero."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(g.dtype).eps * max(g.shape[-2:])
    return (u * kept[..., None, :]) @ vt


# %% Polynomials do not care for bases
QUINTIC = (3.4445, -4.7750, 2.0315)


def through(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """x, (…, rows, cols), after its singular values went through odd quintics (a, b, c), one after the other."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def newton_schulz(
    g: Tensor,
    iterations: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Nearly the orthogonal factor of each matrix in g, (…, rows, cols) → the same, in `dtype`.

    Singular vectors stay; singular values, divided by the matrix's length, go through the polynomial
    `iterations` times. Zeros stay zeros. Coefficients: Keller Jordan's of record 4.
    """
    x = g.to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    return through(x, [coefficients] * iterations)


# %% Muon
@dataclass(frozen=True)
class MatrixOptions:
    """How the blocks' matrices are updated. All other parameters are AdamW's, and so are these under `adamw`."""

    rule: Literal["adamw", "muon", "soap"] = "adamw"
    """muon: orthogonalised momentum. soap: Adam in the eigenbases of the gradient's covariances."""
    lr: Annotated[NonNegativeFloat, "0: the rate of all, optim.lr"] = 0.0
    """Peak rate of the matrices, on the schedule of all parameters; 0: optim.lr, like all."""
    momentum: Beta = 0.95
    """muon: the share of its momentum that a step keeps."""
    nesterov: bool = True
    """muon: mix the newest gradient in once more."""
    iterations: Annotated[int, Interval(ge=0, le=100)] = 5
    """muon: Newton–Schulz iterations; 0: the exact factor, from a singular value decomposition."""
    shape_factor: bool = True
    """muon: the rate of a matrix of more rows than columns is larger by sqrt(rows / cols)."""


def fold(
    g: Tensor, momentum: Tensor, kept: float | Tensor, nesterov: bool, skip: Tensor | None
) -> Tensor:
    """Fold g into momentum, in place. Returns what a step follows: the momentum, or with `nesterov` g mixed into it again.

    kept: the share of itself that the momentum keeps. skip: where this is not zero it stays as it is, and nobody waits to find out.
    """
    if skip is not None:
        g = torch.where(skip > 0, momentum, g)  # momentum folded into itself is what it was
    momentum.lerp_(g, 1 - kept)
    return g.lerp(momentum, kept) if nesterov else momentum


def muon_update(g: Tensor, state: dict, skip: Tensor | None, options: MatrixOptions) -> Tensor:
    """The update at rate 1 of matrices with gradient g, (matrices, rows, cols); folds g into state["momentum"]."""
    momentum = state.setdefault("momentum", torch.zeros_like(g))
    ahead = fold(g, momentum, options.momentum, options.nesterov, skip)
    if options.iterations:
        update = newton_schulz(ahead, options.iterations)
    else:
        update = orthogonal_factor(ahead)
    rows, cols = g.shape[-2:]
    return update * math.sqrt(max(1.0, rows / cols)) if options.shape_factor else update


def cut(bank: Tensor, matrices: int) -> Tensor:
    """A bank (slices, matrices · rows, cols) as its matrices (slices · matrices, rows, cols): a view."""
    slices, rows, cols = bank.shape
    return bank.view(slices * matrices, rows // matrices, cols)


class MatrixOptimizer(torch.optim.Optimizer):
    """Banks of matrices under one rule: p ← (1 − lr · weight_decay) p − lr · rule(gradients, state, found_inf).

    banks: bank and the number of matrices in each of its slices. Like torch's fused optimizers it
    changes nothing in a step whose `found_inf` is not zero.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        banks: list[tuple[Tensor, int]],
        rule: Callable[[Tensor, dict, Tensor | None], Tensor] | None,
        lr: float,
        weight_decay: float,
    ):
        self.rule = rule
        groups = [{"params": [bank], "matrices": matrices} for bank, matrices in banks]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            (bank,) = group["params"]
            g = cut(bank.grad, group["matrices"])
            update = self.direction(g, group).view(bank.shape)
            rate = group["lr"] if self.found_inf is None else group["lr"] * (1 - self.found_inf)
            self.move(bank, update, rate, group)

    def direction(self, g: Tensor, group: dict) -> Tensor:
        """The update at rate 1 of a group's matrices."""
        assert self.rule is not None  # else a subclass has a direction of its own
        return self.rule(g, self.state[group["params"][0]], self.found_inf)

    def move(self, bank: Tensor, update: Tensor, rate: float | Tensor, group: dict) -> None:
        """Take the step."""
        bank.mul_(1 - rate * group["weight_decay"]).sub_(rate * update)
