# Tangled from notebooks/17_norm_and_rotary.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Triton, from the smallest kernel
from typing import Any

import torch
from torch import Tensor

from speedrun.lab.hardware import jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

EPS = 1e-6  # of the RMS norm
ROWS = 16  # tokens of a program
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operators are not the package's


# %% Forward
@jit
def load_halves(X, at, mine, HALF: constexpr):
    """Rows of twice HALF numbers that begin at `at`, (ROWS, 1), float32: their first and their second half."""
    halves = at + tl.arange(0, HALF)[None, :]
    first = tl.load(X + halves, mine, 0.0).to(tl.float32)
    return first, tl.load(X + halves + HALF, mine, 0.0).to(tl.float32)


@jit
def store_halves(X, first, second, at, mine, HALF: constexpr):
    """The reverse, in X's dtype."""
    halves = at + tl.arange(0, HALF)[None, :]
    tl.store(X + halves, first.to(X.dtype.element_ty), mine)
    tl.store(X + halves + HALF, second.to(X.dtype.element_ty), mine)


@jit
def load_turns(COS, SIN, rows, mine, HALF: constexpr):
    """Cosines and sines of these rows' positions, (ROWS, HALF)."""
    at = rows[:, None] * HALF + tl.arange(0, HALF)[None, :]
    return tl.load(COS + at, mine, 0.0), tl.load(SIN + at, mine, 0.0)


@jit
def norm_rotary_kernel(
    QKV, COS, SIN, Q, K, V, FACTORS, tokens, eps, HEADS: constexpr, HALF: constexpr, ROWS: constexpr
):
    """Queries, keys and values of ROWS tokens, head after head, and what the norms multiplied by, FACTORS, (2, tokens, HEADS)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine, WIDTH = (rows < tokens)[:, None], HEADS * 2 * HALF
    cos, sin = load_turns(COS, SIN, rows, mine, HALF)
    for head in range(HEADS):
        source = rows.to(tl.int64)[:, None] * (3 * WIDTH) + head * 2 * HALF
        place = rows.to(tl.int64)[:, None] * WIDTH + head * 2 * HALF
        for part in tl.static_range(2):
            a, b = load_halves(QKV, source + part * WIDTH, mine, HALF)
            factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
            tl.store(FACTORS + (part * tokens + rows) * HEADS + head, factor, rows < tokens)
            a, b = a * factor[:, None], b * factor[:, None]
            OUT = Q if part == 0 else K
            store_halves(OUT, a * cos - b * sin, a * sin + b * cos, place, mine, HALF)
        a, b = load_halves(QKV, source + 2 * WIDTH, mine, HALF)
        store_halves(V, a, b, place, mine, HALF)


# %% Backward
@jit
def norm_rotary_gradient_kernel(
    DQ, DK, DV, Q, K, FACTORS, COS, SIN, DQKV, tokens, HEADS: constexpr, HALF: constexpr, ROWS: constexpr
):  # fmt: skip
    """The gradient of qkv for ROWS tokens, head after head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine, WIDTH = (rows < tokens)[:, None], HEADS * 2 * HALF
    cos, sin = load_turns(COS, SIN, rows, mine, HALF)
    for head in range(HEADS):
        source = rows.to(tl.int64)[:, None] * WIDTH + head * 2 * HALF
        place = rows.to(tl.int64)[:, None] * (3 * WIDTH) + head * 2 * HALF
        for part in tl.static_range(2):
            factor = tl.load(FACTORS + (part * tokens + rows) * HEADS + head, rows < tokens, 0.0)
            a, b = load_halves(DQ if part == 0 else DK, source, mine, HALF)
            x, y = load_halves(Q if part == 0 else K, source, mine, HALF)
            inner = ((tl.sum(a * x, 1) + tl.sum(b * y, 1)) / (2 * HALF))[:, None]
            a, b = (a - x * inner) * factor[:, None], (b - y * inner) * factor[:, None]
            store_halves(DQKV, a * cos + b * sin, b * cos - a * sin, place + part * WIDTH, mine, HALF)  # fmt: skip
        a, b = load_halves(DV, source, mine, HALF)
        store_halves(DQKV, a, b, place + 2 * WIDTH, mine, HALF)


# %% The operators
@torch.library.custom_op(f"{NAMESPACE}::norm_rotary", mutates_args=())
def norm_rotary_op(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> list[Tensor]:
    """Queries and keys, RMS-normed and rotated, and values, (tokens, heads, head_dim) each; and their reciprocal root mean squares (rstd), (2, tokens, heads) float32, through which no gradient flows.

    qkv: (tokens, 3 · heads · head_dim). cos, sin: (tokens, head_dim / 2) float32. A pair is a number of a head's first half and one of its second. Computed in float32; head_dim must be a power of two.
    """
    tokens, half = len(qkv), qkv.shape[1] // (6 * heads)
    fits = qkv.shape[1] == 6 * heads * half and half & (half - 1) == 0 < half
    if not (fits and cos.shape == sin.shape == (tokens, half)):
        shapes = f"{tuple(qkv.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        raise ValueError(f"qkv (tokens, 3 · {heads} heads · head_dim, a power of two), cos and sin (tokens, head_dim / 2), not {shapes}")  # fmt: skip
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    q, k, v = (qkv.new_empty(tokens, heads, 2 * half) for _ in range(3))
    factors, grid = cos.new_empty(2, tokens, heads), (-(-tokens // ROWS),)
    norm_rotary_kernel[grid](qkv, cos, sin, q, k, v, factors, tokens, EPS, heads, half, ROWS)
    return [q, k, v, factors]


@norm_rotary_op.register_fake
def fake_norm_rotary(qkv, cos, sin, heads):
    shape = qkv.shape[0], heads, qkv.shape[1] // (3 * heads)
    return [*(qkv.new_empty(shape) for _ in range(3)), cos.new_empty(2, *shape[:2])]


@torch.library.custom_op(f"{NAMESPACE}::norm_rotary_backward", mutates_args=())
def norm_rotary_backward_op(
    grads: list[Tensor], q: Tensor, k: Tensor, factors: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of qkv, (tokens, 3 · heads · head_dim), from those of q, k and v, and from what `norm_rotary_op` returned."""
    (tokens, heads, dim), grads = q.shape, [grad.contiguous() for grad in grads]
    found, grid = q.new_empty(tokens, 3 * heads * dim), (-(-tokens // ROWS),)
    norm_rotary_gradient_kernel[grid](*grads, q, k, factors, cos.contiguous(), sin.contiguous(), found, tokens, heads, dim // 2, ROWS)  # fmt: skip
    return found


@norm_rotary_backward_op.register_fake
def fake_norm_rotary_backward(grads, q, k, factors, cos, sin):
    return q.new_empty(q.shape[0], 3 * q.shape[1] * q.shape[2])


def keep_turned(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    q, k, _, factors = output
    ctx.save_for_backward(q, k, factors, *inputs[1:3])


def norm_rotary_gradients(ctx: Any, grads: list[Tensor]) -> tuple:
    return norm_rotary_backward_op(grads[:3], *ctx.saved_tensors), None, None, None


norm_rotary_op.register_autograd(norm_rotary_gradients, setup_context=keep_turned)
