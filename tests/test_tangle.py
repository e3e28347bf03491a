"""The tangler: what it writes, and everything that it refuses, by running it on small projects."""

import subprocess
import sys
from pathlib import Path

import pytest
import tangle

HEADER = """# ---
# jupyter:
#   kernelspec:
#     name: python3
#     display_name: Python 3
#     language: python
# ---
"""


def project(folder: Path, **notebooks: str) -> Path:
    """A project with notebooks of the given cells (separated by lines of dashes; # headings are markdown)."""
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    for name, text in notebooks.items():
        cells = []
        for cell in text.strip().split("\n---\n"):
            markdown = cell.startswith("# ")
            cells.append("# %% [markdown]\n" + f"# {cell}" if markdown else "# %%\n" + cell)
        (folder / "notebooks" / f"{name}.py").write_text(HEADER + "\n\n".join(cells) + "\n")
    return folder


def commit(folder: Path) -> None:
    """Put a folder into a repository of its own, as it is."""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a project"]):
        subprocess.run([*git, *words], check=True, capture_output=True)


GOOD = """
# First idea
---
#| default_exp lab.one
#| export
def one():
    return 1
---
assert one() == 1
---
# Second idea
---
#| export model.two
import math


def two():
    return one() + math.floor(1.5)
---
assert two() == 2
"""


def refusal(folder: Path, cells: str) -> str:
    with pytest.raises(tangle.TangleError) as caught:
        tangle.tangle(project(folder, **{"01_a": cells}))
    return str(caught.value)


class TestWriting:
    def test_modules_have_headers_headings_and_imports_between_them(self, tmp_path):
        tangle.tangle(project(tmp_path, **{"01_a": GOOD}))
        one = (tmp_path / "speedrun/lab/one.py").read_text()
        two = (tmp_path / "speedrun/model/two.py").read_text()
        assert (
            one.startswith("# Tangled from notebooks/01_a.py") and "# %% First idea\ndef one" in one
        )
        assert "from speedrun.lab.one import one" in two and "# %% Second idea\nimport math" in two
        assert "assert" not in one + two
        for package in ("", "lab/", "model/"):
            assert (tmp_path / f"speedrun/{package}__init__.py").exists()

    def test_the_package_works(self, tmp_path):
        tangle.tangle(project(tmp_path, **{"01_a": GOOD}))
        code = "from speedrun.model.two import two; assert two() == 2"
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
        )

    def test_tangling_twice_changes_nothing(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD})
        assert tangle.tangle(folder) and tangle.tangle(folder) == []
        assert tangle.tangle(folder, check=True) == []

    def test_directives_in_any_order_and_several_modules_of_one_chapter(self, tmp_path):
        cells = "#| export kernels.a\n#| default_exp kernels.b\nx = 1\n---\nprint(x)\n---\n#| export\ny = x"
        tangle.tangle(project(tmp_path, **{"01_a": cells}))
        assert "x = 1" in (tmp_path / "speedrun/kernels/a.py").read_text()
        assert (
            "from speedrun.kernels.a import x" in (tmp_path / "speedrun/kernels/b.py").read_text()
        )

    def test_a_heading_inside_a_code_fence_is_no_heading(self, tmp_path):
        cells = "# Real\n#\n# ```\n# # not a heading\n# ```\n---\n#| default_exp a\n#| export\nx = 1\n---\nprint(x)"
        tangle.tangle(project(tmp_path, **{"01_a": cells}))
        assert "# %% Real" in (tmp_path / "speedrun/a.py").read_text()


class TestRefusing:
    def test_a_name_defined_twice(self, tmp_path):
        text = refusal(
            tmp_path,
            "#| default_exp a\n#| export\ndef f(): ...\n---\n# Later\n---\n#| export\nf = 3",
        )
        assert "“f” is defined twice" in text and "under “Later”" in text and "→ rename" in text

    def test_a_name_defined_in_two_modules_of_one_chapter(self, tmp_path):
        assert "defined twice" in refusal(tmp_path, "#| export a\nf = 1\n---\n#| export b\nf = 2")

    def test_a_demo_cell_that_rebinds_an_exported_name(self, tmp_path):
        text = refusal(
            tmp_path, "#| default_exp a\n#| export\ndef f(): ...\n---\nfor f in range(3): pass"
        )
        assert "rebinds “f”" in text and "other code than the package" in text

    def test_an_export_before_any_default(self, tmp_path):
        assert "before any default_exp" in refusal(tmp_path, "#| export\nx = 1")

    def test_an_unknown_directive(self, tmp_path):
        assert "unknown directive “#| exprot”" in refusal(tmp_path, "#| exprot\nx = 1")

    @pytest.mark.parametrize(
        "use",
        [
            "def f():\n    return missing",
            "class A:\n    x = missing",
            "x = [missing for i in ()]",
            'def f(a: "missing"): ...',
        ],
    )
    def test_a_name_that_nothing_exported_defines(self, tmp_path, use):
        text = refusal(tmp_path, f"missing = 1\n---\n#| default_exp a\n#| export\n{use}")
        assert "uses “missing”" in text and "export the cell that defines it" in text

    def test_an_import_of_the_chapters_own_module(self, tmp_path):
        cells = "#| export a\nx = 1\n---\n#| export b\nfrom speedrun.a import x\ny = x"
        assert "a module of its own chapter" in refusal(tmp_path, cells)

    def test_modules_that_need_each_other(self, tmp_path):
        cells = "#| export a\ndef f(): return g()\n---\n#| export b\ndef g(): return f()"
        assert "need each other" in refusal(tmp_path, cells)

    def test_a_module_of_two_chapters(self, tmp_path):
        folder = project(tmp_path, **{"01_a": "#| export m\nx = 1", "02_b": "#| export m\ny = 1"})
        with pytest.raises(tangle.TangleError, match="owns"):
            tangle.tangle(folder)

    def test_magics_and_other_non_python(self, tmp_path):
        said = refusal(tmp_path, "#| default_exp a\n#| export\nx = 1\n---\ny = = 2")
        assert "“y = = 2” is not Python" in said and "magics" not in said
        said = refusal(tmp_path, "#| default_exp a\n#| export\nx = 1\n%timeit x")
        assert "“%timeit x” is not Python" in said and "no magics" in said

    @pytest.mark.parametrize("line", ["return 1", "break", "yield 2", "x = 1\n  y = 2", "(1 +"])
    def test_what_only_the_compiler_refuses(self, tmp_path, line):
        said = refusal(tmp_path, f"#| default_exp a\n#| export\nz = 1\n{line}")
        assert "is not Python" in said and "cell 1" in said
        assert not (tmp_path / "speedrun").exists()

    def test_a_name_that_another_chapter_no_longer_defines(self, tmp_path):
        user = "#| default_exp m\n#| export\nfrom speedrun.lab.one import one, gone"
        folder = project(tmp_path, **{"01_a": GOOD, "02_b": user})
        with pytest.raises(tangle.TangleError) as caught:
            tangle.tangle(folder)
        said = str(caught.value)
        assert "notebooks/02_b.py" in said and "“gone” from speedrun.lab.one" in said
        assert "an exported cell of notebooks/01_a.py" in said and "“one”" not in said

    @pytest.mark.parametrize(
        "damage", [b"# ---\n# jupyter:\n#   kernelspec: [b\n# ---\n", b"# %%\nx = '\xff'\n"]
    )
    def test_a_file_that_is_no_notebook_is_named(self, tmp_path, damage):
        folder = project(tmp_path, **{"01_a": GOOD})
        (folder / "notebooks" / "02_b.py").write_bytes(damage)
        with pytest.raises(tangle.TangleError, match="notebooks/02_b.py is not a notebook"):
            tangle.tangle(folder)

    def test_a_copy_is_no_chapter(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD, "01_a-Copy1": GOOD, "Untitled": GOOD})
        assert "speedrun/lab/one.py" in tangle.tangle(folder)
        assert "notebooks/01_a.py" in (folder / "speedrun" / "lab" / "one.py").read_text()

    def test_an_annotation_may_be_any_text(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD.replace("def one():", 'def one() -> "an int":')})
        assert tangle.tangle(folder)

    def test_all_problems_are_reported_at_once(self, tmp_path):
        folder = project(tmp_path, **{"01_a": "#| export\nx = 1", "02_b": "#| export m\ny = nope"})
        with pytest.raises(tangle.TangleError) as caught:
            tangle.tangle(folder)
        assert "01_a" in str(caught.value) and "02_b" in str(caught.value)


class TestChecking:
    def test_a_stale_module_is_named_with_heading_and_diff(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD})
        tangle.tangle(folder)
        project(tmp_path, **{"01_a": GOOD.replace("return 1", "return 1 + 0")})
        with pytest.raises(tangle.TangleError) as caught:
            tangle.tangle(folder, check=True)
        text = str(caught.value)
        assert (
            "speedrun/lab/one.py" in text and "“First idea”" in text and "+    return 1 + 0" in text
        )

    def test_a_module_that_no_notebook_produces(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD})
        tangle.tangle(folder)
        (tmp_path / "speedrun/stray.py").write_text("x = 1\n")
        for check in (True, False):
            with pytest.raises(tangle.TangleError, match="no notebook produces"):
                tangle.tangle(folder, check=check)

    def test_a_hand_edited_module_is_not_overwritten_unless_forced(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD})
        tangle.tangle(folder)
        edited = tmp_path / "speedrun/lab/one.py"
        edited.write_text(edited.read_text() + "\nmine = 1\n")
        with pytest.raises(tangle.TangleError, match="edited by hand"):
            tangle.tangle(folder)
        assert "mine" in edited.read_text()
        assert (
            tangle.tangle(folder, force=True) == ["speedrun/lab/one.py"]
            and "mine" not in edited.read_text()
        )

    @pytest.mark.parametrize("remembered", [True, False], ids=["here before", "cloned"])
    def test_a_checkout_with_crlf_is_the_same_text(self, tmp_path, remembered):
        """Git for Windows: nothing changed, nothing is accused, and an edited notebook still reaches the package."""
        folder = project(tmp_path, **{"01_a": GOOD})
        tangle.tangle(folder)
        commit(folder)
        for path in folder.rglob("*.py"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        if not remembered:
            (folder / "_build" / "tangled.json").unlink()
        assert tangle.tangle(folder, check=True) == [] and tangle.tangle(folder) == []
        if not remembered:
            (folder / "_build" / "tangled.json").unlink()
        notebook = folder / "notebooks" / "01_a.py"
        notebook.write_bytes(notebook.read_bytes().replace(b"return 1\r", b"return 1 + 0\r"))
        assert tangle.tangle(folder) == ["speedrun/lab/one.py"]
        assert b"return 1 + 0\n" in (folder / "speedrun/lab/one.py").read_bytes()

    def test_a_clone_of_this_project_with_crlf_has_lf(self, tmp_path):
        """.gitattributes, by which make, bash and the tangler read it on Windows too."""
        root = Path(tangle.__file__).resolve().parent.parent
        names = (".gitattributes", "Makefile", "scripts/tangle.py", "book/data/curves.csv")
        for name in names:
            (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / name).write_bytes((root / name).read_bytes())
        commit(tmp_path / "a")
        clone = ["git", "-c", "core.autocrlf=true", "clone", "-q", tmp_path / "a", tmp_path / "b"]
        subprocess.run(clone, check=True)
        assert not [name for name in names if b"\r" in (tmp_path / "b" / name).read_bytes()]

    def test_an_edited_list_of_modules_has_advice_that_can_be_followed(self, tmp_path):
        folder = project(tmp_path, **{"01_a": GOOD})
        tangle.tangle(folder)
        (folder / "speedrun/lab/__init__.py").write_text("import os\n")
        with pytest.raises(tangle.TangleError) as caught:
            tangle.tangle(folder)
        assert "an exported cell of a chapter" in str(caught.value) and "# Written" not in str(caught.value)  # fmt: skip
        with pytest.raises(tangle.TangleError, match=r"make the change in notebooks/, then"):
            tangle.tangle(folder, check=True)

    @pytest.mark.parametrize("around", [False, True], ids=["no git", "another repository"])
    def test_an_unpacked_archive_accuses_nobody(self, tmp_path, monkeypatch, around):
        """Without the project's own repository it cannot be known who changed a module; it is asked, not said."""
        folder = project(tmp_path / "inner", **{"01_a": GOOD})
        tangle.tangle(folder)
        if around:
            commit(tmp_path)
        else:
            monkeypatch.setenv("PATH", str(tmp_path))
        (folder / "_build" / "tangled.json").write_text("{half a fi")
        assert tangle.tangle(folder) == []
        (folder / "_build" / "tangled.json").unlink()
        project(tmp_path / "inner", **{"01_a": GOOD.replace("return 1", "return 1 + 0")})
        with pytest.raises(tangle.TangleError) as caught:
            tangle.tangle(folder)
        assert "nobody can tell" in str(caught.value) and "was edited by hand; " not in str(caught.value)  # fmt: skip
        assert tangle.tangle(folder, force=True) == ["speedrun/lab/one.py"]

    def test_the_command_fails_with_the_same_words(self, tmp_path):
        project(tmp_path, **{"01_a": "#| export\nx = 1"})
        command = [sys.executable, tangle.__file__, "--root", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "before any default_exp" in done.stderr

    def test_this_project_is_tangled(self):
        assert tangle.tangle(Path(tangle.__file__).resolve().parent.parent, check=True) == []
