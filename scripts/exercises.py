"""Write the chapters with holes where the solutions were: exercises/*.ipynb.

    python scripts/exercises.py          every chapter
    python scripts/exercises.py 06 13    these only

A cell tagged `solution` keeps its signatures and docstrings and loses its bodies; the cell after it checks what the reader writes, and a
folded cell after that holds the solution. A notebook that its reader has edited is never overwritten.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from folds import fold
from tangle import chapter_paths

from speedrun.lab.errors import UserError, quoted, run_main, visible
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import root

HOW = """> **This copy has holes.** In the exercises at the end, write your code where it says `exercise: write …` and run that cell; then run the check below it, which says what is wrong.
> The folded cell under a check is a solution: click its bar to unfold it. What you write here is kept: `make exercises` does not overwrite a notebook that you have edited."""
ANSWER = (
    "if False:  # the solution: with True in place of False this cell takes it for what you wrote\n"
)


def hole(node: ast.stmt, lines: list[str]) -> str:
    """What is left of a statement: of a function its signature and docstring, of an assignment the names."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return ast.unparse(node)
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        name = ast.unparse(node.targets[0])
        return f"{name} = ...  # exercise: write {name}"
    if not isinstance(node, ast.FunctionDef):
        raise ValueError(f"a solution holds functions and assignments, not {ast.unparse(node)}")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    last = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        last = node.body[0].end_lineno or last
    return "\n".join([*lines[first - 1 : last], f'    raise RuntimeError("exercise: write {node.name}")'])  # fmt: skip


def with_holes(source: str) -> str:
    """A solution without what the reader is to write: calling such a function says so, and the checks know `...`."""
    return "\n\n\n".join(hole(node, source.splitlines()) for node in ast.parse(source).body)


def code_cell(source: str, tags: list[str]) -> nbformat.NotebookNode:
    """A code cell; what the book folds and what gives the solution away is folded (in JupyterLab, and in Colab)."""
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": tags} if tags else {})
    fold(cell, colab=True)
    return cell


def holed(chapter: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, int]:
    """A chapter's copy with holes, each followed by its check and the folded solution; and how many holes it has."""
    cells, answers, count = [], [], 0
    for cell in chapter.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code":  # links lead to the chapters, from the folder beside theirs
            text = re.sub(r"\]\((\d\d_\w+)\.(?:py|ipynb)", r"](../notebooks/\1.py", cell.source)
            cells.append(nbformat.v4.new_markdown_cell(text))
        elif "solution" in tags:
            cells.append(code_cell(with_holes(cell.source), ["exercise"]))
            # it does nothing as it stands, or Run All would put it in the place of what the reader wrote
            answer = ANSWER + textwrap.indent(cell.source, "    ")
            answers, count = [code_cell(answer, ["answer"])], count + 1
        else:
            # Run All goes on after a check that fails, to the other exercises
            cells += [
                code_cell(cell.source, [*tags, "raises-exception"] if answers else tags),
                *answers,
            ]
            answers = []
    title, _, rest = cells[0].source.partition("\n")
    cells[0].source = f"{title}\n\n{HOW}\n{rest}"
    for n, cell in enumerate(cells):
        cell.id = f"cell-{n}"
    kernel = {"kernelspec": chapter.metadata.kernelspec}
    return nbformat.v4.new_notebook(cells=cells, metadata=kernel), count


def hash_of(notebook: nbformat.NotebookNode) -> str:
    """What a reader can have edited: the cells' kinds, sources and tags; not outputs, nor what Jupyter changes when it saves."""
    cells = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in notebook.cells]  # fmt: skip
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def hash_of_file(path: Path) -> str | None:
    """The same of a notebook on the disk; None where it cannot be read as one."""
    try:
        return hash_of(nbformat.read(path, as_version=4))
    except (
        Exception
    ):  # nbformat's, json's and the system's; whatever it is, it is not as we wrote it
        return None


def read_ledger(path: Path) -> dict[str, str]:
    """Notebook → hash of what was last written there. Without a readable ledger, every notebook counts as edited."""
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ledger if isinstance(ledger, dict) else {}


def state_of(path: Path, written: str | None, new: str) -> str:
    """What to do with the notebook at a path: one of `write`, `refresh`, `same`, `edited` (the chapter is as it was), `kept`."""
    if not path.exists() and not path.is_symlink():
        return "write"
    found = hash_of_file(path)
    if found == new:
        return "same"
    if found is not None and found == written:
        return "refresh"
    return "edited" if found is not None and written == new else "kept"


def free_name(path: Path) -> str:
    """A name beside a notebook that nothing has, for the reader's own."""
    names = (f"{path.stem}.mine{n}.ipynb" for n in ("", *range(2, 1000)))
    return next(name for name in names if not path.with_name(name).exists())


def write_one(chapter: Path, folder: Path, ledger: dict[str, str]) -> Path:
    """Write one chapter's notebook unless its reader has edited it, note it in the ledger, and say in one line what was done."""
    notebook, count = holed(jupytext.read(chapter, fmt="py:percent"))
    path, new = folder / f"{chapter.stem}.ipynb", hash_of(notebook)
    state = state_of(path, ledger.get(path.name), new)
    if state in ("write", "refresh"):
        atomic_write(path, nbformat.writes(notebook))
    if state in ("write", "refresh", "same"):
        ledger[path.name] = new
        atomic_write(folder / ".written.json", json.dumps(ledger, indent=1))
    name = path.relative_to(folder.parent)
    away = f"mv {quoted(name)} {quoted(name.with_name(free_name(path)))}"
    said = {
        "write": f"{count} exercises",
        "refresh": f"{count} exercises, from today's chapter",
        "same": f"{count} exercises, as it was",
        "edited": "kept, with what you wrote",
        "kept": f"kept: you have edited it, and the chapter has changed since. For the new one: {away}, then run this again",
    }
    print(f"{name}: {said[state]}", flush=True)
    return path


def write_exercises(wanted: Sequence[str] = (), folder: Path | None = None) -> list[Path]:
    """Write the notebooks of the chapters whose number or name begins with one of `wanted` (none: of all). Returns their paths.

    Raises UserError for a chapter that does not exist, before anything is written, and OSError where the folder cannot be written.
    """
    chapters = chapter_paths(root())
    for start in wanted:
        if not any(path.stem.startswith(start) for path in chapters):
            there = ", ".join(path.stem for path in chapters)
            raise UserError(f"no chapter begins with “{visible(start)}”", f"there are {there}")
    folder = folder or root() / "exercises"
    folder.mkdir(parents=True, exist_ok=True)
    ledger = read_ledger(folder / ".written.json")
    chosen = [path for path in chapters if not wanted or path.stem.startswith(tuple(wanted))]
    return [write_one(path, folder, ledger) for path in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", help="numbers or names; default: all")
    write_exercises(parser.parse_args().chapters)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
