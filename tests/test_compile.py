"""The forward pass in compiled parts, and recorded passes: graphs counted, gradients compared, what a recorder may and may not do."""

from contextlib import contextmanager
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
from speedrun.schedule import Stage
from speedrun.train import (
    build_run,
    graphs_memory,
    train_step,
    val_batches,
    validation_loss,
    warm_up,
)

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
    return packed_row([row], 287)


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
            few = torch.tensor([64, 1])
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
        monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (mock.Mock,), {}))
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

    def test_nothing_is_borrowed_before_there_is_a_graph_and_its_pool_after(self, drawn, monkeypatch):  # fmt: skip
        entered, (own, usual) = [], (mock.Mock(), mock.Mock())

        @contextmanager
        def noted(what):
            entered.append(what)
            yield

        monkeypatch.setattr(torch.cuda, "current_stream", lambda: usual)
        monkeypatch.setattr(torch.cuda, "stream", noted)
        monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: noted(pool.id))
        recorder = Recorder(CPU)
        with graphs_memory(recorder):
            assert not entered
        recorder.recording, recorder.stream = True, own
        recorder("a", torch.sum, [torch.ones(4)])
        with graphs_memory(recorder):
            assert entered == [own, "pool"] and not usual.wait_stream.called
            own.wait_stream.assert_called_once_with(usual)
        usual.wait_stream.assert_called_once_with(own)

    def test_one_graph_for_each_key_that_is_called_while_recording(self, drawn, monkeypatch):
        recorder, calls = Recorder(CPU), []

        def mean(x):
            calls.append(x)
            return x.mean()

        def replay(graph):
            (call,) = (call for call, _, _ in recorder.calls.values() if call.graph is graph)
            call.function()

        def rows(number):
            return [torch.full((4,), float(number))]

        assert recorder("a", mean, rows(0)) == 0 and not drawn and not recorder.calls
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay, raising=False)
        recorder.recording = True
        for number in range(2, 5):
            assert recorder("a", mean, rows(number)) == number
        assert len(drawn) == 1 and drawn[0][1] == "pool"
        assert drawn[0][2] == {"stream": "stream", "capture_error_mode": "thread_local"}
        recorder.recording = False
        assert recorder("a", mean, rows(5)) == 5 and len(drawn) == 1, "replayed for good"
        assert all(x is calls[1] for x in calls[1:]), "one place for all batches"
        assert recorder("b", mean, rows(6)) == 6 and set(recorder.calls) == {"a"}
        recorder.recording = True
        assert recorder("b", mean, rows(7)) == 7 and set(recorder.calls) == {"a", "b"}

    def test_a_batch_of_another_size_is_refused_and_not_cut(self, drawn):
        recorder = Recorder(CPU)
        recorder.recording = True
        recorder("a", torch.sum, [torch.ones(4)])
        with pytest.raises(RuntimeError):
            recorder("a", torch.sum, [torch.ones(5)])
        with pytest.raises(ValueError):
            recorder("a", torch.sum, [torch.ones(4), torch.ones(4)])

    def test_the_callers_tensors_are_not_written_to(self, drawn):
        recorder, mine = Recorder(CPU), torch.ones(3)
        recorder.recording = True
        recorder("a", lambda x: x.mul_(2).sum(), [mine])
        assert torch.equal(mine, torch.ones(3))

    def test_a_call_without_a_stream_is_never_recorded(self, drawn):
        calls = []
        call = GraphedCall(lambda: calls.append(1))
        for _ in range(5):
            call()
        assert len(calls) == 5 and call.graph is None and not drawn


class TestWarmUp:
    def test_stages_are_recorded_in_their_order_after_all_plain_passes_the_longest_first(
        self, brief, tmp_path
    ):
        """Then no plain pass lies beside the graphs' pool."""
        stages = tuple(Stage(1 / 3, factor, 1.0) for factor in (1, 2, 3))
        changes = {"schedule.stages": stages, "steps": 12, "warmup": 2}
        run = build_run(vary(brief, changes), tmp_path, echo=None)
        passes = []

        class Listening(Recorder):
            def __call__(self, key, function, tensors):
                passes.append((self.recording, run.schedule.at(run.step).stage, len(tensors[0])))
                assert key == run.schedule.at(run.step).stage
                return function(*tensors)

        run.recorder = Listening(CPU)
        run.recorder.stream = "a GPU's"
        losses = [train_step(run).item() for _ in range(3)]
        run = build_run(vary(brief, changes), tmp_path / "again", echo=None)
        run.recorder, before = Listening(CPU), len(passes)
        run.recorder.stream = "a GPU's"
        warm_up(run)
        kinds = list(dict.fromkeys(p[:2] for p in passes[before:]))
        assert kinds == [(False, 2), (False, 1), (False, 0), (True, 0), (True, 1), (True, 2)]
        assert not run.recorder.recording
        assert [train_step(run).item() for _ in range(3)] == losses, "and undone"

    def test_where_nothing_can_be_recorded_no_step_is_taken_for_it(self, brief, tmp_path):
        run = build_run(vary(brief, {"warmup": 2}), tmp_path, echo=None)
        with mock.patch("speedrun.train.train_step") as taken:
            warm_up(run)
        assert taken.call_count == 2


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
            warm_up(run)
            losses[on] = [train_step(run).item() for _ in range(config.steps)]
            with mock.patch.object(run.recorder, "calls", {}):  # in memory of its own
                alone = validation_loss(run, val_batches(run, config.val_tokens))
            borrowed = validation_loss(run, val_batches(run, config.val_tokens))
            assert borrowed == pytest.approx(alone, rel=1e-5)
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
            assert validation_loss(run, val_batches(run, config.val_tokens)) == borrowed
            torch.cuda.empty_cache()
            assert not on or torch.cuda.memory_reserved() == reserved
            run.step = config.steps - 1  # a replay after it is none the worse
            losses[on].append(train_step(run).item())
            recorded = [call.graph for call, _, _ in run.recorder.calls.values()]
            assert all(recorded) and len(recorded) >= 3 if on else not recorded
        assert np.allclose(losses[True], losses[False], rtol=2e-2)

    def test_memory_of_graphs_is_borrowed_between_replays(self):
        """64 MiB that a recorded function needs for a moment serve others, and what those write does the next replay no harm."""
        device = torch.device("cuda")
        recorder, x = Recorder(device), torch.arange(16.0)

        def large(x):
            return (x.to(device)[:, None] * torch.ones(2**20, device=device)).sum() / 2**20

        for _ in range(2):
            assert recorder("large", large, [x]) == 120.0
            recorder.recording = True
        assert recorder("large", large, [x]) == 120.0 and recorder.calls
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        for number in range(3):
            with graphs_memory(recorder):
                lent = torch.full((2**24,), float(number), device=device)
                assert lent.sum().item() == number * 2**24
                del lent
            assert torch.cuda.memory_reserved() == reserved
            assert recorder("large", large, [x + number]) == 120.0 + 16 * number

    def test_a_recorder_reads_what_lies_in_its_places_now(self):
        device = torch.device("cuda")
        recorder, rate = Recorder(device), torch.tensor(2.0, device=device)
        for number in range(6):
            rate.fill_(number)
            recorder.recording = number > 0
            assert (
                recorder("k", lambda x: (x.to(device) * rate).sum(), [torch.full((3,), 2.0)])
                == 6 * number
            )
        assert recorder.calls["k"][0].graph is not None
