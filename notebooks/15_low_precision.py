# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Temporary

# %%
#| default_exp kernels.fp8
#| export
import math
from typing import Any

import torch
from torch import Tensor

from speedrun.lab.hardware import jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# %%
#| export
def scale_of(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What x, any shape, is divided by so that its largest number is the format's largest: (1,) float32, on x's device. Never 0."""
    largest = torch.linalg.vector_norm(x, math.inf).float() / torch.finfo(dtype).max
    return largest.clamp(min=1e-12).reshape(1)


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale in a format of eight bits, clipped at its largest number; rounded to the nearest."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


# %%
#| export
@jit
def quantize_kernel(
    X, SCALE, FACTOR, Q, QT, rows, columns, largest, ROWS: constexpr, COLUMNS: constexpr
):
    """A block of X / SCALE, clipped, into Q and, transposed, into QT; either may be None. FACTOR: one number a row that X is multiplied by, or None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(X + at, there, 0.0).to(tl.float32) / tl.load(SCALE)
    if FACTOR is not None:
        x = x * tl.load(FACTOR + row, row < rows, 0.0)[:, None]
    x = tl.minimum(tl.maximum(x, -largest), largest)
    if Q is not None:
        tl.store(Q + at, x.to(Q.dtype.element_ty), there)
    if QT is not None:
        turned = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(QT + turned, tl.trans(x.to(QT.dtype.element_ty)), tl.trans(there))


# %%
#| export
def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None,
    straight: bool = True, turned: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x"""
    rows, columns = x.shape
    q = torch.empty(rows if straight else 0, columns, dtype=dtype, device=x.device)
    qt = torch.empty(columns if turned else 0, rows, dtype=dtype, device=x.device)
    written = (q if straight else None, qt if turned else None)
    grid, largest = (-(-rows // 64), -(-columns // 64)), torch.finfo(dtype).max
    quantize_kernel[grid](x.contiguous(), scale, factor, *written, rows, columns, largest, ROWS=64, COLUMNS=64)  # fmt: skip
    return q, qt


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """a (m, k) times the transpose of b (n, k)"""
    if a.device.type == "cuda" and a.element_size() == 1:
        return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=out)
    return (a.float() @ b.float().T * (scale_a * scale_b)).to(out)
