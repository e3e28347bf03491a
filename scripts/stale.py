"""Which measurements rest on code that has changed since, and whether it still trains the same.

    python scripts/stale.py            list what is stale, the dearest first
    python scripts/stale.py --prove    try to show that the changed code computes the same; what is shown is kept in the result

The proof trains twenty steps of the runs of a result, at the size of a laptop, with the code of the commit that was measured and with
today's. Of runs that differ in nothing but numbers (seeds, rates) the first stands for all, unless a number is zero in one and not in another. It is given where all losses are equal bit by bit, and never for code that only GPUs run. Losses then still stand;
times do not. A result that trained nothing is shown to stand where every statement that its measuring code uses is what it was.
"""

import argparse
import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from speedrun.config import at_cpu_size, config_from_json, fields_of
from speedrun.data.shards import data_folder
from speedrun.lab.errors import Problem
from speedrun.lab.provenance import canonical, code_hash, module_file, module_hashes, root
from speedrun.lab.results import freshness

GPU_WORDS = ("cuda", "nccl", "autocast", "bfloat16", "float8", "triton")  # never run by the proof
AS_COMMAND = "if __name__ == '__main__'"
OUR_IMPORTS = ("from speedrun", "import speedrun")
TRAIN = """
import json, sys, tempfile, threading
from pathlib import Path
import speedrun
from speedrun.config import config_from_json
from speedrun.lab.runlog import read_metrics, series
from speedrun.train import train
assert Path(speedrun.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()), speedrun.__file__
entered = set()
def note(frame, event, argument):
    code = frame.f_code  # what dataclasses write for themselves has no file
    if event == "call" and code.co_name != "<module>" and code.co_filename[0] != "<":
        entered.add(frame.f_globals.get("__name__", ""))
with tempfile.TemporaryDirectory() as folder:
    config = config_from_json(json.loads(sys.argv[2]))
    threading.setprofile(note)
    sys.setprofile(note)
    train(config, Path(folder), echo=None)
    sys.setprofile(None)
    records = read_metrics(Path(folder) / "metrics.jsonl")
losses = [r["train_loss"] for r in series(records, "step")] + [r["val_loss"] for r in series(records, "val")]
print(json.dumps([losses, sorted(name for name in entered if name.startswith("speedrun."))]))
"""


def git(*words: str) -> str:
    """What git says about this project; Problem if it says no."""
    done = subprocess.run(["git", "-C", str(root()), *words], capture_output=True, text=True)
    if done.returncode:
        raise Problem(
            f"git {' '.join(words[:2])} failed: {done.stderr.strip()}",
            "run it in a clone with its history",
        )
    return done.stdout


def all_results() -> dict[Path, dict]:
    """Every committed measurement, by its path."""
    paths = sorted((root() / "book" / "results").rglob("*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def gpu_minutes(result: dict) -> float:
    """What measuring it again costs, in GPU minutes; 0 for a measurement on a CPU."""
    stamp = result["stamp"]
    gpus = int(stamp["gpu"].split("×")[0]) if stamp["gpu"] else 0
    return gpus * stamp.get("minutes", 0.0)


def changed_modules(result: dict) -> list[str]:
    """Modules of the measured code whose hash is another today, or that have come or gone."""
    then = result["stamp"]["modules"]
    now = module_hashes(then)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def versions(commit: str) -> list[dict[str, str]]:
    """All modules of the package as they were at a commit, and as they are: name → text."""
    now = {}
    for path in (root() / "speedrun").rglob("*.py"):
        parts = path.relative_to(root()).with_suffix("").parts
        now[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    gone = git("ls-tree", "-r", "--name-only", commit, "speedrun").split()
    names = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in gone if name.endswith(".py")}  # fmt: skip
    then = {name: source_at(commit, name) if name in names else "" for name in {*now, *names}}
    return [then, {name: now.get(name, "") for name in then}]


def configs_in(value) -> list[dict]:
    """Every training run's config that a result holds under the key `config`."""
    if isinstance(value, list):
        return [config for item in value for config in configs_in(item)]
    if not isinstance(value, dict):
        return []
    own = [value["config"]] if isinstance(value.get("config"), dict) else []
    return own + [
        config for key, item in value.items() if key != "config" for config in configs_in(item)
    ]


def statements(source: str) -> dict[tuple[str, str], str]:
    """A module's statements, those of functions and methods one by one: (where, canonical form) → text to search."""
    found: dict[tuple[str, str], str] = {}

    def visit(body, where: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                visit(node.body, f"{where}.{node.name}".strip("."))
                node.body = []
            found[where or getattr(node, "name", "a statement"), canonical(node)] = ast.unparse(
                node
            ).lower()

    visit(ast.parse(source).body, "")
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Statements that two versions of the same modules do not share: module → (where, text to search).

    A statement that has left one of them and come to another has moved, and is shared. Imports of the package are not compared: what they name is.
    """
    then = {name: statements(text) for name, text in before.items()}
    now = {name: statements(text) for name, text in after.items()}
    gone = {name: then[name].keys() - now[name].keys() for name in then}
    come = {name: now[name].keys() - then[name].keys() for name in then}
    moved = set().union(*gone.values()) & set().union(*come.values())
    told = {}
    for name in then:
        own = then[name] | now[name]
        left = [(key[0], own[key]) for key in sorted((gone[name] | come[name]) - moved)]
        told[name] = [(where, text) for where, text in left if not text.startswith(OUR_IMPORTS)]
    return told


def touches_gpus(changed: list[tuple[str, str]]) -> str | None:
    """Where, among changed statements, one names something that only GPUs do."""
    return next((where for where, text in changed if any(word in text for word in GPU_WORDS)), None)


def source_at(commit: str, module: str) -> str:
    """A module's text at a commit, empty if it did not exist."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        with contextlib.suppress(Problem):
            return git("show", f"{commit}:{candidate}")
    return ""


def measured_commit(result: dict) -> str | None:
    """The newest commit whose modules have the hashes of the stamp."""
    wanted = result["stamp"]["modules"]
    for commit in git("log", "--format=%H", "--", "speedrun").split():
        if all(code_hash(source_at(commit, name)) == digest for name, digest in wanted.items()):
            return commit
    return None


def used_statements(read, start: list[str]) -> set[tuple[str, str]]:
    """All statements that the modules in `start` come to by names: (what it defines, canonical form), wherever it stands.

    read: a module's name → its text. Of a module that is imported as a whole, everything counts but what it does as a command.
    """
    parsed: dict[str, list] = {}
    found: set[tuple[str, str]] = set()  # a name may be defined in several steps
    wanted, seen = [(module, "") for module in start], set()
    while wanted:
        module, name = wanted.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        if module not in parsed:
            parsed[module] = ast.parse(read(module)).body
        for node in parsed[module]:
            own = defined_by(node)
            if name and own and name not in own or ast.unparse(node).startswith(AS_COMMAND):
                continue
            if not ast.unparse(node).startswith(OUR_IMPORTS):
                found.add((", ".join(own), canonical(node)))
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name):
                    wanted.append((module, inner.id))
                elif isinstance(inner, ast.ImportFrom) and "speedrun" in (inner.module or ""):
                    wanted += [(str(inner.module), alias.name) for alias in inner.names]
                elif isinstance(inner, ast.Import):
                    names = [alias.name for alias in inner.names]
                    wanted += [(other, "") for other in names if other.startswith("speedrun.")]
    return found


def defined_by(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines; none for one that is there for what it does."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [
        inner.id
        for target in targets
        if target
        for inner in ast.walk(target)
        if isinstance(inner, ast.Name)
    ]


def same_statements(result: dict, commit: str) -> int:
    """How many statements the measuring code uses, if all are today what they were at the commit; else 0."""
    start = [name for name in result["stamp"]["modules"] if name.startswith("speedrun.measure.")]
    today = {name: file for name in module_hashes(start) if (file := module_file(name))}
    then = used_statements(lambda name: source_at(commit, name), start)
    now = used_statements(
        lambda name: today[name].read_text(encoding="utf-8") if name in today else "", start
    )
    return len(now) if then == now else 0


def objection(result: dict, commit: str) -> str | None:
    """Why training a little on a CPU could not show that this result still stands; None if it could."""
    trained = module_hashes(["speedrun.train", "speedrun.history"])
    changed = changes(*versions(commit))
    for name in changed_modules(result):
        if name.startswith("speedrun.kernels."):
            return f"{name} is a kernel"
        if name.startswith("speedrun.measure."):
            continue  # it chose the runs, whose configs are in the result
        if name not in trained and changed[name] and source_at(commit, name):
            return f"{name} is not part of training: the proof would not run it"
    if not configs_in(result["data"]):
        return "it names no training run"
    return None


def small(saved: dict, data: Path) -> dict:
    """A saved config at a laptop's size, with the fields that it was saved with and no others."""
    sizes = fields_of(at_cpu_size(config_from_json(saved)))
    sizes |= {"data.path": str(data), "log_every": 1, "compile": False, "device": "cpu"}
    sizes |= {"wandb": "", "warmup": 0, "checkpoint_every": 0, "backend": "auto"}

    def shrink(fields: dict, prefix: str) -> dict:
        return {
            name: shrink(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else sizes.get(prefix + name, value)
            for name, value in fields.items()
        }

    return shrink(saved, "")


def paths(runs: list[dict]) -> list[dict]:
    """The first of all runs that take the same way through the code: equal words and switches, the same numbers zero."""

    def way(value):
        if isinstance(value, dict):
            return {name: way(item) for name, item in value.items()}
        if isinstance(value, list):
            return [way(item) for item in value]
        return value if isinstance(value, str | bool) else bool(value)

    first: dict[str, dict] = {}
    for run in runs:
        first.setdefault(json.dumps(way(run)), run)
    return list(first.values())


@contextlib.contextmanager
def checked_out(commit: str):
    """A folder with the project as it was at a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "then"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def about_gpus(result: dict, commit: str) -> dict[str, str]:
    """Changed and new modules of a result on GPUs where a statement that names what only GPUs do has changed: name → where.

    Where a run on the CPU does not enter a module, neither does the same run on a GPU: what leads there has been compared.
    """
    if result["stamp"]["gpu"] is None:
        return {}
    changed = changes(*versions(commit))
    ours = [name for name in changed_modules(result) if not name.startswith("speedrun.measure.")]
    about = {name: touches_gpus(changed[name]) for name in ours}
    return {name: where for name, where in about.items() if where}


def losses(tree: Path, config: dict) -> tuple[list[float], list[str]]:
    """All losses of a run with the code in `tree`, and the modules of which it called a function."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAIN, str(tree), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tree)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Problem(f"the code in {tree.name} cannot train this run: {last}", "measure it again")
    return json.loads(done.stdout.splitlines()[-1])


def keep_proof(path: Path, result: dict, facts: dict) -> None:
    """Write a proof into a result's file, with the hashes of the code that it was given for."""
    proof = {"modules": module_hashes(result["stamp"]["modules"]), **facts}
    text = json.dumps(result | {"proof": proof}, indent=1, ensure_ascii=False)
    path.with_suffix(".part").write_text(text + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".part"), path)


def prove(path: Path, result: dict) -> str:
    """Try to show that today's code trains what the result's did. Returns what came of it; keeps a proof in the file."""
    commit = measured_commit(result)
    if commit is None:
        return "not proved: no commit holds the code that was measured"
    if not configs_in(result["data"]) and (count := same_statements(result, commit)):
        keep_proof(path, result, {"commit": commit, "statements": count})
        return f"same behaviour: the {count} statements that it uses are the same"
    why_not = objection(result, commit)
    if why_not:
        return f"not proved: {why_not}"
    data = data_folder("data/embedded").resolve()
    doubtful = about_gpus(result, commit)
    runs = paths([small(config, data) for config in configs_in(result["data"])])
    with checked_out(commit) as then:
        for number, run in enumerate(runs, 1):
            try:
                (before, _), (after, entered) = losses(then, run), losses(root(), run)
            except Problem as problem:
                return f"not proved: {problem.what}"
            for name in sorted(set(doubtful) & set(entered)):
                return f"not proved: {name}: “{doubtful[name]}” has changed and is about GPUs"
            if before != after:
                step = next(n for n, pair in enumerate(zip(before, after), 1) if pair[0] != pair[1])
                return f"trains differently: run {number} of {len(runs)}, from step {step} on"
    keep_proof(path, result, {"commit": commit, "runs": len(runs)})
    return f"same behaviour: {len(runs)} runs, all losses bit-equal"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prove", action="store_true", help="try to show that the code still trains the same"
    )
    options = parser.parse_args(arguments)
    results = all_results()
    stale = {path: result for path, result in results.items() if freshness(result) == "stale"}
    for path, result in sorted(stale.items(), key=lambda item: -gpu_minutes(item[1])):
        cost = f"{gpu_minutes(result):.1f} GPU min" if gpu_minutes(result) else "CPU"
        print(
            f"{path.parent.name}/{path.stem}  {cost}  changed: {', '.join(changed_modules(result))}"
        )
        print(f"    again: {result['stamp']['command']}")
        if options.prove:
            try:
                print(f"    {prove(path, result)}", flush=True)
            except Problem as problem:
                print(problem, file=sys.stderr)
                return 1
    print(f"{len(stale)} of {len(results)} results are stale")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
