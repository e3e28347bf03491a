# Tangled from notebooks/96_logs_and_stamps.py: edit the notebook, then run "make tangle". Edits made here are lost.


# %% Results: numbers that remember where they come from
import ast
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import speedrun
from speedrun.lab.errors import UserError
from speedrun.lab.hardware import detect_machine, run_tool


def is_docstring(node) -> bool:
    """A string that stands as a statement of its own."""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def canonical(node) -> str:
    """A syntax tree as text, without docstrings, positions and empty fields: every Python version agrees on it."""
    if isinstance(node, list):
        return "[" + ",".join(canonical(item) for item in node if not is_docstring(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    names = sorted(set(node._fields) - {"ctx", "kind", "type_ignores"})
    fields = [(name, getattr(node, name, None)) for name in names]
    shown = [f"{name}={canonical(value)}" for name, value in fields if value not in (None, [])]
    return f"{type(node).__name__}({','.join(shown)})"


def code_hash(source: str) -> str:
    """Sixteen hex digits that change with the code, and not with its comments, docstrings or layout."""
    return hashlib.sha256(canonical(ast.parse(source)).encode()).hexdigest()[:16]


def root() -> Path:
    """The project's folder, found from the package's own file and never from the working directory."""
    folder = Path(speedrun.__file__).resolve().parent.parent
    if not (folder / "book" / "data").is_dir():
        what = f"there is no project around {folder / 'speedrun'}: book/data is missing"
        raise UserError(what, "pip install -e . in a clone of the repository")
    return folder


def module_file(name: str) -> Path | None:
    """The file of a module such as speedrun.lab.stats; None if there is no such module."""
    path = Path(speedrun.__file__).resolve().parent.joinpath(*name.split(".")[1:])
    candidates = (
        [path.with_suffix(".py"), path / "__init__.py"] if name.startswith("speedrun.") else []
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def commit() -> str:
    """The commit of this project; "" without git, or where this folder has no repository of its own, whatever is around it."""
    # named outright, git neither looks in the folders above nor obeys GIT_DIR, which its hooks set
    command = ["git", f"--git-dir={root() / '.git'}", "rev-parse", "--verify", "HEAD"]
    return run_tool(command, 30).strip()


def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports anywhere, functions included; `from a import b` counts as a and a.b, and a module that `import_module` is told by name as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return names


def module_hashes(names) -> dict[str, str]:
    """Module → code hash, for the given modules of the package and all that they import, directly or not."""
    hashes, queue = {}, list(names)
    while queue:
        name = queue.pop()
        file = module_file(name)
        if file is not None and name not in hashes:
            source = file.read_text(encoding="utf-8")
            hashes[name] = code_hash(source)
            queue += imported_names(source)
    return dict(sorted(hashes.items()))


def stamp(command: str, modules, n: int, seeds=(), corpus: dict | None = None) -> dict:
    """Where, when and with what something was measured. modules: those that the command starts.

    n: runs, or repetitions of a timing. corpus: {"name": …, "sha256": …}, None if no text was read.
    """
    machine = detect_machine()
    names = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    return {
        "gpu": f"{len(machine.gpus)}×{names}" if names else None,
        "cpu": f"{machine.cores} cores, {machine.system}",
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "python": machine.python,
        "torch": machine.versions["torch"],
        "triton": machine.versions["triton"],
        "command": command,
        "corpus": corpus,
        "seeds": list(seeds),
        "n": n,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modules": module_hashes(modules),
    }


def note_opened(path: Path) -> None:
    """Tell whoever executes this notebook that it read `path`, so that a change of the file runs it again."""
    opened_files = os.environ.get("SPEEDRUN_OPENED")
    if opened_files:
        with open(opened_files, "a", encoding="utf-8") as file:
            file.write(f"{Path(path).resolve()}\n")
