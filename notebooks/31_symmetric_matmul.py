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
# # A symmetric matmul, and Newton–Schulz on the Gram matrix
#
# ```{admonition} Cost box
# Half a minute on two CPU cores, where Triton's interpreter runs the kernel at small shapes; on one GPU it is compiled. Times come from a committed measurement on one H200.
# Computing one triangle of a symmetric product is record 27's, \@byronxu99; record 69, \@EmmettBicker and AI System Aster, changed that kernel's loads and launch settings (ours are others). Newton–Schulz on the Gram matrix, with kernels for its symmetric products, is Zhang and others' {cite}`zhang2026`. The Triton kernel below is this book's own; it has not been compared with theirs.
# ```
#
# ## The problem
#
# Muon's update is products of matrices, and most of them have a property that PyTorch's `bmm` and `baddbmm` do not use: the result is symmetric. In [chapter 12](12_newton_schulz.py)'s iteration two of three are, $G = XX^\top$ and $Z = bG + cG^2$; only the last, $aX + ZX$, is not. In [chapter 13](13_muon.py)'s Gram form nearly all are. A symmetric result is computed twice: once below the diagonal, and once more, number for number, above it.

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

# %% tags=["hide-input"]
from speedrun.lab.results import load_result, measured_on, public_table

MATRICES, SIZE, INNER = 12, 768, 3072  # one bank of record 89: 12 matrices of an MLP
long, square = 2 * MATRICES * SIZE**2 * INNER / 1e9, 2 * MATRICES * SIZE**3 / 1e9  # GFLOP each
whole = {"plain": 10 * long + 5 * square, "Gram": 4 * long + 14 * square}
symmetric = {"plain": 5 * long + 5 * square, "Gram": 2 * long + 14 * square}
for form, total in whole.items():
    print(f"{form:5} form: {total:.0f} GFLOP, {symmetric[form] / total:.0%} of them in symmetric products")  # fmt: skip
result = load_result("gram", "kernels")
forms = {(row["name"], row["way"], row["dtype"]): row for row in result["data"]["newton_schulz"]}
us = {key: 1000 * row["p50"] for key, row in forms.items()}
print(f"plain form, bfloat16: {us['plain', 'cuBLAS', 'bfloat16']:.0f} µs; Gram form, float16: {us['Gram', 'cuBLAS', 'float16']:.0f} µs")  # fmt: skip
print(measured_on(result))
ladder = {row["record"]: row for row in public_table("records") if not row["note"] or row["record"] == "26"}  # fmt: skip
steps = [float(ladder[record]["step_avg_ms"]) for record in ("26", "27")]
print(f"records 26 and 27, {ladder['27']['steps']} steps each: {steps[0]:.1f} and {steps[1]:.1f} ms a step")  # fmt: skip
assert ladder["26"]["steps"] == ladder["27"]["steps"] and 1.4 < steps[0] - steps[1] < 1.7
assert 0.72 < symmetric["Gram"] / whole["Gram"] < 0.76 and 0.54 < symmetric["plain"] / whole["plain"] < 0.58  # fmt: skip

# %% [markdown]
# Five polynomials of a bank of twelve matrices of 768 × 3,072 take over a millisecond in the plain form in bfloat16, and 0.8 in the Gram form in float16. Three quarters of the latter's FLOPs are in symmetric products, so over a third of all are unnecessary.
#
# How much is that in a run? When record 27 gave all MLP matrices one shape, so that they can be multiplied together, and computed one triangle of each symmetric product, a step on eight H100s became 1.5 ms shorter, of 98. (How much of it is the triangle's cannot be told: the common shape helps as well, and PyTorch was five days newer.) That was with 393,216 tokens a step. Muon's work does not shrink with the batch, so the shorter steps become, the more it matters.
#
# ```{admonition} Prediction
# Cut the result of 768 × 768 into blocks of 128 × 128. **How many of the blocks does a symmetric result need, and how much faster can it be at most?** Then count again, as the GPU does. An H200 has 132 multiprocessors, and if a block takes little enough shared memory, each of them works on two at a time. The blocks that are worked on at one time are a *wave*, here up to 264. With twelve matrices, how many waves do all blocks take, and how many those of the triangle? Does the second count promise more than the first, or less?
# ```
#
# ## The idea
#
# ### Why all of them are symmetric
#
# $XX^\top$ is, whatever $X$ is. All other matrices of the Gram form are polynomials in one $G$. Polynomials in one matrix commute, and for symmetric $A$ and $B$ that commute,
#
# $$
# (AB)^\top = B^\top A^\top = BA = AB .
# $$
#
# So $Z = bG + cG^2$, $Q \leftarrow aQ + ZQ$ and, with $P = aI + Z$, $G \leftarrow PGP$ are symmetric. The last is two products, $PG = aG + ZG$ and then its product with $P$. Five polynomials with one restart need five products for $Z$, three for $Q$ and six for $G$: fourteen of square matrices, on paper all symmetric. Of the whole iteration only the two products with the long $X$ are not. Symmetry helps the kernel in a second way. It computes a block of $AB$ from some rows of $A$ and some *columns* of $B$; since $B$ is symmetric, these columns are rows, too, which are contiguous in memory. So one kernel computes $\alpha AB^\top + \beta C$, and is right, on paper, for $XX^\top$ and for all the others.
#
# ### Counting a triangle
#
# A program has a number, and must know its block. Number the blocks of the lower triangle row by row: row $r$ begins at $r(r+1)/2$. So block $t$ is in the largest row $r$ with $r(r+1)/2 \le t$, which is
#
# $$
# r = \left\lfloor \frac{\sqrt{8t + 1} - 1}{2} \right\rfloor .
# $$
#
# In float32 the root may be off by a rounding, just where a row begins. Two comparisons of integers put it right.
#
# ## The code


# %%
#| default_exp kernels.gram
#| export
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


# %%
#| export
@jit
def lower_tile(tile):
    """Row and column of the tile-th block of a lower triangle, counted row by row: column <= row. Exact below a million."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


# %%
@jit
def write_places(ROWS, COLUMNS):
    """Row and column of this program's block."""
    row, column = lower_tile(tl.program_id(0))
    tl.store(ROWS + tl.program_id(0), row)
    tl.store(COLUMNS + tl.program_id(0), column)


places = torch.empty(2, 820, dtype=torch.int32, device=machine.device)  # 40 rows
write_places[(820,)](*places)
assert places.T.tolist() == [[row, column] for row in range(40) for column in range(row + 1)]
print("the first six blocks:", places.T[:6].tolist())

# %% [markdown]
# ### One block
#
# Loading and storing blocks is [chapter 18](18_fused_mlp.py)'s: by descriptor where there is a tensor memory accelerator, by pointers in the interpreter. A stack of matrices lies in memory as one tall matrix, so a descriptor sees it as such, and the block's row is counted from the stack's beginning.


# %%
#| export
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


# %% [markdown]
# The kernel itself is what is left: find the block, compute it, store it, and off the diagonal store its transpose on the other side. A diagonal block is computed whole, since leaving out a part of it would save little, at most a quarter of each of six blocks in 21. But its upper half is thrown away for the lower one's mirror image: the next product reads rows where columns are meant, so they had better be the same, bit by bit.


# %%
#| export
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


# %%
#| export
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


# %%
generator = torch.Generator().manual_seed(0)
small = Blocks(16, 16, 16, 4, 1)
x = torch.randn(3, 40, 50, generator=generator).to(machine.device)
gram = launch_symmetric(x, x, None, 1.0, 0.0, small, False)
assert torch.allclose(gram, x @ x.mT, atol=1e-3), "three matrices, none a multiple of a block"
assert torch.equal(gram, gram.mT), "symmetric, bit by bit"
square_of = launch_symmetric(gram, gram, gram, 0.6, -1.5, small, False)
exact = 0.6 * gram.double() @ gram.double() - 1.5 * gram.double()
error = ((square_of - exact).norm() / exact.norm()).item()
assert error < 1e-6 and tiles_of(768, LARGE_SHARED[0]) == 21
other = torch.randn(3, 40, 40, generator=generator).to(machine.device)
wrong = launch_symmetric(other, gram, None, 1.0, 0.0, small, False)
off = ((wrong - other @ gram).norm() / (other @ gram).norm()).item()
print(f"bG + cG²: off by {error:.0e}. A product that is not symmetric: off by {off:.0%}")
assert off > 0.5

# %% [markdown]
# The kernel does not check symmetry. Of a product that is not symmetric it returns the lower triangle, mirrored. An exact check would cost as much as computing the other half, so the function below states the condition in its first sentence.
#
# Unlike chapter 18's, the kernel is not persistent: there is one program for each block. How many share a multiprocessor follows from the shared memory that the stages take; the last number of `Blocks` records it.
#
# ### When the kernel is used
#
# The reference is `torch.baddbmm`, one call of the library. The kernel runs in 16 bits, where there are descriptors, on sizes that are whole blocks. Everything else gets the whole product. Muon's update is compiled ([chapter 20](20_many_gpus.py)), so the choice is inside an operator, into which the compiler does not look.


# %%
#| export
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


# %%
reason = why_no_kernel(torch.zeros(2, 256, 256, device=machine.device))
assert reason, "not for float32, wherever it is"
print("256 × 256 in float32 here:", reason)


# %%
#| export
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


# %%
#| export
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


# %%
halves = gram.double() / gram.norm(dim=(1, 2), keepdim=True).double()  # symmetric, float64
poly = halves @ halves - 0.5 * halves  # a polynomial in it: it commutes with it
found = symmetric_matmul(halves, poly, halves, alpha=2.0, beta=0.3)
assert torch.allclose(found, 2.0 * halves @ poly + 0.3 * halves, atol=1e-12)
assert torch.allclose(found, found.mT, atol=1e-12) and torch.equal(triangle_product(halves, halves.mT), halves @ halves.mT)  # fmt: skip
try:
    symmetric_matmul(halves, poly.float(), halves)
    raise AssertionError("two dtypes are refused")
except ValueError as refused:
    print(refused)

# %% [markdown]
# The whole iteration, with each of its fourteen square products and two Gram matrices computed by the kernel:

# %%
from speedrun.optim import muon


def by_kernel(a: Tensor, b: Tensor, c: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """`triangle_product`, by the kernel in blocks of 16, here."""
    counted.append(a.shape)
    return launch_symmetric(a, a if c is None else b, c, alpha, beta, small, False)


wide, counted = torch.randn(2, 32, 128, generator=generator).to(machine.device), list[Any]()
orthogonal = muon.polar_express(wide, dtype=torch.float32, gram=True, product=by_kernel)
known = muon.polar_express(wide.double(), dtype=torch.float64)
error = ((orthogonal - known).norm() / known.norm()).item()
assert len(counted) == 16 and error < 1e-4
print(f"{len(counted)} symmetric products by the kernel; the result is off by {error:.0e}")

# %% [markdown]
# ## The measurement
#
# Four versions of the two kinds of product, each a CUDA graph of twenty calls, so that launching it hardly counts, with nothing else run between them. (Twelve matrices of 768 × 3,072 are 57 MB, a little more than the L2 cache's 50.) Version 0 is cuBLAS, through `bmm` and `baddbmm`. Version 1 is the kernel above with *all* blocks and no mirror. Version 2 is the triangle with pointers. Version 3 is the triangle with descriptors, and that is the one that `symmetric_matmul` takes.


# %% tags=["hide-input"]
#| export measure.gram
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from speedrun.kernels.mlp import Blocks, in_blocks
from speedrun.lab.bench import as_graph, bench
from speedrun.lab.compile import compiled_copy
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import jit
from speedrun.lab.provenance import stamp
from speedrun.measure.runs import relative_error
from speedrun.optim.muon import (
    POLAR_EXPRESS,
    gram_newton_schulz,
    muon_state,
    muon_step,
    polar_express,
)
from speedrun.optim.newton_schulz import apply_odd_polynomials
from speedrun.presets import preset

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

NAMES = ()
ON_GPUS = ("kernels",)
SHAPES = ((12, 768, 3072), (12, 768, 768), (40, 768, 768), (5, 768, 768), (2, 768, 3072), (2, 768, 768), (4, 2048, 2048))  # fmt: skip
BANKS = {
    "attention": (40, 768, 768),
    "up": (11, 3072, 768),
    "down": (11, 768, 3072),
}  # record_200m's; queries, keys, values and outputs as one stack


def fused(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """`apply_odd_polynomials` for wide matrices, (matrices, rows, cols), with every sum inside a product."""
    for a, b, c in polynomials:
        gram = x @ x.mT
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, z, x, beta=a)
    return x


# %% tags=["hide-input"]
#| export measure.gram
@jit
def all_blocks_kernel(
    A, B, C, OUT, size, inner, alpha, beta, across,
    KIND: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """As `symmetric_kernel` with descriptors, for any block of a matrix that is so many blocks wide, and no mirror image."""
    tile, matrix = tl.program_id(0) % (across * across), tl.program_id(0) // (across * across)
    row, column, first = tile // across * ROWS, tile % across * ROWS, matrix * size
    acc = block_of_sum(A, B, C, first, row, column, size, inner, alpha, beta, ROWS, DEPTH, True)
    OUT.store([first + row, column], acc.to(KIND))


def launch_all_blocks(a: Tensor, c: Tensor | None, alpha: float, beta: float, blocks: Blocks) -> Tensor:  # fmt: skip
    """alpha · a aᵀ + beta · c, (matrices, size, size), with every block computed; sizes are multiples of a block."""
    (matrices, size, inner), across = a.shape, a.shape[1] // blocks.rows
    out = a.new_empty(matrices, size, size)
    depths = blocks.depth, blocks.depth, blocks.rows, blocks.rows
    flat = [None if x is None else x.view(-1, x.shape[2]) for x in (a, a, c, out)]
    tensors = [in_blocks(x, [blocks.rows, depth]) for x, depth in zip(flat, depths)]
    all_blocks_kernel[(matrices * across**2,)](
        *tensors, size, inner, alpha, beta, across, KIND=getattr(tl, KINDS[a.dtype]), ROWS=blocks.rows,
        DEPTH=blocks.depth, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


# %% tags=["hide-input"]
#| export measure.gram
REPEATS = 20
TRIED = [Blocks(128, 128, 64, 8, 4), Blocks(128, 128, 64, 4, 4), Blocks(128, 128, 32, 4, 6, 2), Blocks(64, 64, 128, 4, 3, 2)]  # fmt: skip


def product_versions(x: Tensor, square: bool) -> dict[str, Callable[[], Tensor]]:
    """X Xᵀ, or for symmetric x a polynomial of two terms, by each version, and in other blocks."""
    large, c, scales = LARGE_SHARED[0], x if square else None, (0.6, -1.5) if square else (1.0, 0.0)
    calls: dict[str, Callable[[], Tensor]] = {
        "cuBLAS": partial(symmetric_reference, x, x, x, *scales) if square else partial(torch.bmm, x, x.mT),
        "all blocks": partial(launch_all_blocks, x, c, *scales, large),
        "triangle, pointers": partial(launch_symmetric, x, x, c, *scales, large, False),
        "triangle": partial(symmetric_matmul_op, x, x, c, *scales),
    }  # fmt: skip
    for blocks in (*LARGE_SHARED, *TRIED):
        calls[f"triangle {tuple(blocks)}"] = partial(launch_symmetric, x, x, c, *scales, blocks, True)  # fmt: skip
    return calls


def repeated(call: Callable[[], Any]) -> None:
    """Several calls in one graph, so that beginning it, some ten microseconds, is hardly in their time."""
    for _ in range(REPEATS):
        call()


def drawn_stack(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Matrices (matrices, size, inner) of Frobenius norm 1, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator)
    return (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)


def times_of_products(shape: tuple[int, int, int]) -> tuple[list[dict], list[dict]]:
    """Times and errors of X Xᵀ and of a polynomial of a Gram matrix, in float16."""
    times, errors, x = list[dict](), list[dict](), drawn_stack(shape, torch.float16)
    gram = x @ x.mT
    for kind, given in (("X Xᵀ", x), ("bG + cG²", gram)):
        calls = product_versions(given, kind != "X Xᵀ")
        where = {"product": kind, "shape": list(shape)}
        many = {name: partial(repeated, call) for name, call in calls.items()}
        for name, took in bench(many, "cuda", 25, graph=True).items():
            per_call = {key: value / REPEATS for key, value in took._asdict().items() if key != "n"}
            times.append(where | {"name": name} | per_call)
            print(times[-1], flush=True)
        exact = given.double() @ given.double().mT
        known = exact if kind == "X Xᵀ" else 0.6 * exact - 1.5 * given.double()
        for name, call in calls.items():
            errors.append(where | {"name": name, "error": relative_error(call(), known)})
    return times, errors


# %% tags=["hide-input"]
#| export measure.gram
def times_of_newton_schulz() -> list[dict]:
    """Five polynomials of twelve matrices of 768 × 3,072, already divided by their norms, in each form: times, and errors against float64."""
    x, rows, calls = drawn_stack(SHAPES[0], torch.float32), list[dict](), dict[str, Callable]()
    known = apply_odd_polynomials(x.double(), POLAR_EXPRESS)
    rounded = {dtype: x.to(dtype) for dtype in (torch.bfloat16, torch.float16)}  # graphs read them
    for name, form in (("plain", apply_odd_polynomials), ("fused", fused), ("Gram", gram_newton_schulz)):  # fmt: skip
        for dtype in rounded:
            for way in ("cuBLAS", "triangle") if name == "Gram" else ("cuBLAS",):
                more = (3, triangle_product) if way == "triangle" else ()
                call = partial(form, rounded[dtype], POLAR_EXPRESS, *more)
                short, error = str(dtype).split(".")[1], relative_error(call(), known)
                calls[f"{name}, {dtype}, {way}"] = as_graph(call)
                rows.append({"name": name, "way": way, "dtype": short, "error": error})
    for row, took in zip(rows, bench(calls, "cuda", 25).values()):
        row |= took._asdict()
        print(row, flush=True)
    return rows


def times_of_update() -> list[dict]:
    """Muon's update of all matrices of record_200m on one GPU, compiled, with both ways to multiply symmetric matrices."""
    muon, rows = preset("record_200m").optim.muon, list[dict]()
    rate, momentum = (torch.tensor(number, device="cuda") for number in (0.02, 0.95))
    for bank, shape in BANKS.items():
        p = drawn_stack(shape, torch.bfloat16)
        told = p, 1e-3 * p.float(), muon_state(p, muon), rate, 1.0, momentum, 0.1
        calls = dict[str, Callable]()
        for way in ("cuBLAS", "triangle"):
            product = triangle_product if way == "triangle" else None
            express = partial(polar_express, product=product)
            with mock.patch("speedrun.optim.muon.polar_express", express):
                calls[way] = as_graph(partial(compiled_copy(muon_step), *told, muon))
        for way, took in bench(calls, "cuda", 25, cold=True).items():
            rows.append({"bank": bank, "shape": list(shape), "way": way} | took._asdict())
            print(rows[-1], flush=True)
    return rows


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors of products, of Newton–Schulz, and of Muon's update."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    found: dict[str, list] = {"products": [], "errors": []}
    for shape in SHAPES:
        times, errors = times_of_products(shape)
        found["products"] += times
        found["errors"] += errors
    found["newton_schulz"], found["update"] = times_of_newton_schulz(), times_of_update()
    return found, stamp(command, ["speedrun.measure.gram"], 1, [0])


# %% tags=["hide-input"] mystnb={"image": {"alt": "Microseconds of X times its transpose and of a polynomial of G for twelve matrices: cuBLAS, the kernel with all blocks, the triangle with pointers, the triangle with descriptors, and the least time that the chip's arithmetic allows for one triangle."}}
import numpy as np
from matplotlib import pyplot as plt

from speedrun.lab.bench import PEAKS
from speedrun.lab.results import figure_style

times = {(row["product"], tuple(row["shape"]), row["name"]): 1000 * row["p50"] for row in result["data"]["products"]}  # fmt: skip
VERSIONS = ["cuBLAS", "all blocks", "triangle, pointers", "triangle"]
NAMES_SHOWN = ["0: cuBLAS", "1: all blocks", "2: triangle, pointers", "3: triangle, descriptors"]
CASES = [("X Xᵀ", (12, 768, 3072)), ("X Xᵀ", (12, 768, 768)), ("bG + cG²", (12, 768, 768))]
LABELS = ["XXᵀ, X 768 × 3,072", "XXᵀ, X 768 × 768", "bG + cG², G 768 × 768"]
floors = [2e6 * 21 / 36 * m * s * s * k / PEAKS["H200"].flops_s for _, (m, s, k) in CASES]
faster = [times[*case, "cuBLAS"] / times[*case, "triangle"] for case in CASES]
figure_style()
fig, ax = plt.subplots(figsize=(7.6, 3.6), layout="constrained")
for number, version in enumerate(VERSIONS):
    where = np.arange(len(CASES)) + 0.19 * (number - 1.5)
    ax.bar(where, [times[*case, version] for case in CASES], 0.19, label=NAMES_SHOWN[number])
for place, (floor, ratio) in enumerate(zip(floors, faster)):
    ax.plot([place + 0.17, place + 0.4], [floor, floor], color="0.2", ls=":", label=None if place else "least time for one triangle (data sheet)")  # fmt: skip
    ax.text(place + 0.285, times[*CASES[place], "triangle"] + 2, f"{ratio:.1f}×", ha="center", fontsize=8)  # fmt: skip
ax.set_xticks(range(len(CASES)), LABELS)
ax.set_ylabel("µs for twelve matrices, float16\n(×: version 0 over version 3)")
ax.set_title(f"one triangle takes {1 / faster[0]:.0%} to {1 / faster[1]:.0%} of bmm's time, {1 / faster[2]:.0%} of baddbmm's")  # fmt: skip
ax.legend(fontsize=8.5)
fig.text(0.99, -0.03, measured_on(result), ha="right", fontsize=6.5)
plt.show()

# %%
across, slots = 6, 2 * 132
waves = {blocks: -(-MATRICES * blocks // slots) for blocks in (across**2, tiles_of(768, LARGE_SHARED[0]))}  # fmt: skip
by_blocks, by_waves = across**2 / 21, waves[36] / waves[21]
print(f"blocks: 36 and 21 a matrix, at most {by_blocks:.2f}×; waves: {waves[36]} and {waves[21]}, {by_waves:.0f}×")  # fmt: skip
gains = [times[*case, "all blocks"] / times[*case, "triangle"] for case in CASES]
print("all blocks → triangle, measured:", ", ".join(f"{gain:.2f}×" for gain in gains))
rate = 1e-3 * long / times[*CASES[0], "triangle"] * 1e6
print(f"XXᵀ of 768 × 3,072, counted as a whole product: {rate:.0f} TFLOP/s; the chip does {PEAKS['H200'].flops_s / 1e12:.0f}")  # fmt: skip
assert (by_waves, waves) == (2, {36: 2, 21: 1}) and 1.7 < by_blocks < 1.72
assert gains[0] > by_blocks > gains[1] > 1.5 and gains[2] > 1.5 and rate > PEAKS["H200"].flops_s / 1e12  # fmt: skip
assert abs(times[*CASES[0], "all blocks"] / times[*CASES[0], "cuBLAS"] - 1) < 0.05
errors: dict[tuple, set[float]] = {}
for row in result["data"]["errors"]:
    errors.setdefault((row["product"], *row["shape"]), set()).add(row["error"])
assert all(max(found) < 1.001 * min(found) for found in errors.values()), "all versions round alike"
assert all(max(errors[kind, *shape]) < 2**-11 for kind, shape in CASES), "one rounding to float16"
grows = [times[*CASES[0], way] - times[*CASES[1], way] for way in ("all blocks", "triangle")]
assert [round(us) for us in grows] == [58, 29]
copied = times[*CASES[2], "cuBLAS"] - times[*CASES[1], "cuBLAS"]
print(f"baddbmm over bmm: {copied:.0f} µs")
assert 7 < copied < 9
assert all(times[*case, "triangle, pointers"] > times[*case, "cuBLAS"] for case in CASES)

# %% [markdown]
# The prediction: 21 blocks of 36, so at most 1.71 times. In waves, $12 \cdot 36 = 432$ blocks, 264 at a time, are two, and $12 \cdot 21 = 252$ are one; the second wave of the whole product uses fewer than two thirds of the places. For long rows the gain is 1.8, between what blocks and waves promise. From 768 columns to 3,072 the time grows by 58 µs with all blocks, by 29 with the triangle, half of it. What does not grow is larger for the triangle, probably because it stores most blocks twice. With short rows that weighs more, and the gain is below both counts. (Waves are a rough count, since two blocks on one multiprocessor share its matrix units. With five matrices both versions take one wave, and yet the triangle is 1.4 times as fast.)
#
# Three more things. With all blocks the kernel takes as long as `bmm` for these two $XX^\top$, within 3%, so there its lead is the triangle's alone. Where something is added, `baddbmm` takes eight microseconds more than `bmm`, our kernel hardly any: PyTorch first copies $C$ to where the result will be, which is one more kernel. And counted as a whole product, the triangle of $XX^\top$ runs at more TFLOP/s than the data sheet's 989. Counting only what it computes, it is at six tenths of them.
#
# Now the iteration:

# %% tags=["hide-input"]
for (name, way, dtype), row in forms.items():
    print(f"{name:6} {way:9} {dtype:9} {1000 * row['p50']:6.0f} µs   off by {row['error']:.4f}")
plain, fused_us, cublas, triangle = (us[key] for key in (("plain", "cuBLAS", "bfloat16"), ("fused", "cuBLAS", "bfloat16"), ("Gram", "cuBLAS", "float16"), ("Gram", "triangle", "float16")))  # fmt: skip
off_by = {key: row["error"] for key, row in forms.items()}
half_off, whole_off = off_by["Gram", "triangle", "float16"], off_by["Gram", "cuBLAS", "float16"]
assert 460 < triangle < 510 and 1.6 < cublas / triangle < 1.7 and 2.2 < fused_us / triangle < 2.3
assert 1.05 < half_off / whole_off < 1.2 and half_off < off_by["fused", "cuBLAS", "bfloat16"] / 2
in_plain = plain - sum(5 * (times[kind, shape, "cuBLAS"] - times[kind, shape, "triangle"]) for kind, shape in (CASES[0], CASES[2]))  # fmt: skip
print(f"plain → Gram → triangle: {plain:.0f} → {cublas:.0f} → {triangle:.0f} µs; the plain form with triangles, from the products' times: {in_plain:.0f}")  # fmt: skip
assert 960 < in_plain < 1090

# %% [markdown]
# 1.29 milliseconds in the plain form, 1.11 with each sum inside a product (chapter 13's `fused`), 0.80 on the Gram matrix, **0.49 with triangles**. (The plain form with triangles, which the records use, was not timed; going by its products it would take about one millisecond.) On these matrices, of random numbers, the triangles' result is a tenth less exact.
#
# ## What it buys

# %% tags=["hide-input"]
update = {(row["bank"], row["way"]): row["p50"] for row in result["data"]["update"]}
totals = {way: sum(ms for (_, other), ms in update.items() if other == way) for way in ("cuBLAS", "triangle")}  # fmt: skip
for bank, shape in BANKS.items():
    print(f"{bank:9} {shape}: {update[bank, 'cuBLAS']:.2f} → {update[bank, 'triangle']:.2f} ms")
saved = totals["cuBLAS"] - totals["triangle"]
print(f"all matrices of record_200m on one GPU: {totals['cuBLAS']:.2f} → {totals['triangle']:.2f} ms, {saved / totals['cuBLAS']:.0%} less")  # fmt: skip
trained = load_result("gram", "runs")["data"]["runs"]
step_ms = 1000 * trained[0]["seconds"] / trained[0]["train"][-1][0]
print(f"of a step of {step_ms:.0f} ms: {saved / step_ms:.1%}")
assert 0.55 < saved < 0.65 and 0.0015 < saved / step_ms < 0.0025

# %% [markdown]
# The update of all of `record_200m`'s matrices, compiled, with momentum, NorMuon and mantissas (and queries, keys, values and outputs as one stack of forty), becomes a sixth shorter, 0.6 ms on one GPU, whose steps take nearly 300: **a fifth of a percent.** Record 27 had more to win: its Muon had no Gram form.
#
# ## Where half is not enough
#
# It went into the trainer all the same. Here are runs of `record_200m` that had it, beside two without (seed 0's two differ in nothing else):

# %% tags=["hide-input"] mystnb={"image": {"alt": "Training loss against the step for four runs of record_200m on one H200. Two with whole products fall smoothly. Two with triangles follow them for more than 300 steps, and then jump from 3.6 to 8 and above."}}
stopped = load_result("gram", "stopped")["data"]
first = load_result("gram", "first")["data"]["runs"][0]
last_loss = {(run["seed"], run["triangle"]): run["curve"][-1]["val_loss"] for run in trained}
assert len(trained) == 3 and [run["triangle"] for run in trained] == [False, False, True]
fig, ax = plt.subplots(figsize=(7.6, 3.2), layout="constrained")
for run in trained:
    label = f"{'triangles' if run['triangle'] else 'whole products'}, seed {run['seed']}: validation at the end {run['curve'][-1]['val_loss']:.3f}"  # fmt: skip
    ax.plot(*np.array(run["train"]).T, color="C3" if run["triangle"] else f"{0.25 + 0.3 * run['seed']}", lw=1.1, label=label, zorder=3 - run["seed"])  # fmt: skip
points = [(point["step"], point["train_loss"]) for point in stopped["train"]]
ax.plot(*np.array(points).T, color="C1", lw=1.1, label=f"triangles, seed {stopped['seed']}: stopped at step {points[-1][0]}")  # fmt: skip
ax.set(xlim=(0, 735), ylim=(3, 9), xlabel="step", ylabel="training loss (nats a token)")
ax.set_title("with every symmetric product by one triangle, the loss jumps after 300 steps")
ax.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.47))
fig.text(0.99, -0.03, measured_on(load_result("gram", "runs")), ha="right", fontsize=6.5)
plt.show()
jumped = {run["seed"]: next(step for step, loss in run["train"] if step > 250 and loss > 4.4) for run in trained if run["triangle"]}  # fmt: skip
by_val = {point["step"]: point["val_loss"] for point in first["curve"]}
print(f"a third run, seed {first['config']['seed']}: {by_val[250]:.2f} at step 250, {by_val[375]:.2f} at 375, {by_val[735]:.2f} at the end")  # fmt: skip
assert last_loss[0, False] < 3.26 and last_loss[1, False] < 3.26 and last_loss[0, True] > 3.3
assert 300 < jumped[0] < 360 and by_val[375] > 6 and by_val[735] > 3.8

# %% [markdown]
# In all three runs with triangles the loss jumped, and none made it good. Nothing was infinite, the kernel is right on every shape that was tried, and matrices of independent random numbers show nothing. So a fourth run, which jumped too, kept what Muon had been given in its last ten steps; then each matrix was orthogonalized again in both ways. All agreed (40 are square, and never form $PGP$) but one, `mlp_up` of the last layer, in the step before the jump. Here it is, as the GPU computed it, and emulated in float16 in eight orders of its 768 columns, the GPU's first (what is *below* the diagonal depends on the order):

# %% tags=["hide-input"]
caught = load_result("gram", "caught")["data"]
values = caught["singular_values"]
print("singular values, norm 1:", *(f"{v:.2g}" for v in values[:4]), "…", f"{values[len(values) // 2]:.2g} … {values[-1]:.2g}")  # fmt: skip
print(
    f"{caught['loudest']:.0%} of the first right singular vector's sum of squares is in one column"
)
gpu = caught["on_the_gpu"]
print(f"on the {gpu['gpu']}: {gpu['matrices'] - 1} of {gpu['matrices']} matrices off by less than {gpu['others_at_most']:.4f} by triangles; this one, layer {caught['layer']} of 0 to 10 in step {caught['step']}:")  # fmt: skip
for way in ("whole", "triangles", "mean of both halves"):
    print(
        f"  {way:19} off by {gpu[way]['error']:.4f}; largest singular value {gpu[way]['top']:.2f}"
    )
print("emulated in eight orders:")
wrong = {way: [row["error"] for row in caught["rows"] if row["way"] == way] for way in ("whole", "triangles", "(PG)P")}  # fmt: skip
for way, found in wrong.items():
    top = max(row["top"] for row in caught["rows"] if row["way"] == way)
    print(f"  {way:10} off by {min(found):.4f} to {max(found):.4f}; largest singular value up to {top:.2f}")  # fmt: skip
print(measured_on(load_result("gram", "caught")))
assert 0.75 < values[0] < 0.85 and values[1] < 0.2 and max(wrong["whole"]) < 0.007
assert max(wrong["triangles"]) > 0.1 > 0.007 > max(wrong["(PG)P"])
a, b, c = muon.POLAR_EXPRESS[0]
mu = [a + b * (value / 1.02) ** 2 + c * (value / 1.02) ** 4 for value in (values[0], values[-1])]
assert 0.2 < mu[0] < 0.27 and 7.5 < mu[1] < 8.2, (
    "P's eigenvalues, of the loud direction and a quiet one"
)
assert round(gpu["triangles"]["top"] / gpu["whole"]["top"]) == 74 and BANKS["attention"][0] == 40
assert gpu["triangles"]["error"] > 2.9 and gpu["triangles"]["top"] > 80 and gpu["others_at_most"] < 0.007  # fmt: skip

# %% [markdown]
# One direction is loud, with four fifths of the norm, and it lies to a good part in a single column. On the GPU the triangles' error was three times as large as the right result: the largest singular value, 1.14 in the right one, was 84. Before NorMuon that matrix's step was 74 times too long in one direction. Emulated in the same order the error is one per cent, in others up to 14: the last bits decide. (The list's last line is for later.)
#
# ### Why
#
# Take $P = aI + Z$. Its float16 numbers are rounded, so it does not commute with $G$: not in the last bits. Chapter 13 computes the next Gram matrix as $P(PG)$. What it *should* be is the Gram matrix of $PX$ for this rounded $P$, which is $PGP$. The two differ, but
#
# $$
# P(PG) = P\,(PGP)\,P^{-1} ,
# $$
#
# so the next polynomial of it, times $Q = P$, is $P\,p_2(PGP)$: the inverse cancels. As a whole product the detour does no harm. But $P(PG)$ is not symmetric: in the basis of $P$'s eigenvectors, with eigenvalues $\mu$, its error at $(i, j)$ is $\mu_i / \mu_j$ times that at $(j, i)$. For the loud direction $\mu$ is a quarter, for the quiet ones it is eight. Whoever mirrors one half takes the larger error to the other side as well. (The mean of both halves takes half of it.) For a wide $X$ a whole $Q = P_2P_1$ still damps the loud direction first; mirrored, it does not. By then $Q$'s largest eigenvalue is above a hundred, and the two polynomials that follow explode above 1.9.
#
# Here is a matrix of that kind, drawn at random, with the second Gram matrix's error $E$ in the loud direction $v$, $\lVert v^\top E\rVert$ from the left and $\lVert Ev\rVert$ from the right:

# %%
from speedrun.optim.muon import whole_product


def mirrored(a: Tensor, b: Tensor, c: Tensor | None = None, alpha=1.0, beta=0.0) -> Tensor:
    """`whole_product`, rounded, and then its lower half on both sides."""
    product = whole_product(a, b, c, alpha, beta)
    return product.tril() + product.tril(-1).mT


# %%
def loud_matrix(top: float, share: float, seed: int, size: int = 96) -> Tensor:
    """(4 · size, size) float32 of norm 1: the first singular value is `top`, the others fall like 1 / n; `share` of the first right singular vector is in one column."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, size, generator=draw) for n in (4 * size, size))
    v[:, 0] *= (1 - share**2) ** 0.5
    v[seed * 37 % size, 0] += share * size**0.5
    rest = 1 / torch.arange(1, size + 1)
    rest[0] = 0
    values = rest / rest.norm() * (1 - top**2) ** 0.5
    values[0] = top
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    return u * values @ v.T


a, b, c = muon.POLAR_EXPRESS[0]
loud = (loud_matrix(0.85, 0.65, 0)[None] / 1.02).half().mT.contiguous()
g = mirrored(loud, loud.mT)
z = mirrored(g, g, g, c, b)
p, direction = z.double() + a * torch.eye(len(g[0])), torch.linalg.eigh(g[0].double())[1][:, -1]
half = whole_product(z, g, g, 1.0, a)  # P G
should = p @ g.double() @ p
seen = {}
for name, found in {"P(PG), whole": whole_product(z, half, half, 1.0, a), "P(PG), mirrored": mirrored(z, half, half, 1.0, a), "(PG)P, mirrored": mirrored(half, z, half, 1.0, a)}.items():  # fmt: skip
    error = (found.double() - should)[0]
    seen[name] = (direction @ error).norm().item(), (error @ direction).norm().item()
    print(f"{name:16} loud direction from the left {seen[name][0]:.5f}, from the right {seen[name][1]:.5f}")  # fmt: skip
assert min(seen["P(PG), whole"]) < 0.2 * max(seen["P(PG), whole"])
assert max(seen["(PG)P, mirrored"]) < 0.3 * min(seen["P(PG), mirrored"])

# %% [markdown]
# ### In another order
#
# The last line is the way out: multiply by $P$ from both sides. $PG$ is computed whole: rounded, it is not quite symmetric, and it need not be. Then $(PG)P$ is symmetric for *any* symmetric $P$ and $G$, whether they commute or not, up to $PG$'s rounding. So are $XX^\top$ and $bG + cG^2$, products of a matrix with itself. $Q \leftarrow PQ$ is symmetric only as far as both commute; with $G$ right they nearly do, and the triangle costs hardly anything.


# %%
#| export optim.gram
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


# %%
counted.clear()
unit = wide / torch.linalg.matrix_norm(wide, keepdim=True) / 1.02
for given in (unit, unit.mT):
    found = gram_by_triangles(given, muon.POLAR_EXPRESS, product=by_kernel)
    known = muon.apply_odd_polynomials(given.double(), muon.POLAR_EXPRESS)
    assert ((found - known).norm() / known.norm()).item() < 1e-4
print(f"{len(counted) // 2} products by the kernel; 3 of squares and 2 with X are whole")
assert len(counted) == 2 * 13


# %% [markdown]
# Zhang and others, who introduced the Gram form, compute all its symmetric products by triangles, too, and restart after *two* polynomials {cite}`zhang2026`. Does that help as well? Four ways, on sixteen matrices for each loudness:

# %% mystnb={"image": {"alt": "Largest error among sixteen matrices against the share of the first singular value, on a logarithmic axis. Triangles in the order P(PG) with a restart after three polynomials are above 1 from 0.8 to 0.9 only. The other three stay below 2.5 percent: whole products, triangles with a restart after two, and triangles in the order (PG)P."}}
WAYS = {
    "whole products, restart after three": lambda x: muon.gram_newton_schulz(x, muon.POLAR_EXPRESS),
    "triangles, P(PG), after three": lambda x: muon.gram_newton_schulz(x, muon.POLAR_EXPRESS, 3, mirrored),
    "triangles, P(PG), after two": lambda x: muon.gram_newton_schulz(x, muon.POLAR_EXPRESS, 2, mirrored),
    "triangles, (PG)P, after three": lambda x: gram_by_triangles(x, muon.POLAR_EXPRESS, 3, mirrored),
}  # fmt: skip
LOUDNESS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
worst: dict[str, list[float]] = {way: [] for way in WAYS}
for top in LOUDNESS:
    stack = torch.stack([loud_matrix(top, share, seed) for seed in range(4) for share in (0.5, 0.6, 0.7, 0.8)]).mT.contiguous() / 1.02  # fmt: skip
    known = muon.apply_odd_polynomials(stack.double(), muon.POLAR_EXPRESS)
    for way, call in WAYS.items():
        off = torch.linalg.matrix_norm(call(stack.half()).double() - known) / torch.linalg.matrix_norm(known)  # fmt: skip
        worst[way].append(off.nan_to_num(1e4).clamp(max=1e4).max().item())
fig, ax = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
for (way, found), style in zip(worst.items(), (":", "-", "--", "-")):
    ax.plot(LOUDNESS, found, style, marker="o", ms=3, color={":": "0.3", "--": "C0"}.get(style, "C3" if "P(PG)" in way else "C2"), label=way)  # fmt: skip
ax.set(yscale="log", ylim=(1e-3, 3e4), xlabel="the first singular value's share of the norm", ylabel="largest error of 16 matrices\n(10⁴: that much or more)")  # fmt: skip
ax.set_title("triangles in P(PG), restarted after three, fail for a share of 0.8 to 0.9")
ax.legend(fontsize=8.5)
plt.show()
for way, found in worst.items():
    print(f"{way:36}", *(f"{number:8.4f}" for number in found))
whole_way, bad, after_two, good = worst.values()
assert max(bad) > 1 and max(bad[:2]) < 0.02 and max(*whole_way, *after_two, *good) < 0.025

# %% [markdown]
# Both help. With a restart after two, errors have one polynomial less to grow in; it costs one more $XX^\top$ and $QX$, saves three squares, and is even more exact. The order $(PG)P$ costs three whole products of squares. In FLOPs, and by the times above:

# %%
more = 3 * (times[*CASES[2], "cuBLAS"] - times[*CASES[2], "triangle"])
flops = {"P(PG), after three": (2, 14, 0), "P(PG), after two": (3, 11, 0), "(PG)P, after three": (2, 11, 3)}  # fmt: skip
for way, (parts, halves_, whole_) in flops.items():
    total = parts * long * (21 / 36 + 1) + square * (21 / 36 * halves_ + whole_)
    print(f"{way:20} {total:.0f} GFLOP")
print(f"predicted for (PG)P: {triangle + more:.0f} µs, and {cublas:.0f} with whole products")
assert 520 < triangle + more < 550

# %% [markdown]
# ```{admonition} The trainer computes whole products
# :class: warning
# Whole products are safe in the order $P(PG)$, and for a fifth of a percent there is no hurry. `gram_by_triangles` has been tested as above, in emulation; neither its time on a GPU nor a run with it has been measured. `gram_newton_schulz` takes the products as an argument, `product`: do not give it `triangle_product` with a restart after three.
# ```
#
# ## What it costs, and when it fails
#
# - **Few matrices.** With two of them, 42 blocks of 128 leave two thirds of the multiprocessors idle. So the operator takes blocks of 64 where there are too few large ones, nearly four times as many. $XX^\top$ then takes 5 to 21% longer than with cuBLAS, and the sum is 1.3 times as fast.
# - **Many matrices.** Forty take six waves or four, so that waves promise 1.5 and no longer 2. The triangle wins 1.1 times for $XX^\top$ and 1.8 for the sum, of which a part is the copy.
# - **It has to be symmetric**, and a rounded $P(PG)$ is not. The kernel does not detect it.
# - **A tall matrix** has its Gram matrix in $X^\top X$, whose rows are columns in memory. The optimizer leaves that product to cuBLAS.
# - Other chips than Hopper have not been measured. With these pointers the kernel is slower than cuBLAS on an H200, so GPUs without descriptors get the whole product.

# %% tags=["hide-input"]
few, many, five = (2, 768, 3072), (40, 768, 768), (5, 768, 768)
own_128 = "triangle (128, 128, 64, 4, 3, 2)"
print(f"two matrices, XXᵀ: cuBLAS {times['X Xᵀ', few, 'cuBLAS']:.1f}, blocks of 64 {times['X Xᵀ', few, 'triangle']:.1f}, of 128 {times['X Xᵀ', few, own_128]:.1f} µs")  # fmt: skip
ratios = [times[kind, many, "cuBLAS"] / times[kind, many, "triangle"] for kind in ("X Xᵀ", "bG + cG²")]  # fmt: skip
print(f"forty matrices: {ratios[0]:.2f}× and {ratios[1]:.2f}×")
assert 0.8 < times["X Xᵀ", few, "cuBLAS"] / times["X Xᵀ", few, "triangle"] < 0.86
assert 1.3 < times["bG + cG²", few, "cuBLAS"] / times["bG + cG²", few, "triangle"] < 1.45
assert 1.1 < ratios[0] < 1.2 and 1.75 < ratios[1] < 1.9
assert 1.35 < times["X Xᵀ", five, "all blocks"] / times["X Xᵀ", five, own_128] < 1.45
eight = {case: times[*case, "triangle (128, 128, 64, 8, 4, 1)"] / times[*case, "triangle"] for case in CASES}  # fmt: skip
deep = {case: times[*case, "triangle (128, 128, 64, 4, 4, 1)"] / times[*case, "triangle"] for case in CASES}  # fmt: skip
for case, label in zip(CASES, LABELS):
    print(f"{label}: four stages and one program on a multiprocessor take {deep[case]:.2f} times as long with four warps, {eight[case]:.2f} with eight")  # fmt: skip
assert all(1.05 < ratio < 1.25 for ratio in deep.values())
assert all(1.05 < eight[case] < 1.2 for case in CASES[:2]) and 1.4 < eight[CASES[2]] < 1.5

# %% [markdown]
# ## What did not work
#
# - **Eight warps** and four stages, record 69's setting for 768 columns: a tenth slower than ours for $XX^\top$, nearly one and a half times as slow for the sum. Four warps with the same stages lose a tenth to a fifth: with four stages only one program fits on a multiprocessor, and with two, one probably multiplies while the other stores. (Before diagonal blocks were mirrored inside, eight warps took half as long again for $XX^\top$, too. How the compiler lays out a block depends on everything that follows, and what was measured for one kernel need not hold for its neighbour.)
# - **Pointers, as `load_block` uses them.** More than twice as slow, and slower than computing everything by cuBLAS. They mask each block on the way, which probably prevents asynchronous loads; pointers without masks were not tried.
# - **Slices of the sum** of 128 with blocks of 64, or of 32 with six stages: for twelve matrices 5 to 14% slower than slices of 64 in blocks of the same size.
#
# ## Exercises
#
# 1. Write `waves_of(matrices, size, triangle, rows=128, places=264)`: how many waves a stack of symmetric results takes, if a GPU works on `places` blocks of `rows` × `rows` at a time, for all blocks or for those of the triangle.


# %% tags=["solution"]
def waves_of(matrices: int, size: int, triangle: bool, rows: int = 128, places: int = 264) -> int:
    """Blocks over places, rounded up."""
    across = -(-size // rows)
    blocks = across * (across + 1) // 2 if triangle else across**2
    return -(-matrices * blocks // places)


# %%
answer = waves_of(12, 768, False), waves_of(12, 768, True)
assert answer == (2, 1), f"12 matrices of 768 take two waves and one, not {answer}"
answer = waves_of(3, 200, True, rows=64, places=8)
assert answer == 4, f"200 are four blocks of 64, so 30 blocks on 8 places are 4 waves, not {answer}"
answer = waves_of(1, 128, True), waves_of(264, 128, True), waves_of(265, 128, True)
assert answer == (1, 1, 2), f"a matrix of one block has it on the diagonal; expected (1, 1, 2), not {answer}"  # fmt: skip
print("waves, all blocks and triangle:", {n: (waves_of(n, 768, False), waves_of(n, 768, True)) for n in (2, 6, 12, 24, 40)})  # fmt: skip

# %% [markdown]
# 2. Write `symmetric_flops(m, n, iterations=5, restarts=1, rows=128)`: the FLOPs that the Gram form needs for an $m \times n$ matrix, $m \le n$, if symmetric products compute only blocks of the triangle. There are, as in chapter 13, `restarts + 1` parts, each with one Gram matrix and one long product $QX$, and `iterations + 3 · (iterations − parts)` products of squares.


# %% tags=["solution"]
def symmetric_flops(m: int, n: int, iterations: int = 5, restarts: int = 1, rows: int = 128) -> float:  # fmt: skip
    """A Gram matrix and a square cost the share of blocks that is computed; QX costs all."""
    parts, across = restarts + 1, -(-m // rows)
    share = across * (across + 1) / 2 / across**2
    squares = iterations + 3 * (iterations - parts)
    return share * (parts * 2 * m * m * n + squares * 2 * m**3) + parts * 2 * m * m * n


# %%
answer, wanted = symmetric_flops(768, 3072), (21 / 36 * symmetric["Gram"] + 2 * long) * 1e9 / MATRICES  # fmt: skip
assert abs(answer / wanted - 1) < 1e-9, f"768 × 3,072 needs {wanted / 1e9:.2f} GFLOP, not {answer / 1e9:.2f}"  # fmt: skip
answer = symmetric_flops(128, 256, 3, 0)
wanted = 2 * 128 * 128 * 256 * 2 + (3 + 3 * 2) * 2 * 128**3
assert answer == wanted, f"one block is its own triangle: {wanted} FLOPs, not {answer}"
answer = symmetric_flops(256, 256, 1, 0)
wanted = 0.75 * (2 + 2) * 256**3 + 2 * 256**3
assert answer == wanted, f"of four blocks three are computed, of QX all: {wanted:.0f} FLOPs, not {answer:.0f}"  # fmt: skip
saving = 1 - MATRICES * symmetric_flops(768, 3072) / 1e9 / whole["plain"]
print(
    f"against the plain form: {saving:.0%} fewer FLOPs; in time {1 - triangle / fused_us:.0%} less than `fused`"
)

# %% [markdown]
# ## Since then
#
# Record 65 fixed the kernel's settings, which had been searched for at each start, and record 69 changed how it loads. Record 89 orthogonalises in the plain form, with a triangle for each of its symmetric products. Record 92 (\@devenpzak) has six polynomials where record 89 has five, in the plain form as well. No record uses the Gram form yet.
