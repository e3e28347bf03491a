"""Tangle: the exported cells of `notebooks/*.py` become the package `speedrun/`.

    python scripts/tangle.py            write the package
    python scripts/tangle.py --check    change nothing; exit 1 with notebook, heading and diff where they differ

Directives are the leading `#|` lines of a code cell (nbdev's vocabulary):

    #| default_exp optim.muon     the chapter's module
    #| export                     put this cell into it
    #| export kernels.gram        put this cell into another module of the chapter

jupytext reads the notebooks, an nbconvert exporter turns each into modules. Nothing here imports the package.
"""

import old_python  # noqa: F401  # before what older Pythons lack is imported

# isort: split
import argparse
import ast
import builtins
import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import subprocess
import symtable
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "speedrun"
HEADER = '# Tangled from notebooks/{notebook}.py: edit the notebook, then run "make tangle". Edits made here are lost.'
INIT_HEADER = '# Written by "make tangle". Edits made here are lost.'
AS_COMMAND = 'if __name__ == "__main__"'
MODULE_NAMES = {"__name__", "__file__", "__doc__", "__spec__", "__package__", "__builtins__"}


class TangleError(Exception):
    """Every problem found, one paragraph each: where it is, what it is, what to do."""


@dataclass(frozen=True)
class Cell:
    """A code cell; `number` counts all cells, from 1. `module` is where it is exported to, None if it stays in the notebook."""

    notebook: str
    number: int
    heading: str
    source: str
    module: str | None

    @property
    def where(self) -> str:
        return f"notebooks/{self.notebook}.py, cell {self.number}, under “{self.heading}”"


def read_cells(notebook, name: str) -> list[Cell]:
    """The code cells of a notebook (an nbformat node), each with the heading it stands under and its module."""
    cells, heading, default, number = [], "(before the first heading)", None, 0
    for cell in notebook.cells:
        number += 1  # of all cells, as JupyterLab counts them
        if cell.cell_type == "markdown":
            fenced = False
            for line in cell.source.splitlines():
                fenced ^= line.startswith("```")
                if line.startswith("#") and not fenced and line.lstrip("#").startswith(" "):
                    heading = line.lstrip("#").strip()
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        directives = []
        while lines and (lines[0].startswith("#|") or not lines[0].strip()):
            line = lines.pop(0)
            if line.strip():
                directives.append(line[2:].split())
        exports, place = False, f"notebooks/{name}.py, cell {number}, under “{heading}”"
        for words in directives:
            if words[:1] == ["default_exp"] and len(words) == 2:
                default = words[1]
        module = default
        for words in directives:
            if words[:1] == ["export"]:
                exports, module = True, words[1] if len(words) > 1 else default
            elif words[:1] != ["default_exp"] or len(words) != 2:
                raise TangleError(
                    f"{place}: unknown directive “#| {' '.join(words)}”.\n"
                    "  → known are “#| default_exp MODULE”, “#| export” and “#| export MODULE”"
                )
        if exports and module is None:
            raise TangleError(
                f"{place}: an export before any default_exp.\n"
                "  → put “#| default_exp MODULE” on top of this cell, or name the module: “#| export MODULE”"
            )
        cells.append(
            Cell(name, number, heading, "\n".join(lines).strip("\n"), module if exports else None)
        )
    return cells


@functools.lru_cache(maxsize=8192)
def bound_names(source: str, where: str) -> tuple[set[str], set[str]]:
    """Names that a cell binds at module level: those it defines (def, class, assignment) and those it imports."""
    try:
        compile(
            source, where, "exec", dont_inherit=True
        )  # sees a return outside a function, which a symbol table does not
        table = symtable.symtable(source, where, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: a null character
        number = getattr(error, "lineno", None) or 1
        line = ([*source.splitlines(), ""])[number - 1 : number]
        said = f"{where}: “{''.join(line).strip()}” is not Python: {getattr(error, 'msg', error)}."
        magic = "".join(line).lstrip().startswith(("%", "!"))
        fix = (
            "no magics: a chapter also runs as a plain script"
            if magic
            else "mend this line, or the one before it"
        )
        raise TangleError(f"{said}\n  → {fix}") from None
    imported = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_imported()}
    return {
        symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()
    } - imported, imported


@functools.lru_cache(maxsize=8192)
def free_names(source: str) -> set[str]:
    """Global names that the code reads anywhere: in functions, classes, comprehensions and at module level."""
    names, stack = set(), [symtable.symtable(source, "module", "exec")]
    while stack:
        table = stack.pop()
        stack += table.get_children()
        top = table.get_type() == "module"
        names |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (top or s.is_global())
        }
    for node in ast.walk(ast.parse(source)):  # names inside string annotations
        for note in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(note, ast.Constant) and isinstance(note.value, str):
                with contextlib.suppress(SyntaxError):  # any text is allowed there
                    tree = ast.parse(note.value, mode="eval")
                    names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return names


def own_imports(source: str, modules: set[str]) -> list[str]:
    """Imports of the chapter's own modules: forbidden, because in the notebook the definition is simply there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [
            name
            for name in names
            if name.removeprefix(PACKAGE + ".") in modules and name.startswith(PACKAGE + ".")
        ]
    return found


def check_cells(cells: list[Cell]) -> list[str]:
    """Problems that concern one cell or a pair of them: doubled, shadowed or own-chapter names."""
    problems, owner = [], {}
    modules = {cell.module for cell in cells if cell.module}
    for cell in cells:
        defined, imported = bound_names(cell.source, cell.where)
        if cell.module is None:
            continue
        for name in sorted(defined):
            if name in owner:
                problems.append(
                    f"{cell.where}: “{name}” is defined twice, first under “{owner[name].heading}” (cell {owner[name].number}).\n  → rename one, or make it one definition"
                )
            owner.setdefault(name, cell)
        for name in own_imports(cell.source, modules):
            problems.append(
                f"{cell.where}: imports {name}, a module of its own chapter.\n  → delete the import: in the notebook the name is there, in the package the tangler writes it"
            )
        if "from __future__" in cell.source:
            problems.append(
                f"{cell.where}: a __future__ import cannot stand in the middle of a module.\n  → delete it (Python 3.11 does not need it)"
            )
    for cell in cells:
        if cell.module is None:
            defined, imported = bound_names(cell.source, cell.where)
            for name in sorted((defined | imported) & set(owner)):
                problems.append(
                    f"{cell.where}: this cell rebinds “{name}”, which is exported under “{owner[name].heading}”; from here on the notebook would run other code than the package.\n  → use another name in this cell"
                )
    return problems


def resolve(sources: dict[str, list[Cell]]) -> tuple[dict[str, dict[str, set[str]]], list[str]]:
    """For each module of a chapter, which names it needs from which of the others; and what nothing defines."""
    problems: list[str] = []
    needs: dict[str, dict[str, set[str]]] = {module: defaultdict(set) for module in sources}
    defines = {
        m: set().union(*(bound_names(c.source, c.where)[0] for c in cells))
        for m, cells in sources.items()
    }
    imports = {
        m: set().union(*(bound_names(c.source, c.where)[1] for c in cells))
        for m, cells in sources.items()
    }
    for module, cells in sources.items():
        for cell in cells:
            for name in sorted(
                free_names(cell.source) - defines[module] - imports[module] - MODULE_NAMES
            ):
                home = next((other for other in sources if name in defines[other]), None)
                if home:
                    needs[module][home].add(name)
                elif not hasattr(builtins, name):
                    problems.append(
                        f"{cell.where}: uses “{name}”, which no exported cell defines or imports, so {PACKAGE}.{module} would raise NameError.\n  → export the cell that defines it, or import it in an exported cell"
                    )
    for module in sources:
        for other in needs[module]:
            if module in needs[other]:
                problems.append(
                    f"notebooks/{cells[0].notebook}.py: {module} and {other} need each other ({', '.join(sorted(needs[module][other]))} / {', '.join(sorted(needs[other][module]))}).\n  → move those names so that imports point one way"
                )
    return needs, sorted(set(problems))


def write_imports(needs: dict[str, set[str]]) -> str:
    """The import lines between the modules of one chapter."""
    lines = []
    for other in sorted(needs):
        names = sorted(needs[other])
        line = f"from {PACKAGE}.{other} import {', '.join(names)}"
        lines.append(
            line
            if len(line) <= 100
            else f"from {PACKAGE}.{other} import (\n" + "".join(f"    {n},\n" for n in names) + ")"
        )
    return "\n".join(lines)


def tangle_cells(cells: list[Cell]) -> dict[str, str]:
    """Module name → text for one chapter. Raises TangleError with every problem of the chapter."""
    problems = check_cells(cells)
    if problems:
        raise TangleError("\n".join(problems))
    sources: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.module:
            sources[cell.module].append(cell)
    needs, problems = resolve(sources)
    if problems:
        raise TangleError("\n".join(problems))
    texts = {}
    for module, blocks in sources.items():
        parts = [HEADER.format(notebook=blocks[0].notebook)]
        first = int(
            blocks[0].source.startswith(AS_COMMAND)
        )  # what a command does before its imports
        heading = None
        for number, block in enumerate(blocks):
            if number == first and needs[module]:
                parts.append(write_imports(needs[module]))
            title = f"# %% {block.heading}\n" if block.heading != heading else ""
            heading = block.heading
            parts.append(title + block.source)
        texts[module] = "\n\n\n".join(parts) + "\n"
    return texts


def exporter():
    """The nbconvert exporter, made on demand so that the analysis above needs the standard library alone."""
    from nbconvert.exporters import Exporter

    class TangleExporter(Exporter):
        """Writes no single document: the chapter's modules are in `resources["outputs"]`, module path → bytes."""

        output_mimetype = "text/x-python"
        file_extension = ".py"

        def from_notebook_node(self, nb, resources=None, **kwargs):
            nb, resources = super().from_notebook_node(nb, resources, **kwargs)
            name = resources["metadata"]["name"]
            texts = tangle_cells(read_cells(nb, name))
            resources["outputs"] = {
                f"{PACKAGE}/{module.replace('.', '/')}.py": text.encode()
                for module, text in texts.items()
            }
            return "\n".join(resources["outputs"]), resources

    return TangleExporter()


def package_inits(paths: list[str]) -> dict[str, bytes]:
    """An `__init__.py` for every folder that holds a module, with a line that says what lives there."""
    folders = {PACKAGE} | {str(Path(path).parent) for path in paths}
    inits = {}
    for folder in folders:
        inside = sorted(Path(p).stem for p in paths if str(Path(p).parent) == folder)
        inits[f"{folder}/__init__.py"] = (
            f'{INIT_HEADER}\n"""{folder.replace("/", ".")}: {", ".join(inside)}."""\n'.encode()
        )
    return inits


@functools.lru_cache(maxsize=64)
def read_notebook(text: str):
    """A chapter as a notebook; the lab asks for all of them at every save, and one has changed."""
    import jupytext

    return jupytext.reads(text, fmt="py:percent")


def tangle_all(root: Path) -> dict[str, bytes]:
    """Every file of the package, path → bytes, from every notebook. Raises TangleError with all problems."""
    try:
        import jupytext  # noqa: F401

        tangler = exporter()
    except ImportError as error:
        raise TangleError(
            f"the tangler needs {error.name}, which {sys.executable} does not have.\n  → make setup, or pip install jupytext nbconvert"
        ) from None
    files, owner, problems = {}, {}, []
    for path in chapter_paths(root):
        try:
            notebook = read_notebook(path.read_text(encoding="utf-8"))
        except Exception as error:  # what jupytext, YAML and decoding raise
            problems.append(
                f"notebooks/{path.name} is not a notebook in percent format: {' '.join(str(error).split())}.\n  → it begins with a YAML header in comments, and is UTF-8; git diff notebooks/{path.name} shows what has changed"
            )
            continue
        try:
            _, resources = tangler.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        except TangleError as error:
            problems.append(str(error))
            continue
        for target, data in resources["outputs"].items():
            if target in owner:
                problems.append(
                    f"notebooks/{path.name}: exports to {target}, which notebooks/{owner[target]}.py owns.\n  → a module comes from one chapter; export to a module of this chapter's own"
                )
            owner[target] = path.stem
            files[target] = data
    problems = problems or missing_names(files)
    if problems:
        raise TangleError("\n".join(problems))
    return files | package_inits(list(files))


def missing_names(files: dict[str, bytes]) -> list[str]:
    """What one chapter's modules import from another's that is not there (any more)."""
    texts = {target[:-3].replace("/", "."): data.decode() for target, data in files.items()}
    trees = {module: ast.parse(text) for module, text in texts.items()}
    has = {module: set().union(*bound_names(text, module)) for module, text in texts.items()}
    folders = {module.rpartition(".")[0] for module in texts} | {PACKAGE}
    problems = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            source = node.module
            if source.split(".")[0] != PACKAGE:
                continue
            for name in [alias.name for alias in node.names]:
                known = has.get(source, set()) if source not in folders else set()
                if name in known or f"{source}.{name}" in texts or f"{source}.{name}" in folders:
                    continue
                under = heading_of(texts[module], node.lineno - 1)
                where = f"{origin(files[module.replace('.', '/') + '.py'])}, under “{under}”"
                home = source.replace(".", "/") + ".py"
                owner = (
                    f"an exported cell of {origin(files[home])}"
                    if home in files
                    else "an exported cell"
                )
                problems.append(
                    f"{where}: imports “{name}” from {source}, which does not define it.\n  → define it in {owner}, or change what is imported"
                )
    return sorted(set(problems))


def is_chapter(name: str) -> bool:
    """Whether a file of notebooks/ is a chapter: NN_slug.py. Others, such as a copy, are not tangled."""
    return re.fullmatch(r"\d\d_\w+\.py", name) is not None


def chapter_paths(root: Path) -> list[Path]:
    """The chapters of the project at `root`, in order."""
    return sorted(path for path in (root / "notebooks").glob("*.py") if is_chapter(path.name))


def heading_of(text: str, line: int) -> str:
    """The heading above a line (0-based) of a tangled file."""
    titles = [t for t in text.splitlines()[: line + 1] if t.startswith("# %% ")]
    return titles[-1].removeprefix("# %% ") if titles else "its first lines"


def on_disk(path: Path) -> bytes | None:
    """A file's text as tangling would write it: Git for Windows may have checked it out with CRLF. None if it is not there."""
    return path.read_bytes().replace(b"\r\n", b"\n") if path.exists() else None


def origin(data: bytes) -> str:
    """The notebook that a tangled file's first line names; an __init__.py comes from all of them."""
    first = data.decode().splitlines()[0]
    return (
        first.split("Tangled from ")[1].split(":")[0] if "Tangled from" in first else "notebooks/"
    )


def differences(root: Path, files: dict[str, bytes]) -> list[str]:
    """What `--check` reports: modules that differ, with notebook, heading and diff; modules that nothing produces."""
    problems = []
    for target, data in sorted(files.items()):
        have, source = on_disk(root / target), origin(data)
        if have == data:
            continue
        a, b = ((text or b"").decode(errors="replace").splitlines() for text in (have, data))
        first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        names = f"{target} (on disk)", f"{target} (from {source})"
        diff = "\n".join(list(difflib.unified_diff(a, b, *names, lineterm=""))[:40])
        under = heading_of(data.decode(), first)
        what = "does not exist yet" if have is None else f"is not what {source} has under “{under}”"
        problems.append(
            f"{target} {what}.\n  → make the change in {source}, then run: make tangle\n{diff}"
        )
    return problems + strays(root, files)


def strays(root: Path, files: dict[str, bytes]) -> list[str]:
    """Python files in the package that no notebook produces."""
    here = {p.relative_to(root).as_posix() for p in (root / PACKAGE).rglob("*.py")}
    return [
        f"{path}: no notebook produces this module.\n  → if a chapter was deleted or renamed, git checkout notebooks/ brings it back; else move the code into an exported cell of a chapter, and the file out of {PACKAGE}/"
        for path in sorted(here - set(files))
    ]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def last_tangled(root: Path) -> dict[str, str]:
    """Target → digest of what was written here last; empty if that is not known."""
    try:
        return dict(json.loads((root / "_build" / "tangled.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def committed(root: Path, target: str) -> bytes | None:
    """A file as this project's own repository holds it; None without git, without a repository, or if it has no such file."""
    command = ["git", f"--git-dir={root / '.git'}", "show", f"HEAD:{target}"]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        return None
    return done.stdout.replace(b"\r\n", b"\n") if done.returncode == 0 else None


def edited_by_hand(root: Path, files: dict[str, bytes]) -> list[str]:
    """Modules whose text is neither what was last tangled here nor what git holds: somebody edited them, or nobody can tell."""
    last, edited = last_tangled(root), []
    for target, data in files.items():
        have = on_disk(root / target)
        if have is None or have == data or last.get(target) == digest(have):
            continue
        known = committed(root, target)
        if have == known:
            continue
        where = f"an exported cell of {origin(data)}"
        if target.endswith("__init__.py"):
            where = "an exported cell of a chapter (an __init__.py only lists modules)"
        what = f"was edited by hand; tangling would lose that.\n  → carry the change over to {where}, then: make tangle FORCE=1"
        if known is None and target not in last:
            what = f"is not what {origin(data)} says, and without git nobody can tell whether it was edited by hand.\n  → if it was, carry that over to {where}; then: make tangle FORCE=1"
        edited.append(f"{target} {what}")
    return edited


def write_files(root: Path, files: dict[str, bytes]) -> list[str]:
    """Write what changed, each file in one step, and remember what was written."""
    changed = []
    for target, data in sorted(files.items()):
        path = root / target
        if on_disk(path) != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".py.part")
            part.write_bytes(data)
            os.replace(part, path)
            changed.append(target)
    digests = {target: digest(data) for target, data in files.items()}
    memory = root / "_build" / "tangled.json"
    memory.parent.mkdir(exist_ok=True)
    memory.write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
    return changed


def tangle(root: Path, check: bool = False, force: bool = False) -> list[str]:
    """Tangle the project at `root`; returns the files written. Raises TangleError with everything that is wrong."""
    files = tangle_all(root)
    problems = (
        differences(root, files)
        if check
        else strays(root, files) + ([] if force else edited_by_hand(root, files))
    )
    if problems:
        raise TangleError("\n".join(problems))
    return [] if check else write_files(root, files)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; fail where the package is not what the notebooks say",
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite modules that were edited by hand"
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parent.parent,
        help="the project (default: this one)",
    )
    args = parser.parse_args()
    try:
        changed = tangle(args.root, args.check, args.force)
    except (TangleError, OSError) as error:  # OSError says the file and why
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(
        f"{PACKAGE}/ is what the notebooks say"
        if args.check
        else f"tangled: {', '.join(changed) or 'nothing changed'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
