"""The MLP in eight bits: bounds, the kernel against the reference and float64, the operator, what takes it and what does not, the compiler for each chip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speedrun.config import Config, check_config, vary
from speedrun.kernels import mlp as kernels
from speedrun.kernels.fp8 import E4M3, E5M2, quantize, scale_of
from speedrun.kernels.mlp import (
    CONFIGS,
    Blocks,
    hidden_reference,
    launch_hidden,
    mlp_backward_op,
    mlp_op,
    mlp_scales,
)
from speedrun.lab.errors import UserError
from speedrun.model.gpt import GPT, GPTConfig
from speedrun.presets import as_arguments, preset, read_command
from speedrun.train import TrainCommand, prepare_attention

NARROW = Blocks(32, 32, 16, 4, 2)
LIMITS = {89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # shared memory of a block, bytes


def drawn(tokens: int, width: int, hidden: int, std: float = 0.3, seed: int = 0):
    """x of unit mean square, up, down, and the output's gradient, whose rows have many sizes; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = F.rms_norm(draw(tokens, width), (width,))
    sizes = 2.0 ** torch.randint(-12, 1, (tokens, 1), generator=generator)
    return x, std * draw(hidden, width), std * draw(width, hidden), 1e-5 * sizes * draw(tokens, width)  # fmt: skip


def exact(x, up, down, grad):
    leaves = [each.clone().requires_grad_() for each in (x, up, down)]
    y = F.linear(F.relu(F.linear(leaves[0], leaves[1])).square(), leaves[2])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def by_operator(x, up, down, grad):
    leaves = [each.float().requires_grad_() for each in (x, up, down)]
    y = mlp_op(*leaves, mlp_scales(leaves[1][None], leaves[2][None])[0])[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.float())]


def off(found, known) -> float:
    return (torch.linalg.norm(found.double() - known) / torch.linalg.norm(known)).item()


def eight_bits(x, up, down, grad):
    """Operands and scales of both launches, as the operator makes them: (a, w, scales, kind, square)."""
    scales = [scale[:1] for scale in mlp_scales(up[None].float(), down[None].float())[0]]
    forward = quantize(x, scales[0])[0], quantize(up, scales[1])[0]
    square, _ = hidden_reference(*forward, (scales[0], scales[1], None, scales[3]), E4M3)
    of_grad = scale_of(grad, E5M2)
    told = quantize(grad, of_grad, E5M2)[0], quantize(down, scales[2], turned=True)[1]
    of_backward = of_grad, scales[2], scales[3], scales[4] * of_grad
    return [
        (*forward, (scales[0], scales[1], None, scales[3]), E4M3, None),
        (*told, of_backward, E5M2, square),
    ]


class TestBounds:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.sampled_from([1e-4, 0.3, 20.0]), st.integers(0, 99))  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_nothing_exceeds_them(self, tokens, width, hidden, std, seed):
        x, up, down, grad = drawn(tokens, width, hidden, std, seed)
        of_x, of_up, of_down, of_square, of_hidden = mlp_scales(up[None], down[None])[0, :, 0]
        h, slack = x @ up.mT, 1 + 1e-6
        assert x.abs().max() <= 448 * of_x * slack
        assert up.abs().max() <= 448 * of_up * slack and down.abs().max() <= 448 * of_down * slack
        assert h.relu().square().max() <= 448 * of_square * slack + 1e-9
        g = (grad @ down) * 2 * h.relu()
        assert g.abs().max() <= of_hidden * grad.abs().max() * slack + 1e-15

    def test_a_scale_begins_at_16_bytes_and_is_never_zero(self):
        scales = mlp_scales(torch.ones(3, 8, 4), torch.zeros(3, 4, 8))
        assert scales.shape == (3, 5, 4) and scales.is_contiguous() and (scales > 0).all()
        assert all(scale[:1].storage_offset() % 4 == 0 for layer in scales for scale in layer)

    def test_it_is_no_part_of_the_graph(self):
        up = torch.randn(1, 8, 4, requires_grad=True)
        assert not mlp_scales(up, torch.randn(1, 4, 8, requires_grad=True)).requires_grad


class TestKernel:
    @given(
        st.integers(1, 70), st.integers(1, 40), st.integers(1, 90),
        st.sampled_from([0.0, 0.02, 0.5, 5.0]), st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=12, deadline=None)
    def test_it_is_the_reference(self, tokens, width, hidden, std, seed):
        """The interpreter adds up in another order, so that a number may be rounded to its neighbour: a few in a thousand, by one place."""
        for told in eight_bits(*drawn(tokens, width, hidden, std, seed)):
            a, w, scales, kind, square = told
            found = launch_hidden(a, w, scales, kind, square, True, NARROW, False)
            known = hidden_reference(a, w, scales, kind, square)
            for one, other in zip(found, known):
                assert one.dtype == kind and one.shape == other.shape
                one, other = one.float(), other.float()
                places = 2.0 ** -(3 if kind == E4M3 else 2)
                assert ((one - other).abs() <= places * other.abs() + 2e-3).all()
                assert (one != other).float().mean() <= 0.01 + 2 / one.numel()
            assert torch.equal(found[0].float().T, found[1].float())

    def test_one_layout_alone(self):
        a, w, scales, kind, square = eight_bits(*drawn(40, 32, 48))[0]
        both = launch_hidden(a, w, scales, kind, square, True, NARROW, False)
        alone, nothing = launch_hidden(a, w, scales, kind, square, False, NARROW, False)
        assert nothing is None and torch.equal(alone.float(), both[0].float())

    @pytest.mark.parametrize("way", [0, 1])
    def test_what_is_no_number_stays_so(self, way):
        """In the matrix units' result: neither relu nor clipping may hide it."""
        a, w, scales, kind, square = eight_bits(*drawn(40, 32, 48))[way]
        a = a.clone()
        a[7, 3] = math.nan
        out, _ = launch_hidden(a, w, scales, kind, square, True, NARROW, False)
        there = out.float().isnan()
        assert there[7].all() and not there[:7].any() and not there[8:].any()

    def test_what_is_too_large_is_clipped(self):
        a, w, scales, kind, _ = eight_bits(*drawn(40, 32, 48))[0]
        small = (*scales[:3], scales[3] / 1e6)
        for out in (launch_hidden(a, w, small, kind, None, True, NARROW, False)[0], hidden_reference(a, w, small, kind)[0]):  # fmt: skip
            assert out.float().max() == 448 and out.float().isfinite().all()


class TestOperator:
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.02, 0.3, 3.0]), st.integers(0, 99))  # fmt: skip
    @settings(max_examples=20, deadline=None)
    def test_against_float64(self, tokens, width, hidden, std, seed):
        """Roundings to three and two places are worth 2.4 and 4.7%; the longest chain has x, up, the square (twice them), grad, down and itself."""
        given = drawn(64 * tokens, 32 * width, 32 * hidden, std, seed)
        for found, known in zip(by_operator(*given), exact(*given)):
            assert found.isfinite().all() and off(found, known) < 0.14

    def test_at_step_0_what_is_zero_stays_zero(self):
        x, up, down, grad = drawn(64, 32, 64)
        y, dx, dup, ddown = by_operator(x, up, torch.zeros_like(down), grad)
        assert not y.any() and not dx.any() and not dup.any()
        assert off(ddown, exact(x, up, torch.zeros_like(down), grad)[3]) < 0.1

    @pytest.mark.parametrize("where", ["x", "up", "down", "grad"])
    def test_what_is_no_number_is_seen(self, where):
        given = dict(zip(("x", "up", "down", "grad"), drawn(48, 32, 64)))
        given[where][0, 0] = math.nan
        assert any(each.isnan().any() for each in by_operator(*given.values()))

    def test_it_is_an_operator(self):
        x, up, down, grad = (each.float() for each in drawn(48, 32, 64))
        scales = mlp_scales(up[None], down[None])[0]
        leaves = [each.requires_grad_() for each in (x, up, down)]
        checks = ("test_faketensor", "test_autograd_registration")  # no arithmetic on eight bits
        torch.library.opcheck(mlp_op, (*leaves, scales), test_utils=checks)
        _, *saved = mlp_op(x.detach(), up.detach(), down.detach(), scales)
        told = grad, scale_of(grad, E5M2), saved, scales
        torch.library.opcheck(mlp_backward_op, told, test_utils=checks[:1])

    def test_gradients_come_in_the_leaves_dtypes(self):
        x, up, down, grad = drawn(48, 32, 64)
        leaves = x.bfloat16().requires_grad_(), up.float().requires_grad_(), down.float().requires_grad_()  # fmt: skip
        y = mlp_op(*leaves, mlp_scales(leaves[1][None], leaves[2][None])[0])[0]
        y.backward(grad.bfloat16())
        assert y.dtype == torch.bfloat16 and [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]  # fmt: skip

    @pytest.mark.parametrize(
        "spoil",
        [lambda x, u, d: (x[0], u, d), lambda x, u, d: (x, u, d[:, 1:]), lambda x, u, d: (x[:, 1:], u, d)],
    )  # fmt: skip
    def test_what_it_cannot_take_is_refused(self, spoil):
        with pytest.raises(ValueError, match=r"x \(tokens, width\)"):
            mlp_op(*(each.float() for each in spoil(*drawn(32, 16, 32)[:3])), torch.ones(5, 4))

    @pytest.mark.parametrize("sizes", [(40, 32, 64), (48, 24, 64), (48, 32, 72)])
    def test_on_a_gpu_sizes_are_multiples_of_16(self, sizes):
        tokens, width, hidden = sizes
        told = [torch.empty(shape, device="meta") for shape in ((tokens, width), (hidden, width), (width, hidden))]  # fmt: skip
        kernels.check_mlp(*told)  # elsewhere any size

        class OnGPU(torch.Tensor):
            device = torch.device("cuda")

        with pytest.raises(ValueError, match="multiples of 16"):
            kernels.check_mlp(told[0].as_subclass(OnGPU), *told[1:])

    def test_why_there_is_no_kernel(self, monkeypatch):
        assert "no NVIDIA GPU" in kernels.why_no_kernel(torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        assert "FP8" in kernels.why_no_kernel(torch.device("cuda"))


MADE_FOR = {"model.block.norm": "rms", "model.block.biases": False, "model.block.activation": "relu2", "model.block.fp8": True}  # fmt: skip


class TestModel:
    def models(self):
        """The same small model, in float32 and with its MLP in eight bits, and a row of tokens with their targets."""
        run = vary(preset("cpu_gpt2"), MADE_FOR | {"model.model_dim": 64, "model.num_layers": 3})
        eight = GPT(run.model, 97)
        plain = GPT(vary(run, {"model.block.fp8": False}).model, 97)
        tokens = torch.randint(97, (4, 33), generator=torch.Generator().manual_seed(0))
        return plain, eight, tokens[:, :-1], tokens[:, 1:]

    def test_it_trains_almost_as_without(self):
        plain, eight, inputs, targets = self.models()
        losses = [model(inputs, targets) for model in (plain, eight)]
        for loss in losses:
            loss.backward()
        assert losses[0] != losses[1] and abs(losses[0] - losses[1]).item() < 0.01
        for name, p in plain.named_parameters():
            error = off(eight.get_parameter(name).grad, p.grad.double())
            assert error < 0.15 and (error > 1e-3 or "mlp" not in name), name

    def test_validation_does_without(self):
        plain, eight, inputs, targets = self.models()
        with torch.no_grad():
            assert torch.equal(plain(inputs, targets), eight(inputs, targets))

    def test_a_gpu_without_units_does_without(self, monkeypatch):
        _, eight, *_ = self.models()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        config = Config(model=eight.config)
        prepare_attention(config, eight, torch.device("cpu"))
        assert eight.fp8, "a CPU rounds as a GPU would"
        monkeypatch.setattr("speedrun.train.attention_settings", lambda *told: [])
        prepare_attention(config, eight, torch.device("cuda"))
        assert not eight.fp8

    @pytest.mark.parametrize("change", [{"model.block.norm": "layer"}, {"model.block.biases": True}, {"model.block.activation": "gelu"}])  # fmt: skip
    def test_what_the_bound_does_not_hold_for_is_refused(self, change):
        wrong = vary(preset("cpu_gpt2"), MADE_FOR | change)
        with pytest.raises(UserError, match=r"model\.block\.fp8 with norm=") as caught:
            check_config(wrong)
        for advice in caught.value.fix.split("; or "):
            flags = [*as_arguments(wrong), *advice.split()]
            check_config(read_command(TrainCommand, flags, "cpu", "x").config)

    def test_record_has_it_and_its_copies_for_small_machines_do_not(self):
        assert preset("record").model.block.fp8 and preset("record_200m").model.block.fp8
        assert not preset("cpu").model.block.fp8 and not preset("small").model.block.fp8
        assert not GPTConfig().block.fp8


AHEAD = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from speedrun.kernels import mlp
chip, backward = int(sys.argv[1]), sys.argv[2] == "1"
blocks, half = mlp.CONFIGS[chip][backward], mlp.CONFIGS[chip][backward].columns // 2
bulk, out = chip >= 90, "fp8e5" if backward else "fp8e4nv"
def matrix(kind, rows, columns):
    return f"tensordesc<{kind}[{rows},{columns}]>" if bulk else f"*{kind}"
signature = {
    "A": matrix("fp8e5" if backward else "fp8e4nv", blocks.rows, blocks.depth), "W": matrix("fp8e4nv", blocks.columns, blocks.depth),
    "P": matrix("fp8e4nv", blocks.rows, half), "OUT": matrix(out, blocks.rows, half), "TURNED": matrix(out, half, blocks.rows),
    "SCALE_A": "*fp32", "SCALE_W": "*fp32", "SCALE_P": "*fp32", "SCALE_OUT": "*fp32", "tokens": "i32", "hidden": "i32", "largest": "fp32",
}
constants = dict(WIDTH=768, KIND=triton.language.float8e5 if backward else triton.language.float8e4nv, ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, PROGRAMS=264, BULK=bulk)
if not backward:
    constants |= {"P": None, "SCALE_P": None}
if not bulk:
    constants["TURNED"] = None
signature = {name: kind for name, kind in signature.items() if name not in constants}
names = list(mlp.hidden_kernel.arg_names)
full = {name: signature.get(name, "constexpr") for name in names}
attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name != "largest" and not (bulk and name in ("A", "W", "P", "OUT", "TURNED"))}
source = ASTSource(mlp.hidden_kernel, full, {(names.index(k),): v for k, v in constants.items()}, attributes)
made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(num_warps=blocks.warps, num_stages=blocks.stages))
print(json.dumps({"shared": made.metadata.shared, "size": len(made.asm["cubin"])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("chip", sorted(CONFIGS))
def test_every_configuration_compiles_for_its_chip(chip, backward, compiled_ahead):
    """Without a GPU, with the divisibility that a launch has; the shared memory of all programs at a time is at most the chip's."""
    found = compiled_ahead(AHEAD, chip, backward)
    programs = CONFIGS[chip][backward].programs
    assert 0 < found["shared"] * programs <= LIMITS[chip] and found["size"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2048, 2032, 16])
@pytest.mark.parametrize("std", [0.0, 0.03, 0.3])
def test_on_a_gpu(tokens, std):
    """Both passes against float64, and the kernel against the reference, by descriptor and by pointer."""
    x, up, down, grad = (each.cuda() for each in drawn(tokens, 768, 3072, std))
    for found, known in zip(by_operator(x, up, down, grad), exact(x, up, down, grad)):
        assert found.isfinite().all() and (not known.any() or off(found, known) < 0.12)
    bulk = torch.cuda.get_device_capability() >= (9, 0)
    blocks = kernels.blocks_for(x.device, CONFIGS)
    for way, (a, w, scales, kind, square) in enumerate(eight_bits(x, up, down, grad)):
        known = hidden_reference(a, w, scales, kind, square)
        forms = [(kernels.SMALL_SHARED[way], False)] + [(blocks[way], True)] * bulk
        for form in forms:
            found = launch_hidden(a, w, scales, kind, square, True, *form)
            for one, other in zip(found, known):
                assert (one.float() != other.float()).float().mean() < 0.02
