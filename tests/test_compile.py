"""The forward pass in compiled parts, and recorded passes: graphs counted, gradients compared, what a recorder may and may not do."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.data.loader import packed_row
from speedrun.lab.compile import GraphedCall, Recorder, compiled_copy
from speedrun.model.attention import Packed
from speedrun.model.compiled import can_record, compile_model
from speedrun.model.gpt import GPT, attention_settings
from speedrun.passes import accumulate, forward_loss
from speedrun.presets import known_presets, preset
from speedrun.train import build_run, train_step

CPU = torch.device("cpu")
PLAIN = {"model.head.fp8": False, "model.block.fp8": False, "model.model_dim": 32}
PLAIN |= {"schedule.stages": preset("cpu").schedule.stages}


def narrow_record(layers: int = 11, **changes) -> GPT:
    """The record's model, with all its connections, 32 wide and with noise in every weight."""
    long = {"model.num_layers": layers, "model.attention.long_layers": (3, layers - 1)}
    model = GPT(vary(at_cpu_size(preset("record")), PLAIN | long | changes).model, 288)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def row_of(tokens: int, seed: int = 0, every: int = 40):
    row = np.random.default_rng(seed).integers(0, 287, tokens + 1)
    row[::every] = 287
    return packed_row(row, 287)


def told_of(model: GPT, windows=(64, 128)):
    (told,) = attention_settings(model.config, [windows], CPU)
    return CPU, "float32", told


def one_for_each_model() -> list[str]:
    """A preset for each model and way to read; others differ in optimizer and schedule alone."""
    found: dict = {}
    for name in sorted(known_presets()):
        config = at_cpu_size(preset(name))
        found.setdefault((config.model, config.data.mode), name)
    return list(found.values())


@pytest.fixture
def counted():
    """Compiled by a backend that only captures; yields the count of graphs."""
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def gradients(model: GPT, forward, batch, told) -> dict:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss = accumulate(forward, [batch], 2, *told)
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss}


class TestParts:
    def test_ten_graphs_for_all_numbers_of_tokens_and_windows_and_ten_for_validation(self, counted):
        model = narrow_record()
        forward = compile_model(model)
        for tokens, windows in (
            (128, (64, 128)),
            (192, (64, 128)),
            (320, (32, 100)),
            (1024, (8, 9)),
        ):
            batch, told = row_of(tokens, tokens), told_of(model, windows)
            own, plain = (gradients(model, way, batch, told) for way in (forward, model))
            for name, wanted in plain.items():
                assert torch.equal(own[name], wanted), name
            assert counted() == 10
        for tokens in (128, 512):
            with torch.no_grad():
                found = [forward_loss(way, row_of(tokens), *told) for way in (forward, model)]
            assert torch.equal(*found) and counted() == 20

    @pytest.mark.parametrize("name", one_for_each_model())
    def test_every_preset_in_parts_computes_what_it_computes_whole(self, counted, name):
        config = at_cpu_size(preset(name))
        model, few = GPT(config.model, 288), None
        if config.model.head.fp8:
            few = torch.tensor(64)
        if config.data.mode == "stream":
            ids = torch.randint(288, (2, 33), generator=torch.Generator().manual_seed(0))
            given = (ids[:, :-1], ids[:, 1:])
        else:
            inputs, targets, borders, longest = row_of(128)
            given = (inputs, targets, Packed(borders, longest, *told_of(model)[2]))
        found = [forward(*given, candidates=few) for forward in (model, compile_model(model))]
        assert torch.equal(*found) and counted() >= 4
        grads = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in found]  # fmt: skip
        for mine, theirs in zip(*grads):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)

    def test_two_models_do_not_share_what_is_compiled(self, counted):
        for layers in (4, 5):
            model = narrow_record(layers)
            told, batch = told_of(model), row_of(96)
            found = [accumulate(way, [batch], 1, *told) for way in (compile_model(model), model)]
            assert torch.equal(*found)

    def test_a_copy_is_compiled_and_the_function_is_not(self):
        def twice(x):
            return 2 * x

        with mock.patch("torch.compile", side_effect=lambda function, **told: (function, told)):
            copy, told = compiled_copy(twice)
        assert copy is not twice and copy(3) == 6 and told == {"dynamic": False, "fullgraph": True}
        assert compiled_copy(twice, on=False) is twice


class TestRecorder:
    def test_on_a_cpu_the_function_is_called_with_the_tensors_themselves(self):
        given, seen = [torch.ones(2), torch.zeros(3)], []
        recorder = Recorder(CPU)
        assert (
            recorder("k", lambda *tensors: (seen.extend(tensors), torch.tensor(5.0))[1], given) == 5
        )
        assert all(a is b for a, b in zip(seen, given, strict=True)) and not recorder.calls

    def test_off_it_calls_even_where_there_is_a_gpu(self):
        with mock.patch("speedrun.lab.compile.new_stream", side_effect=AssertionError):
            assert Recorder(torch.device("cuda"), on=False).stream is None

    @pytest.fixture
    def drawn(self, monkeypatch):
        """A recorder as on a GPU, whose graphs are lists of what was called while they were recorded."""

        monkeypatch.setattr("speedrun.lab.compile.new_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock)
        recorded = []

        class Recording:
            def __init__(self, graph, pool, **told):
                recorded.append((graph, pool, told))

            def __enter__(self):
                return self

            def __exit__(self, *problem):
                return False

        monkeypatch.setattr(torch.cuda, "graph", Recording)
        return recorded

    def test_one_graph_for_each_key_recorded_at_the_third_call(self, drawn):
        recorder, calls = Recorder(CPU), []

        def mean(x):
            calls.append(x)
            return x.mean()

        for number in range(2):
            assert recorder("a", mean, [torch.full((4,), float(number))]) == number
        assert not drawn
        own = recorder.calls["a"][0]
        with mock.patch.object(torch.cuda, "CUDAGraph", lambda: mock.Mock(replay=own.function)):
            for number in range(2, 5):
                assert recorder("a", mean, [torch.full((4,), float(number))]) == number
        assert len(drawn) == 1 and drawn[0][1] == "pool"
        assert drawn[0][2] == {"stream": "stream", "capture_error_mode": "thread_local"}
        assert all(x is calls[0] for x in calls), "one place for all batches"
        recorder("b", mean, [torch.ones(2)])
        assert set(recorder.calls) == {"a", "b"}

    def test_a_batch_of_another_size_is_refused_and_not_cut(self, drawn):
        recorder = Recorder(CPU)
        recorder("a", torch.sum, [torch.ones(4)])
        with pytest.raises(RuntimeError):
            recorder("a", torch.sum, [torch.ones(5)])
        with pytest.raises(ValueError):
            recorder("a", torch.sum, [torch.ones(4), torch.ones(4)])

    def test_the_callers_tensors_are_not_written_to(self, drawn):
        recorder, mine = Recorder(CPU), torch.ones(3)
        recorder("a", lambda x: x.mul_(2).sum(), [mine])
        assert torch.equal(mine, torch.ones(3))

    def test_a_call_without_a_stream_is_never_recorded(self, drawn):
        calls = []
        call = GraphedCall(lambda: calls.append(1))
        for _ in range(5):
            call()
        assert len(calls) == 5 and call.graph is None and not drawn


class TestWhatCanBeRecorded:
    @pytest.mark.parametrize("backend", ["triton", "fa2", "fa3", "fa4", "flex", "sdpa"])
    def test_only_what_reads_no_number_of_the_batch(self, backend):
        model = narrow_record(2, **{"model.attention.long_layers": (1,)})
        model.backend = backend
        assert not can_record(model, "documents") and not can_record(model, "stream"), "on a CPU"
        on_gpu = mock.Mock(backend=backend)
        on_gpu.parameters = lambda: iter([mock.Mock(is_cuda=True)])
        assert can_record(on_gpu, "stream")
        assert (
            can_record(on_gpu, "documents") == can_record(on_gpu, "packed") == (backend == "triton")
        )


@pytest.mark.gpu
class TestOnAGPU:
    def test_replayed_passes_are_eager_ones(self, embedded, tmp_path):
        """Three stages, several passes a step: recorded and launched by Python, from the same weights, on the same batches."""
        config = vary(at_cpu_size(preset("record_200m")), {"data.path": str(embedded)})
        config = vary(config, {"device": "cuda", "compile": True, "precision": "bfloat16"})
        losses = {}
        for on in (True, False):
            torch._dynamo.reset()
            run = build_run(config, tmp_path / str(on), echo=None)
            run.recorder = Recorder(run.ranks.device, on)
            losses[on] = [train_step(run).item() for _ in range(config.steps)]
            recorded = [call.graph for call, _, _ in run.recorder.calls.values()]
            assert all(recorded) and len(recorded) >= 3 if on else not recorded
        assert np.allclose(losses[True], losses[False], rtol=2e-2)

    def test_a_recorder_reads_what_lies_in_its_places_now(self):
        device = torch.device("cuda")
        recorder, rate = Recorder(device), torch.tensor(2.0, device=device)
        for number in range(6):
            rate.fill_(number)
            assert recorder("k", lambda x: (x * rate).sum(), [torch.full((3,), 2.0)]) == 6 * number
        assert recorder.calls["k"][0].graph is not None
