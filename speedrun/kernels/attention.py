# Tangled from notebooks/11_attention_backends.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from speedrun.lab.hardware import jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

TILE = 64  # rows of a tile: queries in two kernels, keys in the third
HEAD_DIMS = (16, 32, 64, 128)
LOG2E = 1.4426950408889634
NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operators are not the package's


# %% The reference
def seen(rows: Tensor, columns: Tensor, window: int) -> Tensor:
    """Which keys a query sees, (rows, columns) bool: itself, and `window` before it."""
    distance = rows[:, None] - columns[None, :]
    return (distance >= 0) & (distance <= window)


def blocks_of(borders: list[int], window: int, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries in documents, the keys that they see, and which query sees which: (rows, columns) bool."""
    for begin, end in zip(borders, borders[1:]):
        for first in range(begin, end, block):
            last, low = min(first + block, end), max(begin, first - window)
            mask = seen(torch.arange(first, last), torch.arange(low, last), window)
            yield slice(first, last), slice(low, last), mask


def attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, scale: float, block: int = 512
) -> Tensor:
    """Causal attention inside packed documents, one after the other, `block` queries at a time. On any device, in any dtype.

    q, k, v: (tokens, heads, head_dim). cu_seqlens: (documents + 1,) int32, where documents begin and end. A query sees itself and
    `window` keys before it, of its document. Rows in no document give zeros.
    """
    out = torch.zeros_like(q)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    for rows, columns, mask in blocks_of(cu_seqlens.tolist(), window, block):
        part = F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, columns], v[:, :, columns], mask.to(q.device), scale=scale
        )
        out[rows] = part[0].transpose(0, 1)
    return out


def gradients_by_document(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens: Tensor, window: int, scale: float, block: int = 512
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, where `out` is `attention_by_document`'s, and its gradient is `grad`."""
    dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
    delta = (grad * out).sum(-1).T[..., None]  # (heads, tokens, 1)
    turned = (each.transpose(0, 1) for each in (grad, q, k, v))
    grad, q, k, v = turned
    for rows, columns, mask in blocks_of(cu_seqlens.tolist(), window, block):
        logits = scale * q[:, rows] @ k[:, columns].mT
        p = logits.masked_fill(~mask.to(q.device), -math.inf).softmax(-1)
        dlogits = p * (grad[:, rows] @ v[:, columns].mT - delta[:, rows])
        dq[rows] = (scale * dlogits @ k[:, columns]).transpose(0, 1)
        dk[columns] += (scale * dlogits.mT @ q[:, rows]).transpose(0, 1)
        dv[columns] += (p.mT @ grad[:, rows]).transpose(0, 1)
    return dq, dk, dv


# %% Tiles
def document_tiles(cu_seqlens: Tensor, tokens: int, size: int = TILE) -> Tensor:
    """Rows of every document cut into tiles of `size`, (3, ceil(tokens / size) + slots + 1) int32: first row, and where its document begins and ends.

    cu_seqlens: (slots + 1,) int32. No tile has rows of two documents. Rows behind the last document are tiles of their own, whose
    document begins at -1. What is left over begins at row -1.
    """
    ends = F.pad(cu_seqlens[1:], (0, 1), value=tokens)  # the rest is one more
    lengths = ends - cu_seqlens
    first_tile = F.pad(((lengths + size - 1) // size).cumsum(0), (1, 0))
    tile = torch.arange(-(-tokens // size) + len(ends), device=cu_seqlens.device)
    number = torch.searchsorted(first_tile, tile, right=True) - 1
    number = number.clamp(max=len(ends) - 1)
    row = cu_seqlens[number] + (tile - first_tile[number]) * size
    row = torch.where(tile < first_tile[-1], row, -1)
    begin = torch.where(number < len(ends) - 1, cu_seqlens[number], -1)
    return torch.stack([row, begin, ends[number]]).int()


# %% The forward pass
@jit
def forward_block(
    acc, total, top, q, K, V, first, rows, dims, end, window, factor,
    STRIDE: constexpr, COLUMNS: constexpr, MASKED: constexpr, BOUNDED: constexpr,
):  # fmt: skip
    """Queries against one block of keys. factor: softmax scale in powers of 2."""
    columns = first + tl.arange(0, COLUMNS)
    at = columns[:, None] * STRIDE + dims[None, :]
    if MASKED:
        inside = (columns < end)[:, None]
        k, v = tl.load(K + at, inside, 0.0), tl.load(V + at, inside, 0.0)
    else:
        k, v = tl.load(K + at), tl.load(V + at)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASKED:
        distance = rows[:, None] - columns[None, :]
        logits = tl.where((distance >= 0) & (distance <= window), logits, -1e30)
    if not BOUNDED:
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.math.exp2(top - higher)
        acc, total, top = acc * shrink[:, None], total * shrink, higher
    p = tl.math.exp2(logits - top[:, None])
    if MASKED and not BOUNDED:  # a row that has seen nothing yet
        p = tl.where(logits > -1e29, p, 0.0)
    return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee"), total + tl.sum(p, 1), top


@jit
def key_range(row, begin, end, window, ROWS: constexpr, COLUMNS: constexpr):
    """Blocks of keys for a tile of queries: the first key, how many blocks, and which of them every query sees whole."""
    low = tl.maximum(begin, row - window)
    blocks = (tl.minimum(row + ROWS, end) - low + COLUMNS - 1) // COLUMNS
    # the first blocks are cut by the window's edge, the last by the diagonal
    cut = tl.minimum(
        (tl.maximum(row + ROWS - 1 - window - low, 0) + COLUMNS - 1) // COLUMNS, blocks
    )
    whole = tl.minimum(tl.maximum((row + 1 - low) // COLUMNS, cut), blocks)
    return low, blocks, cut, whole


@jit
def forward_kernel(
    Q, K, V, OUT, LSE, TILES, tiles, tokens, window, factor, bound,
    HEADS: constexpr, DIM: constexpr, ROWS: constexpr, COLUMNS: constexpr, BOUNDED: constexpr,
):  # fmt: skip
    """Attention of one tile of queries in one head, and the logarithm (base 2) of its softmax sums."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, begin, end = (
        tl.load(TILES + tile),
        tl.load(TILES + tiles + tile),
        tl.load(TILES + 2 * tiles + tile),
    )
    if row >= 0:
        STRIDE: constexpr = HEADS * DIM
        rows, dims = row + tl.arange(0, ROWS), head * DIM + tl.arange(0, DIM)
        mine, at = rows < end, rows[:, None] * STRIDE + dims[None, :]
        acc, total = tl.full([ROWS, DIM], 0.0, tl.float32), tl.full([ROWS], 0.0, tl.float32)
        top = tl.full([ROWS], -1e30, tl.float32)
        if BOUNDED:
            top = tl.full([ROWS], 0.0, tl.float32) + bound
        if begin >= 0:
            q = tl.load(Q + at, mine[:, None], 0.0)
            low, blocks, cut, whole = key_range(row, begin, end, window, ROWS, COLUMNS)
            for n in range(0, cut):
                acc, total, top = forward_block(acc, total, top, q, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, True, BOUNDED)  # fmt: skip
            for n in range(cut, whole):
                acc, total, top = forward_block(acc, total, top, q, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, False, BOUNDED)  # fmt: skip
            for n in range(whole, blocks):
                acc, total, top = forward_block(acc, total, top, q, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, True, BOUNDED)  # fmt: skip
        total = tl.where(total > 0, total, 1.0)  # rows in no document
        tl.store(OUT + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mine[:, None])
        tl.store(LSE + head * tokens + rows, top + tl.math.log2(total), mine)


# %% The backward pass
@jit
def dq_block(
    dq, q, grad, lse, delta, K, V, first, rows, dims, end, window, factor,
    STRIDE: constexpr, COLUMNS: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The queries' gradient from one block of keys."""
    columns = first + tl.arange(0, COLUMNS)
    at = columns[:, None] * STRIDE + dims[None, :]
    if MASKED:
        inside = (columns < end)[:, None]
        k, v = tl.load(K + at, inside, 0.0), tl.load(V + at, inside, 0.0)
    else:
        k, v = tl.load(K + at), tl.load(V + at)
    p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - lse[:, None])
    if MASKED:
        distance = rows[:, None] - columns[None, :]
        p = tl.where((distance >= 0) & (distance <= window), p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    return tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision="ieee")


@jit
def dq_kernel(
    Q, K, V, OUT, GRAD, DQ, LSE, DELTA, TILES, tiles, tokens, window, factor, scale,
    HEADS: constexpr, DIM: constexpr, ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """The gradient of one tile of queries in one head; and delta, which the keys' kernel needs, too."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, begin, end = (
        tl.load(TILES + tile),
        tl.load(TILES + tiles + tile),
        tl.load(TILES + 2 * tiles + tile),
    )
    if row >= 0:
        STRIDE: constexpr = HEADS * DIM
        rows, dims = row + tl.arange(0, ROWS), head * DIM + tl.arange(0, DIM)
        mine, at = rows < end, rows[:, None] * STRIDE + dims[None, :]
        dq = tl.full([ROWS, DIM], 0.0, tl.float32)
        if begin >= 0:
            grad, out = (
                tl.load(GRAD + at, mine[:, None], 0.0),
                tl.load(OUT + at, mine[:, None], 0.0),
            )
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(DELTA + head * tokens + rows, delta, mine)
            q = tl.load(Q + at, mine[:, None], 0.0)
            lse = tl.load(LSE + head * tokens + rows, mine, 0.0)
            low, blocks, cut, whole = key_range(row, begin, end, window, ROWS, COLUMNS)
            for n in range(0, cut):
                dq = dq_block(dq, q, grad, lse, delta, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, True)  # fmt: skip
            for n in range(cut, whole):
                dq = dq_block(dq, q, grad, lse, delta, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, False)  # fmt: skip
            for n in range(whole, blocks):
                dq = dq_block(dq, q, grad, lse, delta, K, V, low + n * COLUMNS, rows, dims, end, window, factor, STRIDE, COLUMNS, True)  # fmt: skip
        tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mine[:, None])


@jit
def dkv_block(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, first, columns, dims, end, window, factor,
    STRIDE: constexpr, ROWS: constexpr, MASKED: constexpr,
):  # fmt: skip
    """The gradients of keys and values from one block of queries. LSE, DELTA: this head's."""
    rows = first + tl.arange(0, ROWS)
    at = rows[:, None] * STRIDE + dims[None, :]
    if MASKED:
        mine = rows < end
        q, grad = tl.load(Q + at, mine[:, None], 0.0), tl.load(GRAD + at, mine[:, None], 0.0)
        lse, delta = tl.load(LSE + rows, mine, 0.0), tl.load(DELTA + rows, mine, 0.0)
    else:
        q, grad = tl.load(Q + at), tl.load(GRAD + at)
        lse, delta = tl.load(LSE + rows), tl.load(DELTA + rows)
    p = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * factor - lse[None, :])
    if MASKED:
        distance = rows[None, :] - columns[:, None]
        p = tl.where((distance >= 0) & (distance <= window) & mine[None, :], p, 0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
    dv = tl.dot(p.to(v.dtype), grad, dv, input_precision="ieee")
    return tl.dot((p * (dp - delta[None, :])).to(k.dtype), q, dk, input_precision="ieee"), dv


@jit
def dkv_kernel(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, TILES, tiles, tokens, window, factor, scale,
    HEADS: constexpr, DIM: constexpr, COLUMNS: constexpr, ROWS: constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values in one head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    column, begin, end = (
        tl.load(TILES + tile),
        tl.load(TILES + tiles + tile),
        tl.load(TILES + 2 * tiles + tile),
    )
    if column >= 0:
        STRIDE: constexpr = HEADS * DIM
        columns, dims = column + tl.arange(0, COLUMNS), head * DIM + tl.arange(0, DIM)
        mine, at = columns < end, columns[:, None] * STRIDE + dims[None, :]
        dk, dv = tl.full([COLUMNS, DIM], 0.0, tl.float32), tl.full([COLUMNS, DIM], 0.0, tl.float32)
        if begin >= 0:
            k, v = tl.load(K + at, mine[:, None], 0.0), tl.load(V + at, mine[:, None], 0.0)
            sums, deltas = LSE + head * tokens, DELTA + head * tokens
            blocks = (tl.minimum(end, column + COLUMNS + window) - column + ROWS - 1) // ROWS
            cut = tl.minimum((COLUMNS + ROWS - 2) // ROWS, blocks)  # by the diagonal
            whole = tl.minimum(
                tl.maximum((tl.minimum(column + window + 1, end) - column) // ROWS, cut), blocks
            )
            for n in range(0, cut):
                dk, dv = dkv_block(dk, dv, k, v, Q, GRAD, sums, deltas, column + n * ROWS, columns, dims, end, window, factor, STRIDE, ROWS, True)  # fmt: skip
            for n in range(cut, whole):
                dk, dv = dkv_block(dk, dv, k, v, Q, GRAD, sums, deltas, column + n * ROWS, columns, dims, end, window, factor, STRIDE, ROWS, False)  # fmt: skip
            for n in range(whole, blocks):
                dk, dv = dkv_block(dk, dv, k, v, Q, GRAD, sums, deltas, column + n * ROWS, columns, dims, end, window, factor, STRIDE, ROWS, True)  # fmt: skip
        tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mine[:, None])
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mine[:, None])


# %% Operators
class Blocks(NamedTuple):
    """How a kernel is launched: how long its inner blocks are, and by how many warps and stages."""

    size: int
    warps: int
    stages: int


LARGE_SHARED = Blocks(32, 4, 3), Blocks(32, 4, 3), Blocks(32, 4, 3)  # forward, dq, dk and dv
SMALL_SHARED = Blocks(32, 4, 2), Blocks(32, 4, 2), Blocks(32, 4, 2)
CONFIGS = {80: LARGE_SHARED, 86: SMALL_SHARED, 89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}  # fmt: skip


def blocks_for(device: torch.device) -> tuple[Blocks, Blocks, Blocks]:
    """The kernels' configurations on a device: its own, or those of the next older chip."""
    if device.type != "cuda":
        return SMALL_SHARED  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    known = [chip for chip in CONFIGS if chip <= 10 * major + minor]
    return CONFIGS[max(known, default=80)]


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for shapes and layouts that the kernels cannot read."""
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[2] not in HEAD_DIMS:
        what = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"q, k, v must be (tokens, heads, head_dim of {sizes}), not {what}")


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: Tensor, scale: Tensor, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Attention, (tokens, heads, head_dim), and the base-2 logarithms of its softmax sums, (heads, tokens) float32.

    tiles: of `document_tiles`. window, scale: scalars in CPU memory, so that no step compiles again for a new one. bounded: |q · k| is at most head_dim, as under QK-norm.
    """
    check_packed(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    (tokens, heads, dim), count = q.shape, tiles.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    factor, (blocks, _, _) = scale.item() * LOG2E, blocks_for(q.device)
    bounded = bounded and 2 * factor * dim < 120  # float32 has powers of 2 down to -126
    forward_kernel[(count, heads)](
        q, k, v, out, lse, tiles, count, tokens, window.item(), factor, factor * dim,
        HEADS=heads, DIM=dim, ROWS=TILE, COLUMNS=blocks.size, BOUNDED=bounded, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


@attention_op.register_fake
def fake_attention(q, k, v, tiles, window, scale, bounded):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    (tokens, heads, dim), count = q.shape, tiles.shape[1]
    dq, dk, dv, delta = (torch.empty_like(each) for each in (q, k, v, lse))
    _, of_q, of_kv = blocks_for(q.device)
    numbers = (tiles, count, tokens, window.item(), scale.item() * LOG2E, scale.item())
    dq_kernel[(count, heads)](
        q, k, v, out, grad, dq, lse, delta, *numbers,
        HEADS=heads, DIM=dim, ROWS=TILE, COLUMNS=of_q.size, num_warps=of_q.warps, num_stages=of_q.stages,
    )  # fmt: skip
    dkv_kernel[(count, heads)](
        q, k, v, grad, dk, dv, lse, delta, *numbers,
        HEADS=heads, DIM=dim, COLUMNS=TILE, ROWS=of_kv.size, num_warps=of_kv.warps, num_stages=of_kv.stages,
    )  # fmt: skip
    return dq, dk, dv


@backward_op.register_fake
def fake_backward(grad, q, k, v, out, lse, tiles, window, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, tiles, window, scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, tiles, window, scale)


def attention_gradients(ctx: Any, grad: Tensor, _) -> tuple:
    return *backward_op(grad, *ctx.saved_tensors), None, None, None, None


attention_op.register_autograd(attention_gradients, setup_context=keep_for_backward)


# %% One function over all
@torch.library.custom_op(f"{NAMESPACE}::by_document", mutates_args=())
def sdpa_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: Tensor, scale: Tensor
) -> Tensor:
    """`attention_by_document`, as an operator that torch.compile does not look into."""
    return attention_by_document(q, k, v, cu_seqlens, int(window), scale.item())


@torch.library.custom_op(f"{NAMESPACE}::by_document_backward", mutates_args=())
def sdpa_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: Tensor, scale: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    return gradients_by_document(grad, q, k, v, out, cu_seqlens, int(window), scale.item())


@sdpa_op.register_fake
def fake_sdpa(q, k, v, cu_seqlens, window, scale):
    return torch.empty_like(q)


@sdpa_backward_op.register_fake
def fake_sdpa_backward(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


sdpa_op.register_autograd(
    lambda ctx, grad: (*sdpa_backward_op(grad, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


@torch.library.custom_op(f"{NAMESPACE}::flash", mutates_args=())
def flash_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The FlashAttention that PyTorch has (2, or an activated 3), with a window that is data: output, logsumexp, state of no dropout."""
    ends, most = (cu_seqlens, cu_seqlens), longest.item()
    sides = {"window_size_left": window.item(), "window_size_right": 0}
    out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *ends, most, most, 0.0, True, False, scale=scale.item(), **sides
    )
    return out, lse, state


@torch.library.custom_op(f"{NAMESPACE}::flash_backward", mutates_args=())
def flash_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: Tensor, scale: Tensor, out: Tensor, lse: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    ends, most = (cu_seqlens, cu_seqlens), longest.item()
    sides = {"window_size_left": window.item(), "window_size_right": 0}
    unused = torch.empty(0, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, lse, *ends, most, most, 0.0, True, state, unused, scale=scale.item(), **sides
    )  # fmt: skip
    return dq, dk, dv


@flash_op.register_fake
def fake_flash(q, k, v, cu_seqlens, longest, window, scale):
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(2, dtype=torch.uint64)


@flash_backward_op.register_fake
def fake_flash_backward(grad, q, k, v, *others):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


flash_op.register_autograd(
    lambda ctx, grad, *_: (*flash_backward_op(grad, *ctx.saved_tensors), *4 * (None,)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)
