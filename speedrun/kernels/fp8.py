# Tangled from notebooks/15_low_precision.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Scales
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


def scale_of(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """What x is divided by so that its largest magnitude becomes the format's largest number: (1,) float32, on x's device.

    x: any shape with at least one number, any float dtype; beyond float32's range its numbers count as infinite. Never below 1e-12, so never 0. NaN if
    x has one, infinite if x has an infinity; then everything that is divided by it is NaN or 0, and no error is hidden. Reads x once; waits for nothing.
    """
    largest = torch.linalg.vector_norm(x, math.inf).float() / torch.finfo(dtype).max
    return largest.clamp(min=1e-12).reshape(1)


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """x / scale, any shape, in a format of eight bits: clipped at its largest number, rounded to the nearest, ties to even.

    x: any float dtype, divided in float32. scale: float32, of a shape that broadcasts. Infinities are clipped as well; NaN stays NaN. Where dtype is float32
    nothing is rounded. The formats: Micikevicius and others (2022).
    """
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


# %% The code
@jit
def divide_clip(x, SCALE, largest):
    """x / scale between -largest and largest; NaN stays NaN."""
    return tl.clamp(x / tl.load(SCALE), -largest, largest, propagate_nan=tl.PropagateNan.ALL)


@jit
def quantize_kernel(
    X, SCALE, FACTOR, Q, QT, rows, columns, largest, ROWS: constexpr, COLUMNS: constexpr
):
    """A block of X / SCALE, clipped at ±largest, into Q and, transposed, into QT, in their dtypes; either may be None. FACTOR: one number a row that X is multiplied by, or None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    # no `other`: what is not there is not stored either, and where X has eight bits a GPU has read other=0.0 as NaN
    x = tl.load(X + at, there).to(tl.float32)
    if FACTOR is not None:
        x = x * tl.load(FACTOR + row, row < rows, 0.0)[:, None]
    if Q is not None:
        tl.store(Q + at, divide_clip(x, SCALE, largest).to(Q.dtype.element_ty), there)
    if QT is not None:  # turned before it is rounded: see below
        at = column.to(tl.int64)[:, None] * rows + row[None, :]
        turned = divide_clip(tl.trans(x), SCALE, largest).to(QT.dtype.element_ty)
        tl.store(QT + at, turned, tl.trans(there))


def has_fp8(device: torch.device) -> bool:
    """Whether a device's matrix units take eight bits: NVIDIA GPUs from compute capability 8.9 on (Ada, Hopper, Blackwell)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def launch_quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None,
    straight: bool = True, turned: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """As `quantize`, by the kernel; off a GPU, for the interpreter, in float32, rounded afterwards."""
    (rows, columns), x = x.shape, x.contiguous()
    kept = dtype if x.device.type == "cuda" else torch.float32
    q = x.new_empty(rows, columns, dtype=kept) if straight else None
    qt = x.new_empty(columns, rows, dtype=kept) if turned else None
    grid, largest = (-(-rows // 64), -(-columns // 64)), torch.finfo(dtype).max
    quantize_kernel[grid](x, scale, factor, q, qt, rows, columns, largest, ROWS=64, COLUMNS=64)
    return (None if q is None else q.to(dtype)), (None if qt is None else qt.to(dtype))


def quantize(
    x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3, factor: Tensor | None = None,
    straight: bool = True, turned: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """x, times `factor` if given, over `scale`, in eight bits: as it is (straight), (rows, columns), and transposed (turned), (columns, rows), both row-major. What is not asked for is None.

    x: (rows, columns), any float dtype or layout; copied if it is not contiguous. scale: (1,) float32. factor: (rows,) float32. dtype: E4M3, E5M2, or float32, which rounds nothing. Clipping,
    infinities and NaN: as `quantize_reference`, which is also what runs where there are no units for eight bits.
    """
    if has_fp8(x.device):
        return launch_quantize(x, scale, dtype, factor, straight, turned)
    whole = quantize_reference(x if factor is None else x.float() * factor[:, None], scale, dtype)
    return (whole if straight else None), (whole.mT.contiguous() if turned else None)


# %% The product
def check_operands(a: Tensor, b: Tensor) -> None:
    """What matrix units ask of `fp8_matmul`'s a (m, k) and b (n, k). Raises ValueError."""
    whole = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1]
    sizes = whole and b.shape[0] % 16 == b.shape[1] % 16 == 0
    layout = a.is_contiguous() and b.is_contiguous()
    if not (sizes and layout and E4M3 in (a.dtype, b.dtype) and {a.dtype, b.dtype} <= {E4M3, E5M2}):
        have = [f"{tuple(each.shape)} in {each.dtype}" for each in (a, b)]
        rows = "" if layout else ", not row-major"
        raise ValueError(f"FP8 matrix units take a (m, k) and b (n, k), row-major, k and n multiples of 16, at most one of them in e5m2; not {have[0]} and {have[1]}{rows}")  # fmt: skip


def fp8_matmul(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """a (m, k) times the transpose of b (n, k), both of eight bits and row-major, times both scales: (m, n) in dtype `out`.

    scale_a, scale_b: (1,) float32. Sums are off by less than 0.1% (slow accumulation). On GPUs that `has_fp8` it is `torch._scaled_mm`, and raises ValueError for operands that
    `check_operands` refuses; elsewhere, or where a is float32, it is the same product in float32, for any shape.
    """
    if a.dtype == torch.float32 or not has_fp8(a.device):
        return ((a.float() @ b.float().mT) * (scale_a * scale_b)).to(out)
    check_operands(a, b)
    scales = [s.clone() if s.storage_offset() % 4 else s for s in (scale_a, scale_b)]  # 16 bytes
    return torch._scaled_mm(a, b.mT, scales[0], scales[1], out_dtype=out, use_fast_accum=False)
