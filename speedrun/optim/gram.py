# Tangled from notebooks/31_symmetric_matmul.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.gram import triangle_product


# %% In another order
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speedrun.optim.muon import whole_product


def gram_by_triangles(
    x: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    restart: int = 3,
    product: Callable[..., Tensor] = triangle_product,
) -> Tensor:
    """Chapter 13's `gram_newton_schulz` for x, (matrices, rows, cols), with symmetric products by one triangle: each is symmetric even for rounded factors, but for Q ← P Q.

    With Z = bG + cG² and P = aI + Z: H = PG, as a whole product, and G ← HP. product: as triangle_product; of its first factor it reads rows, its second is
    symmetric. Shape and dtype stay.
    """
    if x.shape[-2] > x.shape[-1]:  # rows are contiguous, columns are not
        return gram_by_triangles(x.mT.contiguous(), polynomials, restart, product).mT
    for begin in range(0, len(polynomials), restart):
        part = polynomials[begin : begin + restart]
        gram = product(x, x.mT)
        q = torch.eye(len(gram[0]), dtype=x.dtype, device=x.device).expand_as(gram)
        for n, (a, b, c) in enumerate(part):
            z = product(gram, gram, gram, c, b)
            q = product(z, q, q, 1.0, a) if n else torch.add(z, q, alpha=a)
            if n < len(part) - 1:
                half = whole_product(z, gram, gram, 1.0, a)
                gram = product(half, z, half, 1.0, a)
        x = q @ x
    return x
