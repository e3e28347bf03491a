"""Which measurements are stale, and what may be called the same behaviour."""

import ast
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import migrate
import pytest
import stale
import torch

from speedrun.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint
from speedrun.config import Config, check_config, config_from_json, fields_of, vary
from speedrun.cpu_size import RAMPS, at_cpu_size
from speedrun.lab.errors import UserError
from speedrun.lab.provenance import module_hashes, root
from speedrun.model.init import DRAWN_AS
from speedrun.presets import known_presets, preset
from speedrun.schedule import Stage
from speedrun.train import TrainCommand, run_config, train

DATA = Path("/data")
OLD = "import torch\n\n\ndef f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        torch.cuda.synchronize()\n"


def about_gpus(old: str, new: str) -> str | None:
    return stale.touches_gpus(stale.changes({"m": old}, {"m": new})["m"])


class TestWhatChanged:
    def test_a_change_beside_gpu_code_is_no_objection(self):
        assert about_gpus(OLD, OLD.replace("x + 1", "1 + x")) is None
        assert about_gpus(OLD, OLD + "# cuda\n") is None
        assert about_gpus(OLD, OLD.replace("(x):\n", "(x):\n    'For cuda.'\n")) is None

    def test_a_change_of_gpu_code_is_one(self):
        assert about_gpus(OLD, OLD.replace("synchronize()", "synchronize(0)")) == "A.g"
        assert about_gpus(OLD, OLD.replace("torch.cuda.synchronize()", "pass")) == "A.g"
        assert about_gpus(OLD, OLD.replace("x + 1", "x.to('cuda')")) == "f"
        assert about_gpus("", OLD) == "A.g"
        two = "def f(x):\n    y = x + 1\n    return y.to('cuda')\n"
        assert about_gpus(two, two.replace("x + 1", "1 + x")) is None, "another statement"
        said = "def f():\n    print('one two', cuda)\n"
        assert about_gpus(said, said.replace("one two", "one three")) == "f"
        names = "A = Literal['cuda', 'cpu']\n"
        assert about_gpus(names, names.replace("'cpu'", "'cpu', 'tpu'")) is None
        assert about_gpus("B = 'cuda'\n", "B = 'cuda:1'\n") == "a statement"

    def test_what_only_several_ranks_do_counts_for_them(self):
        two = "def total(x, world):\n    if world > 1:\n        dist.all_reduce(x)\n"
        changed = stale.changes({"m": two}, {"m": two.replace("(x)\n", "(-x)\n")})["m"]
        assert stale.touches_gpus(changed) is None
        assert stale.touches_gpus(changed, stale.GPU_WORDS + stale.RANK_WORDS) == "total"

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

    def test_a_function_that_moved_and_was_reworded_is_the_same(self):
        """As when the trainer was taken apart: `assemble` and `say` left train.py under other names."""
        old = "def assemble(config):\n    heart = Heartbeat(config, cuda)\n    heart.beat()\n\n\ndef say(line: str):\n    print(line, cuda)\n"
        first, second = old.split("\n\n\n")
        (steps,) = [len(migrate.STEPS) - n for n, s in enumerate(migrate.STEPS) if s.since == "speedrun.heartbeat"]  # fmt: skip
        todays = first.replace("assemble", "build_run").replace("heart.", "heartbeat.").replace("heart =", "heartbeat =")  # fmt: skip
        before = {"train": migrate.reworded(old, steps), "command": ""}
        after = {"train": todays, "command": second.replace("say", "print_line")}
        assert stale.changes(before, after) == {"train": [], "command": []}
        assert stale.changes({"train": old, "command": ""}, after)["train"] != []

    def test_configs_are_found_wherever_they_are(self):
        data = {"runs": [{"config": {"steps": 1}}, {"arm": {"config": {"steps": 2, "config": {}}}}]}
        assert [config["steps"] for config in stale.configs_in(data)] == [1, 2]

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

    def test_a_module_that_is_cut_in_two_is_the_same(self):
        one = {
            "speedrun.a": "from typing import Any, NamedTuple\n\n\nclass A(NamedTuple):\n    x: Any\n\n\ndef f(x: Any):\n    return A(x)\n"
        }
        two = {
            "speedrun.a": "from typing import Any\n\nfrom speedrun.b import A\n\n\ndef f(x: Any):\n    return A(x)\n",
            "speedrun.b": "from typing import Any, NamedTuple\n\n\nclass A(NamedTuple):\n    x: Any\n",
        }

        def used(texts: dict) -> set:
            return set(stale.used_statements(texts.__getitem__, ["speedrun.a"]))

        assert used(one) == used(two) and len(used(one)) == 4
        two["speedrun.b"] = two["speedrun.b"].replace("x: Any", "x: object")
        assert used(one) != used(two)

    def test_whence_a_type_is_imported_does_not_count(self):
        texts = [f"if TYPE_CHECKING:\n    from speedrun.{home} import A\n\n\ndef f(x: 'A'):\n    return x\n" for home in "bc"]  # fmt: skip
        homes = {"speedrun.b": "A = int\n", "speedrun.c": "A = int\n"}
        found = [stale.used_statements(({"speedrun.a": text} | homes).__getitem__, ["speedrun.a"]) for text in texts]  # fmt: skip
        assert found[0].keys() == found[1].keys() and len(found[0]) == 2

    def test_what_stands_beside_the_way_of_a_run_does_not_count(self):
        texts = {
            "speedrun.a": "from speedrun.b import f, g\n\n\ndef h():\n    return f() if K else g()\n",
            "speedrun.b": "def f():\n    return 1\n\n\ndef g():\n    return 2\n",
            "speedrun.c": "from speedrun.a import h\nfrom speedrun.b import g\n\n\ndef measure():\n    return h(), g()\n",
        }

        def used(start: str, beside: set) -> set:
            found = stale.used_statements(texts.__getitem__, [start], beside)
            return {name for name, _ in found}

        assert used("speedrun.a", set()) == {"h", "f", "g"}
        assert used("speedrun.a", {("speedrun.a", "g")}) == {"h", "f"}
        assert used("speedrun.c", {("speedrun.a", "g")}) == {"measure", "h", "f", "g"}
        texts["speedrun.d"] = (
            "from speedrun.b import f, g as other\n\n\ndef a():\n    return f()\n\n\ndef b():\n    return other()\n"
        )
        texts["speedrun.e"] = "from speedrun.d import a\n\n\ndef measure():\n    return a()\n"
        assert used("speedrun.e", set()) == {"measure", "a", "f"}
        texts["speedrun.e"] = texts["speedrun.e"].replace("import a", "import b as a")
        assert used("speedrun.e", set()) == {"measure", "b", "g"}
        texts["speedrun.b"] += "\n\ndef k():\n    return 3\n\n\ng.register(k)\n"
        assert used("speedrun.a", set()) == {"h", "f", "g", "k"}
        assert used("speedrun.a", {("speedrun.a", "g")}) == {"h", "f"}
        texts["speedrun.b"] = texts["speedrun.b"].replace("g.register(k)", "print.register(k)")
        assert used("speedrun.a", {("speedrun.a", "g")}) == {"h", "f", "k", ""}

    @pytest.mark.parametrize(
        ("text", "ends"),
        [
            ("if backend == 'fa4' and torch.cuda.f(x):\n    return 1", True),
            ("if backend == 'fa3':\n    return torch.cuda.f(x)", True),
            ("if backend == 'fa4':\n    return 1\nelse:\n    torch.cuda.f(x)", False),
            ("if backend == 'fa4':\n    return 1\nelif torch.cuda.f(x):\n    return 2", False),
            ("if backend == 'fa4' or torch.cuda.f(x):\n    return 1", False),
            ("if torch.cuda.f(x) and backend == 'fa4':\n    return 1", False),
            ("if backend == 'triton' and torch.cuda.f(x):\n    return 1", False),
        ],
    )
    def test_a_statement_that_asks_for_another_backend_ends_there(self, text, ends):
        assert bool(stale.IF_PEER.match(text)) == ends

    def test_runs_that_ask_for_another_backend_are_found(self):
        def result(triton, *backends: str) -> dict:
            runs = [{"config": {"model": {"attention": {"backend": name}}}} for name in backends]
            return {"stamp": {"triton": triton}, "data": {"runs": runs}}

        assert stale.without_peers(result("3.6.0", "auto", "flex"))
        assert not stale.without_peers(result("3.6.0", "auto", "fa2"))
        assert not stale.without_peers(result(None, "auto"))

    def test_minutes_count_gpus(self):
        assert stale.gpu_minutes({"stamp": {"gpu": "2×NVIDIA H100", "minutes": 3.0}}) == 6.0
        assert stale.gpu_minutes({"stamp": {"gpu": None, "minutes": 3.0}}) == 0.0

    def test_a_process_that_ends_early_says_why(self, tmp_path):
        (tmp_path / "0").write_text('{"losses": []}\n')
        (tmp_path / "0.said").write_text("Traceback\nMemoryError\n")
        assert stale.answers(tmp_path / "0", 3) == [{"losses": []}] + [{"error": "MemoryError"}] * 2


def as_saved(config: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


class TestTinyRuns:
    def test_runs_that_differ_in_fractions_only_are_trained_once(self):
        def way(changes: dict) -> str:
            return stale.way(stale.tiny(as_saved(vary(preset("small_gpt2"), changes)), DATA))

        same = (
            {"optim.adam.lr": 0.1},
            {"seed": 7},
            {"optim.adam.betas": (0.8, 0.99)},
            {"steps": 1000},
        )
        other: tuple[dict, ...] = (
            {"optim.adam.weight_decay": 0.0},
            {"optim.muon.ns_dtype": "bfloat16"},
            {"optim.muon.ns_steps": 6},
        )
        other += (
            {"optim.adam.every": 2},
            {"schedule.warmup_steps": 0},
            {"data.max_forward_tokens": 0},
        )
        assert {way(changes) for changes in same} == {way({})}
        assert len({way({}), *map(way, other)}) == 1 + len(other)

    def test_every_committed_training_result_can_be_proved_some_day(self):
        seen = set()  # runs that differ in their seed alone, and missed the same, are checked once
        for path, result in stale.all_results().items():
            then = result["stamp"]["modules"]
            missed = sum(bool(step.marks) or step.since not in then for step in migrate.STEPS)
            for saved in stale.configs_in(result["data"]):
                if (key := (json.dumps(saved | {"seed": 0}, sort_keys=True), missed)) not in seen:
                    seen.add(key)
                    run = stale.tiny(saved, DATA)
                    assert check_config(run).steps == 20 and run.schedule.warmup_steps <= 5, path
                    assert not run.schedule.momentum_min or max(run.schedule.momentum_ramp) <= 5
                    for steps in range(missed + 1):
                        older = migrate.in_older_names(run, steps)
                        assert migrate.todays(older) == run, path

    def test_a_table_goes_into_older_code_without_a_column_that_is_off(self):
        start, end = stale.TRAIN.index("def known("), stale.TRAIN.index("pure = []")
        Older = dataclasses.make_dataclass("Older", [("batch", int)])
        Whole = dataclasses.make_dataclass("Whole", [("stages", tuple[Older, ...])])
        around = {"Config": Whole, "dataclasses": dataclasses, "typing": typing}
        exec(stale.TRAIN[start:end], around)
        off = {"stages": [{"batch": 1, "candidates": 0}]}
        rows = [{"batch": 2, "candidates": 0}, {"batch": 3, "candidates": 0}]
        found = around["known"]({"stages": rows}, off)
        assert found == {"stages": [{"batch": 2}, {"batch": 3}]}
        rows[1]["candidates"] = 16
        with pytest.raises(ValueError, match="stages.candidates=16: not in this code"):
            around["known"]({"stages": rows}, off)

    def test_arithmetic_and_schedule_stay(self):
        own = preset("small_gpt2")
        small = stale.tiny(as_saved(own), DATA)
        assert small.precision == "bfloat16"
        assert small.optim == own.optim
        assert small.schedule.warmup_steps == 3 and small.schedule.momentum_ramp == (4, 3)


OTHERWISE = {  # whole numbers about steps that do not shrink with a run, and why
    "steps": "what the others shrink with",
    "max_steps": "0 in a small run",
    "val_every": "set by whoever asks for a small run",
    "log_every": "likewise",
    "checkpoint_every": "likewise",
    "warmup": "undone, and not part of the schedule",
    "data.batch_tokens": "tokens",
    "data.micro_batches": "micro-batches",
    "schedule.stages.0.batch_mul": "a multiple",
    "optim.adam.every": "a period: a small run has many",
    "optim.muon.ns_steps": "iterations of a polynomial",
}


def documented(kind: type, prefix: str = ""):
    """(dotted name, type, docstring) of every field of a config."""
    types, (node,) = get_type_hints(kind), ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    for field, text in zip(node.body, node.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            rows = get_args(types[name])[:1] if ... in get_args(types[name]) else ()
            if dataclasses.is_dataclass(types[name]):
                yield from documented(types[name], f"{prefix}{name}.")  # type: ignore[arg-type]
            elif rows and dataclasses.is_dataclass(rows[0]):  # a table
                yield from documented(rows[0], f"{prefix}{name}.0.")
            else:
                yield prefix + name, types[name], ast.unparse(text).lower()


def parts_of(kind: object) -> list:
    """The kinds of a field's numbers, those of tuples in tuples included."""
    if get_origin(kind) is not tuple:
        return [kind]
    return [part for one in get_args(kind) if one is not ... for part in parts_of(one)]


def test_no_count_of_steps_is_forgotten_when_a_run_is_made_small():
    """A ramp that keeps its length hides all that comes after it from the proof, the golden curves and the switches' tests."""
    found = set()
    for name, kind, text in documented(Config):
        parts = {*parts_of(kind)}
        simple = get_origin(kind) is Literal or parts <= {int, float, bool, str}
        assert simple, f"{name}: can this test tell whether a {kind} counts steps?"
        found |= {name} if int in parts and ("step" in name or "step" in text) else set()
    rows = [name for name, _, _ in documented(Config) if ".0." in name]
    assert len(rows) == len(dataclasses.fields(Stage))
    assert len(list(documented(Config))) - len(rows) == len(fields_of(Config())) - 1
    assert found == set(RAMPS) | set(OTHERWISE) and not set(RAMPS) & set(OTHERWISE)


def test_it_lists_what_there_is():
    done = subprocess.run(
        [sys.executable, str(root() / "scripts" / "stale.py")], capture_output=True, text=True
    )
    count = len(list((root() / "book" / "results").rglob("*.json")))
    assert done.returncode == 0 and f"of {count} results are stale" in done.stdout


@pytest.fixture
def project(tmp_path, embedded):
    """A clone of this project with two small committed results, and its own package first on the path."""
    tree = tmp_path / "clone"
    tree.mkdir()
    for name in ("speedrun", "scripts", "book"):
        shutil.copytree(
            root() / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(root() / "pyproject.toml", tree)
    (tree / "data").mkdir()
    (tree / "data" / "embedded").symlink_to(embedded.resolve())
    stamp = {"command": "…", "triton": "3.6.0", "modules": module_hashes(["speedrun.train"])}
    folder = tree / "book" / "results" / "example"
    folder.mkdir(parents=True)
    for name, gpu in (("record1", "1×NVIDIA H100"), ("small_gpt2", None)):
        runs = [{"config": dataclasses.asdict(preset(name))}]
        result = {"stamp": stamp | {"gpu": gpu}, "data": {"runs": runs}}
        (folder / f"{name}.json").write_text(json.dumps(result))
    commit(tree, "results")
    return tree


def commit(tree: Path, message: str) -> str:
    """Commit everything; returns the commit."""

    def git(*words) -> str:
        return subprocess.run(["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip

    git("init")
    git("add", "-A")
    git("commit", "-m", message)
    return git("rev-parse", "HEAD")


def prove(tree: Path) -> tuple[dict[str, str], dict[str, dict]]:
    """What `stale.py --prove` says of each result of a project, and the results afterwards."""
    done = subprocess.run(
        [sys.executable, str(tree / "scripts" / "stale.py"), "--prove"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
        cwd=tree,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("results are stale")[2].splitlines()
    words = [line.partition("  ") for line in lines if line.startswith("example/")]
    files = (tree / "book" / "results" / "example").glob("*.json")
    return {n.removeprefix("example/"): said for n, _, said in words}, {f.stem: json.loads(f.read_text()) for f in files}  # fmt: skip


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


SAME = "same behaviour: 1 runs, all losses bit-equal"
ALONE = {  # what is changed, alone: file, old, new, and the results that train differently
    "cosine": ("schedule.py", "0.5 * (1 + math.cos", "0.499 * (1 + math.cos", {"record1"}),
    "cooldown": ("schedule.py", "(1 - t) * peak", "(1 - t) ** 1.01 * peak", {"small_gpt2"}),
    "its begin": (
        "schedule.py",
        "self.scheduled - falls",
        "1 + self.scheduled - falls",
        {"small_gpt2"},
    ),
    "warm-up": ("schedule.py", "(step + 1) / warmup", "step / warmup", {"record1", "small_gpt2"}),
    "momentum": ("schedule.py", "min(1.0, up, down)", "min(0.99, up, down)", {"small_gpt2"}),
    "its end": ("schedule.py", "(steps - step) /", "(steps - 1 - step) /", {"small_gpt2"}),
    "decay": (
        "optim/state.py",
        "self.config.weight_decay * wd_mul",
        "0.99 * self.config.weight_decay * wd_mul",
        {"record1", "small_gpt2"},
    ),
    "cautious decay": (
        "optim/muon.py",
        "update + decay * p",
        "update + 0.99 * decay * p",
        {"small_gpt2"},
    ),
    "products in 16 bits": (
        "optim/muon.py",
        "beta=beta, alpha=alpha)",
        "beta=beta, alpha=1.001 * alpha)",
        {"small_gpt2"},
    ),
}


@pytest.mark.slow
class TestProof:
    @pytest.mark.parametrize(  # make check takes a sample
        "what",
        [
            pytest.param(what, marks=[] if what == "cooldown" else pytest.mark.long)
            for what in ALONE
        ],
    )
    def test_a_change_of_one_thing_alone_is_seen(self, project, what):
        file, old, new, differ = ALONE[what]
        edit(project / "speedrun" / file, old, new)
        said, results = prove(project)
        for name in ("record1", "small_gpt2"):
            wanted = "trains differently: run 1 of 1, from step" if name in differ else SAME
            assert said[name].startswith(wanted), said
            assert ("proof" in results[name]) == (name not in differ)

    def test_a_new_switch_that_is_off_is_the_same_behaviour_and_proofs_chain(self, project):
        mlp = project / "speedrun/model/mlp.py"
        edit(
            mlp,
            "    fan_in_init: bool = False\n",
            "    fan_in_init: bool = False\n    twice: bool = False\n",
        )
        edit(mlp, '    return linear(hidden, weights, "mlp_down")', '    hidden = 2 * hidden if options.twice else hidden\n    return linear(hidden, weights, "mlp_down")')  # fmt: skip
        said, results = prove(project)
        assert said == {"record1": SAME, "small_gpt2": SAME}
        proof = results["record1"]["proof"]
        assert set(proof["modules"]) == set(results["record1"]["stamp"]["modules"])
        assert prove(project)[0] == {}, "not stale any more"
        proved = commit(project, "a switch")
        edit(mlp, "2 * hidden if", "3 * hidden if")
        said, results = prove(project)
        assert said == {"record1": SAME, "small_gpt2": SAME}
        assert results["record1"]["proof"]["commit"] == proved != proof["commit"]
        edit(mlp, "if options.twice", "if not options.twice")
        assert "trains differently: run 1 of 1" in prove(project)[0]["record1"]

    @pytest.mark.parametrize("called", [False, True])
    def test_a_new_module_about_gpus_counts_where_a_run_enters_it(self, project, called):
        """And an old one as little where it does not enter it."""
        (project / "speedrun/fast.py").write_text("def nothing():\n    return 'cuda'\n")
        add = "\n    nothing()" if called else ""
        edit(project / "speedrun/optim/soap.py", "return torch.linalg.eigh(covariance)[1].flip(-1)", "return torch.linalg.eigh(covariance.cuda())[1].flip(-1)")  # fmt: skip
        edit(project / "speedrun/train.py", "from speedrun.lab.hardware import setup\n", "from speedrun.fast import nothing\nfrom speedrun.lab.hardware import setup\n")  # fmt: skip
        edit(project / "speedrun/train.py", "    run.step += 1\n", f"    run.step += 1{add}\n")  # fmt: skip
        said, _ = prove(project)
        refused = "not proved: speedrun.fast: “nothing” has changed and is about GPUs"
        assert said == {"record1": refused if called else SAME, "small_gpt2": SAME}

    @pytest.mark.parametrize("what", ["flash_op", "dkv_kernel", "another backend"])
    def test_a_kernel_counts_where_a_run_comes_to_it(self, what, project):
        module = "kernels.attention" if what == "dkv_kernel" else "model.backends"
        file = project / f"speedrun/{module.replace('.', '/')}.py"
        if what == "dkv_kernel":
            edit(file, "def dkv_kernel(", "def dkv_kernel(  # noqa\n    OTHER,")
        else:
            edit(file, 'causal": True, "window_size_left', 'causal": 1 == 1, "window_size_left')
            edit(file, "most, most, 0.0, True, False,", "most, most, 0.00, bool(1), False,")
        path = project / "book/results/example/record1.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        backend = "fa2" if what == "another backend" else "auto"
        reads_documents = vary(preset("small"), {"model.attention.backend": backend})
        result["data"]["runs"] = [{"config": dataclasses.asdict(reads_documents)}]
        path.write_text(json.dumps(result), encoding="utf-8")
        said, _ = prove(project)
        refused = f"not proved: speedrun.{module} is a kernel"
        assert said == {"record1": SAME if what == "flash_op" else refused, "small_gpt2": SAME}

    def test_a_path_that_only_gpus_take_is_never_proved(self, project):
        edit(project / "speedrun/lab/timer.py", "torch.cuda.synchronize(self.device)", "torch.cuda.synchronize()")  # fmt: skip
        said, results = prove(project)
        assert "“TrainClock.wait” has changed and is about GPUs" in said["record1"]
        assert said["small_gpt2"] == SAME and "proof" not in results["record1"]

    def test_code_that_does_not_run_is_not_proved(self, project):
        edit(project / "speedrun/train.py", "    run.step += 1\n", "    run.step += one\n")
        for said in prove(project)[0].values():
            assert said == "not proved: today's code cannot train run 1 of 1: NameError: name 'one' is not defined"  # fmt: skip

    def test_code_that_was_never_committed_has_no_past(self, project):
        for path in (project / "book/results/example").glob("*.json"):
            result = json.loads(path.read_text())
            result["stamp"]["modules"]["speedrun.train"] = "0" * 16
            path.write_text(json.dumps(result))
        said, _ = prove(project)
        assert set(said.values()) == {"not proved: no commit holds the code that was measured"}


OLD_AND_NEW = {  # the module that tells a change of names → code of before and since
    "speedrun.model.layout": [
        (
            'def capped(z, step_tokens):\n    raise Problem(f"--data.step-tokens {step_tokens}")\n',
            'def softcap(z, batch_tokens):\n    raise UserError(f"--data.batch-tokens {batch_tokens}")\n',
        )
    ],
    "speedrun.model.gpt": [
        (
            'def smeared(x, look):\n    raise UserError(f"--model.width {config.width}", look.turns)\n',
            'def apply_smear(x, look):\n    raise UserError(f"--model.model-dim {config.model_dim}", context.cos_sin)\n',
        ),
        (
            "raise x @ self.head if config.head.tied == 'tied' else GPTConfig(2, f(1), width=8, layers=3)\n",
            "raise x @ self.lm_head if config.head.tie == 'tied' else GPTConfig(2, f(1), model_dim=8, num_layers=3)\n",
        ),
        (
            'raise {"model.plan.skips": "gated", "model.plan.without": "attention", "model.rotary.positions": "half"}\n',
            'raise {"model.layout.skips": "single_gated", "model.layout.skip_sublayers": "attn", "model.rotary.pos": "half_rope"}\n',
        ),
    ],
}


def ago_of(module: str) -> int:
    """How many changes of names there have been from the one on that a module tells."""
    return len(migrate.STEPS) - [step.since for step in migrate.STEPS].index(module)


class TestWords:
    @pytest.mark.parametrize(
        ("since", "old", "new"),
        [(since, *pair) for since, pairs in OLD_AND_NEW.items() for pair in pairs],
    )
    def test_a_rename_is_no_change_and_anything_more_is(self, since, old, new):
        from migrate import reworded

        ago = ago_of(since)

        assert stale.changes({"m": reworded(old, ago)}, {"m": new}) == {"m": []}
        assert stale.changes({"m": reworded(old, ago - 1)}, {"m": new})["m"]
        assert reworded(new, len(migrate.STEPS)) == new, "twice is once"
        other = new.replace("raise", "return")
        assert stale.changes({"m": reworded(old, ago)}, {"m": other})["m"]

    @pytest.mark.parametrize(
        "text",
        [
            "missteps step_tokens_x x.head.capital TrainClock unpaused",
            "page.width, spec.layers, model.head.std, launch.plan, len(plan) == 2, model.heads_up",
            'bytes_sent(width=3), {"width": 3}, the context of a head, ParamSpec("head", (3, 5))',
        ],
    )
    def test_a_longer_word_is_left_alone(self, text):
        from migrate import reworded

        assert reworded(text, len(migrate.STEPS)) == text

    def test_the_clock_has_moved_and_has_another_name(self):
        from migrate import reworded

        ago = ago_of("speedrun.lab.timer")
        old = "class Clock:\n    def wait(self):\n        torch.cuda.synchronize()\n\n\ndef paused(clock: Clock, marks: 'Marks | None'):\n    clock.wait()\n"
        new = old.replace("Clock", "TrainClock").replace("paused", "off_the_clock")
        new = new.replace("Marks", "StepTimer")
        before = {"train": reworded(old, ago), "timer": ""}
        assert stale.changes(before, {"train": "", "timer": new}) == {"train": [], "timer": []}
        assert reworded(new, ago) == new, "today's words stay"
        faster = new.replace("torch.cuda.synchronize()", "pass")
        assert stale.changes(before, {"train": "", "timer": faster})["timer"]

    def test_a_commit_tells_its_names_by_a_module_or_by_a_word_in_it(self, monkeypatch):
        texts = {step.since: step.marks for step in migrate.STEPS}
        monkeypatch.setattr(stale, "blobs", lambda commit: {name: name for name in texts})
        monkeypatch.setattr(stale, "text_of", texts.get)
        assert stale.names_at("a") == 0
        texts["speedrun.model.gpt"] = "layers: int"
        assert stale.names_at("a") == 1
        del texts["speedrun.model.layout"]
        assert stale.names_at("a") == 2

    def test_every_preset_goes_back_a_change_and_forth_again(self):
        found, ago = set(), ago_of("speedrun.model.gpt")
        for name in known_presets():
            run = preset(name)
            older = migrate.in_older_names(run, ago)
            assert {"layers", "plan"} <= older["model"].keys()
            assert migrate.todays(older) == run
            flat = migrate.leaves(older)
            found |= {(field, said) for field, said in SAID if flat[field] == said}
            with pytest.raises(UserError, match="fields that today's GPTConfig lacks: context"):
                config_from_json(older)
        assert found == SAID


def test_a_run_of_before_a_change_of_names_goes_on_after_it(embedded, tmp_path):
    """It is refused with a sentence; once migrated it is, to the bit, what it would have been."""
    changes = {"data.path": str(embedded), "model.head.tie": "until_step", "warmup": 0}
    changes |= {"model.embedding.values": "ends", "model.layout.x0": True, "checkpoint_every": 2}
    changes |= {"optim.adam.every": 2, "optim.adam.cautious": True, "optim.grad_clip": 0.0}
    run = vary(at_cpu_size(preset("cpu_gpt2"), 8), changes | {"max_steps": 5})
    train(run, tmp_path / "run", echo=None)
    wanted = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert DRAWN_AS.keys() <= wanted[0].keys()

    def renamed(tensors: dict) -> dict:
        own = re.compile(rf"\b({'|'.join(DRAWN_AS)})\b")
        return {own.sub(lambda found: DRAWN_AS[found[0]], name): t for name, t in tensors.items()}

    folder, older = (tmp_path / "old", migrate.in_older_names(run, ago_of("speedrun.model.gpt")))
    shutil.copytree(tmp_path / "run", folder)
    for path in checkpoints(folder):
        weights, moments, facts = load_checkpoint(path)
        assert renamed(moments).keys() != moments.keys()
        save_checkpoint(folder, facts["step"], renamed(weights), renamed(moments), facts | {"config": older})  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"config": older}
    (folder / "metrics.jsonl").write_text("".join([json.dumps(first) + "\n", *lines[1:]]))
    with pytest.raises(UserError, match="fields that today's GPTConfig lacks: context, heads"):
        run_config(TrainCommand(preset("smoke"), resume=str(folder)))
    assert migrate.migrate_run(folder) and not migrate.migrate_run(folder)
    found = load_checkpoint(latest_checkpoint(folder))
    for here, there in zip(found[:2], wanted[:2]):
        assert here.keys() == there.keys()
        assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    whole = run_config(TrainCommand(preset("smoke"), resume=str(folder)))
    assert whole == vary(run, {"max_steps": 0})
    ends = [train(whole, tmp_path / name, again=True, echo=None).model for name in ("run", "old")]
    weights, others = (dict(end.named_parameters()) for end in ends)
    assert all(torch.equal(p, others[name]) for name, p in weights.items())


SAID = {  # what values were called
    ("model.rotary.positions", "rotary"),
    ("model.rotary.positions", "half"),
    ("model.rotary.pairs", "halves"),
    ("model.plan.skips", "gated"),
    ("model.plan.without", "attention"),
    ("model.plan.without", "nothing"),
    ("model.plan.without", "both"),
    ("model.head.tied", "split"),
    ("model.embedding.value_residual", "gates"),
    ("model.embedding.value_residual", "free"),
    ("model.embedding.value_residual", "share"),
}
