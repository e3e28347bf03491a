"""What only a GPU can show: `pytest -m gpu` on one, `pytest -m multigpu` on two or more."""

import math
import subprocess
import sys

import pytest
import torch

from speedrun.checkpoint import latest_checkpoint, load_checkpoint
from speedrun.config import as_arguments, at_cpu_size, preset, vary
from speedrun.lab.hardware import find_gpus, jit, look
from speedrun.lab.runlog import read_metrics, series
from speedrun.launch import run_ranks
from speedrun.train import train

HAVE = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = [pytest.mark.gpu, pytest.mark.skipif(HAVE < 1, reason="no GPU that PyTorch can use")]
two_gpus = [pytest.mark.multigpu, pytest.mark.skipif(HAVE < 2, reason="fewer than two GPUs")]


def losses(folder) -> list[float]:
    return [record["val_loss"] for record in series(read_metrics(folder / "metrics.jsonl"), "val")]


class TestOneGPU:
    pytestmark = one_gpu

    def test_the_driver_and_pytorch_see_the_same_gpus(self):
        gpus = find_gpus()
        assert len(gpus) == HAVE and look().device == "cuda"
        for gpu, index in zip(gpus, range(HAVE)):
            facts = torch.cuda.get_device_properties(index)
            assert gpu.name == facts.name and gpu.capability == (facts.major, facts.minor)
            assert abs(gpu.memory_gb - facts.total_memory / 2**30) < 4

    def test_a_kernel_is_compiled_and_not_interpreted(self):
        pointer = torch.zeros(1, device="cuda")
        from tests_kernel import fill_one

        jit(fill_one)[(1,)](pointer)
        assert pointer.item() == 1.0 and type(jit(fill_one)).__name__ == "JITFunction"

    def test_float32_training_agrees_with_the_cpu(self, brief, tmp_path):
        here = vary(brief, {"device": "cuda"})
        train(here, tmp_path / "gpu", echo=None)
        train(vary(brief, {"device": "cpu"}), tmp_path / "cpu", echo=None)
        for gpu, cpu in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu")):
            assert gpu == pytest.approx(cpu, abs=2e-4)

    @pytest.mark.parametrize("name", ["cpu", "small", "record", "baseline"])
    def test_every_preset_compiles_and_learns_in_bf16(self, name, embedded, tmp_path):
        run = vary(
            at_cpu_size(preset(name), 30),
            {
                "precision": "bfloat16",
                "data.path": str(embedded),
                "optim.warmup_steps": 5,
                "optim.lr": 3e-3,
            },
        )
        train(run, tmp_path, echo=None)
        first, *_, last = losses(tmp_path)
        assert abs(first - math.log(288)) < 0.3 and last < first - 1.5

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
        from speedrun.lab.hardware import Problem

        with pytest.raises(Problem, match="not finite"):
            train(vary(brief, {"device": "cuda", "optim.lr": 1e30}), tmp_path, echo=None)

    def test_the_launcher_trains_and_never_touches_cuda(self, brief, tmp_path):
        code = (
            "import sys, torch; from pathlib import Path; from speedrun.launch import run_ranks; from speedrun.lab.hardware import look;"
            "look(); run_ranks(sys.argv[2:], 1, Path(sys.argv[1])); assert not torch.cuda.is_initialized()"
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


class TestTwoGPUs:
    pytestmark = two_gpus

    def test_two_gpus_agree_with_one(self, brief, tmp_path):
        here = vary(brief, {"device": "cuda"})
        train(here, tmp_path / "one", echo=None)
        run_ranks(
            ["-m", "speedrun.train", "--out", str(tmp_path / "two"), *as_arguments(here)],
            2,
            tmp_path / "two",
        )
        for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two")):
            assert two == pytest.approx(one, abs=2e-4)

    def test_a_killed_rank_is_reported_and_nobody_is_left(self, brief, tmp_path):
        import psutil

        from speedrun.lab.hardware import Problem
        from speedrun.launch import pulses

        killed = []

        def kill_rank_1(line: str) -> None:
            if line.startswith("step:3/") and not killed:
                killed.append(next(pulse.pid for pulse in pulses(tmp_path) if pulse.rank == 1))
                psutil.Process(killed[0]).kill()

        long = vary(brief, {"device": "cuda", "steps": 100_000, "val_every": 100_000})
        with pytest.raises(Problem, match="rank 1 was killed by SIGKILL"):
            run_ranks(
                ["-m", "speedrun.train", "--out", str(tmp_path), *as_arguments(long)],
                2,
                tmp_path,
                echo=kill_rank_1,
            )
        assert not any(psutil.pid_exists(pulse.pid) for pulse in pulses(tmp_path))
