"""Studies: runs with a result each, made where it is missing."""

import json
import math
from dataclasses import replace
from functools import partial

import measure
import pytest
import torch

from speedrun.config import check_config, config_from_json, vary
from speedrun.cpu_size import at_cpu_size
from speedrun.kernels import head_reference
from speedrun.kernels import loss as head
from speedrun.kernels.fp8 import has_fp8
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import detect_machine
from speedrun.measure import ablations, documents, precision, runs
from speedrun.measure.study import train_alone
from speedrun.model import gpt
from speedrun.presets import preset
from speedrun.train import build_run, train_step

HAVE = torch.cuda.is_available() and has_fp8(torch.device("cuda"))
OPCHECKS = ("test_faketensor", "test_autograd_registration")  # no arithmetic on eight bits


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


@pytest.mark.parametrize(
    "module", [ablations, documents, precision], ids=["ablations", "documents", "precision"]
)
def test_arms_are_equally_far_wherever_a_study_stops(module):
    names = [name.rsplit("_", 1) for name in module.study()]
    seeds = [int(seed) for _, seed in names]
    assert seeds == sorted(seeds) and len({arm for arm, _ in names}) * len({*seeds}) == len(names)
    for name, run in module.study().items():
        assert run.seed == int(name.rsplit("_", 1)[1]) and run.val_every == run.steps


@pytest.mark.parametrize("arm", ["stages", "windows", "documents"])
def test_an_ablation_is_trained_validated_once_and_kept(arm, embedded):
    brief = {"device": "cpu", "warmup": 0, "compile": False, "val_tokens": 4096}
    run = vary(at_cpu_size(ablations.study()[f"{arm}_0"]), brief | {"data.batch_tokens": 256})
    data, stamp = train_alone(run, "…", ablations.after, echo=None)
    (kept,) = data["runs"]
    assert json.dumps(data) and stamp["seeds"] == [0] and len(kept["steps_ms"]) == 99
    assert [point["step"] for point in kept["curve"]] == [0, 20]
    assert ("loss_in_documents" in kept) == (arm == "documents")


class TestPrecision:
    def losses(self, arm, folder):
        """Training losses of three steps in float32 under an arm's patches."""
        run = at_cpu_size(precision.study()[f"{arm}_0"])
        brief = {"device": "cpu", "warmup": 0, "compile": False, "data.batch_tokens": 256}
        with precision.around(f"{arm}_0"):
            live = build_run(vary(run, brief), folder, echo=None)
            return [train_step(live).item() for _ in range(3)]

    def test_each_factor_changes_a_little_of_what_is_trained(self, embedded, tmp_path):
        found = {arm: self.losses(arm, tmp_path / arm) for arm in precision.arms()}
        assert len({tuple(losses) for losses in found.values()}) == len(found), "all are different"
        for arm, losses in found.items():  # a sum over fewer words is smaller
            peer = found["only_sampled" if "sampled" in precision.arms()[arm] else "only_head"]
            assert all(abs(a - b) < 0.002 * b for a, b in zip(losses, peer))
        again = self.losses("only_sampled", tmp_path / "again")
        assert again == found["only_sampled"], "nothing stays patched"

    def test_what_no_option_switches_is_patched_and_nothing_else(self):
        before = gpt.linear, head.head_form
        for arm, on in precision.arms().items():
            with precision.around(f"{arm}_0"):
                assert (gpt.linear is not before[0]) == ("qkv" in on)
                assert (head.head_form is not before[1]) == ("head" not in on)
            assert (gpt.linear, head.head_form) == before
            run = precision.study()[f"{arm}_0"]
            assert any(s.candidates for s in run.schedule.stages) == ("sampled" in on)
            assert run.model.block.fp8 == ("mlp" in on)
            check_config(run)

    def test_effects_are_found_where_there_is_no_noise_and_their_intervals_hold_them(
        self, monkeypatch
    ):
        true = dict(zip(precision.FACTORS, (0.1, -0.2, 0.3, 0.05)))
        noise = {name: 0.001 * math.sin(99.0 * n) for n, name in enumerate(precision.study())}

        def made(size):
            on = {name: precision.arms()[name.rpartition("_")[0]] for name in precision.study()}
            return {name: {"loss": 3 + sum(true[one] for one in each) + size * noise[name]} for name, each in on.items()}  # fmt: skip

        for size in (0, 1):
            monkeypatch.setattr(precision, "finished", partial(made, size))
            found = precision.effects(lambda run: run["loss"])
            assert all(abs(found[one][0] - true[one]) <= 0.9 * size * found[one][1] + 1e-9 for one in true)  # fmt: skip
            assert all((half > 1e-5) == bool(size) and half < 0.002 for _, half in found.values())
        # a seed of its own height is no noise, and one that is not complete does not count
        first = {name: run for name, run in made(1).items() if name.endswith("_0")}
        monkeypatch.setattr(precision, "finished", lambda: first)
        one_seed = precision.effects(lambda run: run["loss"])
        more = first | {"only_mlp_1": {"loss": 99.0}}
        monkeypatch.setattr(precision, "finished", lambda: more)
        assert precision.effects(lambda run: run["loss"]) == one_seed
        high = {name: {"loss": run["loss"] + 7 * name.endswith("_1")} for name, run in made(0).items()}  # fmt: skip
        monkeypatch.setattr(precision, "finished", lambda: high)
        assert all(half < 1e-9 for _, half in precision.effects(lambda run: run["loss"]).values())

    def test_the_operators(self):
        x, w = torch.randn(32, 16, requires_grad=True), torch.randn(48, 16, requires_grad=True)
        torch.library.opcheck(precision.linear_op, (x, w), test_utils=OPCHECKS)

    @pytest.mark.gpu
    @pytest.mark.skipif(not HAVE, reason="no GPU with units for eight bits")
    @pytest.mark.parametrize("count", [0, 2048])
    def test_on_a_gpu(self, count):
        """The head where it is off, in two micro-batches, and the linear map, against float64."""
        torch.manual_seed(0)
        x = torch.nn.functional.rms_norm(torch.randn(2048, 768, device="cuda"), (768,)).bfloat16()
        w, targets = 0.15 * torch.randn(768, 4096, device="cuda"), torch.randint(0, 4096, (2048,), device="cuda")  # fmt: skip
        with precision.around("only_mlp_0"):
            found = head.head_loss_op(x, w, targets, torch.tensor([count, 2]))
        inside = [head.choose_candidates(to, 4096, count)[1] for to in targets.chunk(2)]
        exact = head_reference.head_loss_by_hand(
            x.double(), w.double(), targets, torch.stack(inside)
        )
        assert abs(found[0] - exact[0]) < 2e-3 * exact[0]
        for ours, theirs in zip(found[1:], exact[1:]):
            assert (ours.double() - theirs).norm() < 0.012 * theirs.norm()
        leaves = x.detach().requires_grad_(), (w.T.bfloat16().contiguous()).requires_grad_()
        upstream = torch.randn(2048, 4096, device="cuda").bfloat16()
        y = precision.linear_op(*leaves)[0]
        gradients = torch.autograd.grad(y, leaves, upstream)
        a, b, u = x.double(), leaves[1].detach().double(), upstream.double()
        for ours, theirs in zip((y, *gradients), (a @ b.T, u @ b, u.T @ a)):
            assert (ours.double() - theirs).norm() < 0.08 * theirs.norm()


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


class TestArms:
    """`train_arms`: paired seeds, balanced, and what ended is kept until all of it has."""

    FACTS = {"command": "c", "modules": {}, "gpu": None, "cpu": "1", "torch": "2", "corpus": None}

    @pytest.fixture
    def trained(self, monkeypatch, tmp_path):
        """What is trained, in order: (steps, seed, what its process sees); from the moment that `stop` is set, nothing ends."""
        monkeypatch.setattr(runs, "root", lambda: tmp_path)
        given: list = []

        def each(wanted, on_gpus, after=None):
            for number, run in reversed(list(enumerate(wanted))) if on_gpus else enumerate(wanted):
                if given and given[0] == "stop after 3" and len(given) > 3:
                    raise KeyboardInterrupt
                given.append((run.steps, run.seed))
                yield number, {"val_loss": run.steps + run.seed / 10, "after": str(after)}

        monkeypatch.setattr(runs, "train_each", each)
        return given

    @pytest.fixture
    def arms(self):
        return {name: vary(preset("cpu_gpt2"), {"steps": n}) for name, n in (("a", 1), ("b", 2))}

    @pytest.mark.parametrize("on_gpus", [False, True])
    def test_all_arms_have_a_seed_before_any_has_the_next(self, on_gpus, trained, arms):
        done = runs.train_arms(arms, {"a": 3, "b": 1}, self.FACTS, on_gpus)
        assert {arm: [run["val_loss"] for run in of] for arm, of in done.items()} == {"a": [1.0, 1.1, 1.2], "b": [2.0]}  # fmt: skip
        order = [(1, 0), (2, 0), (1, 1), (1, 2)]
        assert trained == (order[::-1] if on_gpus else order)

    def test_a_measurement_goes_on_where_it_was_stopped(self, trained, arms, tmp_path):
        trained.append("stop after 3")
        with pytest.raises(KeyboardInterrupt):
            runs.train_arms(arms, 3, self.FACTS)
        assert trained[1:] == [(1, 0), (2, 0), (1, 1)]
        trained.clear()
        done = runs.train_arms(arms, 3, self.FACTS)
        assert trained == [(2, 1), (1, 2), (2, 2)] and [len(of) for of in done.values()] == [3, 3]
        assert runs.train_arms(arms, 3, self.FACTS) == done and len(trained) == 3

    @pytest.mark.parametrize("fact", ["command", "modules", "gpu", "cpu", "torch", "corpus"])
    def test_other_code_or_another_machine_begins_anew(self, fact, trained, arms):
        runs.train_arms(arms, 1, self.FACTS)
        runs.train_arms(arms, 1, self.FACTS | {fact: "other"})
        assert trained == [(1, 0), (2, 0)] * 2

    def test_in_processes_of_their_own_runs_end_as_here(self, brief, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "root", lambda: tmp_path)
        brief = vary(brief, {"device": "auto"})
        wide = vary(brief, {"model.model_dim": 48, "model.num_heads": 3})
        arms = {"narrow": brief, "wide": wide}
        done = runs.train_arms(arms, {"narrow": 2, "wide": 1}, self.FACTS, after=width_of)
        for arm, (first, *_) in done.items():
            live = build_run(vary(arms[arm], {"device": "cpu"}), tmp_path / arm, echo=None)
            here = runs.train_in_place(live, arms[arm], width_of)
            assert first["val_loss"] == here["val_loss"] and first["width"] == here["width"]
            assert config_from_json(first["config"]) == arms[arm]
        one, other = done["narrow"]
        assert one["val_loss"] != other["val_loss"] and other["config"]["seed"] == 1

    def test_without_a_gpu_what_wants_one_is_refused(self, monkeypatch, arms):
        bare = replace(detect_machine(), gpus=())
        monkeypatch.setattr(runs, "detect_machine", lambda: bare)
        with pytest.raises(UserError, match="measured on a GPU"):
            next(runs.train_each(list(arms.values()), on_gpus=True))

    def test_a_finished_measurement_keeps_its_result_alone(self, monkeypatch, tmp_path):
        folder = runs.kept_runs(self.FACTS)
        assert folder != runs.kept_runs(self.FACTS | {"torch": "3"})
        monkeypatch.setattr(runs, "root", lambda: tmp_path)
        folder = runs.kept_runs(self.FACTS)
        folder.mkdir(parents=True)
        monkeypatch.setattr(measure, "measured", lambda *given: ({}, dict(self.FACTS)))
        monkeypatch.setattr(measure, "save_result", lambda *given: measure.root() / "there.json")
        assert measure.main(["logits", "laptop"]) == 0 and not folder.exists()


def width_of(live) -> dict:
    return {"width": live.model.config.model_dim}
