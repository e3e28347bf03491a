# Tangled from notebooks/12_newton_schulz.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% What we want: the orthogonal factor
from collections.abc import Sequence

import torch
from torch import Tensor


def polar_factor(g: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ in g, (…, rows, cols), without the directions in which it is zero."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    kept = s > s[..., :1] * torch.finfo(g.dtype).eps * max(g.shape[-2:])
    return (u * kept[..., None, :]) @ vt


# %% Polynomials do not care for bases
QUINTIC = (3.4445, -4.7750, 2.0315)


def apply_odd_polynomials(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
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
    return apply_odd_polynomials(x, [coefficients] * iterations)


# %% Muon
def nesterov_momentum(
    g: Tensor, buffer: Tensor, momentum: float | Tensor, nesterov: bool, skip: Tensor | None
) -> Tensor:
    """Update the momentum buffer, in place: an average of gradients. Returns it, or with `nesterov` g mixed into it again.

    momentum: the coefficient of the average. skip: device flag; if it is not zero the buffer stays as it is, without host sync.
    """
    if skip is not None:
        g = torch.where(skip > 0, buffer, g)  # the average of the buffer and itself
    buffer.lerp_(g, 1 - momentum)
    return g.lerp(buffer, momentum) if nesterov else buffer
