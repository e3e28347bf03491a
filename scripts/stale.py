"""Which measurements rest on code that has changed since, and whether it still trains the same.

    python scripts/stale.py            list what is stale, the dearest first
    python scripts/stale.py --prove    try to show that the changed code computes the same; what is shown is kept in the result

The proof trains twenty steps of every run that a stale result names, very small, with the code of a commit that is known to be good and with
today's: one process for each, side by side. Known to be good for a result is the newest commit that holds the code that was measured, or the code of its last
proof. Of runs that differ only in fractions (rates, deviations) or in the seed the first stands for all, unless a fraction is zero in one and not in
another. What is shown is written into all results whose runs have all losses equal bit by bit, and never for code that only GPUs run. Losses then still
stand; times do not. A result that trained nothing is shown to stand where every statement that its measuring code uses is what it was.
"""

import argparse
import ast
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from migrate import STEPS, Step, configs_in, in_older_names, reworded

from speedrun.config import Config, config_from_json, fields_of, vary
from speedrun.cpu_size import RAMPS, at_cpu_size
from speedrun.data.shards import data_folder
from speedrun.lab import provenance
from speedrun.lab.errors import UserError, run_main, visible
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import canonical, code_hash, is_docstring, module_hashes, root
from speedrun.lab.results import freshness

GPU_WORDS = (
    "cuda",
    "nccl",
    "autocast",
    "bfloat16",
    "float8",
    "triton",
)  # what a CPU does not do, or does otherwise
RANK_WORDS = ("dist.", "world")  # what a process alone does not do
# for runs that ask for them, where there is Triton
PEERS = ("flash_op", "flash_attention", "flash4_lacks")
IF_PEER = re.compile(
    r"if backend == '(?:fa2|fa3|fa4)'(?: and |:)(?!.*\n(?:else|elif)\b)", re.DOTALL
)
BESIDE = frozenset(("speedrun.model.attention", name) for name in PEERS)
AS_COMMAND = "if __name__ == '__main__'"
OUR_IMPORTS = ("from speedrun", "import speedrun", "if TYPE_CHECKING:\n    from speedrun")
for pure in ("code_hash", "imported_names", "module_file"):  # asked again for every result
    setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
TINY: dict[str, Any] = {
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.num_layers": 7,
    "model.max_seq_len": 32,
}
TINY |= {"data.seq_len": 32, "data.batch_tokens": 256, "data.micro_batches": 2, "val_tokens": 256}
TINY |= {"val_every": 5, "log_every": 1, "seed": 0, "compile": False, "device": "cpu"}
TINY |= {"wandb": "", "warmup": 0, "checkpoint_every": 0, "backend": "auto"}
ARITHMETIC = (
    "precision",
    "optim.muon.param_dtype",
    "optim.muon.ns_dtype",
    "model.layout.stream_dtype",
)  # a CPU can do it, too
TRAIN = """
import contextlib, dataclasses, functools, importlib, json, sys, tempfile, threading, typing
from pathlib import Path
import speedrun
tree, wanted, answers = sys.argv[1:]
assert Path(speedrun.__file__).resolve().is_relative_to(Path(tree).resolve()), speedrun.__file__
import torch
from speedrun.config import Config, config_from_json
from speedrun.train import train
def known(run, off, kind=Config, prefix=""):  # without what this code does not know, and is off
    kinds, found = typing.get_type_hints(kind), {}
    for name, value in run.items():
        if name not in kinds:
            if value != off[name] and name != "preset":
                raise ValueError(f"{prefix}{name}={value!r}: not in this code")
        elif dataclasses.is_dataclass(kinds[name]):
            found[name] = known(value, off[name], kinds[name], f"{prefix}{name}.")
        elif value and isinstance(value, list) and isinstance(value[0], dict):  # a table
            row = typing.get_args(kinds[name])[0]
            found[name] = [known(v, off[name][0], row, f"{prefix}{name}.") for v in value]
        else:
            found[name] = value
    return found
pure = []
with contextlib.suppress(ImportError, AttributeError):  # old code may not have it
    provenance = importlib.import_module("speedrun.lab.provenance")
    for name in ("code_hash", "imported_names"):  # of the same texts for every run
        setattr(provenance, name, functools.cache(getattr(provenance, name)))
        pure.append(id(getattr(provenance, name)))
def forget():  # what a module remembers would let a later run do without entering it
    modules = [module for name, module in sys.modules.items() if name.startswith("speedrun.")]
    for value in [value for module in modules for value in vars(module).values()]:
        if isinstance(value, functools._lru_cache_wrapper) and id(value) not in pure:
            value.cache_clear()
entered = set()
def note(frame, event, argument):
    code = frame.f_code  # what dataclasses write for themselves has no file
    if event == "call" and code.co_name != "<module>" and code.co_filename[0] != "<":
        entered.add(frame.f_globals.get("__name__", ""))
def trained(run):
    torch.manual_seed(0)
    forget()
    entered.clear()
    with tempfile.TemporaryDirectory() as folder:
        train(config_from_json(known(run, off)), Path(folder), echo=None)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] in ("step", "val")]
    losses = [[r["step"], r["val_loss" if r["kind"] == "val" else "train_loss"]] for r in records]
    return {"losses": losses, "entered": sorted(n for n in entered if n.startswith("speedrun."))}
threading.setprofile(note)
sys.setprofile(note)
with open(answers, "w", encoding="utf-8") as file:
    off, *runs = json.loads(Path(wanted).read_text(encoding="utf-8"))
    for run in runs:
        try:
            told = trained(run)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {getattr(error, 'what', error)}"}
        print(json.dumps(told), file=file, flush=True)
"""


def git(*words: str) -> str:
    """What git says about this project; UserError if it says no."""
    done = subprocess.run(["git", "-C", str(root()), *words], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(
            f"git {' '.join(words[:2])} failed: {visible(done.stderr.strip())}",
            "run it in a clone with its history",
        )
    return done.stdout


def all_results() -> dict[Path, dict]:
    """Every committed measurement, by its path."""
    paths = sorted((root() / "book" / "results").rglob("*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def gpus_of(result: dict) -> int:
    """On how many GPUs it was measured; 0: on a CPU."""
    return int(result["stamp"]["gpu"].split("×")[0]) if result["stamp"]["gpu"] else 0


def gpu_minutes(result: dict) -> float:
    """What measuring it again costs, in GPU minutes; 0 for a measurement on a CPU."""
    return gpus_of(result) * result["stamp"].get("minutes", 0.0)


def known_good(result: dict) -> list[dict[str, str]]:
    """Hashes of the modules that the result is known to stand for: those of the last proof, if any, then the measured ones."""
    return [part["modules"] for part in (result.get("proof"), result["stamp"]) if part]


def changed_modules(then: dict[str, str]) -> list[str]:
    """Modules whose hash is another today than it was then, or that have come or gone."""
    now = module_hashes(then)
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


@functools.cache
def blobs(commit: str) -> dict[str, str]:
    """Every module of the package at a commit, and git's name of its text."""
    found = {}
    for line in git("ls-tree", "-r", commit, "speedrun").splitlines():
        facts, path = line.split("\t")
        if path.endswith(".py"):
            name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            found[name] = facts.split()[2]
    return found


@functools.cache
def text_of(blob: str) -> str:
    return git("cat-file", "blob", blob)


@functools.cache
def hash_of(blob: str) -> str:
    return code_hash(text_of(blob))


def source_at(commit: str, module: str) -> str:
    """A module's text at a commit, in today's words; empty if it did not exist."""
    blob = blobs(commit).get(module)
    return todays_words(blob, names_at(commit)) if blob else ""


@functools.cache
def todays_words(blob: str, steps: int) -> str:
    return reworded(text_of(blob), steps)


def holds(commit: str, modules: dict[str, str]) -> bool:
    """Whether the modules had these hashes at a commit."""
    there = blobs(commit)
    return all(name in there and hash_of(there[name]) == digest for name, digest in modules.items())


def base_of(result: dict) -> tuple[str, dict[str, str]] | None:
    """The newest commit whose code the result is known to stand for, with the hashes of its modules; None if there is none."""
    for modules in known_good(result):
        for commit in git("log", "--format=%H", "--", "speedrun").split():
            if holds(commit, modules):
                return commit, modules
    return None


def versions(commit: str) -> list[dict[str, str]]:
    """All modules of the package as they were at a commit, and as they are: name → text."""
    now = {}
    for path in (root() / "speedrun").rglob("*.py"):
        parts = path.relative_to(root()).with_suffix("").parts
        now[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    names = {*now, *blobs(commit)}
    return [{name: source_at(commit, name) for name in names}, {n: now.get(n, "") for n in names}]


def statements(source: str) -> dict[tuple[str, str], str]:
    """A module's statements, those of functions and methods one by one, without docstrings: (where, canonical form) → text to search."""
    found: dict[tuple[str, str], str] = {}

    def visit(body, where: str) -> None:
        for node in body:
            if is_docstring(node):
                continue
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
    differ = [name for name in before if before[name] != after[name]]
    then = {name: statements(before[name]) for name in differ}
    now = {name: statements(after[name]) for name in differ}
    gone = {name: then[name].keys() - now[name].keys() for name in then}
    come = {name: now[name].keys() - then[name].keys() for name in then}
    moved = set().union(*gone.values()) & set().union(*come.values())
    told: dict[str, list[tuple[str, str]]] = {name: [] for name in before}
    for name in differ:
        own = then[name] | now[name]
        left = [(key[0], own[key]) for key in sorted((gone[name] | come[name]) - moved)]
        told[name] = [(where, text) for where, text in left if not text.startswith(OUR_IMPORTS)]
    return told


def touches_gpus(changed: list[tuple[str, str]], words: tuple = GPU_WORDS) -> str | None:
    """Where, among changed statements, one names something that only GPUs do, or another of the words. What an option may be (`X = Literal[…]`) does nothing."""
    does = [(where, text) for where, text in changed if not re.match(r"\w+ = literal\[", text)]
    return next((where for where, text in does if any(word in text for word in words)), None)


@functools.cache
def changes_since(commit: str) -> dict[str, list[tuple[str, str]]]:
    """Statements that the package at a commit and today's do not share."""
    return changes(*versions(commit))


def used_statements(
    read, start: list[str], beside: Collection = ()
) -> dict[tuple[str, str], set[str]]:
    """All statements that the modules in `start` come to by names: (what it defines, canonical form) → modules where it stands.

    read: a module's name → its text. Of a module that is imported as a whole, everything counts but what it does as a command.
    beside: (module, name): what that module imports by this name is not followed.
    """
    found: dict[tuple[str, str], set[str]] = defaultdict(
        set
    )  # a name may be defined in several steps
    wanted, seen = [(module, "") for module in start], set()
    while wanted:
        module, name = wanted.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        for node, own, text, form in top_statements(read(module)):
            if name and own and name not in own or text.startswith(AS_COMMAND):
                continue
            if not text.startswith(OUR_IMPORTS):
                found[", ".join(own), form].add(module)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name):
                    wanted.append((module, inner.id))
                elif isinstance(inner, ast.ImportFrom) and "speedrun" in (inner.module or ""):
                    one = (
                        name if inner is node else ""
                    )  # of several names that are imported together
                    names = [a.name for a in inner.names if one in ("", a.asname or a.name)]
                    wanted += [(str(inner.module), n) for n in names if (module, n) not in beside]
                elif isinstance(inner, ast.Import):
                    names = [alias.name for alias in inner.names]
                    wanted += [(other, "") for other in names if other.startswith("speedrun.")]
    return found


@functools.cache
def top_statements(source: str) -> list[tuple[ast.stmt, list[str], str, str]]:
    """A module's statements, imports one by one: each with what it defines or belongs to, as text, and in canonical form."""
    nodes = [it for node in ast.parse(source).body for it in apart(node)]
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own = [defined_by(n) or [called_on(n)] * (called_on(n) in functions) for n in nodes]
    return [(n, names, ast.unparse(n), canonical(n)) for n, names in zip(nodes, own)]


def apart(node: ast.stmt) -> list[ast.stmt]:
    """A statement; an import of several names as one import of each, for a module that is cut in two needs some of them here, some there."""
    if isinstance(node, ast.Import):
        return [ast.Import([alias]) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [alias], node.level) for alias in node.names]
    return [node]


def called_on(node: ast.stmt) -> str:
    """The name that a statement alone calls a method of, `op.register_autograd(…)`; empty: it is none of these."""
    call = node.value if isinstance(node, ast.Expr) else None
    asked = call.func if isinstance(call, ast.Call) else None
    inner = asked.value if isinstance(asked, ast.Attribute) else None
    return inner.id if isinstance(inner, ast.Name) else ""


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


@functools.cache
def used_then_and_now(
    start: tuple[str, ...], commit: str, beside: frozenset = frozenset()
) -> list[dict]:
    """`used_statements` of modules at a commit, and today's."""
    today = {name: file for name in module_hashes(start) if (file := provenance.module_file(name))}

    def read(name: str) -> str:
        return today[name].read_text(encoding="utf-8") if name in today else ""

    then = used_statements(lambda name: source_at(commit, name), list(start), beside)
    return [then, used_statements(read, list(start), beside)]


def measuring(modules: dict[str, str], slug: str) -> tuple[str, ...]:
    """Those modules that choose what is measured, and measure it; or else the chapter's, which collects what others ran."""
    own = tuple(name for name in modules if name.startswith("speedrun.measure."))
    return own or (f"speedrun.measure.{slug}",)


def same_statements(start: tuple[str, ...], commit: str) -> int:
    """How many statements the measuring code uses, if all are today what they were at the commit; else 0."""
    then, now = used_then_and_now(start, commit)
    return len(now) if then.keys() == now.keys() else 0


@functools.cache
def part_of_training(commit: str) -> frozenset[str]:
    """The modules that training imports, at a commit or today."""
    found, queue = set(), ["speedrun.train", "speedrun.history"]
    while queue:
        if (name := queue.pop()) not in found and (source := source_at(commit, name)):
            found.add(name)
            queue += provenance.imported_names(source)
    return frozenset(found | set(module_hashes(["speedrun.train", "speedrun.history"])))


def changed_where(
    start: tuple[str, ...], commit: str, beside: frozenset = frozenset()
) -> set[str] | None:
    """The modules in which the statements that some come to by names have changed; None if there were none."""
    then, now = used_then_and_now(start, commit, beside)
    apart = then.keys() ^ now.keys()
    return {n for key in apart for n in {*then.get(key, ()), *now.get(key, ())}} if then else None


def kernels_of(result: dict) -> tuple[str, ...]:
    """The modules whose code no CPU runs for a result: our kernels, and other libraries' where they are asked for."""
    ours = ("speedrun.kernels.",)
    return ours if without_peers(result) else (*ours, "speedrun.model.backends")


def without_peers(result: dict) -> bool:
    """Whether no run of a result can have come to FlashAttention: none asked for it, and there was Triton."""
    backends = {c["model"].get("attention", {}).get("backend", "auto") for c in configs_in(result["data"])}  # fmt: skip
    return backends <= {"auto", "triton", "flex", "sdpa"} and bool(result["stamp"].get("triton"))


def objection(
    modules: dict[str, str], start: tuple[str, ...], commit: str, result: dict
) -> str | None:
    """Why training a little on a CPU could not show that a result with these modules still stands; None if it could.

    start: those that measure. What a CPU computed, a CPU computes again, without kernels; of a GPU's kernels all counts that training comes to.
    """
    changed, gpus = changes_since(commit), gpus_of(result)
    beside = BESIDE if without_peers(result) else frozenset()
    used = changed_where(start, commit)
    kernels = changed_where((*start, "speedrun.train"), commit, beside)
    for name in changed_modules(modules):
        if name.startswith(kernels_of(result)) and gpus:
            if kernels is None or name in kernels:
                return f"{name} is a kernel"
            continue
        if name.startswith("speedrun.measure."):
            continue  # it chose the runs, whose configs are in the result
        apart = name not in part_of_training(commit) and changed[name] and source_at(commit, name)
        if apart and (used is None or name in used):
            return f"{name} is not part of training: the proof would not run it"
    return None


def tiny(saved: dict, data: Path) -> Config:
    """The run of a saved config, very small: its decisions, and its arithmetic, stay."""
    whole = config_from_json(saved)
    own = fields_of(whole)
    sizes = TINY | {
        "data.path": str(data),
        "data.max_forward_tokens": 256 * bool(whole.data.max_forward_tokens),
    }
    if not whole.schedule.momentum_min:  # then there are no ramps, and old code may have none
        sizes["schedule.momentum_ramp"] = Config().schedule.momentum_ramp
    return vary(at_cpu_size(whole), sizes | {name: own[name] for name in ARITHMETIC})


def names_at(commit: str) -> int:
    """How many changes of names came after a commit."""
    return sum(not knows(commit, step) for step in STEPS)


def knows(commit: str, step: Step) -> bool:
    """Whether a commit has the names since a change of them."""
    blob = blobs(commit).get(step.since)
    return blob is not None and step.marks in text_of(blob)


def way(run: Config) -> str:
    """The way that a run takes through the code, as a text: words, switches, whole numbers; of fractions and ramps, whether they are zero."""

    def rough(value, exact: tuple):
        if isinstance(value, tuple):
            return [rough(item, exact) for item in value]
        return value if isinstance(value, exact) else bool(value)

    kinds = {name: (str,) if name in RAMPS else (str, int) for name in fields_of(run)}
    return json.dumps({name: rough(value, kinds[name]) for name, value in fields_of(run).items()})


@contextlib.contextmanager
def checked_out(commit: str):
    """A folder with the project as it was at a commit."""
    packed = subprocess.run(
        ["git", "-C", str(root()), "archive", "--format=zip", commit], capture_output=True
    )
    if packed.returncode:
        raise UserError(
            f"git archive {commit} failed: {visible(packed.stderr.decode(errors='replace').strip())}",
            "run it in a clone with its history",
        )
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(packed.stdout)).extractall(folder)
        yield Path(folder)


def about_gpus(modules: dict[str, str], commit: str, result: dict) -> dict[str, str]:
    """Changed and new modules where a statement that names what only GPUs do, or several, has changed: name → where.

    Where a run on the CPU does not enter a module, neither does the same run on a GPU: what leads there has been compared. A statement that
    begins by asking for a backend that no run asked for ends there.
    """
    words = GPU_WORDS if gpus_of(result) == 1 else GPU_WORDS + RANK_WORDS
    changed = changes_since(commit)
    if without_peers(result):
        changed = {
            n: [it for it in them if not IF_PEER.match(it[1])] for n, them in changed.items()
        }
    judged = ("speedrun.measure.", *kernels_of(result))  # kernels by `objection`
    ours = [name for name in changed_modules(modules) if not name.startswith(judged)]
    about = {name: touches_gpus(changed[name], words) for name in ours}
    return {name: where for name, where in about.items() if where}


def train_all(trees: dict[Path, list[dict]]) -> list[list[dict]]:
    """Train runs with the code in each tree, in one process a tree, all at once. trees: to each what is off there, and its runs.

    Returns for each tree and run {"losses": [[step, loss], …], "entered": modules of which a function was called} or {"error": …}.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, started = Path(name), []
        for n, (tree, runs) in enumerate(trees.items()):
            (folder / f"{n}.runs").write_text(json.dumps(runs), encoding="utf-8")
            environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                "-c",
                TRAIN,
                str(tree),
                *(str(folder / f) for f in (f"{n}.runs", f"{n}")),
            ]
            said = stack.enter_context(open(folder / f"{n}.said", "w"))
            process = subprocess.Popen(command, env=environment, cwd=tree, stdout=said, stderr=said)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            process.wait()
        return [answers(folder / f"{n}", len(runs) - 1) for n, runs in enumerate(trees.values())]


def answers(path: Path, count: int) -> list[dict]:
    """What a process wrote about each run, and for those that it did not come to, its last words."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    words = path.with_suffix(".said").read_text(encoding="utf-8", errors="replace").strip()
    last = (words.splitlines() or ["it ended without a word"])[-1]
    return [json.loads(line) for line in lines] + [{"error": last}] * (count - len(lines))


def keep_proof(path: Path, result: dict, today: dict[str, str], facts: dict) -> None:
    """Write a proof into a result's file, with the hashes of the code that it was given for."""
    if module_hashes(result["stamp"]["modules"]) != today:
        raise UserError("the code has changed while it was proved", "run it again")
    proof = {"modules": today, **facts}
    text = json.dumps(result | {"proof": proof}, indent=1, ensure_ascii=False)
    atomic_write(path, text + "\n")


def same_or_not(result: dict, modules: dict[str, str], commit: str, pairs: list) -> str | None:
    """Why the runs of a result, (with the code then, with today's), do not prove that it stands; None if they do."""
    doubtful = about_gpus(modules, commit, result) if gpus_of(result) else {}
    for number, (before, after) in enumerate(pairs, 1):
        which = f"run {number} of {len(pairs)}"
        for whose, told in (("the code of " + commit[:12], before), ("today's code", after)):
            if "error" in told:
                return f"not proved: {whose} cannot train {which}: {visible(told['error'])}"
        for name in sorted(set(doubtful) & set(after["entered"])):
            return f"not proved: {name}: “{doubtful[name]}” has changed and is about GPUs"
        if before["losses"] != after["losses"]:
            both = zip(before["losses"], after["losses"])
            step = next((a[0] for a, b in both if a != b), "the last")
            return f"trains differently: {which}, from step {step} on"
    return None


def prove(results: dict[Path, dict]):
    """Try to show that today's code trains what stale results did: yields (path, what came of it), and keeps proofs in the files."""
    groups: dict[str, dict[Path, tuple]] = defaultdict(dict)
    data = data_folder("data/embedded").resolve()
    for path, result in results.items():
        base, configs = base_of(result), configs_in(result["data"])
        if base is None:
            yield path, "not proved: no commit holds the code that was measured"
            continue
        commit, modules = base
        start = measuring(modules, path.parent.name)
        if not configs:
            yield path, prove_without_runs(path, result, modules, commit)
        elif why_not := objection(modules, start, commit, result):
            yield path, f"not proved: {why_not}"
        else:
            try:
                small = [tiny(saved, data) for saved in configs]
                groups[commit][path] = (modules, {way(run): run for run in small})
            except UserError as problem:
                yield path, f"not proved: {problem.what}"
    for commit, members in groups.items():
        yield from prove_group(results, commit, members)


def prove_without_runs(path: Path, result: dict, modules: dict[str, str], commit: str) -> str:
    today = module_hashes(result["stamp"]["modules"])
    start = measuring(modules, path.parent.name)
    count = same_statements(start, commit)
    if not count:
        return (
            f"not proved: {objection(modules, start, commit, result) or 'it names no training run'}"
        )
    keep_proof(path, result, today, {"commit": commit, "statements": count})
    return f"same behaviour: the {count} statements that it uses are the same"


def prove_group(results: dict[Path, dict], commit: str, members: dict[Path, tuple]):
    """`prove` for the results that a commit's code is known to be good for."""
    runs: dict[str, Config] = {}
    for _, own in members.values():
        runs = own | runs  # the first of each way
    today = {path: module_hashes(results[path]["stamp"]["modules"]) for path in members}
    print(
        f"training {len(runs)} runs with the code of {commit[:12]} and with today's …", flush=True
    )
    began = time.monotonic()
    with checked_out(commit) as then:
        each = [Config(), *runs.values()]  # the first: everything off
        names = {then: names_at(commit), root(): 0}
        trees = {tree: [in_older_names(run, n) for run in each] for tree, n in names.items()}
        before, after = train_all(trees)
    print(f"… in {time.monotonic() - began:.0f} s")
    pairs = dict(zip(runs, zip(before, after)))
    for path, (modules, own) in members.items():
        why_not = same_or_not(results[path], modules, commit, [pairs[key] for key in own])
        if why_not is None:
            keep_proof(path, results[path], today[path], {"commit": commit, "runs": len(own)})
        yield path, why_not or f"same behaviour: {len(own)} runs, all losses bit-equal"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prove", action="store_true", help="try to show that the code still trains the same"
    )
    options = parser.parse_args(arguments)
    results = all_results()
    found = {path: result for path, result in results.items() if freshness(result) == "stale"}
    stale = dict(sorted(found.items(), key=lambda item: -gpu_minutes(item[1])))
    for path, result in stale.items():
        cost = f"{gpu_minutes(result):.1f} GPU min" if gpu_minutes(result) else "CPU"
        changed = ", ".join(changed_modules(known_good(result)[0]))
        print(f"{path.parent.name}/{path.stem}  {cost}  changed: {changed}")
        print(f"    again: {result['stamp']['command']}")
    print(f"{len(stale)} of {len(results)} results are stale")
    if options.prove:
        for path, said in prove(stale):
            print(f"{path.parent.name}/{path.stem}  {said}", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
