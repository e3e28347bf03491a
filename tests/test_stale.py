"""Which measurements are stale, and what may be called the same behaviour."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stale

from speedrun.lab.provenance import module_hashes, root

OLD = "import torch\n\n\ndef f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        torch.cuda.synchronize()\n"


def about_gpus(old: str, new: str) -> str | None:
    return stale.touches_gpus(stale.changes({"m": old}, {"m": new})["m"])


class TestWhatChanged:
    def test_a_change_beside_gpu_code_is_no_objection(self):
        assert about_gpus(OLD, OLD.replace("x + 1", "1 + x")) is None
        assert about_gpus(OLD, OLD + "# cuda\n") is None

    def test_a_change_of_gpu_code_is_one(self):
        assert about_gpus(OLD, OLD.replace("synchronize()", "synchronize(0)")) == "A.g"
        assert about_gpus(OLD, OLD.replace("torch.cuda.synchronize()", "pass")) == "A.g"
        assert about_gpus(OLD, OLD.replace("x + 1", "x.to('cuda')")) == "f"
        assert about_gpus("", OLD) == "A.g"
        two = "def f(x):\n    y = x + 1\n    return y.to('cuda')\n"
        assert about_gpus(two, two.replace("x + 1", "1 + x")) is None, "another statement"
        said = "def f():\n    print('one two', cuda)\n"
        assert about_gpus(said, said.replace("one two", "one three")) == "f"

    def test_a_statement_that_moved_is_the_same(self):
        one, two = OLD.split("class")
        before = {"m": OLD, "n": ""}
        after = {"m": one + "from speedrun.n import A\n", "n": "class" + two}
        assert stale.changes(before, after) == {"m": [], "n": []}
        after["n"] = after["n"].replace("synchronize()", "synchronize(0)")
        told = stale.changes(before, after)
        assert [[where for where, _ in told[name]] for name in "mn"] == [["A.g"], ["A.g"]]
        twice = {"m": OLD, "n": OLD}  # the same in two modules, gone from one: not moved
        assert stale.changes(twice, {"m": one, "n": OLD})["m"] != []

    def test_configs_are_found_wherever_they_are(self):
        data = {"runs": [{"config": {"steps": 1}}, {"arm": {"config": {"steps": 2, "config": {}}}}]}
        assert [config["steps"] for config in stale.configs_in(data)] == [1, 2]

    def test_runs_that_differ_in_numbers_only_are_tried_once(self):
        runs = [{"seed": s, "a": {"lr": lr, "on": on}} for s in (1, 2) for lr in (0.1, 0.0, 3.0) for on in (True, False)]  # fmt: skip
        kept = [(run["seed"], run["a"]["lr"], run["a"]["on"]) for run in stale.paths(runs)]
        assert kept == [(1, 0.1, True), (1, 0.1, False), (1, 0.0, True), (1, 0.0, False)]

    def test_statements_that_are_not_used_do_not_count(self):
        texts = {
            "speedrun.measure.m": "from speedrun.a import f\n\n\ndef measure():\n    return f(1)\n",
            "speedrun.a": "K = 2\nK += 5\n\n\ndef g(x):\n    return K * x\n\n\ndef f(x):\n    return g(x)\n\n\ndef h(x):\n    return x\n",
        }

        def used(old: str = "", new: str = "") -> set:
            return stale.used_statements(
                lambda n: texts[n].replace(old, new), ["speedrun.measure.m"]
            )

        assert {name for name, _ in used()} == {"f", "measure", "g", "K"}
        assert used("return x\n", "return -x\n") == used() != used("K = 2", "K = 3")
        assert used("K += 5", "K += 6") != used()
        texts["speedrun.a"] += "\n\nif __name__ == '__main__':\n    h(2)\n"
        assert {name for name, _ in used()} == {"f", "measure", "g", "K"}
        assert used("K * x", "K + x") != used() != used("f(1)", "f(2)")

    def test_minutes_count_gpus(self):
        assert stale.gpu_minutes({"stamp": {"gpu": "2×NVIDIA H100", "minutes": 3.0}}) == 6.0
        assert stale.gpu_minutes({"stamp": {"gpu": None, "minutes": 3.0}}) == 0.0

    def test_every_committed_training_result_can_be_proved_some_day(self):
        for path, result in stale.all_results().items():
            for config in stale.configs_in(result["data"]):
                small = stale.small(config, Path("/data"))
                assert set(small) == set(config) and small["steps"] == 20, path


def test_it_lists_what_there_is():
    done = subprocess.run(
        [sys.executable, str(root() / "scripts" / "stale.py")], capture_output=True, text=True
    )
    count = len(list((root() / "book" / "results").rglob("*.json")))
    assert done.returncode == 0 and f"of {count} results are stale" in done.stdout


@pytest.fixture
def project(tmp_path, embedded):
    """A clone of this project with one small committed result, and its own package first on the path."""
    tree = tmp_path / "clone"
    tree.mkdir()
    for name in ("speedrun", "scripts", "book"):
        shutil.copytree(
            root() / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(root() / "pyproject.toml", tree)
    (tree / "data").mkdir()
    (tree / "data" / "embedded").symlink_to(embedded.resolve())
    import dataclasses

    from speedrun.config import preset

    result = {
        "stamp": {
            "gpu": "1×NVIDIA H100",
            "command": "…",
            "modules": module_hashes(["speedrun.train"]),
        },
        "data": {"runs": [{"config": dataclasses.asdict(preset("record"))}]},
    }
    folder = tree / "book" / "results" / "example"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(result))

    def git(*words):
        subprocess.run(["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True, capture_output=True)  # fmt: skip

    git("init")
    git("add", "-A")
    git("commit", "-m", "a result")
    return tree


def prove(tree: Path) -> tuple[str, dict]:
    """What `stale.py --prove` says in a project, and the result afterwards."""
    done = subprocess.run(
        [sys.executable, str(tree / "scripts" / "stale.py"), "--prove"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
        cwd=tree,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tree / "book/results/example/run.json").read_text())


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.slow
class TestProof:
    @pytest.mark.parametrize("called", [False, True])
    def test_a_new_module_about_gpus_counts_where_a_run_enters_it(self, project, called):
        (project / "speedrun/fast.py").write_text("def nothing():\n    'cuda'\n    return None\n")
        add = "\n    nothing()" if called else ""
        edit(project / "speedrun/train.py", "from speedrun.optim.muon import Muon, rate_factor\n", "from speedrun.fast import nothing\nfrom speedrun.optim.muon import Muon, rate_factor\n")  # fmt: skip
        edit(project / "speedrun/train.py", "    rates, broken = rates_of(run), (~finite).float()\n", f"    rates, broken = rates_of(run), (~finite).float(){add}\n")  # fmt: skip
        said, _ = prove(project)
        assert (
            "speedrun.fast: “nothing” has changed and is about GPUs"
            if called
            else "same behaviour: 1 runs"
        ) in said

    def test_an_old_module_that_the_run_does_not_enter_does_not_count(self, project):
        edit(project / "speedrun/optim/soap.py", "return torch.linalg.eigh(covariance)[1].flip(-1)", "return torch.linalg.eigh(covariance.cuda())[1].flip(-1)")  # fmt: skip
        assert "same behaviour: 1 runs" in prove(project)[0]

    def test_another_way_to_write_the_same_is_the_same_behaviour(self, project):
        edit(project / "speedrun/model/gpt.py", 'x = x + mlp(normed(x, weights, "mlp_norm"), weights, switches.block)', 'y = normed(x, weights, "mlp_norm")\n        x = x + mlp(y, weights, switches.block)')  # fmt: skip
        said, result = prove(project)
        assert "same behaviour: 1 runs, all losses bit-equal" in said
        assert set(result["proof"]["modules"]) == set(result["stamp"]["modules"])
        assert "0 of 1 results are stale" in prove(project)[0]

    def test_another_arithmetic_is_not(self, project):
        edit(project / "speedrun/optim/schedule.py", "0.5 * (1 + math.cos", "0.499 * (1 + math.cos")
        edit(project / "speedrun/optim/schedule.py", "if step < warmup:", "if step < 0:")
        said, result = prove(project)
        assert "trains differently: run 1 of 1, from step" in said and "proof" not in result

    def test_a_path_that_only_gpus_take_is_never_proved(self, project):
        edit(project / "speedrun/train.py", "torch.cuda.synchronize(self.device)", "torch.cuda.synchronize()")  # fmt: skip
        said, result = prove(project)
        assert "is about GPUs" in said and "Clock.wait" in said and "proof" not in result

    def test_code_that_was_never_committed_has_no_past(self, project):
        path = project / "book/results/example/run.json"
        result = json.loads(path.read_text())
        result["stamp"]["modules"]["speedrun.train"] = "0" * 16
        path.write_text(json.dumps(result))
        edit(project / "speedrun/model/gpt.py", 'x = x + mlp(normed(x, weights, "mlp_norm"), weights, switches.block)', 'x = mlp(normed(x, weights, "mlp_norm"), weights, switches.block) + x')  # fmt: skip
        assert "no commit holds the code that was measured" in prove(project)[0]
