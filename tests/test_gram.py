"""The product of symmetric matrices by one triangle: every block once, the kernel against float64, who takes it, the compiler for each chip, Newton–Schulz by it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.kernels import gram as kernels
from speedrun.kernels.gram import (
    CONFIGS,
    LARGE_SHARED,
    SMALL_SHARED,
    blocks_of,
    launch_symmetric,
    lower_tile,
    symmetric_matmul,
    symmetric_matmul_op,
    symmetric_reference,
    triangle_product,
)
from speedrun.kernels.mlp import Blocks
from speedrun.lab.hardware import jit
from speedrun.optim.gram import gram_by_triangles
from speedrun.optim.muon import POLAR_EXPRESS, gram_newton_schulz, polar_express, whole_product
from speedrun.optim.newton_schulz import apply_odd_polynomials

tl = pytest.importorskip("triton.language")

NARROW = Blocks(16, 16, 16, 4, 1)
LIMITS = {
    80: 166_912,
    86: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # shared memory of a block, bytes


def drawn(matrices: int, size: int, inner: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """A stack, float64, each of Frobenius norm 1, and of a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(matrices, size, inner, generator=generator, dtype=torch.float64)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    return (x * 2.0 ** torch.arange(matrices)[:, None, None]).to(device)


def commuting(matrices: int, size: int, seed: int = 0, device: str = "cpu"):
    """Three different symmetric matrices for each of a stack, polynomials of one, so that all of them commute; float64."""
    x = drawn(matrices, size, size + 3, seed, device)
    gram = x @ x.mT
    return gram, gram @ gram - 0.5 * gram, 0.3 * gram @ gram @ gram - gram


@jit
def places_kernel(ROWS, COLUMNS):
    tile = tl.program_id(0)
    row, column = lower_tile(tile)
    tl.store(ROWS + tile, row)
    tl.store(COLUMNS + tile, column)


class TestTheTriangle:
    def test_every_block_once(self):
        count = 40 * 41 // 2
        rows, columns = (torch.full((count,), -1, dtype=torch.int32) for _ in range(2))
        places_kernel[(count,)](rows, columns)
        found = list(zip(rows.tolist(), columns.tolist(), strict=True))
        assert found == [(row, column) for row in range(40) for column in range(row + 1)]

    @settings(max_examples=25)
    @given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 70), st.booleans(), st.integers(0, 99))  # fmt: skip
    def test_of_any_shape(self, matrices, size, inner, with_c, seed):
        """Stacks that are no multiples of a block: each matrix gets its own numbers, none of its neighbour's. float32: K roundings of 2^-24, relative to a sum of magnitudes of at most the norms' product."""
        x = drawn(matrices, size, inner, seed)
        c = drawn(matrices, size, size, seed + 1) if with_c else None
        c = c if c is None else c + c.mT
        told = (None if c is None else c.float()), 0.7, -1.3 if with_c else 0.0
        found = launch_symmetric(x.float(), x.float(), *told, NARROW, False)
        known = 0.7 * x @ x.mT + (0 if c is None else -1.3 * c)
        allowed = (inner + 4) * 2.0**-24 * (torch.linalg.matrix_norm(x, keepdim=True) ** 2 + (0 if c is None else 2 * c.abs()))  # fmt: skip
        assert ((found.double() - known).abs() <= allowed).all()
        assert found.shape == (matrices, size, size)

    def test_what_is_above_the_diagonal_is_a_copy(self):
        """Bit by bit, though the product is not symmetric; whatever C has there is not looked at."""
        x, y, c = drawn(2, 48, 20).float(), drawn(2, 48, 20, 2).float(), drawn(2, 48, 48, 1).float()
        low = torch.ones(48, 48).tril().bool()
        c[:, :16, 16:] = float("nan")
        found = launch_symmetric(x, y, c, 1.0, 1.0, NARROW, False)
        assert torch.equal(found, found.mT)
        assert torch.allclose(found[:, low], (x @ y.mT + c)[:, low], atol=1e-5)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    def test_a_number_that_is_none_stays_in_its_matrix(self, wrong):
        x = drawn(3, 20, 20).float()
        x[1, 5, 7] = wrong
        found = launch_symmetric(x, x, None, 1.0, 0.0, NARROW, False)
        assert torch.isfinite(found[0]).all() and torch.isfinite(found[2]).all()
        assert not torch.isfinite(found[1, 5]).any() and not torch.isfinite(found[1, :, 5]).any()


class TestTheFunction:
    def test_is_baddbmm_where_there_is_no_gpu(self):
        a, b, c = (each.float() for each in commuting(2, 30))
        known = torch.baddbmm(c, a, b, beta=0.4, alpha=-2.0)
        assert torch.equal(symmetric_matmul(a, b, c, -2.0, 0.4), known)
        assert torch.allclose(symmetric_matmul_op(a, b, c, -2.0, 0.4), known, rtol=1e-4, atol=1e-6)
        x = drawn(2, 30, 41).float()
        assert torch.equal(triangle_product(x, x.mT), x @ x.mT)
        assert torch.equal(triangle_product(a, b, c, -2.0, 0.4), known)
        assert torch.equal(symmetric_matmul_op(x, x, None, 1.0, 0.0), x @ x.mT)

    def test_by_the_kernel_it_is_the_same(self):
        """Of three matrices, in order: a times b plus c, and not b times c."""
        a, b, c = commuting(2, 40)
        found = launch_symmetric(a.float(), b.float(), c.float(), -2.0, 0.4, NARROW, False)
        known = symmetric_reference(a, b, c, -2.0, 0.4)
        assert torch.allclose(found.double(), known, rtol=0, atol=1e-5 * known.abs().max().item())
        other = symmetric_reference(b, c, a, -2.0, 0.4)
        assert (other - known).norm() > 0.1 * known.norm()

    @pytest.mark.parametrize(
        "shapes", [((2, 4, 5),) * 3, ((4, 4),) * 3, ((2, 4, 4), (2, 4, 4), (1, 4, 4)), ((2, 4, 4), (2, 5, 5), (2, 4, 4))]
    )  # fmt: skip
    def test_other_shapes_are_refused(self, shapes):
        with pytest.raises(ValueError, match=r"stacks of matrices \(matrices, size, size\)"):
            symmetric_matmul(*(torch.zeros(shape) for shape in shapes))

    def test_two_dtypes_are_refused(self):
        a = torch.zeros(1, 4, 4)
        with pytest.raises(ValueError, match="one dtype"):
            symmetric_matmul(a, a.half(), a)

    def test_the_operator_is_one(self):
        """Its fake tells the truth about shapes, dtypes and strides; it does not write into its arguments."""
        a, b, c = (each.float() for each in commuting(2, 12))
        torch.library.opcheck(symmetric_matmul_op, (a, b, c, 0.5, 2.0))
        torch.library.opcheck(symmetric_matmul_op, (a.mT, b, c.mT, 0.5, 2.0))
        torch.library.opcheck(symmetric_matmul_op, (drawn(2, 5, 9).float(), drawn(2, 5, 9).float(), None, 0.5, 2.0))  # fmt: skip

    @pytest.mark.parametrize(("chip", "count"), [((9, 0), 132), ((10, 0), 148), ((12, 1), 48)])
    def test_small_blocks_where_large_ones_leave_multiprocessors_idle(
        self, chip, count, monkeypatch
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=count))  # fmt: skip
        for matrices, size in [(12, 768), (2, 768), (1, 2048), (8, 256), (1, 16), (3, 100)]:
            blocks = blocks_of(torch.zeros(matrices, size, 1))
            across = -(-size // 128)
            enough = matrices * across * (across + 1) / 2 >= count
            assert blocks.rows == (128 if enough else 64)

    def test_who_computes_the_whole_product(self, monkeypatch):
        assert "no NVIDIA GPU" in kernels.why_no_kernel(torch.zeros(1, 4, 4))

        monkeypatch.setattr(kernels, "find_triton", lambda: "3.6")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

        def reason(*shape, dtype=torch.float16):
            there = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape, numel=lambda: math.prod(shape))  # fmt: skip
            return kernels.why_no_kernel(there)

        assert not reason(2, 256, 256) and not reason(1, 128, 64, dtype=torch.bfloat16)
        assert "torch.float32" in reason(2, 256, 256, dtype=torch.float32)
        for shape in [
            (2, 192, 256),
            (2, 256, 96),
            (2, 7, 7),
            (0, 128, 128),
            (2, 0, 128),
            (2, 128, 0),
        ]:
            assert "no multiples" in reason(*shape)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        assert "no tensor memory accelerator" in reason(2, 256, 256)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(kernels, "find_triton", lambda: None)
        assert "Triton is not installed" in reason(2, 256, 256)


@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24), (2, 32, 32)])
def test_newton_schulz_by_the_kernel(shape):
    """Five polynomials on the Gram matrix, with every product of symmetric matrices by one triangle, against float64."""
    calls = []

    def by_kernel(a, b, c=None, alpha=1.0, beta=0.0):
        calls.append(a.shape)
        return launch_symmetric(a, a if c is None else b, c, alpha, beta, NARROW, False)

    x = drawn(*shape)
    known = polar_express(x, dtype=torch.float64)
    found = polar_express(x.float(), dtype=torch.float32, gram=True, product=by_kernel)
    assert len(calls) == {24: 16, 96: 14, 32: 10}[shape[1]], (
        "a tall matrix's first product is not its own"
    )
    assert (found.double() - known).norm() / known.norm() < 1e-3
    assert gram_newton_schulz(x.float(), [(1.0, 0.0, 0.0)], 3, by_kernel).equal(x.float())


def mirrored(a, b, c=None, alpha=1.0, beta=0.0):
    """A whole product, rounded to its dtype, and of that the lower half on both sides."""
    product = whole_product(a, b, c, alpha, beta)
    return product.tril() + product.tril(-1).mT


def loud(top: float, share: float, seed: int, size: int = 256, device: str = "cpu") -> torch.Tensor:
    """(1, size, 4 · size) float32 of norm 1 / 1.02, with one singular value far above the others, whose left vector is to a good part in one row."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, size, generator=draw) for n in (4 * size, size))
    v[:, 0] *= (1 - share**2) ** 0.5
    v[seed * 37 % size, 0] += share * size**0.5
    values = 1 / torch.arange(1, size + 1)
    values[0] = 0
    values *= (1 - top**2) ** 0.5 / values.norm()
    values[0] = top
    u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    return (v * values @ u.T)[None].to(device) / 1.02


def off(found: torch.Tensor, x: torch.Tensor) -> float:
    """The largest error of a stack's matrices, relative to their norms; not finite is infinite."""
    known = apply_odd_polynomials(x.double(), POLAR_EXPRESS)
    errors = torch.linalg.matrix_norm(found.double() - known) / torch.linalg.matrix_norm(known)
    return errors.nan_to_num(float("inf")).max().item()


class TestGramByTriangles:
    @pytest.mark.parametrize("restart", [1, 2, 3, 5])
    @pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24), (1, 17, 17), (3, 1, 5)])
    def test_is_the_plain_iteration(self, shape, restart):
        """In float64, whatever the order of factors."""
        x = drawn(*shape)
        x = x / torch.linalg.matrix_norm(x, keepdim=True)
        found = gram_by_triangles(x, POLAR_EXPRESS, restart)
        known = apply_odd_polynomials(x, POLAR_EXPRESS)
        assert found.shape == x.shape and found.dtype == x.dtype
        assert (found - known).norm() < 1e-8 * known.norm()

    @pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24), (2, 32, 32)])
    def test_by_the_kernel(self, shape):
        """Thirteen products by one triangle, a tall matrix's first one as well, and three whole ones."""
        calls = []

        def by_kernel(a, b, c=None, alpha=1.0, beta=0.0):
            calls.append(a.shape)
            return launch_symmetric(a, a if c is None else b, c, alpha, beta, NARROW, False)

        x = drawn(*shape)
        x = (x / torch.linalg.matrix_norm(x, keepdim=True)).float()
        found = gram_by_triangles(x, POLAR_EXPRESS, 3, by_kernel)
        assert len(calls) == 13 and off(found, x) < 1e-3
        assert gram_by_triangles(x, [(1.0, 0.0, 0.0)], 3, by_kernel).equal(x)
        assert gram_by_triangles(x, [], 3, by_kernel).equal(x)

    @settings(max_examples=20)
    @given(st.integers(1, 40), st.integers(0, 99))
    def test_from_both_sides_is_symmetric_though_nothing_commutes(self, size, seed):
        """(P G) P by one triangle, for symmetric P and G: two sums of `size` products, relative to the norms."""
        p, g = (x + x.mT for x in (drawn(1, size, size, seed), drawn(1, size, size, seed + 1)))
        known, bound = p @ g @ p, p.norm() ** 2 * g.norm()
        half = (p @ g).float()
        found = launch_symmetric(half, p.float(), None, 1.0, 0.0, NARROW, False)
        assert (found.double() - known).abs().max() <= 2 * (size + 4) * 2.0**-24 * bound

    def test_one_loud_direction_does_not_break_it(self):
        """It breaks the other order, P (P G), by more than the whole result; restarted after two polynomials that is right again."""
        x = torch.cat([loud(top, 0.6, seed, 96) for top in (0.8, 0.85, 0.9) for seed in range(4)])
        half = x.half()
        whole = off(gram_newton_schulz(half, POLAR_EXPRESS), x)
        assert off(gram_newton_schulz(half, POLAR_EXPRESS, 3, mirrored), x) > 1
        assert off(gram_by_triangles(half, POLAR_EXPRESS, 3, mirrored), x) < 1.5 * whole < 0.04
        assert off(gram_newton_schulz(half, POLAR_EXPRESS, 2, mirrored), x) < whole


AHEAD = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from speedrun.kernels import gram
chip, kind, few = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
blocks = gram.CONFIGS[chip][few]
short = {"bfloat16": "bf16", "float16": "fp16"}[kind]
def matrix(columns):
    return f"tensordesc<{short}[{blocks.rows},{columns}]>"
depths = dict(A=blocks.depth, B=blocks.depth, C=blocks.rows, OUT=blocks.rows)
numbers = dict(size="i32", inner="i32", alpha="fp32", beta="fp32", tiles="i32")
signature = {name: matrix(depth) for name, depth in depths.items()} | numbers
constants = dict(KIND=getattr(triton.language, kind), ROWS=blocks.rows, DEPTH=blocks.depth, BULK=True)
names = list(gram.symmetric_kernel.arg_names)
full = {name: signature.get(name, "constexpr") for name in names}
attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in ("size", "inner")}
source = ASTSource(gram.symmetric_kernel, full, {(names.index(k),): v for k, v in constants.items()}, attributes)
made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(num_warps=blocks.warps, num_stages=blocks.stages))
print(json.dumps({"shared": made.metadata.shared, "size": len(made.asm["cubin"])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("chip", sorted(CONFIGS))
def test_every_configuration_compiles_for_its_chip(chip, kind, few, compiled_ahead):
    """Without a GPU, with the divisibility that a launch has; the shared memory is at most the chip's."""
    found = compiled_ahead(AHEAD, chip, kind, few)
    assert 0 < found["shared"] * CONFIGS[chip][few].programs <= LIMITS[chip] and found["size"] > 0


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("size", [768, 256, 1000, 72, 7])
    def test_every_configuration_against_float64(self, size, dtype):
        """By descriptors and by pointers. An entry: operands are exact, a sum of `size` in float32, one rounding to dtype of what may have cancelled."""
        a, b, c = (each.to("cuda", dtype) for each in commuting(3, size))
        known = 0.6 * a.double() @ b.double() - 1.5 * c.double()
        whole = 0.6 * a.double().norm(dim=2)[:, :, None] * b.double().norm(dim=1)[:, None, :] + 1.5 * c.double().abs()  # fmt: skip
        allowed = size * 2.0**-24 * whole + torch.finfo(dtype).eps * known.abs() + torch.finfo(dtype).smallest_normal  # fmt: skip
        whole = symmetric_matmul(a, b, c, 0.6, -1.5)  # by cuBLAS, if the size is no whole block
        ways = [] if size % 128 else [whole]
        for blocks in {*LARGE_SHARED, *SMALL_SHARED}:
            for bulk in (False, True) if size % blocks.rows == 0 else (False,):
                ways.append(launch_symmetric(a, b, c, 0.6, -1.5, blocks, bulk))
        lower = torch.ones(size, size, device="cuda").tril().bool()
        assert ((whole.double() - known).abs() <= allowed)[:, lower].all()
        for found in ways:
            assert ((found.double() - known).abs() <= allowed)[:, lower].all()
            assert torch.equal(found, found.mT), "rounded, a and b hardly commute"

    def test_under_the_compiler_and_in_a_graph(self):
        a, b, c = (each.to("cuda", torch.float16) for each in commuting(4, 256))
        known = symmetric_matmul(a, b, c, 0.6, -1.5)
        compiled = torch.compile(lambda a, b, c: symmetric_matmul(a, b, c, 0.6, -1.5) + 0, fullgraph=True)  # fmt: skip
        assert torch.equal(compiled(a, b, c), known)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = symmetric_matmul(a, b, c, 0.6, -1.5)
        found.zero_()
        graph.replay()
        assert torch.equal(found, known)

    def test_newton_schulz(self):
        x = drawn(2, 768, 3072, device="cuda").float()
        known = polar_express(x.double(), dtype=torch.float64)
        found = polar_express(x, dtype=torch.float16, gram=True, product=triangle_product)
        assert (found.double() - known).norm() / known.norm() < 0.01

    def test_one_loud_direction(self):
        """By the kernel, of a real bank's size, in float16 and bfloat16."""
        x = torch.cat([loud(0.85, share, 1, 768, "cuda") for share in (0.5, 0.6, 0.7)])
        whole = off(gram_newton_schulz(x.half(), POLAR_EXPRESS), x)
        assert off(gram_by_triangles(x.half(), POLAR_EXPRESS), x) < 2 * whole < 0.04
        tall = x.mT.half().contiguous()
        assert off(gram_by_triangles(tall, POLAR_EXPRESS).mT, x) < 2 * whole
