# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The polar factor
from collections.abc import Sequence

import torch
from torch import Tensor


def polar_factor(g: Tensor) -> Tensor:
    """The polar factor U Vᵀ of each matrix g = U S Vᵀ, (…, rows, cols) → the same shape and dtype.

    Directions with a singular value of zero, up to rounding, are left out.
    """
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(g.dtype).eps * max(g.shape[-2:])
    return (u * kept[..., None, :]) @ vt


# %% Newton–Schulz: odd polynomials of singular values
QUINTIC = (3.4445, -4.7750, 2.0315)


def apply_odd_polynomials(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """x ← a x + b (x xᵀ) x + c (x xᵀ)² x for each (a, b, c): x, (…, rows, cols) → the same shape and dtype.

    Singular values go through a σ + b σ³ + c σ⁵, one polynomial after the other; singular vectors stay.
    """
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
    """Nearly the polar factor of each matrix in g, (…, rows, cols) → the same shape, in `dtype`.

    Singular values, divided by the matrix's Frobenius norm, go through the polynomial `iterations`
    times; singular vectors stay, and rows and columns of zeros. Coefficients: Keller Jordan's of record 4.
    """
    x = g.to(dtype)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    return apply_odd_polynomials(x, [coefficients] * iterations)


# %% Muon: momentum, then orthogonalisation
def nesterov_momentum(
    g: Tensor, buffer: Tensor, momentum: float | Tensor, nesterov: bool, skip: Tensor | None
) -> Tensor:
    """buffer ← momentum · buffer + (1 − momentum) · g, in place; all of one shape. Returns the buffer, or with `nesterov` the same average of it and g.

    skip: device flag, shape (); if it is not zero the buffer stays as it is, without host sync.
    """
    if skip is not None:
        g = torch.where(skip > 0, buffer, g)  # the average of the buffer and itself
    buffer.lerp_(g, 1 - momentum)
    return g.lerp(buffer, momentum) if nesterov else buffer
