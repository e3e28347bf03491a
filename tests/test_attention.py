"""Attention over packed documents: kernels against float64, the whole model against documents read alone, the trainer."""

import itertools
import math
import sys

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resuming import broken_and_resumed
from torch.nn import functional as F

from speedrun.config import Config, check_config, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.data.loader import (
    DataConfig,
    Loader,
    Shards,
    packed_row,
    slots_for,
    validation_batches,
)
from speedrun.kernels import attention as kernels
from speedrun.kernels.attention import (
    LARGE_SHARED,
    SMALL_SHARED,
    attention_op,
    document_tiles,
    launch_backward,
    launch_forward,
    room_for_squares,
)
from speedrun.lab.errors import UserError
from speedrun.lab.metrics import read_metrics, series
from speedrun.model.attention import Packed, choose_backend, prepare_tiles, why_not
from speedrun.model.backends import (
    attend,
    attention_by_document,
    flash_op,
    gradients_by_document,
    sdpa_op,
)
from speedrun.model.gpt import GPT, attention_settings
from speedrun.presets import as_arguments, preset
from speedrun.schedule import Stage
from speedrun.train import attn_settings_now, build_run, train, warm_up

CUTS = {  # bounds of documents, in rows of so many tokens
    "one document": ([0, 70], 70),
    "odd lengths": ([0, 1, 64, 65, 130], 130),
    "one token each": ([*range(31)], 30),
    "empty slots": ([0, 40, 90, 90, 90], 90),
    "an empty tail": ([0, 33, 50], 75),
    "nothing at all": ([0, 0, 0], 20),
}
WINDOWS = (0, 1, 17, 64, 10**6)


def dense(q, k, v, bounds, window, scale):
    """The definition: every pair of tokens, (tokens, heads, head_dim) float64."""
    tokens = len(q)
    number = torch.full((tokens,), -1)
    for n, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        number[begin:end] = n
    place = torch.arange(tokens)
    distance = place[:, None] - place[None, :]
    sees = (number[:, None] == number[None, :]) & (number[:, None] >= 0)
    sees &= (distance >= 0) & (distance <= window)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    p = logits.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


def draw(tokens: int, dim: int = 16, heads: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = torch.randn(4, tokens, heads, dim, generator=generator, dtype=torch.float64)
    return F.rms_norm(q, (dim,)), F.rms_norm(k, (dim,)), v, grad


def known(q, k, v, grad, bounds, window, scale=0.3):
    """Output and three gradients by the definition."""
    asked = [each.clone().requires_grad_() for each in (q, k, v)]
    out = dense(*asked, bounds, window, scale)
    return out.detach(), *torch.autograd.grad(out, asked, grad)


def close(found, wanted, tolerance: float) -> None:
    for a, b in zip(found, wanted):
        a = a.double().cpu()
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * (b.norm() + len(b) ** 0.5)


def pairs(*lists) -> list:
    """All combinations; those whose places do not add up to an even number, `make check` leaves to whoever asks for them by name."""
    found = []
    for places in itertools.product(*(range(len(each)) for each in lists)):
        values = [each[n] for each, n in zip(lists, places)]
        found.append(pytest.param(*values, marks=[pytest.mark.long] if sum(places) % 2 else []))
    return found


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("window", WINDOWS)
    def test_document_by_document(self, cut, window):
        bounds, tokens = CUTS[cut]
        q, k, v, grad = draw(tokens)
        wanted = known(q, k, v, grad, bounds, window)
        ends = torch.tensor(bounds, dtype=torch.int32)
        out = attention_by_document(q, k, v, ends, window, 0.3, block=13)
        close(
            (out, *gradients_by_document(grad, q, k, v, out, ends, window, 0.3, 29)), wanted, 1e-12
        )
        asked = [each.clone().requires_grad_() for each in (q, k, v)]
        numbers = torch.tensor(window, dtype=torch.int32), torch.tensor(0.3, dtype=torch.float64)
        out = sdpa_op(*asked, ends, *numbers)
        close((out.detach(), *torch.autograd.grad(out, asked, grad)), wanted, 1e-12)

    @pytest.mark.parametrize(("cut", "window", "bounded"), pairs([*CUTS], WINDOWS, [True, False]))
    def test_the_kernels(self, cut, window, bounded):
        bounds, tokens = CUTS[cut]
        q, k, v, grad = draw(tokens)
        wanted = known(q, k, v, grad, bounds, window)
        asked = [each.float().requires_grad_() for each in (q, k, v)]
        tiles = document_tiles(torch.tensor(bounds, dtype=torch.int32), tokens)
        numbers = torch.tensor(window, dtype=torch.int32), torch.tensor(0.3)
        out, _ = attention_op(*asked, tiles, *numbers, bounded)
        close((out.detach(), *torch.autograd.grad(out, asked, grad.float())), wanted, 2e-6)


class TestKernels:
    @pytest.mark.parametrize(
        ("cut", "window", "blocks"),
        pairs(["odd lengths", "an empty tail"], [0, 17, 64, 65, 129], [SMALL_SHARED, LARGE_SHARED]),
    )
    def test_blocks_by_descriptor_and_squares_kept_or_not(self, cut, window, blocks, monkeypatch):
        monkeypatch.setattr(kernels, "blocks_for", lambda device: blocks)
        bounds, tokens = CUTS[cut]
        q, k, v, grad = (each.float() for each in draw(tokens))
        tiles = document_tiles(torch.tensor(bounds, dtype=torch.int32), tokens)
        told, found = (tiles, window, 0.3), {}
        for bulk in (False, True):
            out, lse = launch_forward(q, k, v, *told, True, bulk)
            for keep in (False, True):
                gradients = launch_backward(grad, q, k, v, out, lse, *told, keep, bulk)
                found[bulk, keep] = out, *gradients
        wanted = known(*draw(tokens), bounds, window)
        for each in found.values():
            close(each, wanted, 2e-6)
        for keep in (False, True):  # who loads a block does not change a bit
            assert all(map(torch.equal, found[False, keep], found[True, keep]))

    def test_three_hundred_documents_of_one_token(self):
        """Each sees itself, so the output is v; no query, no key and no scale matters, so their gradients are zero."""
        q, k, v, grad = (each.float() for each in draw(300, heads=1))
        tiles = document_tiles(torch.arange(301, dtype=torch.int32), 300)
        asked = [each.requires_grad_() for each in (q, k, v)]
        numbers = torch.tensor(17, dtype=torch.int32), torch.tensor(0.3)
        out, _ = attention_op(*asked, tiles, *numbers, True)
        dq, dk, dv = torch.autograd.grad(out, asked, grad)
        close((out.detach(), dv), (v.detach().double(), grad.double()), 2e-6)
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5

    def test_squares_are_kept_where_there_is_room(self):
        q, tiles = torch.zeros(65_536, 6, 128, dtype=torch.bfloat16), torch.zeros(3, 2049)
        assert not room_for_squares(q, tiles, 1664)  # 2.7 GB, without a GPU
        assert room_for_squares(q, tiles[:, :200], 128)

    @pytest.mark.gpu
    @pytest.mark.parametrize("window", [1408, 2**30])
    def test_a_document_of_262144_tokens_on_a_gpu(self, window):
        generator = torch.Generator("cuda").manual_seed(0)
        drawn = torch.randn(4, 262_144, 1, 64, device="cuda", generator=generator).bfloat16()
        q, k = (F.rms_norm(each, (64,)) for each in drawn[:2])
        ends = torch.tensor([0, 262_144], dtype=torch.int32, device="cuda")
        asked = [each.clone().requires_grad_() for each in (q, k, drawn[2])]
        numbers = torch.tensor(window, dtype=torch.int32), torch.tensor(0.12)
        out, _ = attention_op(*asked, document_tiles(ends, 262_144), *numbers, True)
        found = out.detach(), *torch.autograd.grad(out, asked, drawn[3])
        longest = torch.tensor(262_144, dtype=torch.int32)
        theirs = [each.clone().requires_grad_() for each in (q, k, drawn[2])]
        out, *_ = flash_op(*theirs, ends, longest, *numbers)
        wanted = out.detach(), *torch.autograd.grad(out, theirs, drawn[3])
        for a, b in zip(found, wanted):
            assert (a.double() - b.double()).norm() < 0.01 * b.double().norm()

    @pytest.mark.parametrize("dim", [16, 64, 128])
    def test_in_float16(self, dim):  # the interpreter's products of bfloat16 are wrong
        self.check(torch.float16, dim, "cpu")

    @pytest.mark.gpu
    @pytest.mark.parametrize("cut", ["odd lengths", "an empty tail"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["triton", "fa2", "fa3", "fa4", "flex", "sdpa"])
    def test_every_backend_on_a_gpu(self, name, dtype, cut):
        """Those that are there; a row in no document gives zeros, whatever its memory held before."""
        there = torch.device("cuda")
        if reason := why_not(name, there, dtype, 64):
            pytest.skip(reason)
        bounds, tokens = CUTS[cut]
        held = [torch.full((tokens, 2, 64), math.nan, dtype=dtype, device=there) for _ in range(64)]
        q, k, v, grad = (each.to(dtype).double() for each in draw(tokens, 64))
        config = vary(Config(), {"model.attention.scale": 0.12}).model
        (told,) = attention_settings(config, [(17, 30)], there)
        ends = torch.tensor(bounds, dtype=torch.int32, device=there)
        packed = Packed(ends, torch.tensor(int(np.diff(bounds).max()), dtype=torch.int32), *told)
        tiles = prepare_tiles(packed, tokens, name)
        asked = [each.to(there, dtype).requires_grad_() for each in (q, k, v)]
        del held
        out = attend(*asked, packed, True, name, False, tiles)
        found = torch.autograd.grad(out, asked, grad.to(there, dtype))
        close((out.detach(), *found), known(q, k, v, grad, bounds, 30, 0.12), 1e-2)
        for each in (out, *found):
            assert not each[bounds[-1] :].any()

    @pytest.mark.gpu
    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_on_a_gpu(self, dtype, dim):
        self.check(dtype, dim, "cuda")

    def check(self, dtype, dim, device):
        bounds, window = [0, 20, 75, 80], 30
        q, k, v, grad = (each.to(dtype).double() for each in draw(80, dim))
        wanted = known(q, k, v, grad, bounds, window, 0.12)
        ends = torch.tensor(bounds, dtype=torch.int32, device=device)
        for bounded in (False,) if dtype == torch.float16 else (False, True):
            asked = [each.to(device, dtype).requires_grad_() for each in (q, k, v)]
            numbers = torch.tensor(window, dtype=torch.int32), torch.tensor(0.12)
            out, _ = attention_op(*asked, document_tiles(ends, 80), *numbers, bounded)
            found = torch.autograd.grad(out, asked, grad.to(device, dtype))
            close((out.detach(), *found), wanted, 1e-2)

    def test_a_scale_that_the_bounded_form_cannot_take_is_computed_online(self):
        bounds = [0, 40]
        q, k, v, grad = draw(40, 128)
        wanted = known(-q, q, v, grad, bounds, 50, 1.0)  # logits down to -128
        tiles = document_tiles(torch.tensor(bounds, dtype=torch.int32), 40)
        numbers = torch.tensor(50, dtype=torch.int32), torch.tensor(1.0)
        out, _ = attention_op(-q.float(), q.float(), v.float(), tiles, *numbers, True)
        close((out,), wanted[:1], 1e-5)

    @settings(max_examples=60)
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=12),
        st.integers(0, 30),
        st.integers(1, 20),
    )
    def test_tiles_cover_every_row_once_and_no_two_documents(self, lengths, tail, size):
        bounds = [0, *np.cumsum(lengths).tolist()]
        tokens = bounds[-1] + tail
        if not tokens:
            return
        rows, begins, ends = document_tiles(
            torch.tensor(bounds, dtype=torch.int32), tokens, size
        ).tolist()
        covered = []
        for row, begin, end in zip(rows, begins, ends):
            if row < 0:
                continue
            if begin >= 0:
                assert (begin, end) in list(zip(bounds, bounds[1:])) and begin <= row < end
            else:
                assert row >= bounds[-1] and end == tokens
            covered += range(row, min(row + size, end))
        assert covered == [*range(tokens)]

    def test_shapes_that_the_kernels_cannot_read_are_refused(self):
        tiles = document_tiles(torch.tensor([0, 8], dtype=torch.int32), 8)
        numbers = torch.tensor(3, dtype=torch.int32), torch.tensor(0.3)
        for shape in ((8, 2, 24), (8, 32), (8, 2, 256)):
            with pytest.raises(ValueError, match="head_dim of 16, 32, 64, 128"):
                attention_op(*torch.zeros(3, *shape), tiles, *numbers, True)

    def test_a_backend_that_cannot_says_why(self):
        cpu = torch.device("cpu")
        assert (
            choose_backend("auto", cpu, torch.float32, 64)
            == choose_backend("sdpa", cpu, torch.float32, 96)
            == "sdpa"
        )
        for name in ("triton", "fa2", "fa3", "fa4"):
            with pytest.raises(
                UserError, match=f"model.attention.backend={name}: it needs an NVIDIA GPU"
            ):
                choose_backend(name, cpu, torch.bfloat16, 64)


class FlashAttention4:
    """Stands in for the package's two functions, by the names of their arguments in 4.0.0b36."""

    def __init__(self):
        self.longest = None

    def _flash_attn_fwd(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size_left, window_size_right, return_lse
    ):  # fmt: skip
        assert causal and window_size_right == 0 and return_lse and cu_seqlens_q is cu_seqlens_k
        assert (
            type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k
        )  # a tensor compiles it again
        self.longest = max_seqlen_q
        out = attention_by_document(q, k, v, cu_seqlens_q, window_size_left, softmax_scale)
        out[cu_seqlens_q[-1] :] = math.nan  # as it leaves them
        return out, torch.zeros(q.shape[1], len(q)), None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    ):  # fmt: skip
        assert causal and window_size_right == 0 and dout.is_contiguous() and max_seqlen_q == self.longest  # fmt: skip
        told = (cu_seqlens_q, window_size_left, softmax_scale)
        found = gradients_by_document(dout, q, k, v, out, *told)
        for each in found:
            each[cu_seqlens_q[-1] :] = math.nan
        return *found, None


class TestFlashAttention4:
    @pytest.mark.parametrize("cut", ["odd lengths", "an empty tail"])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_it_is_told_bounds_window_and_scale_as_numbers(self, compiled, cut, monkeypatch):
        package = FlashAttention4()
        for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            monkeypatch.setitem(sys.modules, name, package)
        bounds, tokens = CUTS[cut]
        q, k, v, grad = draw(tokens)
        config = vary(Config(), {"model.attention.scale": 0.3}).model
        (told,) = attention_settings(config, [(5, 17)], torch.device("cpu"))
        ends = torch.tensor(bounds, dtype=torch.int32)
        longest = int(np.diff(bounds).max())
        packed = Packed(ends, torch.tensor(longest, dtype=torch.int32), *told)
        call = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
        for long, window in ((False, 5), (True, 17)):
            asked = [each.clone().requires_grad_() for each in (q, k, v)]
            out = call(*asked, packed, long, "fa4", True, None)
            found = out.detach(), *torch.autograd.grad(out, asked, grad)
            close(found, known(q, k, v, grad, bounds, window), 1e-7)  # the scale is a float32
        assert package.longest == longest

    def test_it_is_refused_where_it_is_not_installed(self, monkeypatch):
        there = torch.device("cuda")  # a machine that is played
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        assert 'pip install "flash-attn-4' in why_not("fa4", there, torch.bfloat16)
        monkeypatch.setattr("speedrun.model.attention.distributions", lambda name: [name])
        assert "Hopper and Blackwell" in why_not("fa4", there, torch.bfloat16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert why_not("fa4", there, torch.bfloat16) == ""


MODEL = {
    "model.num_layers": 4, "model.num_heads": 2, "model.model_dim": 32, "model.init_std": 0.3, "model.block.norm": "rms", "model.block.biases": False,
    "model.block.qk_norm": True, "model.rotary.pos": "half_rope", "model.embedding.norm": True, "model.embedding.values": "ends",
    "model.embedding.value_residual": "gate", "model.layout.x0": True, "model.layout.skips": "single_gated", "model.layout.backout": True,
    "model.layout.skip_sublayers": "attn", "model.head.softcap": "sigmoid23", "model.attention.long_layers": (1, 3),
}  # fmt: skip


def packed_of(bounds: list[int], config, windows=(0, 0)) -> Packed:
    (told,) = attention_settings(config, [windows], torch.device("cpu"))
    ends = torch.tensor(bounds, dtype=torch.int32)
    return Packed(ends, torch.tensor(max(np.diff(bounds)), dtype=torch.int32), *told)


class TestModel:
    @pytest.mark.parametrize("windows", [(0, 0), (5, 0), (3, 11)])
    def test_a_documents_logits_do_not_depend_on_its_neighbours_or_its_place(self, windows):
        config = vary(Config(), MODEL).model
        model = GPT(config, 50)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    0.2
                    * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p.shape)))
                )
        tokens = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(1))
        alone = model(tokens[:, 11:31], None, packed_of([0, 20], config, windows))
        for bounds, begin in (([0, 11, 31, 40], 11), ([0, 5, 11, 31, 31], 11)):
            together = model(tokens[:, : bounds[-1]], None, packed_of(bounds, config, windows))
            assert torch.allclose(together[:, begin : begin + 20], alone, atol=1e-5)
        moved = torch.cat([tokens[:, 31:], tokens[:, 11:31]], 1)
        found = model(moved, None, packed_of([0, 9, 29], config, windows))[:, 9:]
        assert torch.allclose(found, alone, atol=1e-5)
        if windows == (0, 0):  # as a row of the stream
            assert torch.allclose(model(tokens[:, 11:31]), alone, atol=1e-5)
        else:
            assert not torch.allclose(model(tokens[:, 11:31]), alone, atol=1e-3)

    def test_smear_alone_crosses_a_border(self):
        config = vary(Config(), MODEL | {"model.embedding.smear": True}).model
        model = GPT(config, 50)
        with torch.no_grad():
            model.smear_lambda.fill_(1.0)
        tokens = torch.randint(50, (1, 30), generator=torch.Generator().manual_seed(1))
        together = model(tokens, None, packed_of([0, 10, 30], config))[:, 10:]
        assert not torch.allclose(together, model(tokens[:, 10:]), atol=1e-3)

    def test_the_loss_in_slabs_is_the_loss(self):
        from speedrun.model.gpt import loss_in_slabs

        config = vary(Config(), MODEL).model
        model = GPT(config, 50)
        tokens = torch.randint(50, (1, 101), generator=torch.Generator().manual_seed(1))
        packed = packed_of([0, 30, 100], config, (7, 20))
        loss = model(tokens[:, :-1], tokens[:, 1:], packed)
        with torch.no_grad():
            same = model(tokens[:, :-1], tokens[:, 1:], packed)
            x = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(2))
            parts = [loss_in_slabs(model, x, tokens[:, 1:], rows) for rows in (7, 100)]
        assert same.item() == pytest.approx(loss.item(), abs=1e-6)
        assert parts[0].item() == pytest.approx(parts[1].item(), abs=1e-6)

    def test_a_stream_in_16_bits_is_nearly_the_same(self):
        told = {"model.layout.stream_dtype": "bfloat16"}
        models = [GPT(vary(Config(), MODEL | more).model, 50) for more in ({}, told)]
        tokens = torch.randint(50, (1, 33), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [model(tokens[:, :-1], tokens[:, 1:]).item() for model in models]
        assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)

    def test_a_new_window_compiles_nothing(self):
        config = vary(Config(), MODEL).model
        model, graphs = GPT(config, 50), []
        counted = torch.compile(model, fullgraph=True, dynamic=False, backend=lambda graph, _: (graphs.append(1), graph.forward)[1])  # fmt: skip
        tokens = torch.randint(50, (1, 33))
        for windows in ((1, 2), (3, 11), (0, 0)):
            counted(tokens[:, :-1], tokens[:, 1:], packed_of([0, 20, 32], config, windows))
        assert len(graphs) == 1


class TestLoader:
    def test_validation_rows_have_their_documents_bounds(self, embedded):
        options = DataConfig(str(embedded), "documents", batch_tokens=2048, micro_batches=2)
        shards = Shards(embedded, "val")
        (batch,) = validation_batches(shards, options, 16_384)
        assert batch.inputs.shape == (1, 16_384) and len(batch.cu_seqlens) == slots_for(16_384) + 1
        ends = batch.cu_seqlens.unique()
        document = shards.manifest.document
        assert ends[0] == 0 and ends[-1] == 16_384 and len(ends) > 3
        assert all(batch.inputs[0, end] == document for end in ends[1:-1])
        assert (batch.inputs[0, 1:] == document).sum() == len(ends) - 2
        assert batch.longest == ends.diff().max()
        two = [list(validation_batches(shards, options, 16_384, rank, 2)) for rank in (0, 1)]
        halves = torch.cat([batch.inputs[0] for rank in two for batch in rank])
        assert torch.equal(halves, batch.inputs[0])

    def test_joined_rows_are_the_same_documents(self, embedded):
        options = DataConfig(str(embedded), "documents", batch_tokens=4096, micro_batches=4)
        apart = Loader(options).next()
        joined = Loader(
            DataConfig(
                str(embedded),
                "documents",
                batch_tokens=4096,
                micro_batches=4,
                max_forward_tokens=2048,
            )
        ).next()
        assert len(apart) == 4 and len(joined) == 2
        for n, batch in enumerate(joined):
            parts = apart[2 * n : 2 * n + 2]
            assert torch.equal(batch.inputs, torch.cat([part.inputs for part in parts], 1))
            assert torch.equal(batch.targets, torch.cat([part.targets for part in parts], 1))
            wanted = torch.cat([parts[0].cu_seqlens, 1024 + parts[1].cu_seqlens]).unique()
            assert torch.equal(batch.cu_seqlens.unique(), wanted)
            assert batch.longest == max(part.longest for part in parts)

    def test_more_documents_than_slots_is_an_error(self):
        row = np.arange(3001)
        packed_row([np.where(row % 12, row, 9)], 9)
        with pytest.raises(
            UserError, match="a row of 3000 tokens has 300 documents, and room for 256"
        ):
            packed_row([np.where(row % 10, row, 3001)], 3001)


DOCUMENTS = {
    "data.mode": "documents",
    "model.rotary.pos": "half_rope",
    "model.block.qk_norm": True,
    "model.attention.long_layers": (1,),
    "model.attention.yarn": True,
    "schedule.stages": (
        Stage(0.5, 1, 1.0, 60, (8, 30)),
        Stage(0.5, 2, 1.4, 0, (16, 80)),
        Stage(0.0, 2, 1.0, 0, (24, 120)),
    ),
    "schedule.extension_steps": 2,
    "log_every": 1,
    "val_tokens": 8192,
}


class TestTrainer:
    @pytest.mark.parametrize(
        "name, value, why",
        [
            (
                "schedule.stages",
                (Stage(1.0, windows=(0, 64)),),
                "rows of the stream are seen whole",
            ),
            ("schedule.val_windows", (0, 64), "rows of the stream are seen whole"),
            ("model.attention.backend", "triton", "PyTorch computes attention in rows"),
            ("model.attention.yarn", True, "there is nothing to follow"),
        ],
    )
    def test_what_rows_of_the_stream_cannot_do_is_refused(self, brief, name, value, why):
        with pytest.raises(UserError, match=why):
            check_config(vary(brief, {name: value}))

    @pytest.mark.parametrize("name", ["record", "record9", "record12"])
    def test_a_row_of_the_stream_is_seen_as_one_document_is(self, name):
        told = {"model.attention.yarn": False, "model.attention.scale": 0.1}
        config = vary(at_cpu_size(preset(name)), told).model
        model, row = GPT(config, 288), torch.randint(0, 288, (1, 90))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        settings = attention_settings(config, [(0, 0)], torch.device("cpu"))[0]
        ends, longest = (torch.tensor(n, dtype=torch.int32) for n in ([0, 90], 90))
        packed = model(row, None, Packed(ends, longest, *settings))
        assert torch.allclose(model(row), packed, atol=1e-4)

    def test_resuming_is_exact_inside_any_stage(self, brief, tmp_path):
        run = vary(brief, DOCUMENTS | {"val_tokens": 2048})  # its losses are nobody's here
        whole, again = broken_and_resumed(run, tmp_path, 3, 5, 7, 10)
        assert again.loader.position == whole.loader.position

    @pytest.mark.parametrize(
        ("mode", "world"),
        [
            ("documents", 2),
            pytest.param("documents", 4, marks=pytest.mark.slow),
            pytest.param("packed", 4, marks=pytest.mark.long),
        ],
    )
    def test_ranks_train_as_one_in_every_stage(self, brief, tmp_path, mode, world):
        sizes = {"data.mode": mode, "data.micro_batches": 4, "data.batch_tokens": 2048}
        run = vary(brief, DOCUMENTS | sizes)
        train(run, tmp_path / "one", echo=None)
        rank = ["--out", str(tmp_path / "two"), *as_arguments(run)]
        forked.train_on_ranks(rank, world, tmp_path / "two")
        one, two = (
            [[row.get("train_loss", row.get("val_loss")) for row in series(read_metrics(tmp_path / name / "metrics.jsonl"), kind)] for kind in ("step", "val")]
            for name in ("one", "two")
        )  # fmt: skip
        assert two[0] == pytest.approx(one[0], abs=1e-5)
        assert two[1] == pytest.approx(one[1], abs=1e-3), (
            "rows of validation are shorter on several ranks"
        )

    def test_the_last_validation_may_look_further(self, brief, tmp_path):
        wide = vary(brief, DOCUMENTS | {"schedule.val_windows": (0, 500)})
        runs = [train(run, tmp_path / name, echo=None) for name, run in (("wide", wide), ("narrow", vary(brief, DOCUMENTS)))]  # fmt: skip
        assert attn_settings_now(runs[0]).windows.tolist() == [24, 500]
        assert attn_settings_now(runs[1]).windows.tolist() == [24, 120]
        losses = [
            [row["val_loss"] for row in series(read_metrics(run.folder / "metrics.jsonl"), "val")]
            for run in runs
        ]
        assert losses[0][:-1] == losses[1][:-1] and losses[0][-1] != losses[1][-1]
        runs[0].step -= 1
        assert attn_settings_now(runs[0]).windows.tolist() == [24, 120], (
            "before the last step as in training"
        )
        with pytest.raises(UserError, match="data.mode=stream"):
            check_config(vary(brief, {"schedule.val_windows": (0, 500)}))

    def test_flex_attention_trains_as_the_default_does(self, brief, tmp_path):
        curves = []
        for backend in ("auto", "flex"):
            # a row of validation is long, and FlexAttention on a CPU is dense: quadratic in a row
            changes = DOCUMENTS | {"model.attention.backend": backend, "val_tokens": 2048}
            run = train(vary(brief, changes), tmp_path / backend, echo=None)
            assert run.model.backend == {"auto": "sdpa"}.get(backend, backend)
            rows = read_metrics(tmp_path / backend / "metrics.jsonl")
            curves.append([row["train_loss"] for row in series(rows, "step")])
        assert curves[1] == pytest.approx(curves[0], abs=1e-4)

    def test_packed_rows_are_the_stream_with_borders(self, embedded):
        options = DataConfig(str(embedded), "packed", batch_tokens=4096, micro_batches=4)
        plain = Loader(DataConfig(str(embedded), "stream", 1024, 4096, 4))
        loader = Loader(options)
        for _ in range(3):
            for packed, rows in zip(loader.next(), plain.next()):
                assert torch.equal(packed.inputs, rows.inputs)
                assert torch.equal(packed.targets, rows.targets)
                begins = (packed.inputs[0] == loader.shards.manifest.document).nonzero()[:, 0]
                borders = torch.cat([torch.tensor([0]), begins, torch.tensor([1024])]).unique()
                assert torch.equal(packed.cu_seqlens.unique(), borders.int())
                assert packed.longest == borders.diff().max()
        assert loader.position == plain.position

    def test_windows_and_frequencies_follow_the_stage(self, brief, tmp_path):
        run = build_run(vary(brief, DOCUMENTS), tmp_path, echo=None)
        assert [told.windows.tolist() for told in run.attn_settings] == [
            [8, 30],
            [16, 80],
            [24, 120],
        ]
        scales = [told.scale.item() for told in run.attn_settings]
        assert scales == sorted(scales) and scales[0] < scales[1]
        seen, real = [], run.forward
        run.forward = lambda *there, **few: (seen.append(there[2].windows.tolist()), real(*there, **few))[1]  # fmt: skip
        warm_up(run)
        assert [8, 30] in seen and [16, 80] in seen and [24, 120] in seen and run.step == 0

    def test_a_sample_is_read_as_the_model_was_trained(self, brief, tmp_path):
        from speedrun.sample import generate, load_trained, losses_of_rows

        run = train(vary(brief, DOCUMENTS), tmp_path, echo=None)
        trained = load_trained(tmp_path)
        assert trained.seq_len == run.config.data.max_doc_tokens
        assert torch.equal(trained.told.windows, run.attn_settings[2].windows)
        tokens = torch.randint(288, (1, 100), generator=torch.Generator().manual_seed(0))
        ends = torch.tensor([0, 100], dtype=torch.int32)
        known = run.model(tokens, None, Packed(ends, torch.tensor(100, dtype=torch.int32), *run.attn_settings[2]))  # fmt: skip
        assert torch.allclose(trained.logits(tokens), known, atol=1e-5)
        assert len(generate(trained, "def ", 5)) and not torch.allclose(
            known, run.model(tokens), atol=1e-3
        )
        assert losses_of_rows(trained, 2).shape == (2, min(512, trained.seq_len))

    def test_it_learns(self, brief, tmp_path):
        long = vary(brief, DOCUMENTS | {"steps": 60, "optim.adam.lr": 4e-3})
        train(long, tmp_path, echo=None)
        losses = [
            row["val_loss"] for row in series(read_metrics(tmp_path / "metrics.jsonl"), "val")
        ]
        assert losses[-1] < 3.4 < losses[0]
