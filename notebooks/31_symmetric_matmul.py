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

# %% tags=["hide-input"]
from speedrun.lab.tier import choose_tier

tier = choose_tier()

# %%
from speedrun.lab.hardware import setup

machine = setup()

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
    store_block(OUT, out, first + row, column, size, size, ROWS, ROWS, BULK)
    if row != column:
        store_block(OUT, tl.trans(out), first + column, row, size, size, ROWS, ROWS, BULK)


# %%
#| export
SMALL_SHARED, LARGE_SHARED = Blocks(128, 128, 32, 8, 4), Blocks(128, 128, 64, 8, 4)
KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
CONFIGS = {
    80: LARGE_SHARED,
    86: SMALL_SHARED,
    90: LARGE_SHARED,
    100: LARGE_SHARED,
    120: SMALL_SHARED,
}


def launch_symmetric(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, blocks: Blocks, bulk: bool
) -> Tensor:
    """alpha · a bᵀ + beta · c, (matrices, size, size), where that is symmetric, by the kernel, for a and b (matrices, size, inner). bulk: through descriptors, for a size that is a multiple of a block."""
    (matrices, size, inner), across = a.shape, -(-a.shape[1] // blocks.rows)
    a, b, c = a.contiguous(), b.contiguous(), None if c is None else c.contiguous()
    out, tiles = a.new_empty(matrices, size, size), across * (across + 1) // 2
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
#| export
def symmetric_reference(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, size, size)."""
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def why_no_kernel(a: Tensor) -> str:
    """Why `symmetric_matmul` computes all of a product and not one triangle; empty: the kernel runs."""
    if a.device.type != "cuda":
        return "it is on no NVIDIA GPU"
    if torch.cuda.get_device_capability(a.device) < (8, 0):
        return "its GPU is older than compute capability 8.0"
    if a.dtype not in (torch.bfloat16, torch.float16):
        return f"its numbers are {a.dtype}, not bfloat16 or float16"
    if not a.numel():
        return "it is empty"
    return "" if find_triton() else "Triton is not installed"


# %%
#| export
@torch.library.custom_op(f"{NAMESPACE}::symmetric_matmul", mutates_args=())
def symmetric_matmul_op(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float) -> Tensor:
    """`symmetric_matmul`, as an operator that torch.compile does not look into."""
    if why_no_kernel(a):
        return symmetric_reference(a, b, c, alpha, beta)
    blocks = blocks_for(a.device, CONFIGS)
    hopper = torch.cuda.get_device_capability(a.device) >= (9, 0)
    whole = a.shape[1] % blocks.rows == 0
    return launch_symmetric(a, b, c, alpha, beta, blocks, hopper and whole)


@symmetric_matmul_op.register_fake
def fake_symmetric_matmul(a, b, c, alpha, beta):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


# %%
#| export
def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of symmetric matrices, (matrices, size, size), of which a and b commute, so that the result is symmetric, too. In their dtype.

    Only blocks on and below the diagonal are computed, with sums in float32, and mirrored: what a, b and c have above is not looked at, so for others the result is wrong. Off a GPU, and in other
    dtypes than bfloat16 and float16, all of the product is computed. No gradient. Raises ValueError for shapes and dtypes that differ.
    """
    square = a.dim() == 3 and a.shape[1] == a.shape[2] and a.shape == b.shape == c.shape
    if not square or not a.dtype == b.dtype == c.dtype:
        given = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (a, b, c))
        raise ValueError(f"stacks of matrices (matrices, size, size) in one dtype, not {given}")
    if a.device.type == "cpu":  # nothing to hide from the compiler
        return symmetric_reference(a, b, c, alpha, beta)
    return symmetric_matmul_op(a, b, c, alpha, beta)


# %%
generator = torch.Generator().manual_seed(0)
x = torch.randn(3, 37, 50, generator=generator).to(machine.device)
small = Blocks(16, 16, 16, 4, 1)
gram = launch_symmetric(x, x, None, 1.0, 0.0, small, False)
assert torch.allclose(gram, x @ x.mT, atol=1e-3)
print((gram - x @ x.mT).abs().max())

# %% [markdown]
# ## The measurement

# %%
#| export measure.gram
from collections.abc import Callable
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
from speedrun.optim.muon import muon_state, muon_step, polar_express
from speedrun.presets import preset

try:
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # macOS, Windows
    tl = constexpr = Any

NAMES = ()
ON_GPUS = ("kernels",)
SHAPES = ((12, 768, 3072), (12, 768, 768), (40, 768, 768), (6, 768, 768), (3, 768, 768), (8, 256, 256), (4, 2048, 2048))  # fmt: skip
BANKS = {
    "attention": (40, 768, 768),
    "up": (11, 3072, 768),
    "down": (11, 768, 3072),
}  # record_200m's


def products_by(way: Callable[..., Tensor]) -> Any:
    """While it lasts, Muon's products of symmetric matrices are computed that way."""
    return mock.patch("speedrun.optim.muon.symmetric_matmul", way)


# %%
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


# %%
#| export measure.gram
TRIED = [Blocks(128, 128, depth, warps, stages) for depth, warps, stages in ((64, 8, 4), (64, 4, 4), (64, 8, 3), (64, 4, 3), (128, 8, 3), (32, 4, 6))]  # fmt: skip
TRIED += [Blocks(64, 64, 64, 4, 4), Blocks(64, 64, 128, 4, 3)]


def product_versions(x: Tensor, square: bool, more: bool) -> dict[str, Callable[[], Tensor]]:
    """X Xᵀ, or for symmetric x a polynomial of two terms, by each version; `more` blocks than the chip's own."""
    own, c, scales = CONFIGS[90], x if square else None, (0.6, -1.5) if square else (1.0, 0.0)
    calls: dict[str, Callable[[], Tensor]] = {
        "cuBLAS": partial(symmetric_reference, x, x, x, *scales),
        "all blocks": partial(launch_all_blocks, x, c, *scales, own),
        "triangle, pointers": partial(launch_symmetric, x, x, c, *scales, own, False),
        "triangle": partial(launch_symmetric, x, x, c, *scales, own, True),
    }
    if not square:
        calls["cuBLAS"] = partial(torch.bmm, x, x.mT)
    for blocks in TRIED if more else ():
        calls[f"triangle {tuple(blocks)}"] = partial(launch_symmetric, x, x, c, *scales, blocks, True)  # fmt: skip
    return calls


def drawn_stack(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Matrices (matrices, size, inner) of Frobenius norm 1, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator)
    return (x / torch.linalg.matrix_norm(x, keepdim=True)).to(dtype)


def times_of_products(shape: tuple[int, int, int], more: bool) -> tuple[list[dict], list[dict]]:
    """Times and errors of X Xᵀ and of a polynomial of a Gram matrix, in float16."""
    times, errors, x = list[dict](), list[dict](), drawn_stack(shape, torch.float16)
    gram = x @ x.mT
    for kind, given in (("X Xᵀ", x), ("bG + cG²", gram)):
        calls = product_versions(given, kind != "X Xᵀ", more)
        where = {"product": kind, "shape": list(shape)}
        for name, took in bench(calls, "cuda", 25, graph=True).items():
            times.append(where | {"name": name} | took._asdict())
            print(times[-1], flush=True)
        exact = given.double() @ given.double().mT
        known = exact if kind == "X Xᵀ" else 0.6 * exact - 1.5 * given.double()
        for name, call in calls.items():
            errors.append(where | {"name": name, "error": relative_error(call(), known)})
    return times, errors


# %%
#| export measure.gram
def times_of_newton_schulz() -> list[dict]:
    """Five polynomials of twelve matrices of 768 × 3,072 in each form: times, and errors against float64."""
    x, rows, calls = drawn_stack(SHAPES[0], torch.float32), list[dict](), dict[str, Callable]()
    known = polar_express(x.double(), dtype=torch.float64)
    forms = {"plain": (False, symmetric_matmul), "Gram, cuBLAS": (True, symmetric_reference)}
    for name, (gram, product) in (forms | {"Gram, triangle": (True, symmetric_matmul)}).items():
        for dtype in (torch.bfloat16, torch.float16):
            call = partial(polar_express, x, 5, dtype, gram)
            with products_by(product):
                error = relative_error(call(), known)
                calls[f"{name}, {dtype}"] = as_graph(call)
            rows.append({"name": name, "dtype": str(dtype).split(".")[1], "error": error})
    for row, took in zip(rows, bench(calls, "cuda", 25).values()):
        row |= took._asdict()
        print(row, flush=True)
    return rows


def times_of_update() -> list[dict]:
    """Muon's update of all matrices of record_200m on one GPU, compiled, with both ways to multiply symmetric matrices."""
    muon, rows = preset("record_200m").optim.muon, list[dict]()
    rate, momentum = (torch.tensor(number, device="cuda") for number in (0.02, 0.95))
    for bank, shape in BANKS.items():
        calls = dict[str, Callable]()
        for name, product in (("cuBLAS", symmetric_reference), ("triangle", symmetric_matmul)):
            p = drawn_stack(shape, torch.bfloat16)
            told = p, 1e-3 * p.float(), muon_state(p, muon), rate, 1.0, momentum, 0.1, muon
            with products_by(product):
                calls[name] = as_graph(partial(compiled_copy(muon_step), *told))
        for name, took in bench(calls, "cuda", 25, cold=True).items():
            rows.append({"bank": bank, "shape": list(shape), "name": name} | took._asdict())
            print(rows[-1], flush=True)
    return rows


def measure(name: str, arguments: list[str], command: str) -> tuple[dict, dict]:
    """kernels: times and errors of products, of Newton–Schulz, and of Muon's update."""
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs a GPU", "run it on an NVIDIA GPU")
    found: dict[str, list] = {"products": [], "errors": []}
    for number, shape in enumerate(SHAPES):
        times, errors = times_of_products(shape, number < 2)
        found["products"] += times
        found["errors"] += errors
    found["newton_schulz"], found["update"] = times_of_newton_schulz(), times_of_update()
    return found, stamp(command, ["speedrun.measure.gram"], 1, [0])
