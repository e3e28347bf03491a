"""The script that runs ablations."""

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from ablate import main

from speedrun.lab.errors import run_main

ROOT = Path(__file__).parent.parent


def arguments(out: Path, data: Path, *more: str) -> list[str]:
    sizes = ["--steps", "6", "--val-tokens", "2048", "--warmup", "0", "--data.path", str(data)]
    return [str(out), *more, "--preset", "cpu_gpt2", *sizes]


def script(words: list[str]) -> int:
    return run_main(lambda: main(words))


def ablate(*words) -> subprocess.CompletedProcess:
    return forked.run("test_ablate:script", arguments(*words))


@pytest.fixture
def refused(capsys):
    """What the script says where it trains nothing, without a process for each."""

    def ask(*words) -> str:
        assert run_main(lambda: main(arguments(*words))) == 1
        return capsys.readouterr().err

    return ask


@pytest.fixture(scope="module")
def ablated(tmp_path_factory, embedded):
    out = tmp_path_factory.mktemp("ablated") / "x" / "norms.json"
    arm = ("--arm", "plain norms", "model.block.norm=rms", "model.block.biases=False")
    done = ablate(out, embedded, *arm, "--seeds", "2", "--control", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


class TestAblate:
    def test_runs_are_paired_and_stamped(self, ablated):
        out, said = ablated
        result = json.loads(out.read_text())
        arms = result["data"]["arms"]
        assert {arm: [run["config"]["seed"] for run in runs] for arm, runs in arms.items()} == {
            "control": [0, 1, 2],
            "plain norms": [0, 1],
        }
        assert arms["plain norms"][0]["config"]["model"]["block"]["norm"] == "rms"
        assert arms["plain norms"][0]["config"]["model"]["block"]["biases"] is False
        assert (
            result["stamp"]["corpus"]["sha256"]
            and "speedrun.model.mlp" in result["stamp"]["modules"]
        )
        assert "plain norms" in said and "p = " in said and "(n=3)" in said

    def test_what_is_there_is_not_trained_again(self, ablated, embedded):
        out, said = ablated
        before = out.stat().st_mtime_ns
        arm = ("--arm", "plain norms", "model.block.norm=rms", "model.block.biases=False")
        again = ablate(out, embedded, *arm, "--seeds", "2", "--control", "3")
        assert again.stdout == said and out.stat().st_mtime_ns == before

    def test_another_base_is_not_mixed_in(self, ablated, embedded, refused):
        out, _ = ablated
        said = refused(out, embedded, "--control", "3", "--optim.adam.lr", "0.003")
        assert "another base" in said and str(out) in said

    def test_a_file_that_is_something_else_is_kept(self, tmp_path, embedded, refused):
        out = tmp_path / "notes.json"
        out.write_text("mine")
        assert f"{out} is there, and holds no ablations" in refused(out, embedded)
        assert out.read_text() == "mine"

    def test_a_count_of_nothing_is_refused(self, tmp_path, embedded, refused):
        said = refused(tmp_path / "no.json", embedded, "--control", "0")
        assert "--control 0: every arm is trained" in said

    @pytest.mark.parametrize(
        "words, said",
        [
            (["a", "block.nrm=rms"], "did you mean model.block.norm"),
            (["a", "model.block.norm=ms"], "layer or rms"),
            (["a", "model.block.norm"], "no FIELD=VALUE"),
            (["control", "seed=3"], "two arms are called"),
        ],
    )
    def test_a_wrong_arm_is_refused_before_anything_is_trained(
        self, words, said, tmp_path, embedded, refused
    ):
        assert said in refused(tmp_path / "no.json", embedded, "--arm", *words)
        assert not (tmp_path / "no.json").exists()


class TestWhoTrainsWhat:
    def runs(self):
        from speedrun.config import vary
        from speedrun.presets import preset

        wide, rms = ({}, {"model.block.norm": "rms"})
        both = [vary(preset("cpu_gpt2"), changes) for changes in (wide, rms)]
        return [vary(run, {"seed": seed}) for run in both for seed in range(3)]

    def test_runs_of_one_model_stay_together(self):
        from speedrun.measure.runs import group_by_model

        assert (
            group_by_model(self.runs(), 1)
            == group_by_model(self.runs(), 2)
            == [[0, 1, 2], [3, 4, 5]]
        )

    def test_they_are_dealt_out_where_gpus_would_idle(self):
        from speedrun.measure.runs import group_by_model

        groups = group_by_model(self.runs()[:3], 2)
        assert groups == [[0, 2], [1]]
        assert sorted(sum(group_by_model(self.runs(), 4), [])) == list(range(6))

    def test_a_rate_is_no_other_model(self):
        from speedrun.config import vary
        from speedrun.measure.runs import compile_key

        run = self.runs()[0]
        assert compile_key(run) == compile_key(vary(run, {"optim.adam.lr": 0.1, "steps": 7}))
        assert compile_key(run) != compile_key(vary(run, {"model.layout.x0": True}))


def test_weights_over_a_run_are_kept_to_five_digits():
    sys.path.insert(0, str(ROOT / "scripts"))
    from ablate import brief

    told = {"x0_lambdas": [[0, [0.123456789, -2e-7]]], "skip_gate": [[0, [[0.0] * 65]]]}
    assert brief(told) == {"x0_lambdas": [[0, [0.12346, -2e-7]]]}
    mix = {"ve_lambdas": [[5, [[0.5, 1.0], [0.25, 3.0]]]]}
    assert brief(mix) == mix


def test_single_runs_are_reported_without_a_p():
    sys.path.insert(0, str(ROOT / "scripts"))
    from ablate import report

    def runs(*losses: float) -> list[dict]:
        return [{"val_loss": loss, "seconds": 2.0} for loss in losses]

    alone = report({"control": runs(3.0), "a": runs(2.5)})
    assert len(alone) == 2 and "-0.5000" in alone[1] and "p =" not in "".join(alone)
    three = report({"control": runs(3.0, 3.1, 3.05), "a": runs(2.5, 2.6, 2.55), "b": runs(3.0, 3.1)})  # fmt: skip
    assert len(three) == 4 and "p < 0.001" in three[1] and "p = " in three[2] and three[3].startswith("one deviation")  # fmt: skip
    assert len(report({"control": runs(3.0, 3.1)})) == 1
