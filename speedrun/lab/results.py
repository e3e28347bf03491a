# Tangled from notebooks/01_are_you_faster.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Results: numbers that remember where they come from
import ast
import csv
import hashlib
import json
import os
import sys
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import speedrun
from speedrun.lab.hardware import Problem, look


def canonical(node) -> str:
    """A syntax tree as text: no comments, docstrings, positions or empty fields, so that Python versions agree on it."""
    if isinstance(node, list):
        kept = [item for item in node if not (isinstance(item, ast.Expr) and is_text(item.value))]
        return "[" + ",".join(canonical(item) for item in kept) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, getattr(node, name, None)) for name in sorted(node._fields) if name not in ("ctx", "kind", "type_ignores")]
    return type(node).__name__ + "(" + ",".join(f"{name}={canonical(value)}" for name, value in fields if value not in (None, [])) + ")"


def is_text(node) -> bool:
    """A string constant; as a statement of its own it is a docstring."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def code_hash(source: str) -> str:
    """Sixteen hex digits that change with the code and not with its comments, docstrings or layout."""
    return hashlib.sha256(canonical(ast.parse(source)).encode()).hexdigest()[:16]


def root() -> Path:
    """The project's folder, found from the package's own file and never from the working directory."""
    folder = Path(speedrun.__file__).resolve().parent.parent
    if not (folder / "book" / "data").is_dir():
        raise Problem(f"there is no project around {folder / 'speedrun'}: book/data is missing", "pip install -e . in a clone of the repository")
    return folder


def module_file(name: str) -> Path | None:
    """The file of a module such as `speedrun.lab.stats`, or None if there is no such module."""
    path = Path(speedrun.__file__).resolve().parent.joinpath(*name.split(".")[1:])
    candidates = [path.with_suffix(".py"), path / "__init__.py"] if name.startswith("speedrun.") else []
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports anywhere, functions included; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def module_closure(names) -> list[str]:
    """The given modules of the package and all that they import, directly or not, sorted."""
    found, queue = set(), list(names)
    while queue:
        name = queue.pop()
        file = module_file(name)
        if file is not None and name not in found:
            found.add(name)
            queue += imported_names(file.read_text(encoding="utf-8"))
    return sorted(found)


def module_hashes(names) -> dict[str, str]:
    """Module → code hash, for the given modules and all that they import."""
    return {name: code_hash(module_file(name).read_text(encoding="utf-8")) for name in module_closure(names)}


def stamp(command: str, modules, n: int, seeds=(), corpus: dict | None = None) -> dict:
    """Where, when and with what a measurement was made. `modules` are those the command starts; `corpus` has name and sha256."""
    machine = look()
    gpus = sorted({gpu.name for gpu in machine.gpus})
    return {
        "gpu": f"{len(machine.gpus)}×{', '.join(gpus)}" if gpus else None,
        "cpu": f"{machine.cores} cores, {machine.system}",
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "python": machine.python,
        **{name: machine.versions[name] for name in ("torch", "triton")},
        "command": command,
        "corpus": corpus,
        "seeds": list(seeds),
        "n": n,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "modules": module_hashes(modules),
    }


def freshness(result: dict) -> str:
    """`fresh`: the measured code is today's. `same behaviour`: it changed, and was shown to train bit-equally. Else `stale`."""
    today = module_hashes(result["stamp"]["modules"])
    if today == result["stamp"]["modules"]:
        return "fresh"
    return "same behaviour" if today == result.get("proof", {}).get("modules") else "stale"


def note_opened(path: Path) -> None:
    """Tell whoever executes this notebook that it read `path`, so that a change of the file runs it again."""
    ledger = os.environ.get("SPEEDRUN_OPENED")
    if ledger:
        with open(ledger, "a", encoding="utf-8") as file:
            file.write(f"{Path(path).resolve()}\n")


def public_table(name: str) -> list[dict]:
    """A table of the public record history, `book/data/<name>.csv`, as dicts of strings: records, curves or variance."""
    path = root() / "book" / "data" / f"{name}.csv"
    note_opened(path)
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save_result(slug: str, name: str, data, stamp: dict) -> Path:
    """Write a measurement to `book/results/<slug>/<name>.json`."""
    path = root() / "book" / "results" / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"stamp": stamp, "data": data}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def load_result(slug: str, name: str) -> dict:
    """A measurement with its stamp: {"stamp": …, "data": …}."""
    path = root() / "book" / "results" / slug / f"{name}.json"
    note_opened(path)
    if not path.is_file():
        raise Problem(f"{path} does not exist: nobody has measured that yet", f"python scripts/measure.py {slug}")
    return json.loads(path.read_text(encoding="utf-8"))


def result_names(slug: str) -> list[str]:
    """The names of all measurements of a chapter."""
    return sorted(path.stem for path in (root() / "book" / "results" / slug).glob("*.json"))


def measured_on(result: dict) -> str:
    """One line for the foot of a figure: hardware, versions, corpus, runs, date and freshness."""
    stamp = result["stamp"]
    where = stamp["gpu"] or stamp["cpu"]
    corpus = f", {stamp['corpus']['name']}" if stamp["corpus"] else ""
    return f"measured on {where}, torch {stamp['torch']}{corpus}, n={stamp['n']}, {stamp['date']} ({freshness(result)})"


def figure_style() -> None:
    """The look of the book's figures: call it once, before the first one."""
    import matplotlib

    matplotlib.style.use(root() / "book" / "figures.mplstyle")
