"""Norm and rotary in one kernel: against chapters 05 and 06 in float64, the operators, the model that takes them, the compiler for each chip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.kernels import rotary as kernels
from speedrun.kernels.rotary import norm_rotary_backward_op, norm_rotary_op
from speedrun.model.gpt import AttentionContext, GPTConfig, attention
from speedrun.model.mlp import BlockConfig, rms_norm
from speedrun.model.rotary import RotaryConfig, apply_rotary


def drawn(tokens: int, heads: int, dim: int, size: float = 1.0, seed: int = 0):
    """qkv (tokens, 3 · heads · dim), cosines, sines, and gradients of q, k and v; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    angles = 3 * draw(tokens, dim // 2)
    grads = [draw(tokens, heads, dim) for _ in range(3)]
    return size * draw(tokens, 3 * heads * dim), angles.cos(), angles.sin(), grads


def by_chapters(qkv, cos, sin, heads):
    q, k, v = qkv.view(len(qkv), 3, heads, -1).permute(1, 2, 0, 3)
    turned = (apply_rotary(rms_norm(each), cos, sin) for each in (q, k))
    return [each.transpose(0, 1) for each in (*turned, v)]


def both(qkv, cos, sin, grads, heads):
    """Outputs and the gradient of qkv, by the operator and in float64."""
    leaf, exact = qkv.float().requires_grad_(), qkv.clone().requires_grad_()
    found = norm_rotary_op(leaf, cos.float(), sin.float(), heads)[:3]
    known = by_chapters(exact, cos, sin, heads)
    found += torch.autograd.grad(found, leaf, [each.float() for each in grads])
    return found, [*known, *torch.autograd.grad(known, exact, grads)]


class TestKernel:
    @given(
        st.integers(1, 50), st.integers(1, 5), st.sampled_from([2, 4, 16, 32]),
        st.sampled_from([1e-2, 1.0, 1e3]), st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=15, deadline=None)
    def test_against_float64(self, tokens, heads, dim, size, seed):
        qkv, cos, sin, grads = drawn(tokens, heads, dim, size, seed)
        found, known = both(qkv, cos, sin, grads, heads)
        # a sum of dim squares and a dozen further operations, 2^-24 each; the gradient is over the norm
        for one, other in zip(found, known):
            bound = 2**-22 * (dim + 12) ** 0.5 * max(1.0, other.abs().max().item())
            assert (one.double() - other).abs().max() < 8 * bound

    def test_rows_of_zeros_have_a_gradient(self):
        qkv, cos, sin, grads = drawn(20, 2, 16)
        qkv[3] = 0
        found, known = both(qkv, cos, sin, grads, 2)
        assert all(each.isfinite().all() for each in found)
        assert torch.allclose(found[3][3].double(), known[3][3], rtol=1e-4)

    def test_what_is_no_number_stays_in_its_head(self):
        qkv, cos, sin, _ = drawn(20, 2, 16)
        qkv[5, 3] = float("nan")
        q, k, v, _ = norm_rotary_op(qkv.float(), cos.float(), sin.float(), 2)
        assert q[5, 0].isnan().all() and not q[5, 1].isnan().any()
        assert not any(each.isnan().any() for each in (q[:5], q[6:], k, v))

    def test_pairs_that_stand_are_only_normed(self):
        qkv, _, _, _ = drawn(10, 2, 8)
        one, zero = torch.ones(10, 4), torch.zeros(10, 4)
        q, _, v, factors = norm_rotary_op(qkv.float(), one, zero, 2)
        heads = qkv.view(10, 3, 2, 8)
        assert torch.allclose(q.double(), rms_norm(heads[:, 0]), atol=1e-6)
        assert torch.equal(v, heads[:, 2].float())
        assert torch.allclose(factors[0].double(), (heads[:, 0].square().mean(-1) + 1e-6).rsqrt())


class TestOperator:
    def test_they_are_operators(self):
        qkv, cos, sin, grads = drawn(20, 2, 16)
        told = qkv.float().requires_grad_(), cos.float(), sin.float(), 2
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(norm_rotary_op, told, test_utils=checks)
        q, k, _, factors = norm_rotary_op(*told)
        told = [each.float() for each in grads], q.detach(), k.detach(), factors, *told[1:3]
        torch.library.opcheck(norm_rotary_backward_op, told, test_utils=checks[:2])

    def test_compiled_it_is_one_graph(self):
        qkv, cos, sin, grads = drawn(20, 2, 16)
        leaf = qkv.float().requires_grad_()
        call = lambda x: norm_rotary_op(x, cos.float(), sin.float(), 2)[:3]  # noqa: E731
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        known = torch.autograd.grad(call(leaf), leaf, [each.float() for each in grads])[0]
        found = torch.autograd.grad(compiled(leaf), leaf, [each.float() for each in grads])[0]
        assert torch.equal(found, known)

    @pytest.mark.parametrize(
        ("columns", "tokens", "half"), [(95, 20, 8), (96, 19, 8), (90, 20, 8), (72, 20, 6)]
    )
    def test_what_it_cannot_take_is_refused(self, columns, tokens, half):
        turns = torch.ones(tokens, half)
        with pytest.raises(ValueError, match=r"3 · 2 heads · head_dim, a power of two"):
            norm_rotary_op(torch.ones(20, columns), turns, turns, 2)

    def test_gradients_in_any_layout(self):
        qkv, cos, sin, grads = (each for each in drawn(20, 2, 16))
        q, k, _, factors = norm_rotary_op(qkv.float(), cos.float(), sin.float(), 2)
        straight = [each.float() for each in grads]
        other = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in straight]
        told = q, k, factors, cos.float(), sin.float()
        assert torch.equal(norm_rotary_backward_op(straight, *told), norm_rotary_backward_op(other, *told))  # fmt: skip


class TestModel:
    @pytest.mark.parametrize(
        ("block", "rotary", "takes"),
        [
            ({"qk_norm": True}, {"pos": "half_rope"}, True),
            ({"qk_norm": True}, {"pos": "rope"}, True),
            ({"qk_norm": False}, {"pos": "rope"}, False),
            ({"qk_norm": True}, {"pos": "rope", "interleaved": True}, False),
        ],
    )
    def test_who_takes_it(self, block, rotary, takes, monkeypatch):
        """With our attention kernel, where queries and keys are normed and paired in halves; and it computes the same."""
        config = GPTConfig(num_heads=2, model_dim=32, block=BlockConfig(**block), rotary=RotaryConfig(**rotary))  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 20, 32, generator=generator)
        weights = {"attention_qkv": torch.randn(96, 32, generator=generator), "attention_out": torch.eye(32)}  # fmt: skip
        _, cos, sin, _ = drawn(20, 2, 16)
        asked, seen = [], {}

        def watched(*told):
            asked.append(told)
            return norm_rotary_op(*told)

        def attend(q, k, v, context, packed, qk_norm):
            seen[context.backend] = [each.squeeze(0).transpose(0, 1) for each in (q, k, v)]
            return v.squeeze(0).transpose(0, 1)

        monkeypatch.setattr("speedrun.model.gpt.norm_rotary_op", watched)
        monkeypatch.setattr("speedrun.model.gpt.attend_packed", attend)
        for backend in ("sdpa", "triton"):
            context = AttentionContext((cos.float(), sin.float()), object(), None, backend)
            attention(x, weights, config, context)
        assert len(asked) == takes
        for a, b in zip(seen["sdpa"], seen["triton"]):
            assert a.shape == (20, 2, 16) and torch.allclose(a, b, atol=1e-6)
        if takes:
            assert all(each.is_contiguous() for each in seen["triton"]), "no copy before attention"


AHEAD = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from speedrun.kernels import rotary
kernel = getattr(rotary, sys.argv[2])
names = list(kernel.arg_names)
bf16 = ("QKV", "Q", "K", "V", "DQ", "DK", "DV", "DQKV")
constants = dict(HEADS=6, HALF=64, ROWS=rotary.ROWS)
signature = {name: "constexpr" if name in constants else "*bf16" if name in bf16 else "i32" if name == "tokens" else "fp32" if name == "eps" else "*fp32" for name in names}
attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name] not in ("constexpr", "fp32")}
source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
print(json.dumps({"shared": made.metadata.shared, "size": len(made.asm["cubin"])}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm_rotary_kernel", "norm_rotary_gradient_kernel"])
@pytest.mark.parametrize("chip", [80, 86, 89, 90, 100, 120])
def test_it_compiles_for_every_chip(chip, name, compiled_ahead):
    found = compiled_ahead(AHEAD, chip, name)
    assert found["shared"] <= 101_376 and found["size"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(2000, 6, 128), (16, 4, 128), (999, 2, 64)])
def test_on_a_gpu(tokens, heads, dim):
    """In bfloat16, against float64 of the same rounded numbers: one rounding, 2^-9, and float32 before it."""
    qkv, cos, sin, grads = drawn(tokens, heads, dim)
    qkv, *grads = (each.bfloat16() for each in (qkv, *grads))
    leaf, exact = qkv.cuda().requires_grad_(), qkv.double().requires_grad_()
    found = norm_rotary_op(leaf, cos.float().cuda(), sin.float().cuda(), heads)[:3]
    known = by_chapters(exact, cos, sin, heads)
    found += torch.autograd.grad(found, leaf, [each.cuda() for each in grads])
    known += torch.autograd.grad(known, exact, [each.double() for each in grads])
    for one, other in zip(found, known):
        error = torch.linalg.norm(one.double().cpu() - other) / torch.linalg.norm(other)
        assert error < 2**-8
    assert kernels.ROWS == 16
