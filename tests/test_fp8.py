"""Eight bits: rounding, clipping and both layouts against float64; what is no number; products; what is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.kernels import fp8
from speedrun.kernels.fp8 import (
    E4M3,
    E5M2,
    check_operands,
    fp8_matmul,
    has_fp8,
    launch_quantize,
    quantize,
    quantize_kernel,
    quantize_reference,
    scale_of,
)

DIGITS = {E4M3: 3, E5M2: 2}
KINDS = ("normal", "tiny", "huge", "zero", "one number", "many sizes", "specials")
HAVE = torch.cuda.is_available() and has_fp8(torch.device("cuda"))
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAVE, reason="no GPU with units for eight bits")]


def draw(kind: str, rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix of one kind, (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "tiny":
        x *= 1e-30 if dtype in (torch.float32, torch.float64, torch.bfloat16) else 1e-7
    if kind == "huge":
        x *= 1e36 if dtype in (torch.float32, torch.float64, torch.bfloat16) else 1e4
    if kind == "zero":
        x.zero_()
    if kind == "one number":
        x = x[:1, :1].expand(rows, columns).clone()
    if kind == "many sizes":
        x *= 2.0 ** torch.randint(-20, 3, x.shape, generator=generator)
    if kind == "specials":
        where = torch.randint(0, 20, x.shape, generator=generator)
        for n, value in enumerate((math.nan, math.inf, -math.inf, 0.0, -0.0)):
            x[where == n] = value
    return x.to(dtype)


def half_gap(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half of the gap between the two neighbours of a value within the format: the most that rounding may move it."""
    least = math.frexp(torch.finfo(dtype).smallest_normal)[1]
    exponent = torch.frexp(values)[1].clamp(min=least) - 1
    return torch.ldexp(torch.ones_like(values), exponent - DIGITS[dtype] - 1)


def check_rounded(q, x, scale, dtype, factor=None) -> None:
    """q is x * factor / scale, clipped and rounded to the nearest; NaN where that is NaN. A quotient in float32 may be off by two last digits."""
    largest = torch.finfo(dtype).max
    wanted = x.detach().cpu().double() if factor is None else x.cpu().double() * factor.cpu().double()[:, None]  # fmt: skip
    wanted = (wanted / scale.cpu().double()).clamp(-largest, largest)
    found = q.cpu().double()
    assert q.dtype == dtype and torch.equal(found.isnan(), wanted.isnan())
    there = ~wanted.isnan()
    slack = half_gap(wanted[there], dtype) + 4e-7 * wanted[there].abs()
    assert ((found - wanted)[there].abs() <= slack).all()
    assert (found[there].abs() <= largest).all()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in bits, but for which NaN it is."""
    return torch.equal(a.float().nan_to_num(-1e9), b.float().nan_to_num(-1e9))


class TestScale:
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    @given(st.sampled_from(KINDS[:-1]), st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_the_largest_becomes_the_formats_largest(self, dtype, kind, seed):
        x = draw(kind, 7, 9, seed, torch.float32)
        scale = scale_of(x, dtype)
        assert scale.shape == (1,) and scale.dtype == torch.float32 and scale.item() >= 1e-12 * 0.99
        largest = quantize_reference(x, scale, dtype).float().abs().max().item()
        if scale.item() > 1e-11:
            assert largest == torch.finfo(dtype).max
        else:
            assert largest < torch.finfo(dtype).max

    def test_what_is_no_number_shows(self):
        """NaN and infinities leave nothing that could be taken for a result."""
        for value in (math.nan, math.inf, -math.inf):
            x = torch.tensor([[1.0, value, 0.0]])
            q, _ = quantize(x, scale_of(x))
            assert q[0, 1].float().isnan()
            assert q[0, 0].float().isnan() or q[0, 0].float() == 0
        q, _ = quantize(torch.tensor([[math.inf, -math.inf]]), torch.ones(1))
        assert q.float().tolist() == [[448, -448]], "under a constant scale they are clipped"

    def test_any_shape_and_dtype(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert scale_of(torch.tensor([[[-896.0]]], dtype=dtype)).tolist() == [2.0]
        assert scale_of(torch.tensor(448.0)).shape == (1,)


class TestQuantize:
    @given(
        st.sampled_from(KINDS),
        st.integers(1, 130),
        st.integers(1, 130),
        st.integers(0, 999),
        st.sampled_from([E4M3, E5M2]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        st.sampled_from(["amax", "constant"]),
    )
    @settings(max_examples=60, deadline=None)
    def test_rounded_to_the_nearest_both_ways(self, kind, rows, columns, seed, dtype, of, choice):
        x = draw(kind, rows, columns, seed, of)
        scale = scale_of(x, dtype) if choice == "amax" else torch.full((1,), 0.01)
        if kind == "specials" and choice == "amax":
            scale = scale_of(x.nan_to_num(0, 1, -1), dtype)
        q, qt = launch_quantize(x, scale, dtype, turned=True)
        check_rounded(q, x, scale, dtype)
        assert q.shape == (rows, columns) and qt.shape == (columns, rows)
        assert q.is_contiguous() and qt.is_contiguous() and same(q.mT, qt)
        assert same(q, quantize_reference(x, scale, dtype))

    @given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 999), st.sampled_from(list(DIGITS)))  # fmt: skip
    @settings(max_examples=30, deadline=None)
    def test_a_factor_a_row(self, rows, columns, seed, dtype):
        x = draw("normal", rows, columns, seed, torch.float32)
        factor = draw("many sizes", 1, rows, seed + 1, torch.float32)[0]
        scale = scale_of(x, dtype)
        q, qt = launch_quantize(x, scale, dtype, factor, turned=True)
        check_rounded(q, x, scale, dtype, factor)
        assert same(q.mT, qt)

    @pytest.mark.parametrize("interpreted", [False, True])
    def test_what_is_asked_for_comes(self, interpreted, monkeypatch):
        call = launch_quantize if interpreted else quantize
        if not interpreted:  # a machine without Triton
            monkeypatch.setattr(fp8, "quantize_kernel", None)
        x, scale = draw("normal", 65, 66, 0, torch.float32), torch.ones(1)
        factor = torch.rand(65)
        for straight, turned, by in itertools.product((False, True), (False, True), (None, factor)):
            q, qt = call(x, scale, E5M2, by, straight, turned)
            assert (q is not None) == straight and (qt is not None) == turned
            if straight:
                check_rounded(q, x, scale, E5M2, by)
            if turned:
                check_rounded(qt.mT, x, scale, E5M2, by)
                assert qt.is_contiguous()

    @pytest.mark.parametrize("make", [lambda x: x.mT, lambda x: x[::2, 1::3], lambda x: x[:1].expand(9, -1), lambda x: x.flip(0)[3:]])  # fmt: skip
    def test_any_layout(self, make):
        x = make(draw("normal", 70, 90, 0, torch.float32))
        q, qt = launch_quantize(x, scale_of(x), turned=True)
        check_rounded(q, x, scale_of(x), E4M3)
        assert same(q.mT, qt) and q.is_contiguous()

    def test_no_rows(self):
        q, qt = launch_quantize(torch.empty(0, 16), torch.ones(1), turned=True)
        assert q.shape == (0, 16) and qt.shape == (16, 0)

    def test_float32_is_only_divided(self):
        """What kernels read where the interpreter runs them."""
        x, scale = draw("many sizes", 30, 70, 0, torch.float32), torch.full((1,), 0.3)
        q, qt = launch_quantize(x, scale, torch.float32, turned=True)
        assert torch.equal(q, x / 0.3) and torch.equal(qt, q.mT)

    def test_eight_bits_are_turned_without_loss(self):
        for dtype in (E4M3, E5M2):
            x = draw("many sizes", 70, 33, 0, torch.float32).to(dtype)
            _, qt = launch_quantize(x, torch.ones(1), dtype, straight=False, turned=True)
            assert same(qt, x.mT)

    def test_the_kernel_clips_as_told(self):
        if type(quantize_kernel).__name__ != "InterpretedFunction":
            pytest.skip("the kernel is compiled here")
        x = draw("specials", 70, 65, 0, torch.float32)
        q, qt = torch.empty_like(x), x.new_empty(65, 70)
        quantize_kernel[(2, 2)](x, torch.ones(1), None, q, qt, 70, 65, 0.5, ROWS=64, COLUMNS=64)
        assert torch.equal(q.nan_to_num(-9), x.clamp(-0.5, 0.5).nan_to_num(-9))
        assert torch.equal(q.nan_to_num(-9), qt.mT.nan_to_num(-9)) and q.isnan().any()


class TestProduct:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.integers(0, 999), st.sampled_from([(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)]), st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
    @settings(max_examples=40, deadline=None)
    def test_against_float64(self, m, n, k, seed, kinds, out):
        a, b = (draw("normal", rows, k, seed + rows, torch.float32) for rows in (m, n))
        scales = [scale_of(each, dtype) for each, dtype in zip((a, b), kinds)]
        (a8, _), (b8, _) = (quantize(each, s, dtype) for each, s, dtype in zip((a, b), scales, kinds))  # fmt: skip
        found = fp8_matmul(a8, b8, *scales, out)
        exact = (a8.double() * scales[0].double()) @ (b8.double() * scales[1].double()).mT
        assert found.dtype == out and found.shape == (m, n)
        digits = 24 if out == torch.float32 else 8
        most = 2.0**-digits * exact.abs() + k * 2.0**-23 * exact.abs().max()
        assert ((found.double() - exact).abs() <= most + 1e-30).all()

    @pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E4M3, E5M2)])
    @pytest.mark.parametrize("k", [64, 768, 4096])
    def test_the_error_of_random_operands_is_the_formats(self, kinds, k):
        """sqrt(e_a^2 + e_b^2) with e = 2^-digits / sqrt(28), at any length."""
        a, b = (draw("normal", 128, k, seed, torch.float64) for seed in (0, 1))
        scales = [scale_of(each, dtype) for each, dtype in zip((a, b), kinds)]
        a8, b8 = (quantize(each, s, dtype)[0] for each, s, dtype in zip((a, b), scales, kinds))
        exact = a @ b.mT
        off = (fp8_matmul(a8, b8, *scales, torch.float32).double() - exact).norm() / exact.norm()
        predicted = math.hypot(*(2.0 ** -DIGITS[dtype] / math.sqrt(28) for dtype in kinds))
        assert 0.9 < off / predicted < 1.25

    def test_float32_operands(self):
        a, b = draw("normal", 5, 7, 0, torch.float32), draw("normal", 3, 7, 1, torch.float32)
        found = fp8_matmul(a, b, torch.full((1,), 2.0), torch.full((1,), 3.0), torch.float32)
        assert torch.allclose(found, 6 * a @ b.mT, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("a, b", [((8, 24), (16, 24)), ((8, 32), (17, 32)), ((8, 32), (16, 48)), ((2, 8, 32), (16, 32))])  # fmt: skip
    def test_shapes_that_the_units_do_not_take_are_refused(self, a, b):
        with pytest.raises(ValueError, match="multiples of 16") as refused:
            check_operands(torch.zeros(a).to(E4M3), torch.zeros(b).to(E4M3))
        assert f"{a} in" in str(refused.value) and f"{b} in" in str(refused.value)

    def test_what_else_is_refused(self):
        a, b = torch.zeros(8, 32), torch.zeros(16, 32)
        check_operands(a.to(E4M3), b.to(E4M3))
        check_operands(a.to(E5M2), b.to(E4M3))
        for kinds in ((E5M2, E5M2), (torch.bfloat16, E4M3), (E4M3, torch.float32)):
            with pytest.raises(ValueError, match="at most one of them in e5m2"):
                check_operands(*(each.to(dtype) for each, dtype in zip((a, b), kinds)))
        with pytest.raises(ValueError, match="not row-major"):
            check_operands(a.to(E4M3), torch.zeros(32, 16).to(E4M3).mT)

    def test_a_cpu_has_no_units(self):
        assert not has_fp8(torch.device("cpu"))


class TestOnAGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_quantize(self, dtype, of, kind):
        for rows, columns in ((70, 100), (64, 64), (256, 768), (1, 300), (257, 1)):
            x = draw(kind, rows, columns, rows, of).cuda()
            factor = torch.rand(rows, device="cuda") + 0.5
            for scale in (scale_of(x.nan_to_num(0, 1, -1), dtype), torch.full((1,), 0.01, device="cuda")):  # fmt: skip
                for by in (None, factor):
                    q, qt = quantize(x, scale, dtype, by, turned=True)
                    check_rounded(q, x, scale, dtype, by)
                    assert same(q.mT, qt) and qt.is_contiguous()

    @pytest.mark.parametrize("dtype", [E4M3, E5M2])
    def test_eight_bits_are_turned_without_loss(self, dtype):
        for rows, columns in ((70, 33), (64, 128)):
            x = draw("many sizes", rows, columns, 0, torch.float32).cuda().to(dtype)
            _, qt = quantize(x, torch.ones(1, device="cuda"), dtype, straight=False, turned=True)
            assert same(qt, x.mT)

    @pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)])
    @pytest.mark.parametrize("m, n, k", [(1, 16, 16), (33, 48, 96), (256, 304, 768), (64, 64, 50_304)])  # fmt: skip
    def test_the_product_against_float64(self, kinds, m, n, k):
        a, b = (draw("normal", rows, k, rows, torch.float32).cuda() for rows in (m, n))
        scales = torch.cat([scale_of(each, dtype) for each, dtype in zip((a, b), kinds)])
        first, second = scales[:1], scales[1:]  # the second begins at 4 bytes
        a8, b8 = (quantize(each, s, dtype)[0] for each, s, dtype in zip((a, b), (first, second), kinds))  # fmt: skip
        exact = (a8.double() * first.double()) @ (b8.double() * second.double()).mT
        for out, most in ((torch.float32, 2e-3), (torch.bfloat16, 5e-3)):
            found = fp8_matmul(a8, b8, first, second, out)
            assert (found.double() - exact).norm() <= most * exact.norm() and found.dtype == out

    def test_accumulation_is_as_chapter_15_emulates_it(self):
        """Sums of up to 50,304 products that are all positive; many at once, so that none is cut into parts."""
        a = draw("normal", 2048, 50_304, 0, torch.float32).abs().cuda()
        scale = scale_of(a)
        a8, _ = quantize(a, scale)
        for k, fast in ((768, 0.0103), (3072, 0.052), (50_304, 0.452)):
            left = a8[:, :k].contiguous()
            parts = [left[:, n : n + 8192].double() for n in range(0, k, 8192)]
            exact = sum(part @ part.mT for part in parts) * scale.double() ** 2
            slow = fp8_matmul(left, left, scale, scale, torch.float32).double()
            found = torch._scaled_mm(left, left.mT, scale, scale, out_dtype=torch.float32, use_fast_accum=True).double()  # fmt: skip
            off, off_fast = ((each - exact).norm() / exact.norm() for each in (slow, found))
            assert off < 0.001
            if torch.cuda.get_device_capability() == (9, 0):
                assert 0.9 < off_fast / fast < 1.1

    def test_refusals(self):
        a = torch.zeros(16, 24, device="cuda").to(E4M3)
        with pytest.raises(ValueError, match="multiples of 16"):
            fp8_matmul(a, a, *torch.ones(2, 1, device="cuda"), torch.bfloat16)
