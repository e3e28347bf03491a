"""Head and loss in one pass: the kernel against the definition in float64, candidates, the operator, the compiler for each chip."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun.kernels import loss as kernels
from speedrun.kernels.head_bf16 import CONFIGS_BF16, bf16_form, product_bf16, unit_scale
from speedrun.kernels.head_reference import head_loss_by_hand
from speedrun.kernels.loss import (
    CONFIGS,
    Blocks,
    Form,
    check_head,
    choose_candidates,
    head_form,
    head_loss_fused,
    head_loss_op,
    launch_head,
)
from speedrun.model.head import loss_of

NARROW = Blocks(32, 32, 16, 4, 2, 1)
IN_FLOAT32 = Form(torch.float32, partial(launch_head, blocks=NARROW, bulk=False, fast=False))
FORMS = {torch.float8_e4m3fn: CONFIGS, torch.bfloat16: CONFIGS_BF16}
# bytes of shared memory a block may have
LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def drawn(tokens: int, width: int, words: int, std: float = 0.5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    w = std * torch.randn(width, words, generator=generator, dtype=torch.float64)
    return x, w, torch.randint(0, words, (tokens,), generator=generator)


def candidates(targets, words, count):
    inside = torch.ones(words, dtype=torch.bool)
    return choose_candidates(targets, words, count)[1] if 0 < count < words else inside


def off(found, known) -> float:
    return (torch.linalg.norm(found.double() - known) / torch.linalg.norm(known)).item()


class TestDefinition:
    @pytest.mark.parametrize("rows", [1, 7, 100])
    def test_it_is_chapter_08s_loss(self, rows):
        x, w, targets = drawn(30, 16, 50)
        leaves = x.requires_grad_(), w.requires_grad_()
        loss = loss_of(x.float() @ w.float(), targets, "sigmoid23")
        by_hand = head_loss_by_hand(x.detach(), w.detach(), targets, torch.ones(50).bool(), rows)
        assert abs(by_hand[0].item() - loss.item()) < 1e-5
        for a, b in zip(by_hand[1:], torch.autograd.grad(loss, leaves)):
            assert off(b, a) < 1e-5

    def test_words_outside_take_no_part(self):
        x, w, targets = drawn(20, 8, 40)
        inside = candidates(targets, 40, 24)
        few = head_loss_by_hand(x, w, targets, inside)
        kept = inside.nonzero()[:, 0]
        place = torch.searchsorted(kept, targets)
        assert torch.equal(kept[place], targets), "all targets are candidates here"
        alone = head_loss_by_hand(x, w[:, kept], place, torch.ones(24).bool())
        assert torch.isclose(few[0], alone[0]) and torch.allclose(few[1], alone[1])
        assert torch.allclose(few[2][:, kept], alone[2]) and not few[2][:, ~inside].any()


class TestCandidates:
    @given(st.lists(st.integers(0, 63), min_size=1, max_size=80), st.integers(1, 64))
    @settings(max_examples=60, deadline=None)
    def test_all_targets_first_and_then_the_sweep(self, targets, count):
        targets = torch.tensor(targets)
        chosen, inside = choose_candidates(targets, 64, count)
        assert len(chosen.unique()) == count and torch.equal(chosen, chosen.sort().values)
        assert torch.equal(inside.nonzero()[:, 0], chosen)
        distinct = targets.unique()
        if len(distinct) <= count:
            assert inside[distinct].all()
        else:
            assert torch.isin(chosen, distinct).all()

    @pytest.mark.parametrize("words", [50_304, 50_257, 20_011, 256])
    def test_the_sweep_meets_every_word(self, words):
        chosen, _ = choose_candidates(torch.tensor([3]), words, words)
        assert torch.equal(chosen, torch.arange(words))

    def test_another_batch_has_others(self):
        first, second = (choose_candidates(torch.tensor([n]), 1000, 100)[0] for n in (1, 2))
        assert not torch.equal(first, second)


class TestKernel:
    @given(
        st.integers(1, 70), st.integers(1, 40), st.integers(2, 90), st.integers(0, 60),
        st.sampled_from([0.0, 0.02, 0.5, 5.0]), st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=12, deadline=None)
    def test_against_float64(self, tokens, width, words, count, std, seed):
        x, w, targets = drawn(tokens, width, words, std, seed)
        found = head_loss_fused(x.float(), w.float(), targets, count, IN_FLOAT32)
        known = head_loss_by_hand(x, w, targets, candidates(targets, words, count))
        # float32: 2^-24 a rounding, `width` of them in a logit, which the loss multiplies by 23 / 7.5 at most
        bound = 4 * 2**-24 * (width + words) ** 0.5 * (1 + x.abs().max() * w.abs().max() * width)
        assert abs(found[0].item() - known[0].item()) < bound + 1e-6
        for a, b in zip(found[1:], known[1:]):
            assert (a.double() - b).abs().max() < (bound + 1e-6) * max(1.0, b.abs().max().item())

    @pytest.mark.parametrize("count", [0, 16, 48])
    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_micro_batches_choose_their_own(self, parts, count):
        """Loss and gradients are the means of the micro-batches' own, in the kernel and in the reference."""
        x, w, targets = drawn(32, 16, 48)
        alone = [
            head_loss_by_hand(own, w, to, candidates(to, 48, count))
            for own, to in zip(x.chunk(parts), targets.chunk(parts))
        ]
        loss = torch.stack([each[0] for each in alone]).mean()
        dx = torch.cat([each[1] for each in alone]) / parts
        dw = torch.stack([each[2] for each in alone]).mean(0)
        args = x.float(), w.float(), targets, count
        found = head_loss_fused(*args, IN_FLOAT32, parts=parts)
        for a, b in zip(found, (loss, dx, dw)):
            assert off(a, b) < 1e-5
        rounded = head_loss_op(*args[:3], torch.tensor([count, parts]))
        for a, b, most in zip(rounded, (loss, dx, dw), (0.01, 0.1, 0.1)):
            assert off(a, b) < most

    @given(
        st.integers(1, 50), st.integers(1, 40), st.integers(2, 90), st.integers(0, 60),
        st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=3), st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=12, deadline=None)
    def test_several_weighted_targets(self, tokens, width, words, count, by, seed):
        """The sum of the losses of each alone, and of their gradients; targets may be equal, and no candidates."""
        x, w, first = drawn(tokens, width, words, 0.5, seed)
        targets = torch.stack([first, first.roll(1), first][: len(by)]).T
        weights = torch.tensor([*zip(by, by)])[:, 0]
        inside = candidates(targets.flatten(), words, count)
        alone = [head_loss_by_hand(x, w, to, inside) for to in targets.T]
        known = [sum(weight * each[n] for weight, each in zip(by, alone)) for n in range(3)]
        found = head_loss_fused(x.float(), w.float(), targets, count, IN_FLOAT32, weights=weights)  # fmt: skip
        for a, b, c in zip(found, known, head_loss_by_hand(x, w, targets, inside, weights=weights)):
            assert torch.allclose(
                c, b
            )  # as a definition, and of targets and weights that do not lie side by side
            assert (a.double() - b).abs().max() < 2e-5 * max(1.0, b.abs().max().item())

    @pytest.mark.parametrize("count", [0, 32])
    def test_in_bfloat16(self, count):
        """As before Ada: errors of 8 bits, not of float32's 24 or e4m3's 4. The interpreter multiplies no bfloat16, so PyTorch does it for the largest kernel."""

        def launch(x, w, scale):
            assert scale == 1 and x.dtype == w.dtype == torch.bfloat16
            s = torch.sigmoid((x.float() @ w.float().T + 5) / 7.5)
            e = torch.exp(23 * s - 23)
            g = (e * s * (1 - s) * kernels.GAIN).bfloat16()
            return g, g.T.contiguous(), e.sum(1)

        form = Form(torch.bfloat16, launch, product_bf16, unit_scale)
        x, w, targets = drawn(64, 48, 80, 0.15)
        found = head_loss_fused(x.bfloat16(), w.float(), targets, count, form)
        known = head_loss_by_hand(x, w, targets, candidates(targets, 80, count))
        assert all(1e-4 < off(a, b) < 2**-8 for a, b in zip(found[1:], known[1:]))
        assert abs(found[0] - known[0]) < 1e-3

    def test_micro_batches_of_unequal_length_are_refused(self):
        x, w, targets = drawn(30, 16, 48)
        with pytest.raises(ValueError, match="30 tokens are not 4 micro-batches"):
            head_loss_op(x.float(), w.float(), targets, torch.tensor([16, 4]))

    def test_rows_of_one_word(self):
        x, w, _ = drawn(40, 16, 64)
        targets = torch.full((40,), 7)
        found = head_loss_fused(x.float(), w.float(), targets, 16, IN_FLOAT32)
        known = head_loss_by_hand(x, w, targets, candidates(targets, 64, 16))
        assert all(off(a, b) < 1e-5 for a, b in zip(found[1:], known[1:]))

    def test_what_is_not_finite_stays_so(self):
        x, w, targets = drawn(8, 16, 32)
        x[3, 2] = math.nan
        assert head_loss_op(x.float(), w.float(), targets, torch.tensor([0, 1]))[0].isnan()


class TestOperator:
    def test_it_is_an_operator(self):
        x, w, targets = drawn(32, 16, 48)
        leaves = (
            x.float().requires_grad_(),
            w.float().requires_grad_(),
            targets,
            torch.tensor([16, 1]),
        )
        torch.library.opcheck(head_loss_op, leaves, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip

    def test_operands_that_do_not_lie_row_by_row(self):
        """Their strides are not the results': else a compiled caller breaks. The kernels read copies."""
        x, w, targets = drawn(32, 16, 48)
        usual = x.float(), w.float()
        turned = tuple(each.T.contiguous().T for each in usual)
        few = torch.tensor([16, 1])
        leaves = [each.clone().requires_grad_() for each in turned]
        torch.library.opcheck(head_loss_op, (*leaves, targets, few), test_utils=("test_faketensor",))  # fmt: skip
        found = [head_loss_fused(*pair, targets, 16, IN_FLOAT32) for pair in (usual, turned)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))

    @pytest.mark.parametrize("compiled", [False, True])
    def test_gradients_are_scaled_and_no_count_compiles_again(self, compiled):
        x, w, targets = drawn(32, 16, 48)
        graphs = []

        def count_graphs(graph, _):
            graphs.append(1)
            return graph.forward

        def scaled(x, w, count):
            return 5 * head_loss_op(x, w, targets, count)[0]

        call = torch.compile(scaled, fullgraph=True, backend=count_graphs) if compiled else scaled
        for count in (0, 16, 32):
            leaves = x.float().requires_grad_(), w.float().requires_grad_()
            call(*leaves, torch.tensor([count, 1])).backward()
            known = head_loss_op(x.float(), w.float(), targets, torch.tensor([count, 1]))[1:]
            for leaf, gradient in zip(leaves, known):
                assert torch.allclose(leaf.grad, 5 * gradient)
        assert len(graphs) == compiled

    @pytest.mark.parametrize(
        "spoil",
        [lambda x, w, t: (x[0], w, t), lambda x, w, t: (x, w.T, t), lambda x, w, t: (x, w, t[:5]),
         lambda x, w, t: (x, w, t.int()), lambda x, w, t: (x.long(), w, t), lambda x, w, t: (x, w, t[:, None]),
         lambda x, w, t: (x, w, t[:, None].expand(-1, 2), torch.ones(1, 2)), lambda x, w, t: (x, w, t, torch.ones(())),
         lambda x, w, t: (x, w, t, torch.ones(1)), lambda x, w, t: (x, w, t[:, None], torch.ones(2))],
    )  # fmt: skip
    def test_what_it_cannot_take_is_refused(self, spoil):
        with pytest.raises(ValueError, match="targets"):
            check_head(*spoil(*drawn(12, 16, 32)))

    @pytest.mark.parametrize(
        ("chip", "kernel", "dtype"),
        [((7, 5), False, torch.bfloat16), ((8, 0), True, torch.bfloat16), ((8, 6), True, torch.bfloat16),
         ((8, 9), True, torch.float8_e4m3fn), ((9, 0), True, torch.float8_e4m3fn), ((12, 1), True, torch.float8_e4m3fn)],
    )  # fmt: skip
    def test_what_a_chip_computes_in(self, chip, kernel, dtype, monkeypatch):
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert head_form(cpu).kind == torch.float8_e4m3fn and bf16_form(cpu).kind == torch.bfloat16
        assert head_form(cpu).launch is bf16_form(cpu).launch is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chip)
        monkeypatch.setattr(kernels, "find_triton", lambda: "3.6")
        form = head_form(gpu)
        assert form.kind == dtype and (form.launch is not None) == kernel
        if kernel:
            told = form.launch.keywords
            assert told["fast"] and told["bulk"] == (chip >= (9, 0))
            assert told["blocks"] in FORMS[dtype].values()
        monkeypatch.setattr(kernels, "find_triton", lambda: None)
        assert head_form(gpu).launch is None

    @pytest.mark.parametrize("form", [bf16_form, head_form])
    def test_where_there_is_no_kernel_operands_are_rounded_all_the_same(self, form, monkeypatch):
        monkeypatch.setattr(kernels, "head_form", form)
        x, w, targets = drawn(30, 17, 45, 0.15)
        known = head_loss_by_hand(x, w, targets, torch.ones(45).bool())
        found = head_loss_op(x.float(), w.float(), targets, torch.tensor([0, 1]))
        low, high = (1e-4, 2**-8) if form is bf16_form else (0.01, 0.06)
        assert all(low < off(a, b) < high for a, b in zip(found[1:], known[1:]))

    def test_several_targets_compiled(self):
        x, w, first = drawn(32, 16, 48)
        targets, weights = torch.stack([first, first.roll(1)], 1), torch.tensor([1.0, 0.5])
        leaves = x.float().requires_grad_(), w.float().requires_grad_()
        args = (*leaves, targets, torch.tensor([16, 2]), weights)
        torch.library.opcheck(head_loss_op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
        call = torch.compile(lambda *given: head_loss_op(*given)[0], fullgraph=True, backend="eager")  # fmt: skip
        call(*args).backward()
        inside = torch.stack([candidates(to.flatten(), 48, 16) for to in targets.chunk(2)])
        known = head_loss_by_hand(x, w, targets, inside, weights=weights)[1:]
        for leaf, gradient in zip(leaves, known):
            assert leaf.grad is not None and off(leaf.grad, gradient) < 0.1


AHEAD = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from speedrun.kernels import head_bf16, loss
chip, kind = int(sys.argv[1]), getattr(torch, sys.argv[2])
blocks = (loss.CONFIGS if kind == loss.E4M3 else head_bf16.CONFIGS_BF16)[chip]
half, bulk = blocks.columns // 2, chip >= 90
operand, gradient = ("fp8e4nv", "fp8e5") if kind == loss.E4M3 else ("bf16", "bf16")
def matrix(kind, rows, columns):
    return f"tensordesc<{kind}[{rows},{columns}]>" if bulk else f"*{kind}"
def compiled(kernel, signature, constants, plain, **options):
    names = list(kernel.arg_names)
    full = {name: signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name not in plain}
    source = ASTSource(kernel, full, {(names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
signature = {
    "X": matrix(operand, blocks.rows, blocks.depth), "W": matrix(operand, blocks.columns, blocks.depth),
    "G": matrix(gradient, blocks.rows, half), "GT": matrix(gradient, half, blocks.rows),
    "SUMS": "*fp32", "SCALE": "*fp32", "tokens": "i32", "words": "i32",
}
out = triton.language.float8e5 if kind == loss.E4M3 else triton.language.bfloat16
constants = dict(WIDTH=768, KIND=out, ROWS=blocks.rows, COLUMNS=blocks.columns, DEPTH=blocks.depth, PROGRAMS=264, FAST=True, BULK=bulk)
made = compiled(loss.head_kernel, signature, constants, ("X", "W", "G", "GT") if bulk else (), num_warps=blocks.warps, num_stages=blocks.stages)
small = dict(ROWS=4, WIDTH=1024, SEVERAL=3)
pointers = {name: "*fp32" for name in ("WEIGHTS", "SUMS", "SCALE", "LOSS", "SHARE", "OWN")} | {"W": f"*{operand}", "TARGETS": "*i64", "tokens": "i32", "width": "i32"}
def only(kernel, more):
    have = pointers | more
    return {name: have[name] for name in kernel.arg_names if name in have}
target = compiled(loss.target_kernel, only(loss.target_kernel, {"X": f"*{operand}", "INSIDE": "*u8"}), small, ())
dx = compiled(loss.dx_kernel, only(loss.dx_kernel, {"RAW": "*bf16", "DX": "*bf16", "factor": "fp32"}), small, ("factor",))
beside = [each.metadata.shared for each in (target, dx)]
print(json.dumps({"shared": made.metadata.shared, "size": len(made.asm["cubin"]), "beside": beside}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "chip"), [(kind, chip) for kind, chips in FORMS.items() for chip in sorted(chips)]
)
def test_every_configuration_compiles_for_its_chip(kind, chip, compiled_ahead):
    """Without a GPU, with the divisibility that a launch has; the shared memory is at most the chip's."""
    found = compiled_ahead(AHEAD, chip, str(kind).removeprefix("torch."))
    programs = FORMS[kind][chip].programs
    assert 0 < found["shared"] * programs <= LIMITS[chip] and found["size"] > 0
    assert max(found["beside"]) <= LIMITS[chip]


@pytest.mark.gpu
@pytest.mark.parametrize("several", [1, 3])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 4096])
@pytest.mark.parametrize("std", [0.0, 0.02, 0.15, 0.3])
def test_on_a_gpu(std, count, kind, several, monkeypatch):
    """Against float64: loss to what rounding operands to four bits costs, gradients to a few per cent, in bfloat16 to one; step 0's logits included."""
    form = head_form(torch.device("cuda"))
    if form.launch is None or form.kind != torch.float8_e4m3fn == kind:
        pytest.skip("no kernel, or none in eight bits")
    if kind == torch.bfloat16:
        monkeypatch.setattr(kernels, "head_form", bf16_form)
    x, w, targets = (each.cuda() for each in drawn(2000, 768, 50_304, std))
    x, weights = torch.nn.functional.rms_norm(x, (768,)), None
    if several > 1:
        targets = torch.stack([targets.roll(n) for n in range(several)], 1)
        weights = torch.tensor([1.0, 0.5, 0.25]).cuda()
    inside = candidates(targets.flatten().cpu(), 50_304, count).cuda()
    known = head_loss_by_hand(x, w, targets, inside, 500, weights)
    found = head_loss_op(x.bfloat16(), w.float(), targets, torch.tensor([count, 1]), weights)
    assert abs(found[0].item() - known[0].item()) < 0.02
    for a, b in zip(found[1:], known[1:]):
        limit = 0.08 if kind == torch.float8_e4m3fn else 0.012
        assert a.isfinite().all() and (not b.any() or off(a, b) < limit)


@pytest.mark.gpu
@pytest.mark.parametrize("chip", sorted(CONFIGS_BF16))
def test_configurations_of_older_chips_on_a_gpu(chip):
    """Without descriptors, as before Hopper."""
    x, w, targets = (each.cuda() for each in drawn(2000, 768, 4096, 0.15))
    launch = partial(launch_head, blocks=CONFIGS_BF16[chip], bulk=False, fast=True)
    form = Form(torch.bfloat16, launch, product_bf16, unit_scale)
    known = head_loss_by_hand(x, w, targets, candidates(targets.cpu(), 4096, 2048).cuda(), 500)
    found = head_loss_fused(x.bfloat16(), w.float(), targets, 2048, form)
    assert all(off(a, b) < 0.012 for a, b in zip(found, known))
