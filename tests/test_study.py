"""Studies: runs with a result each, made where it is missing."""

import json
from dataclasses import replace

import measure
import pytest

from speedrun.config import vary
from speedrun.cpu_size import at_cpu_size
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import detect_machine
from speedrun.measure import ablations, documents
from speedrun.measure.study import train_alone


class TestMissing:
    @pytest.fixture
    def made(self, monkeypatch):
        """What would be started: the run's name, its further arguments, and what its process sees of the machine."""
        calls: list = []

        def call(words, env):
            calls.append((words[3], words[4:], env))
            return int(words[3] == "b_1")

        monkeypatch.setattr(measure.subprocess, "call", call)
        return calls

    def test_only_what_has_no_result_is_made_in_the_studys_order(self, made, monkeypatch):
        monkeypatch.setattr(measure, "result_names", lambda slug: ["b_0"])
        monkeypatch.setattr(
            measure, "detect_machine", lambda: replace(detect_machine(), cores=1, gpus=())
        )
        assert measure.make_missing("x", ["a_0", "b_0", "a_1", "c_1"], ["/data"]) == 0
        assert [name for name, *_ in made] == ["a_0", "a_1", "c_1"]
        assert all(rest == ["/data"] and env["OMP_NUM_THREADS"] == "1" for _, rest, env in made)

    def test_one_that_fails_does_not_stop_the_others_and_is_told(self, made, monkeypatch):
        monkeypatch.setattr(measure, "result_names", lambda slug: [])
        assert measure.make_missing("x", ["a_0", "b_1", "a_1"], []) == 1 and len(made) == 3

    def test_a_run_that_the_study_does_not_have(self):
        with pytest.raises(UserError, match="no run “stages_7”"):
            measure.measured(ablations, "stages_7", [], "…")


@pytest.mark.parametrize("module", [ablations, documents], ids=["ablations", "documents"])
def test_arms_are_equally_far_wherever_a_study_stops(module):
    names = [name.rsplit("_", 1) for name in module.study()]
    seeds = [int(seed) for _, seed in names]
    assert seeds == sorted(seeds) and len({arm for arm, _ in names}) * len({*seeds}) == len(names)
    for name, run in module.study().items():
        assert run.seed == int(name.rsplit("_", 1)[1]) and run.val_every == run.steps


@pytest.mark.parametrize("arm", ["stages", "windows", "documents"])
def test_an_ablation_is_trained_validated_once_and_kept(arm, embedded):
    run = vary(
        at_cpu_size(ablations.study()[f"{arm}_0"]), {"device": "cpu", "warmup": 0, "compile": False}
    )
    data, stamp = train_alone(run, "…", ablations.after, echo=None)
    (kept,) = data["runs"]
    assert json.dumps(data) and stamp["seeds"] == [0] and len(kept["steps_ms"]) == 99
    assert [point["step"] for point in kept["curve"]] == [0, 20]
    assert ("loss_in_documents" in kept) == (arm == "documents")


class TestScaling:
    def test_a_rank_alone_steps_through_all_stages_and_sends_nothing(self, embedded):
        from speedrun.measure.many_gpus import run_of_rank

        found = run_of_rank("cpu", str(embedded.absolute()), 2)["stages"]
        assert [stage["tokens"] for stage in found] == [1024, 2048, 3072]
        assert all(len(stage["ms"]) == 2 and stage["formula"] == 0 for stage in found)

    def test_only_gpus_that_are_there(self):
        from speedrun.measure.many_gpus import measure

        with pytest.raises(UserError, match="“run_512” is measured on GPUs, here are"):
            measure("run_512", [], "python scripts/measure.py many_gpus run_512")

    def test_transfers_are_noted_as_they_begin(self):
        from speedrun.measure.many_gpus import announce_some, noted, settings_at, small_record

        optimizer = small_record(48)
        begun = noted(optimizer)
        for step in range(2):
            announce_some(optimizer, 0.2, seed=step)
            optimizer.step(settings_at(step))
        for kind in ("sums", "gathers"):
            names = [name for k, name in begun if k == kind]
            assert names.count("qk") == 2 and names.count("head") == names.count("bigram") == 1
