# Tangled from notebooks/31_symmetric_matmul.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% The code
from typing import Any

import torch
from torch import Tensor

from speedrun.kernels.mlp import Blocks, blocks_for, in_blocks, load_block, store_block
from speedrun.lab.hardware import find_triton, jit

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

NAMESPACE = __name__.strip("_").replace(".", "_")  # the notebook's operator is not the package's


@jit
def lower_tile(tile):
    """Row and column of the tile-th block of a lower triangle, counted row by row: column <= row. Exact below a million."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


# %% One block
@jit
def matrix_of(X, matrix, numbers, BULK: constexpr):
    """Where one matrix of a stack begins, each of so many numbers. BULK: X is a descriptor of the whole stack and stays."""
    return X if BULK else X + matrix.to(tl.int64) * numbers


@jit
def block_of_sum(
    A, B, C, first, row, column, size, inner, alpha, beta,
    ROWS: constexpr, DEPTH: constexpr, BULK: constexpr,
):  # fmt: skip
    """A block of alpha · A Bᵀ + beta · C, (ROWS, ROWS) float32, for A and B (size, inner). first: the stack's row in which the matrices begin, if BULK."""
    acc = tl.zeros([ROWS, ROWS], tl.float32)
    for k in range(0, inner, DEPTH):
        a = load_block(A, first + row, k, size, inner, ROWS, DEPTH, BULK)
        b = load_block(B, first + column, k, size, inner, ROWS, DEPTH, BULK)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    acc *= alpha
    if C is not None:
        c = load_block(C, first + row, column, size, size, ROWS, ROWS, BULK)
        acc += beta * c.to(tl.float32)
    return acc


@jit
def symmetric_kernel(
    A, B, C, OUT, size, inner, alpha, beta, tiles,
    KIND: constexpr, ROWS: constexpr, DEPTH: constexpr, BULK: constexpr,
):  # fmt: skip
    """A block on or below the diagonal of alpha · A Bᵀ + beta · C, and its mirror image, for one of a stack of matrices of so many tiles. A, B: (…, size, inner). C may be None. BULK: all are descriptors."""
    matrix = tl.program_id(0) // tiles
    row, column = lower_tile(tl.program_id(0) % tiles)
    row, column, first = row * ROWS, column * ROWS, 0
    if BULK:
        first = matrix * size
    A, B = matrix_of(A, matrix, size * inner, BULK), matrix_of(B, matrix, size * inner, BULK)
    OUT = matrix_of(OUT, matrix, size * size, BULK)
    if C is not None:
        C = matrix_of(C, matrix, size * size, BULK)
    acc = block_of_sum(A, B, C, first, row, column, size, inner, alpha, beta, ROWS, DEPTH, BULK)
    out = acc.to(KIND)
    if row == column:  # exactly symmetric, too: where rows stand for columns, they must be the same
        number = tl.arange(0, ROWS)
        out = tl.where(number[:, None] >= number[None, :], out, tl.trans(out))
    store_block(OUT, out, first + row, column, size, size, ROWS, ROWS, BULK)
    if row != column:
        store_block(OUT, tl.trans(out), first + column, row, size, size, ROWS, ROWS, BULK)


KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
LARGE_SHARED = (
    Blocks(128, 128, 64, 4, 3, 2),
    Blocks(64, 64, 64, 4, 4, 3),
)  # for many blocks, for few
SMALL_SHARED = Blocks(128, 128, 32, 4, 3, 2), Blocks(64, 64, 32, 4, 4, 2)
CONFIGS = {90: LARGE_SHARED, 100: LARGE_SHARED, 120: SMALL_SHARED}


def tiles_of(size: int, blocks: Blocks) -> int:
    """How many blocks of a matrix are on its diagonal or below."""
    across = -(-size // blocks.rows)
    return across * (across + 1) // 2


def launch_symmetric(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, blocks: Blocks, bulk: bool
) -> Tensor:
    """alpha · a bᵀ + beta · c, (matrices, size, size), where that is symmetric, by the kernel, for a and b (matrices, size, inner). bulk: through descriptors, for a size that is a multiple of a block."""
    (matrices, size, inner), tiles = a.shape, tiles_of(a.shape[1], blocks)
    a, b, c = a.contiguous(), b.contiguous(), None if c is None else c.contiguous()
    out = a.new_empty(matrices, size, size)
    tensors: list[Any] = [a, b, c, out]
    if bulk:
        depths = blocks.depth, blocks.depth, blocks.rows, blocks.rows
        flat = [None if x is None else x.view(-1, x.shape[2]) for x in tensors]
        tensors = [in_blocks(x, [blocks.rows, depth]) for x, depth in zip(flat, depths)]
    symmetric_kernel[(matrices * tiles,)](
        *tensors, size, inner, alpha, beta, tiles, KIND=getattr(tl, KINDS[a.dtype]), ROWS=blocks.rows,
        DEPTH=blocks.depth, BULK=bulk, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


# %% When the kernel is used
def symmetric_reference(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, size, size)."""
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def why_no_kernel(a: Tensor) -> str:
    """Why all of a product of a, (matrices, size, inner), is computed and not one triangle; empty: the kernel runs."""
    if a.device.type != "cuda":
        return "it is on no NVIDIA GPU"
    if torch.cuda.get_device_capability(a.device) < (9, 0):
        return "its GPU has no tensor memory accelerator (compute capability 9.0 or later)"
    if a.dtype not in (torch.bfloat16, torch.float16):
        return f"its numbers are {a.dtype}, not bfloat16 or float16"
    if not a.numel() or a.shape[1] % 128 or a.shape[2] % 64:
        return f"{a.shape[1]} × {a.shape[2]} are no multiples of 128 and 64"
    return "" if find_triton() else "Triton is not installed"


def blocks_of(a: Tensor) -> Blocks:
    """Large blocks, if there are enough of them for all multiprocessors of a's GPU, or small ones."""
    large, small = blocks_for(a.device, CONFIGS)
    count = torch.cuda.get_device_properties(a.device).multi_processor_count
    return large if len(a) * tiles_of(a.shape[1], large) >= count else small


@torch.library.custom_op(f"{NAMESPACE}::symmetric_matmul", mutates_args=())
def symmetric_matmul_op(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """alpha · a bᵀ + beta · c, (matrices, size, size), where that is symmetric, as an operator that torch.compile does not look into."""
    if not why_no_kernel(a):
        return launch_symmetric(a, b, c, alpha, beta, blocks_of(a), True)
    if c is None:
        return alpha * (a @ b.mT)
    return symmetric_reference(a, b.mT, c, alpha, beta)


@symmetric_matmul_op.register_fake
def fake_symmetric_matmul(a, b, c, alpha, beta):
    return a.new_empty(len(a), a.shape[1], a.shape[1])


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, size, size), where b and the result are symmetric: so it is if a and b are symmetric and commute. In their dtype.

    Only blocks on and below the diagonal are computed, with sums in float32, and mirrored; c is read there only. For other matrices the result is wrong, and where rounded factors do not
    quite commute it may be (`gram_by_triangles`). Where `why_no_kernel` has a reason, all of the product is computed. No gradient. Raises ValueError for shapes and dtypes that differ.
    """
    square = a.dim() == 3 and a.shape[1] == a.shape[2] and a.shape == b.shape == c.shape
    if not square or not a.dtype == b.dtype == c.dtype:
        given = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (a, b, c))
        raise ValueError(f"stacks of matrices (matrices, size, size) in one dtype, not {given}")
    if a.device.type == "cpu":  # the compiler may look into it
        return symmetric_reference(a, b, c, alpha, beta)
    return symmetric_matmul_op(a, b, c, alpha, beta)


def triangle_product(a: Tensor, b: Tensor, c: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """Chapter 13's `whole_product` by one triangle, for what is symmetric: a b + c as in `symmetric_matmul`, or a aᵀ, which is meant if c is None; for a stack a, (matrices, size, inner)."""
    if c is not None:
        return symmetric_matmul(a, b, c, alpha, beta)
    return a @ a.mT if a.device.type == "cpu" else symmetric_matmul_op(a, a, None, 1.0, 0.0)
