"""What only a GPU can show: `pytest -m gpu` on one, `pytest -m multigpu` on two or more."""

import math
import shutil
import subprocess
import sys

import optimizer_ranks
import pytest
import torch
from optimizer_ranks import everything
from test_switches import WAYS

from speedrun.checkpoint import latest_checkpoint, load_checkpoint
from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.lab.bench import Peak, bench, clocked, ledger, roofline_ms
from speedrun.lab.hardware import detect_machine, find_gpus, jit
from speedrun.lab.metrics import read_metrics, series
from speedrun.measure import many_gpus
from speedrun.model.gpt import GPT
from speedrun.model.head import round_up
from speedrun.optim.optimizer import MuonAdam
from speedrun.presets import as_arguments, preset
from speedrun.supervise import run_ranks
from speedrun.train import compile_model, train

HAVE = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(HAVE < 1, reason="no GPU that PyTorch can use")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(HAVE < 2, reason="fewer than two GPUs")]


def losses(folder) -> list[float]:
    return [record["val_loss"] for record in series(read_metrics(folder / "metrics.jsonl"), "val")]


class TestOneGPU:
    pytestmark = one_gpu

    def test_the_driver_and_pytorch_see_the_same_gpus(self):
        gpus = find_gpus()
        assert len(gpus) == HAVE and detect_machine().device == "cuda"
        for gpu, index in zip(gpus, range(HAVE)):
            facts = torch.cuda.get_device_properties(index)
            assert gpu.name == facts.name and gpu.capability == (facts.major, facts.minor)
            assert abs(gpu.memory_gb - facts.total_memory / 2**30) < 4

    def test_a_kernel_is_compiled_and_not_interpreted(self):
        pointer = torch.zeros(1, device="cuda")
        from tests_kernel import fill_one

        jit(fill_one)[(1,)](pointer)
        assert pointer.item() == 1.0 and type(jit(fill_one)).__name__ == "JITFunction"

    def test_a_product_takes_as_long_as_the_chip_needs_however_it_is_timed(self):
        a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(a)
        works = {"once": lambda: torch.mm(a, a, out=out), "nothing": lambda: None}
        times = {
            (cold, graph): bench(works, "cuda", 9, cold=cold, graph=graph)["once"].p50
            for cold in (False, True)
            for graph in (False, True)
        }
        least = roofline_ms(2 * 4096**3, 0, Peak(2.5e15, 1.0))
        assert all(least < ms < 100 for ms in times.values()), times
        assert clocked(works["once"], "cuda")[0] > least

    def test_a_ledger_of_kernels(self):
        a = torch.randn(2048, 2048, device="cuda", requires_grad=True)
        book = ledger(lambda: (a @ a).softmax(-1).sum().backward(), "cuda")
        assert min(book[kind] for kind in ("matmul", "head", "pointwise")) > 0
        assert sum(ms for kind, ms in book.items() if kind != "wall") < 2 * book["wall"]

    def test_float32_training_agrees_with_the_cpu(self, brief, tmp_path):
        here = vary(brief, {"device": "cuda"})
        train(here, tmp_path / "gpu", echo=None)
        train(vary(brief, {"device": "cpu"}), tmp_path / "cpu", echo=None)
        for gpu, cpu in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu")):
            assert gpu == pytest.approx(cpu, abs=2e-4)

    @pytest.mark.parametrize("name", ["cpu", "small", "small_gpt2", "record", "record11"])
    def test_every_preset_compiles_and_learns_in_bf16(self, name, embedded, tmp_path):
        run = vary(
            at_cpu_size(preset(name), 30),
            {
                "precision": "bfloat16",
                "data.path": str(embedded),
                "schedule.warmup_steps": 5,
                "optim.adam.lr": 3e-3,
            },
        )
        train(run, tmp_path, echo=None)
        first, *_, last = losses(tmp_path)
        words = round_up(288, run.model.head.pad_vocab_to)
        assert abs(first - math.log(words)) < 0.3 and last < first - 1.5

    @pytest.mark.parametrize("way", WAYS)
    def test_every_switch_compiles_and_learns_in_bf16(self, way, embedded, tmp_path):
        torch._dynamo.reset()
        muon = {"optim.matrices": "muon", "optim.matrix_lr": 0.02, "schedule.warmup_steps": 0}
        real = {"precision": "bfloat16", "device": "cuda", "compile": True}
        run = vary(
            at_cpu_size(preset("cpu_gpt2")), WAYS[way] | muon | real | {"data.path": str(embedded)}
        )
        train(run, tmp_path, echo=None)
        first, last = losses(tmp_path)
        assert last < first - (0.4 if way == "all" else 0.8)  # as on the CPU

    @pytest.mark.parametrize("rows", [8, 32])
    def test_compiled_gradients_are_eager_ones_however_long_the_pass(self, rows):
        """PyTorch 2.10 to 2.13 left gradients of gains and biases unwritten from 16,384 tokens on (pytorch#193061)."""
        model = GPT(preset("small_gpt2").model, 50_257).cuda()
        tokens = torch.randint(0, 50_257, (rows, 1025), device="cuda")
        found = []
        for forward in (model, compile_model(model)):
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, eager in found[0].items():
            assert (found[1][name] - eager).norm() < 0.03 * eager.norm(), name

    def test_resuming_goes_on_where_it_stopped(self, brief, tmp_path):
        here = vary(brief, {"device": "cuda"})
        train(here, tmp_path / "whole", echo=None)
        train(vary(here, {"max_steps": 7}), tmp_path / "broken", echo=None)
        train(here, tmp_path / "broken", again=True, echo=None)
        whole, broken = (
            load_checkpoint(latest_checkpoint(tmp_path / name))[0] for name in ("whole", "broken")
        )
        for name, weight in whole.items():
            assert (weight - broken[name]).norm() <= 1e-4 * weight.norm() + 1e-6, name

    def test_an_infinity_is_named(self, brief, tmp_path):
        from speedrun.lab.errors import UserError

        with pytest.raises(UserError, match="not finite"):
            train(vary(brief, {"device": "cuda", "optim.adam.lr": 1e9}), tmp_path, echo=None)

    def test_the_launcher_trains_and_never_touches_cuda(self, brief, tmp_path):
        code = (
            "import sys, torch; from pathlib import Path; from speedrun.supervise import run_ranks; from speedrun.lab.hardware import detect_machine;"
            "detect_machine(); run_ranks(sys.argv[2:], 1, Path(sys.argv[1])); assert not torch.cuda.is_initialized()"
        )
        rank = [
            "-m",
            "speedrun.train",
            "--out",
            str(tmp_path),
            *as_arguments(vary(brief, {"device": "cuda"})),
        ]
        subprocess.run([sys.executable, "-c", code, str(tmp_path), *rank], check=True, timeout=200)
        assert losses(tmp_path)[-1] < losses(tmp_path)[0]

    def test_two_ranks_share_a_gpu_through_gloo(self, brief, tmp_path):
        here = vary(brief, {"device": "cuda"})
        train(here, tmp_path / "one", echo=None)
        program = [
            "-m",
            "speedrun.train",
            "--out",
            str(tmp_path / "two"),
            *as_arguments(vary(here, {"backend": "gloo"})),
        ]
        run_ranks(program, 2, tmp_path / "two")
        for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
            assert two == pytest.approx(one, abs=2e-4)


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    return optimizer_ranks.starter(
        tmp_path_factory.mktemp("gpus"), "cuda", optimizer_ranks.SCENARIOS
    )


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory):
    return optimizer_ranks.starter(tmp_path_factory.mktemp("cpus"))


def steps_apart(one: dict, other: dict) -> dict[str, float]:
    """How far two results lie from each other, as a share of the way from their common start, by parameter."""
    apart = {}
    for name, start in one["start"].items():
        assert torch.equal(start, other["start"][name])
        way = one["parameters"][name].float() - start.float()
        between = other["parameters"][name].float() - one["parameters"][name].float()
        apart[name] = (between.norm() / way.norm()).item()
    return apart


def assert_nothing_moved(result: dict) -> None:
    """The step with the NaN has changed nothing but whether gradients wait, and its parameter is named."""
    before, now = everything(result["at"][5]), everything(result)
    assert set(before) - set(now) == {name for name in before if name.endswith("/pending_grad")}
    moved = {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}
    assert moved == {"optimizer/pending"} and result["nonfinite"] == ["values"]


def apart(one: dict, other: dict) -> dict[str, float]:
    """How far two states lie from each other, as a share of their length, by label; only what is counted in floats."""
    found = {}
    for label, tensor in one["state"].items():
        if tensor.is_floating_point():
            between = other["state"][label].float() - tensor.float()
            found[label] = (between.norm() / tensor.float().norm().clamp(min=1e-30)).item()
    return found


def record_after_four_steps(streams: bool) -> dict[str, torch.Tensor]:
    """Record 89's parameters at full size, after random gradients."""
    optimizer = many_gpus.small_record(1, "cuda")
    optimizer.warm_up()
    if not streams:
        optimizer.streams = dict.fromkeys(optimizer.states)
    for index in range(4):
        torch.manual_seed(index)
        many_gpus.fill_gradients(optimizer, index)
        optimizer.step(many_gpus.settings_at(index))
    assert all(not state.comm.full_grad.any() for state in optimizer.states.values())
    return {name: p.detach().cpu() for name, p in optimizer.params.items()}


class TestMuonAdamOnOneGPU:
    pytestmark = one_gpu

    def test_streams_change_no_bit_at_full_size(self):
        start = many_gpus.record_parameters(1, "cuda")["vo"].detach().bfloat16().cpu()
        beside, alone = (record_after_four_steps(streams) for streams in (True, False))
        assert not torch.equal(beside["vo"], start)
        assert [name for name, p in beside.items() if not torch.equal(p, alone[name])] == []

    @pytest.mark.parametrize("scenario", ["float32", "float32-clipped", "adamw-float32-clipped"])
    def test_six_steps_replayed_as_graphs_are_those_of_a_cpu(self, scenario, on_gpus, on_cpus):
        cpu, gpu = on_cpus(scenario, 1), on_gpus(scenario, 1)
        ways = steps_apart(cpu, gpu)
        assert max(ways.values()) < 2e-2, ways  # Muon's products round in float16
        states = {label: d for label, d in apart(cpu, gpu).items() if "second_" not in label}
        assert max(states.values()) < 1e-4, states

    @pytest.mark.parametrize("scenario", ["integers", "adamw-integers"])
    def test_it_goes_on_from_a_saved_state(self, scenario, on_gpus):
        whole = everything(on_gpus(scenario, 1))
        resumed = everything(on_gpus(scenario, 1, saved=(scenario, 1, 5)))
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []

    @pytest.mark.parametrize("scenario", ["integers-nan", "adamw-integers-nan-clipped"])
    def test_nonfinite_gradient_stops_all_and_has_a_name(self, scenario, on_gpus):
        assert_nothing_moved(on_gpus(scenario, 1))

    @pytest.mark.parametrize("table", [optimizer_ranks.TABLE, optimizer_ranks.adamw_table()])
    def test_warming_up_changes_nothing(self, table):
        """It compiles and records every update, the tied ones' as well."""
        parameters = optimizer_ranks.model("cuda")
        optimizer = MuonAdam(parameters, table, optimizer_ranks.CONFIG)
        before, state = optimizer_ranks.copies(parameters), optimizer.state_dict()
        for p in parameters.values():
            p.grad += 1.0
        optimizer.warm_up()
        for name, p in optimizer_ranks.copies(parameters).items():
            assert torch.equal(p, before[name]), name
        for label, tensor in optimizer.state_dict().items():
            assert torch.equal(tensor, state[label]), label
        for name, call in optimizer.calls.items():
            graphable = optimizer.states[name].rule.graphable
            assert (call.graph is not None) == graphable, name
        assert optimizer.skip.item() == 0 and optimizer.nonfinite_params() == []


WORLDS = [count for count in (2, 4, 8) if count <= max(HAVE, 2)]
on_each = pytest.mark.parametrize("world", WORLDS)
on_all = pytest.mark.parametrize("world", WORLDS[-1:])


class TestMuonAdamOnManyGPUs:
    pytestmark = two_gpus

    @on_each
    def test_sums_of_integers_lead_to_the_same_numbers(self, world, on_gpus):
        one, many = everything(on_gpus("integers", 1)), everything(on_gpus("integers", world))
        banks = ("qk", "mlp")  # a product may come out otherwise in a smaller batch
        rest = [name for name in one if not name.startswith(banks)]
        assert [name for name in rest if not torch.equal(one[name], many[name])] == []
        for name in banks:
            momentum = f"{name}/momentum_buffer"
            assert torch.equal(one[momentum], many[momentum]), name

    @on_all
    @pytest.mark.parametrize("scenario", ["float32", "float32-clipped", "adamw-float32-clipped"])
    def test_real_gradients_lead_to_the_same_step(self, scenario, world, on_gpus):
        ways = steps_apart(on_gpus(scenario, 1), on_gpus(scenario, world))
        assert max(ways.values()) < 1e-3, ways

    @on_all
    @pytest.mark.parametrize(
        "scenario", ["integers", "float32-clipped", "adamw-integers", "adamw-float32-clipped"]
    )
    def test_all_ranks_are_the_same_to_the_bit(self, scenario, world, on_gpus):
        digests = on_gpus(scenario, world)["digests"]
        assert len(digests) == world and len(set(digests)) == 1

    @on_each
    def test_sums_in_bfloat16_differ_by_its_rounding(self, world, on_gpus):
        """Each of a ring's world - 1 sums rounds once."""
        one, many = on_gpus("normal", 1)["state"], on_gpus("normal", world)["state"]
        for name in ("qk/momentum_buffer", "mlp/momentum_buffer"):
            between = (many[name] - one[name]).norm()
            assert between < (world - 1) ** 0.5 * 2**-7 * one[name].norm(), name

    @on_all
    def test_it_goes_on_from_the_state_of_another_number_of_ranks(self, world, on_gpus):
        ways = {}
        whole = everything(on_gpus("integers", world))
        on_gpus("integers", 1)  # whose file the next one reads
        resumed = everything(on_gpus("integers", world, saved=("integers", 1, 5)))
        for name, tensor in whole.items():
            ways[name] = (resumed[name].float() - tensor.float()).norm().item()
        assert max(ways[name] for name in ways if not name.startswith(("qk", "mlp"))) == 0, ways

    @on_all
    def test_streams_and_overlap_change_no_bit_at_full_size(self, world, on_gpus):
        beside, in_turn = on_gpus("record-streams", world), on_gpus("record-in-turn", world)
        assert beside["hashes"] == in_turn["hashes"]
        assert set(beside["left"].values()) == {0.0}

    @on_all
    @pytest.mark.parametrize("scenario", ["integers-nan", "adamw-integers-nan-clipped"])
    def test_nonfinite_gradient_on_the_last_rank_stops_all(self, scenario, world, on_gpus):
        assert_nothing_moved(on_gpus(scenario, world))


class TestManyGPUs:
    pytestmark = two_gpus

    @staticmethod
    def program(config, folder, *more):
        return ["-m", "speedrun.train", "--out", str(folder), *more, *as_arguments(config)]

    @staticmethod
    def here(brief, **changes):
        return vary(brief, {"device": "cuda", "data.micro_batches": 8} | changes)

    @on_each
    def test_many_gpus_agree_with_one(self, world, brief, tmp_path):
        here = self.here(brief)
        train(here, tmp_path / "one", echo=None)
        run_ranks(self.program(here, tmp_path / "many"), world, tmp_path / "many")
        for one, many in zip(losses(tmp_path / "one"), losses(tmp_path / "many")):
            assert many == pytest.approx(one, abs=2e-4)

    @on_all
    def test_a_run_goes_on_with_another_number_of_gpus(self, world, brief, tmp_path):
        here = self.here(brief)
        train(here, tmp_path / "whole", echo=None)
        broken = tmp_path / "broken"
        run_ranks(self.program(vary(here, {"max_steps": 7}), broken), 2, broken)
        for again in {world, 1}:
            folder = tmp_path / f"on{again}"
            shutil.copytree(broken, folder)
            run_ranks(["-m", "speedrun.train", "--resume", str(folder)], again, folder)
            assert losses(folder)[-1] == pytest.approx(losses(tmp_path / "whole")[-1], abs=2e-4)

    @on_all
    def test_a_killed_rank_is_reported_and_nobody_is_left(self, world, brief, tmp_path):
        import psutil

        from speedrun.heartbeat import read_heartbeats
        from speedrun.lab.errors import UserError

        killed, last = [], world - 1

        def kill_the_last(line: str) -> None:
            if line.startswith("step:3/") and not killed:
                killed.append(next(s.pid for s in read_heartbeats(tmp_path) if s.rank == last))
                psutil.Process(killed[0]).kill()

        long = self.here(brief, steps=100_000, val_every=100_000)
        with pytest.raises(UserError, match=f"rank {last} was killed by SIGKILL"):
            run_ranks(self.program(long, tmp_path), world, tmp_path, echo=kill_the_last)
        assert not any(psutil.pid_exists(status.pid) for status in read_heartbeats(tmp_path))
