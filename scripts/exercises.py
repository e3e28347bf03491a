"""Write the chapters with holes where the solutions were: _build/exercises/*.ipynb.

A cell tagged `solution` keeps its signatures and docstrings and loses its bodies; the cell after it grades what the reader writes.
"""

import ast
import sys

import jupytext
import nbformat

from speedrun.lab.errors import run_main
from speedrun.lab.provenance import root

HOLE = 'raise RuntimeError("exercise: write this")'


def with_holes(source: str) -> str:
    """Functions keep signature and docstring; everything else becomes a comment that says what to define."""
    kept = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = (
                node.body[0]
                if isinstance(node.body[0], ast.Expr)
                and isinstance(node.body[0].value, ast.Constant)
                else None
            )
            last = text.end_lineno if text else node.body[0].lineno - 1
            lines = source.splitlines()[node.lineno - 1 : last]
            kept.append("\n".join([*lines, f"    {HOLE}"]))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            kept.append(ast.unparse(node))
        elif isinstance(node, ast.Assign):
            names = ", ".join(ast.unparse(target) for target in node.targets)
            kept.append(f"# exercise: define {names}\n{names} = ...")
    return "\n\n\n".join(kept)


def holed(notebook):
    """A chapter with its solutions taken out, and the number of them."""
    count = 0
    for cell in notebook.cells:
        if cell.cell_type == "code" and "solution" in cell.metadata.get("tags", []):
            cell.source, count = with_holes(cell.source), count + 1
    return notebook, count


def main() -> int:
    folder = root() / "_build" / "exercises"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((root() / "notebooks").glob("*.py")):
        notebook, count = holed(jupytext.read(path, fmt="py:percent"))
        nbformat.write(notebook, folder / f"{path.stem}.ipynb")
        print(f"{(folder / path.stem).relative_to(root())}.ipynb: {count} exercises")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
