"""Try answers to a chapter's exercises: python tests/graded.py CHAPTER ANSWERS RESULTS (test_exercises starts it).

Runs the chapter's code once, in order, as `python notebooks/CHAPTER.py` would. Before each solution, its holes (all of them, then one at a
time) and the wrong answers are tried, each in a copy of the names that there are by then; then the chapter goes on, so the solution passes
the same check after all of these have failed it. ANSWERS and RESULTS are JSON files: exercise → sources, and exercise → what came of each
hole and each wrong answer, an exception's type and message or null.
"""

import ast
import contextlib
import io
import json
import linecache
import sys
import types
from pathlib import Path

import jupytext

from speedrun.lab.provenance import root


def run(source: str, name: str, names: dict) -> None:
    """Execute a cell; inspect.getsource finds its text, as it does in a notebook."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), names)


def outcome(sources: list[str], names: dict) -> list[str] | None:
    """The exception that these cells end with, as its type and message, or None; what they define is forgotten."""
    copy = dict(names)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for n, source in enumerate(sources):
                run(source, f"<answer {id(copy)} {n}>", copy)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def main(chapter: str, answers: dict[str, list[str]]) -> dict[str, dict]:
    sys.path.insert(0, str(root() / "scripts"))
    from exercises import hole, with_holes

    module = sys.modules["__main__"] = types.ModuleType("__main__")
    cells = jupytext.read(root() / "notebooks" / f"{chapter}.py", fmt="py:percent").cells
    code, found = [cell for cell in cells if cell.cell_type == "code"], {}
    for n, cell in enumerate(code):
        if "solution" in cell.metadata.get("tags", []):
            check, names = code[n + 1].source, module.__dict__
            number = str(len(found) + 1)
            body, lines = ast.parse(cell.source).body, cell.source.splitlines()
            holes = [with_holes(cell.source), *(hole(node, lines) for node in body)]
            tried = {"holes": holes, "wrong": answers.get(number, [])}
            found[number] = {kind: [outcome([cell.source, source, check], names) for source in sources] for kind, sources in tried.items()}  # fmt: skip
        run(cell.source, f"<{chapter}, code cell {n}>", module.__dict__)
    return found


if __name__ == "__main__":
    answers = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    results = main(sys.argv[1], answers)
    Path(sys.argv[3]).write_text(json.dumps(results), encoding="utf-8")
