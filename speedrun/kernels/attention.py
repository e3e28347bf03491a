# Tangled from notebooks/11_attention_backends.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
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


# %% Tiles
def document_tiles(cu_seqlens: Tensor, tokens: int, size: int = TILE) -> Tensor:
    """Rows of every document cut into tiles of `size`, (3, ceil(tokens / size) + slots + 1) int32: first row, and where its document begins and ends.

    cu_seqlens: (slots + 1,) int32, from 0 on. No tile has rows of two documents. Rows behind the last document are tiles of their own, whose
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


# %% Bulk loads
@jit
def load_rows(
    X, first, end, head, HEADS: constexpr, DIM: constexpr, ROWS: constexpr, BULK: constexpr
):
    """Rows first … first + ROWS of one head, (ROWS, DIM). BULK: X is a descriptor, and rows from `end` on are loaded; else they are zero."""
    if BULK:
        return X.load([first, head * DIM])
    else:
        rows, dims = first + tl.arange(0, ROWS), head * DIM + tl.arange(0, DIM)
        return tl.load(
            X + rows[:, None] * (HEADS * DIM) + dims[None, :], (rows < end)[:, None], 0.0
        )


@jit
def tile_of(TILES, tiles):
    """This program's tile: its first row, and where its document begins and ends."""
    tile = tl.program_id(0)
    return tl.load(TILES + tile), tl.load(TILES + tiles + tile), tl.load(TILES + 2 * tiles + tile)


# %% The forward pass
@jit
def forward_block(
    acc, total, top, q, K, V, first, rows, head, end, window, factor,
    HEADS: constexpr, DIM: constexpr, COLUMNS: constexpr, BOUNDED: constexpr, BULK: constexpr,
):  # fmt: skip
    """Queries against one block of keys. factor: softmax scale in powers of 2."""
    k = load_rows(K, first, end, head, HEADS, DIM, COLUMNS, BULK)
    v = load_rows(V, first, end, head, HEADS, DIM, COLUMNS, BULK)
    distance = rows[:, None] - (first + tl.arange(0, COLUMNS))[None, :]
    inside = (distance >= 0) & (distance <= window)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if not BOUNDED:
        logits = tl.where(inside, logits, -1e30)  # not -inf: a row may see nothing of a block
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.math.exp2(top - higher)
        acc, total, top = acc * shrink[:, None], total * shrink, higher
    p = tl.where(inside, tl.math.exp2(logits - top[:, None]), 0.0)
    return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee"), total + tl.sum(p, 1), top


@jit
def forward_kernel(
    Q, K, V, OUT, LSE, TILES, tiles, tokens, window, factor, bound,
    HEADS: constexpr, DIM: constexpr, ROWS: constexpr, COLUMNS: constexpr, BOUNDED: constexpr, BULK: constexpr,
):  # fmt: skip
    """Attention of one tile of queries in one head, and the logarithm (base 2) of its softmax sums. BULK: K and V are descriptors."""
    head = tl.program_id(1)
    row, begin, end = tile_of(TILES, tiles)
    if row >= 0:
        rows, dims = row + tl.arange(0, ROWS), head * DIM + tl.arange(0, DIM)
        mine, at = rows < end, rows[:, None] * (HEADS * DIM) + dims[None, :]
        acc, total = tl.full([ROWS, DIM], 0.0, tl.float32), tl.full([ROWS], 0.0, tl.float32)
        top = tl.full([ROWS], -1e30, tl.float32)
        if BOUNDED:
            top = tl.full([ROWS], 0.0, tl.float32) + bound
        if begin >= 0:
            q = load_rows(Q, row, end, head, HEADS, DIM, ROWS, False)
            low = tl.maximum(begin, row - window)
            blocks = (tl.minimum(row + ROWS, end) - low + COLUMNS - 1) // COLUMNS
            for n in range(0, blocks):
                acc, total, top = forward_block(
                    acc, total, top, q, K, V, low + n * COLUMNS, rows, head, end, window, factor,
                    HEADS, DIM, COLUMNS, BOUNDED, BULK,
                )  # fmt: skip
        total = tl.where(total > 0, total, 1.0)  # rows in no document
        tl.store(OUT + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mine[:, None])
        tl.store(LSE + head * tokens + rows, top + tl.math.log2(total), mine)


# %% The backward pass
@jit
def delta_kernel(OUT, GRAD, DELTA, tokens, HEADS: constexpr, DIM: constexpr, ROWS: constexpr):
    """Output times its gradient, summed over a head's numbers, for ROWS rows."""
    row, head = tl.program_id(0) * ROWS, tl.program_id(1)
    out = load_rows(OUT, row, tokens, head, HEADS, DIM, ROWS, False).to(tl.float32)
    grad = load_rows(GRAD, row, tokens, head, HEADS, DIM, ROWS, False).to(tl.float32)
    rows = row + tl.arange(0, ROWS)
    tl.store(DELTA + head * tokens + rows, tl.sum(out * grad, 1), rows < tokens)


@jit
def dkv_block(
    dk, dv, k, v, Q, GRAD, LSE, DELTA, D, place, at_row, first, column, head, end, window, factor,
    HEADS: constexpr, DIM: constexpr, COLUMNS: constexpr, ROWS: constexpr, KEEP: constexpr, BULK: constexpr,
):  # fmt: skip
    """The gradients of keys and values from one block of queries. LSE, DELTA: this head's. KEEP: D is written, at rows `place` and columns `at_row`."""
    q = load_rows(Q, first, end, head, HEADS, DIM, ROWS, BULK)
    grad = load_rows(GRAD, first, end, head, HEADS, DIM, ROWS, BULK)
    inner, rows = tl.arange(0, COLUMNS), first + tl.arange(0, ROWS)
    mine = rows < end
    lse, delta = tl.load(LSE + rows, mine, 0.0), tl.load(DELTA + rows, mine, 0.0)
    logits = tl.dot(k, tl.trans(q), input_precision="ieee") * factor
    dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
    distance = rows[None, :] - (column + inner)[:, None]
    inside = (distance >= 0) & (distance <= window) & mine[None, :]
    p = tl.where(inside, tl.math.exp2(logits - lse[None, :]), 0.0)
    dv = tl.dot(p.to(v.dtype), grad, dv, input_precision="ieee")
    d = (p * (dp - delta[None, :])).to(k.dtype)
    if KEEP and BULK:
        D.store([place, at_row], d)
    elif KEEP:
        there = (place + inner).to(tl.int64)[:, None] * COLUMNS
        tl.store(D + there + (at_row + tl.arange(0, ROWS))[None, :], d)
    return tl.dot(d, q, dk, input_precision="ieee"), dv


@jit
def dkv_kernel(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, D, TILES, tiles, tokens, window, factor, scale, depth,
    HEADS: constexpr, DIM: constexpr, COLUMNS: constexpr, ROWS: constexpr, KEEP: constexpr, BULK: constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values in one head. BULK: Q, GRAD and D are descriptors."""
    tile, head = tl.program_id(0), tl.program_id(1)
    column, begin, end = tile_of(TILES, tiles)
    if column >= 0:
        columns, dims = column + tl.arange(0, COLUMNS), head * DIM + tl.arange(0, DIM)
        mine, at = columns < end, columns[:, None] * (HEADS * DIM) + dims[None, :]
        dk, dv = tl.full([COLUMNS, DIM], 0.0, tl.float32), tl.full([COLUMNS, DIM], 0.0, tl.float32)
        if begin >= 0:
            PARTS: constexpr = COLUMNS // ROWS
            k = load_rows(K, column, end, head, HEADS, DIM, COLUMNS, False)
            v = load_rows(V, column, end, head, HEADS, DIM, COLUMNS, False)
            sums, deltas = LSE + head * tokens, DELTA + head * tokens
            reach = tl.minimum(end - column, COLUMNS + window)
            for m in range(0, (reach + COLUMNS - 1) // COLUMNS * PARTS):
                n = m // PARTS  # the queries' tile, counted from the keys'
                place = ((head * tiles + tile + n) * depth + n) * COLUMNS
                dk, dv = dkv_block(
                    dk, dv, k, v, Q, GRAD, sums, deltas, D, place, m % PARTS * ROWS, column + m * ROWS, column, head, end, window, factor,
                    HEADS, DIM, COLUMNS, ROWS, KEEP, BULK,
                )  # fmt: skip
        tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mine[:, None])
        tl.store(DV + at, dv.to(DV.dtype.element_ty), mine[:, None])


@jit
def read_square(D, place, ROWS: constexpr, BULK: constexpr):
    """D of one tile of queries and one of keys, (ROWS, ROWS), as it was kept at rows `place`."""
    if BULK:
        return tl.trans(D.load([place, 0]))
    else:
        inner = tl.arange(0, ROWS)
        there = (place + inner).to(tl.int64)[:, None] * ROWS
        return tl.trans(tl.load(D + there + inner[None, :]))


@jit
def weights_gradient(
    q, grad, k, v, lse, delta, row, first, window, factor, ROWS: constexpr, COLUMNS: constexpr
):
    """D of one tile of queries and one of keys, (ROWS, COLUMNS), computed again."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    distance = (row + tl.arange(0, ROWS))[:, None] - (first + tl.arange(0, COLUMNS))[None, :]
    inside = (distance >= 0) & (distance <= window)
    p = tl.where(inside, tl.math.exp2(logits - lse[:, None]), 0.0)
    return (p * (dp - delta[:, None])).to(k.dtype)


@jit
def dq_kernel(
    Q, K, V, GRAD, DQ, LSE, DELTA, D, TILES, tiles, tokens, window, factor, scale, depth,
    HEADS: constexpr, DIM: constexpr, ROWS: constexpr, KEPT: constexpr, BULK: constexpr,
):  # fmt: skip
    """The gradient of one tile of queries in one head. BULK: K, V and D are descriptors."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row, begin, end = tile_of(TILES, tiles)
    if row >= 0:
        rows, dims = row + tl.arange(0, ROWS), head * DIM + tl.arange(0, DIM)
        mine, at = rows < end, rows[:, None] * (HEADS * DIM) + dims[None, :]
        dq = tl.full([ROWS, DIM], 0.0, tl.float32)
        if begin >= 0:
            if not KEPT:
                q = load_rows(Q, row, end, head, HEADS, DIM, ROWS, False)
                grad = load_rows(GRAD, row, end, head, HEADS, DIM, ROWS, False)
                sums = head * tokens + rows
                lse, delta = tl.load(LSE + sums, mine, 0.0), tl.load(DELTA + sums, mine, 0.0)
            for n in range(0, tl.minimum((row - begin) // ROWS, (window + ROWS - 1) // ROWS) + 1):
                k = load_rows(K, row - n * ROWS, end, head, HEADS, DIM, ROWS, BULK)
                if KEPT:
                    d = read_square(D, ((head * tiles + tile) * depth + n) * ROWS, ROWS, BULK)
                else:
                    v = load_rows(V, row - n * ROWS, end, head, HEADS, DIM, ROWS, BULK)
                    d = weights_gradient(q, grad, k, v, lse, delta, row, row - n * ROWS, window, factor, ROWS, ROWS)  # fmt: skip
                dq = tl.dot(d, k, dq, input_precision="ieee")
        tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mine[:, None])


# %% Launches
class Blocks(NamedTuple):
    """How a kernel is launched: how long its inner blocks are, and by how many warps and stages."""

    size: int
    warps: int
    stages: int


LARGE_SHARED = Blocks(32, 4, 3), Blocks(64, 4, 2), Blocks(64, 4, 3)  # forward, dk and dv, dq
SMALL_SHARED = Blocks(32, 4, 2), Blocks(32, 4, 2), Blocks(64, 4, 2)
CONFIGS = {80: LARGE_SHARED, 86: SMALL_SHARED, 89: SMALL_SHARED, 90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}  # fmt: skip


def blocks_for(device: torch.device) -> tuple[Blocks, Blocks, Blocks]:
    """The kernels' configurations on a device: its own, or those of the next older chip."""
    if device.type != "cuda":
        return SMALL_SHARED  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    known = [chip for chip in CONFIGS if chip <= 10 * major + minor]
    return CONFIGS[max(known, default=80)]


def has_bulk_loads(device: torch.device, *tensors: Tensor) -> bool:
    """Whether a device copies blocks by descriptor, of these tensors, which must begin at a multiple of 16 bytes."""
    aligned = all(each.data_ptr() % 16 == 0 for each in tensors)
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return able and aligned


def in_blocks(x: Tensor, block: list[int], bulk: bool) -> Any:
    """A tensor as kernels read it: a descriptor of its rows with this block, or itself."""
    if not bulk:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.view(len(x), -1), block)


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for shapes and layouts that the kernels cannot read."""
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[2] not in HEAD_DIMS:
        what = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        sizes = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"q, k, v must be (tokens, heads, head_dim of {sizes}), not {what}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: int, scale: float, bounded: bool, bulk: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 logarithms of the softmax sums. bounded: no running maximum. bulk: keys and values by descriptor."""
    (tokens, heads, dim), count = q.shape, tiles.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(heads, tokens, dtype=torch.float32)
    factor, (blocks, _, _) = scale * LOG2E, blocks_for(q.device)
    k, v = (in_blocks(each, [blocks.size, dim], bulk) for each in (k, v))
    forward_kernel[(count, heads)](
        q, k, v, out, lse, tiles, count, tokens, window, factor, factor * dim,
        HEADS=heads, DIM=dim, ROWS=TILE, COLUMNS=blocks.size, BOUNDED=bounded, BULK=bulk, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: int, scale: float, keep: bool, bulk: bool
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v. keep: D is written and read again, not computed twice. bulk: blocks by descriptor."""
    (tokens, heads, dim), count = q.shape, tiles.shape[1]
    dq, dk, dv, delta = (torch.empty_like(each) for each in (q, k, v, lse))
    depth, (_, of_kv, of_q) = -(-window // TILE) + 1, blocks_for(q.device)
    d = q.new_empty((heads * count * depth if keep else 1) * TILE, TILE)
    sizes = {"HEADS": heads, "DIM": dim, "BULK": bulk}
    delta_kernel[(-(-tokens // TILE), heads)](out, grad, delta, tokens, heads, dim, TILE)
    facts = (tiles, count, tokens, window, scale * LOG2E, scale, depth)
    blocks = [in_blocks(each, [of_kv.size, dim], bulk) for each in (q, grad)]
    dkv_kernel[(count, heads)](
        blocks[0], k, v, blocks[1], dk, dv, lse, delta, in_blocks(d, [TILE, of_kv.size], bulk), *facts,
        COLUMNS=TILE, ROWS=of_kv.size, KEEP=keep, num_warps=of_kv.warps, num_stages=of_kv.stages, **sizes,
    )  # fmt: skip
    blocks = [in_blocks(each, [TILE, dim], bulk) for each in (k, v)]
    dq_kernel[(count, heads)](
        q, *blocks, grad, dq, lse, delta, in_blocks(d, [TILE, TILE], bulk), *facts,
        ROWS=TILE, KEPT=keep, num_warps=of_q.warps, num_stages=of_q.stages if keep else 2, **sizes,
    )  # fmt: skip
    return [dq, dk, dv]


# %% Operators
@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, window: Tensor, scale: Tensor, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Attention, (tokens, heads, head_dim), and the base-2 logarithms of its softmax sums, (heads, tokens) float32.

    tiles: of `document_tiles`. window, scale: scalars in CPU memory, so that no step compiles again for a new one. bounded: |q · k| is at most head_dim, as under QK-norm.
    """
    check_packed(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    bounded = bounded and 2 * scale.item() * LOG2E * q.shape[2] < 120  # float32: down to 2^-126
    told = (int(window), scale.item(), bounded, has_bulk_loads(q.device, k, v))
    return launch_forward(q, k, v, tiles, *told)


@attention_op.register_fake
def fake_attention(q, k, v, tiles, window, scale, bounded):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def room_for_squares(q: Tensor, tiles: Tensor, window: int) -> bool:
    """Whether D fits in the share of a device's memory that it may have for a while; without a GPU, 256 MB."""
    squares = q.shape[1] * tiles.shape[1] * (-(-window // TILE) + 1)
    room = 2**28
    if q.device.type == "cuda":
        room = torch.cuda.get_device_properties(q.device).total_memory // 24
    return squares * TILE**2 * q.element_size() < room


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    keep = room_for_squares(q, tiles, int(window))
    bulk = has_bulk_loads(q.device, grad, q, k, v)
    told = (tiles, int(window), scale.item(), keep, bulk)
    dq, dk, dv = launch_backward(grad, q, k, v, out, lse, *told)
    return dq, dk, dv


@backward_op.register_fake
def fake_backward(grad, q, k, v, out, lse, tiles, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, tiles, window, scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, tiles, window, scale)


def attention_gradients(ctx: Any, grad: Tensor, _) -> tuple:
    return *backward_op(grad, *ctx.saved_tensors), None, None, None, None


attention_op.register_autograd(attention_gradients, setup_context=keep_for_backward)
