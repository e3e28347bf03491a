# Tangled from notebooks/31_symmetric_matmul.py: edit the notebook, then run "make tangle". Edits made here are lost.


from speedrun.kernels.gram import (
    KINDS,
    LARGE_SHARED,
    block_of_sum,
    launch_symmetric,
    symmetric_matmul_op,
    symmetric_reference,
    triangle_product,
)


# %% The measurement
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
