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
KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
LARGE_SHARED = Blocks(128, 128, 64, 4, 3, 2), Blocks(64, 64, 64, 4, 4, 3)  # many blocks, few
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
#| export
def symmetric_reference(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of matrices, (matrices, size, size)."""
    return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


# %%
#| export
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


# %%
#| export
def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """alpha · a b + beta · c for stacks of symmetric matrices, (matrices, size, size), of which a and b commute, so that the result is symmetric, too. In their dtype.

    Only blocks on and below the diagonal are computed, with sums in float32, and mirrored: what a, b and c have above is not looked at, so for others the result is wrong. Where
    `why_no_kernel` has a reason, all of the product is computed. No gradient. Raises ValueError for shapes and dtypes that differ.
    """
    square = a.dim() == 3 and a.shape[1] == a.shape[2] and a.shape == b.shape == c.shape
    if not square or not a.dtype == b.dtype == c.dtype:
        given = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in (a, b, c))
        raise ValueError(f"stacks of matrices (matrices, size, size) in one dtype, not {given}")
    if a.device.type == "cpu":  # the compiler may look into it
        return symmetric_reference(a, b, c, alpha, beta)
    return symmetric_matmul_op(a, b, c, alpha, beta)


def gram_matrix(x: Tensor) -> Tensor:
    """x xᵀ for a stack x, (matrices, size, inner): (matrices, size, size), in x's dtype; where `symmetric_matmul` computes one triangle, this does. No gradient."""
    return x @ x.mT if x.device.type == "cpu" else symmetric_matmul_op(x, x, None, 1.0, 0.0)


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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from speedrun.optim.muon import POLAR_EXPRESS, gram_newton_schulz, muon_state, muon_step
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
}  # record_200m's


def fused(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """`apply_odd_polynomials` for wide matrices, (matrices, rows, cols), with every sum inside a product."""
    for a, b, c in polynomials:
        gram = x @ x.mT
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, z, x, beta=a)
    return x


def all_of_it(on: bool) -> Any:
    """While it lasts and is on, Muon's symmetric products are computed whole, by cuBLAS."""
    instead: dict[str, Any] = {
        "symmetric_matmul": symmetric_reference,
        "gram_matrix": lambda x: x @ x.mT,
    }
    return mock.patch.multiple("speedrun.optim.muon", **instead) if on else nullcontext()


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


# %%
#| export measure.gram
def times_of_newton_schulz() -> list[dict]:
    """Five polynomials of twelve matrices of 768 × 3,072, already divided by their norms, in each form: times, and errors against float64."""
    x, rows, calls = drawn_stack(SHAPES[0], torch.float32), list[dict](), dict[str, Callable]()
    known = apply_odd_polynomials(x.double(), POLAR_EXPRESS)
    rounded = {dtype: x.to(dtype) for dtype in (torch.bfloat16, torch.float16)}  # graphs read them
    for name, form in (("plain", apply_odd_polynomials), ("fused", fused), ("Gram", gram_newton_schulz)):  # fmt: skip
        for dtype in rounded:
            call = partial(form, rounded[dtype], POLAR_EXPRESS)
            for way in ("cuBLAS", "triangle") if name == "Gram" else ("cuBLAS",):
                with all_of_it(way == "cuBLAS"):
                    error = relative_error(call(), known)
                    calls[f"{name}, {dtype}, {way}"] = as_graph(call)
                short = str(dtype).split(".")[1]
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
        told = p, 1e-3 * p.float(), muon_state(p, muon), rate, 1.0, momentum, 0.1, muon
        calls = dict[str, Callable]()
        for way in ("cuBLAS", "triangle"):
            with all_of_it(way == "cuBLAS"):
                calls[way] = as_graph(partial(compiled_copy(muon_step), *told))
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
