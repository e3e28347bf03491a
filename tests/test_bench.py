"""Timing functions in turn, rooflines, and a step's time by kind of kernel."""

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from speedrun.lab import bench
from speedrun.lab.bench import PEAKS, Peak, Product, Times, covered, kind_of, ledger, roofline_ms


class TestSamples:
    def test_a_round_calls_each_function_once_and_the_warm_up_does_not_count(self):
        order: list[str] = []
        works = {name: lambda name=name: order.append(name) for name in "abc"}
        taken = bench.sample_in_turn(works, rounds=4, warm_up=2)
        assert order == ["a", "b", "c"] * 6 and {len(ms) for ms in taken.values()} == {4}

    def test_the_cache_is_filled_outside_of_the_clock(self, monkeypatch):
        class Slow:
            def zero_(self):
                time.sleep(0.05)

        monkeypatch.setattr(bench.torch, "empty", lambda *size, **rest: Slow())
        assert min(bench.sample_in_turn({"a": lambda: None}, rounds=3, cold=True)["a"]) < 25

    def test_percentiles(self):
        assert bench.times_of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == Times(1.0, 2.5, 4.0, 6)
        assert bench.times_of([7.0]) == Times(7.0, 7.0, 7.0, 1)

    def test_an_error_in_a_function_is_not_swallowed(self):
        with pytest.raises(ZeroDivisionError):
            bench.bench({"a": lambda: 1 / 0})


class TestRoofline:
    def test_whichever_takes_longer(self):
        peak = Peak(100.0, 10.0)
        assert roofline_ms(200, 10, peak) == 2000 and roofline_ms(100, 30, peak) == 3000

    def test_a_product(self):
        product = Product(2, 3, 5, repeats=7, size=4)
        assert product.flops == 7 * 2 * 2 * 3 * 5
        assert product.bytes_moved == 7 * 4 * (2 * 3 + 3 * 5 + 2 * 5)
        with FlopCounterMode(display=False) as counter:
            torch.ones(2, 3) @ torch.ones(3, 5)
        assert counter.get_total_flops() * 7 == product.flops
        assert all(200 > 1000 * roofline_ms(1, 1e6, peak) > 0.2 for peak in PEAKS.values())


class TestLedger:
    @given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=12))
    def test_the_union_of_intervals(self, starts):
        spans = [(begin, begin + length) for begin, length in starts]
        assert covered(spans) == len({n for begin, end in spans for n in range(begin, end)})

    @pytest.mark.parametrize(
        ("kernel", "kind"),
        [
            ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication"),
            ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
            ("forward_kernel", "attention"),
            ("my_forward_kernel", "pointwise"),
            ("void at::native::vectorized_gather_kernel", "gathers and scatters"),
            ("multi_tensor_apply_kernel", "optimizer"),
            ("void softmax_warp_forward", "head"),
        ],
    )
    def test_kinds(self, kernel, kind):
        assert kind_of(kernel) == kind
        assert kind_of(kernel, {}, "all") == "all"

    def test_kernels_of_two_streams_are_no_longer_than_the_time_in_which_they_ran(self):
        def event(name: str, begin: float, end: float):
            span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
            return SimpleNamespace(name=name, time_range=span, device_type=torch.autograd.DeviceType.CUDA)  # fmt: skip

        events = [event("gemm", 0, 3000), event("gemm", 1000, 4000), event("nccl:sum", 0, 9000)]
        times, busy = bench.kernel_times(SimpleNamespace(events=lambda: events), "cuda")
        assert times == {"gemm": 6.0} and busy == 4.0

    def test_of_a_step_on_a_cpu(self):
        a = torch.randn(64, 64, requires_grad=True)
        calls: list[int] = []

        def step() -> None:
            calls.append(1)
            (a @ a).softmax(-1).sum().backward()
            time.sleep(0.02)

        book = ledger(step, repeats=4)
        assert len(calls) == 3 + 2 * 4, "warm, timed, profiled"
        assert book["matmul"] > 0 < book["head"] and book["gaps"] > 10 < 20 <= book["wall"]
