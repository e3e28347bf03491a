"""The exercises: copies with holes that keep what a reader writes, and checks that refuse holes and wrong answers in words.

`make check` executes three quick chapters; all of them: pytest tests/test_exercises.py -m long
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import exercises
import jupytext
import nbformat
import pytest
from wrong_answers import WRONG

from speedrun.lab.errors import UserError
from speedrun.lab.provenance import canonical, root

NOTEBOOKS = sorted((root() / "notebooks").glob("*.py"))
QUICK = ("01", "21", "93")


def exercises_of(path: Path) -> list[tuple[str, str]]:
    """(solution, check) of every exercise of a chapter."""
    code = [
        cell for cell in jupytext.read(path, fmt="py:percent").cells if cell.cell_type == "code"
    ]
    return [(cell.source, code[n + 1].source) for n, cell in enumerate(code) if "solution" in cell.metadata.get("tags", [])]  # fmt: skip


class TestHoles:
    source = '"""doc"""\nimport math\n\n\n@cache\ndef f(x):\n    """What it does."""\n    return x\n\n\ny = f(3)'

    def test_signature_and_docstring_stay(self):
        hole = exercises.with_holes(self.source.removeprefix('"""doc"""\n'))
        assert "import math" in hole and "@cache\ndef f(x):\n" in hole and "What it does" in hole
        assert "return x" not in hole and "f(3)" not in hole and "y = ..." in hole

    def test_an_unwritten_function_says_so(self):
        names = {"cache": lambda f: f}
        exec(exercises.with_holes(self.source.removeprefix('"""doc"""\n')), names)
        with pytest.raises(RuntimeError, match="exercise: write f"):
            names["f"](1)

    @pytest.mark.parametrize("line", ["for x in y: pass", "class A: pass", "a = b = 1", "f(3)"])
    def test_what_would_stay_in_the_hole_is_refused(self, line):
        with pytest.raises(ValueError, match="functions and assignments"):
            exercises.with_holes(line)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestCopies:
    def test_every_exercise_is_a_hole_a_check_and_a_folded_solution(self, path):
        notebook, count = exercises.holed(jupytext.read(path, fmt="py:percent"))
        nbformat.validate(notebook)
        pairs = exercises_of(path)
        assert count == len(pairs) >= 1
        places = [n for n, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["exercise"]]  # fmt: skip
        for n, (solution, check) in zip(places, pairs, strict=True):
            hole, grader, answer = notebook.cells[n : n + 3]
            compile(hole.source, path.name, "exec")
            assert grader.source == check and "raises-exception" in grader.metadata.tags
            assert answer.source.startswith(exercises.ANSWER), "which does nothing as it stands"
            taken = ast.parse(answer.source.replace("if False", "if True", 1)).body[0].body
            assert canonical(taken) == canonical(ast.parse(solution).body)
            assert (
                answer.metadata.tags == ["answer"] and answer.metadata["jupyter"]["source_hidden"]
            )
            assert "jupyter" not in hole.metadata and "jupyter" not in grader.metadata

    def test_what_the_book_folds_is_folded(self, path):
        notebook, _ = exercises.holed(jupytext.read(path, fmt="py:percent"))
        for cell in notebook.cells:
            tags = {"hide-input", "remove-cell", "answer"} & set(cell.metadata.get("tags", []))
            assert bool(tags) == cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert exercises.HOW in notebook.cells[0].source

    def test_links_lead_somewhere(self, path):
        import re

        notebook, _ = exercises.holed(jupytext.read(path, fmt="py:percent"))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell.source):
                    assert "://" in link or (root() / "exercises" / link).resolve().exists(), link

    def test_every_assertion_of_a_check_has_a_message(self, path):
        for _, check in exercises_of(path):
            found = [node for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Assert)]
            assert found and all(node.msg is not None for node in found), check

    def test_assigned_names_are_asked_for_in_the_text_and_checked_first(self, path):
        text = "\n".join(cell.source for cell in jupytext.read(path, fmt="py:percent").cells if cell.cell_type == "markdown")  # fmt: skip
        for solution, check in exercises_of(path):
            for node in ast.parse(solution).body:
                name = node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node.targets[0])  # fmt: skip
                assert f"`{name}" in text
                if isinstance(node, ast.Assign):
                    assert f'assert {name} is not ..., "exercise: write {name}"' in check

    def test_a_check_takes_no_name_that_the_chapter_needs(self, path):
        """A reader runs it more than once, and goes back to earlier cells."""
        cells = [cell for cell in jupytext.read(path, fmt="py:percent").cells if cell.cell_type == "code"]  # fmt: skip
        checks, defined = {check for _, check in exercises_of(path)}, set()
        for node in ast.parse("\n".join(cell.source for cell in cells if cell.source not in checks)).body:  # fmt: skip
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {(name.asname or name.name).split(".")[0] for name in node.names}
        for check in checks:
            tree = ast.parse(check)
            bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}  # fmt: skip
            assert not bound & defined

    def test_there_are_two_wrong_answers_to_each(self, path):
        for number, _ in enumerate(exercises_of(path), 1):
            assert len(WRONG[path.stem[:2], number]) >= 2


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project with two chapters; exercises go into its folder `exercises`."""
    (tmp_path / "notebooks").mkdir()
    for name in ("05_one", "06_two"):
        (tmp_path / "notebooks" / f"{name}.py").write_text(NOTEBOOKS[0].read_text(encoding="utf-8"))
    monkeypatch.setattr(exercises, "root", lambda: tmp_path)
    return tmp_path / "exercises"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


class TestWriting:
    def test_it_writes_those_that_are_asked_for(self, folder, capsys):
        assert exercises.write_exercises(["06"]) == [folder / "06_two.ipynb"]
        assert capsys.readouterr().out == "exercises/06_two.ipynb: 2 exercises\n"
        assert len(exercises.write_exercises()) == 2 == len(list(folder.glob("*.ipynb")))

    def test_a_chapter_that_is_not_there(self, folder):
        with pytest.raises(UserError, match="no chapter begins with “77”\n.*05_one, 06_two"):
            exercises.write_exercises(["06", "77"])
        assert not folder.exists()

    def test_untouched_is_refreshed(self, folder, capsys):
        (path,) = exercises.write_exercises(["05"])
        edit(folder.parent / "notebooks" / "05_one.py", "Start here", "Begin here")
        exercises.write_exercises(["05"])
        assert "Begin here" in path.read_text(encoding="utf-8")
        assert "from today's chapter" in capsys.readouterr().out

    def test_edited_is_kept_and_the_way_out_works(self, folder, capsys):
        (path,) = exercises.write_exercises(["05"])
        edit(path, "exercise: write half_life", "my answer")
        exercises.write_exercises(["05"])
        assert "kept, with what you wrote" in capsys.readouterr().out
        edit(folder.parent / "notebooks" / "05_one.py", "Start here", "Begin here")
        for _ in range(2):  # saying so once does not make it ours
            exercises.write_exercises(["05"])
            assert "my answer" in path.read_text(encoding="utf-8")
            said = capsys.readouterr().out
            assert "05_one.ipynb: kept: you have edited it" in said
        command = said.split("For the new one: ")[1].split(",")[0]
        subprocess.run(command, shell=True, check=True, cwd=folder.parent)
        exercises.write_exercises(["05"])
        assert "Begin here" in path.read_text(encoding="utf-8")
        assert "my answer" in (folder / "05_one.mine.ipynb").read_text(encoding="utf-8")
        edit(path, "exercise: write half_life", "a second answer")
        (folder / ".written.json").unlink()
        edit(folder.parent / "notebooks" / "05_one.py", "Begin here", "Start here")
        exercises.write_exercises(["05"])  # the first copy must not be lost by the advice
        assert "05_one.ipynb exercises/05_one.mine2.ipynb," in capsys.readouterr().out

    def test_running_and_saving_is_no_edit(self, folder, capsys):
        """Jupyter adds outputs, counts and its own metadata, and another layout of the file."""
        (path,) = exercises.write_exercises(["05"])
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            cell.metadata.pop("jupyter", None)  # unfolded
            if cell.cell_type == "code":
                cell.execution_count = 3
                cell.outputs = [nbformat.v4.new_output("stream", text="hello")]
        path.write_text(json.dumps(notebook, indent=4), encoding="utf-8")
        exercises.write_exercises(["05"])
        assert "as it was" in capsys.readouterr().out and "hello" in path.read_text()
        edit(folder.parent / "notebooks" / "05_one.py", "Start here", "Begin here")
        exercises.write_exercises(["05"])
        assert "Begin here" in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize("ledger", ["", "[1]", '{"05_one.ipynb": 3}', None])
    def test_without_a_ledger_nothing_is_overwritten(self, folder, ledger, capsys):
        (path,) = exercises.write_exercises(["05"])
        written = folder / ".written.json"
        written.unlink() if ledger is None else written.write_text(ledger)
        edit(folder.parent / "notebooks" / "05_one.py", "Start here", "Begin here")
        exercises.write_exercises(["05"])
        assert "Start here" in path.read_text(encoding="utf-8")
        assert "kept" in capsys.readouterr().out

    @pytest.mark.parametrize("content", ["", "{", "half a notebook", "[]", None, "link"])
    def test_what_is_no_notebook_is_kept(self, folder, content, capsys):
        folder.mkdir()
        path = folder / "05_one.ipynb"
        if content is None:
            path.mkdir()
        elif content == "link":
            path.symlink_to("elsewhere")
        else:
            path.write_text(content)
        exercises.write_exercises(["05"])
        assert "05_one.ipynb: kept" in capsys.readouterr().out
        assert path.is_dir() or path.is_symlink() or path.read_text() == content

    def test_the_command_ends_with_a_sentence(self):
        command = [sys.executable, str(root() / "scripts" / "exercises.py"), "77"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert done.returncode == 1 and done.stderr.startswith("no chapter begins with “77”")

    def test_git_ignores_the_folder(self):
        assert "/exercises/" in (root() / ".gitignore").read_text().splitlines()


@pytest.mark.chapters
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", [pytest.param(path, marks=[] if path.stem[:2] in QUICK else pytest.mark.long) for path in NOTEBOOKS], ids=lambda path: path.stem)  # fmt: skip
def test_checks_refuse_holes_and_wrong_answers_and_accept_the_solution(path, embedded, tmp_path):
    """Really executed, in a folder that is not the project's."""
    answers = {number: [source for source, _ in wrong] for (chapter, number), wrong in WRONG.items() if path.stem.startswith(chapter)}  # fmt: skip
    (tmp_path / "answers").write_text(json.dumps(answers))
    alone = jupytext.read(path, fmt="py:percent").metadata.get("speedrun", {}).get("alone")
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(root()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    if alone:  # chapter 24 counts the threads that it gives its ranks
        del environment["OMP_NUM_THREADS"]
    script = str(Path(__file__).with_name("graded.py"))
    done = subprocess.run([sys.executable, script, path.stem, "answers", "results"], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results").read_text())
    assert len(results) == len(exercises_of(path))
    faults = []
    for number, found in results.items():
        faults += [(number, hole) for hole in found["holes"] if not hole or "exercise: write" not in hole[1]]  # fmt: skip
        for (source, words), outcome in zip(WRONG[path.stem[:2], int(number)], found["wrong"], strict=True):  # fmt: skip
            if outcome is None or outcome[0] != "AssertionError" or words not in outcome[1]:
                faults.append((number, source, words, outcome))
    assert not faults, "\n".join(map(str, faults))
