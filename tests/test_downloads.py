"""Downloaded chapters: an installing cell, plain Markdown, and a real run of one where the package is not installed."""

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import downloads
import nbformat
import pytest
from execute import chapters
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from repository import page_of, repository, web_address

from speedrun.lab.errors import UserError
from speedrun.lab.provenance import root

HUB = "https://github.com/somebody/a-book"


@functools.cache
def portable(name: str, address: str = "") -> nbformat.NotebookNode:
    """A chapter as it is downloaded, from its source: without outputs."""
    return downloads.portable(chapters([name])[0].notebook, address, name)


def texts(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


class TestTheOneSetting:
    def settings(self, tmp_path, text: str) -> Path:
        (tmp_path / "pyproject.toml").write_text(text)
        return tmp_path / "pyproject.toml"

    def test_it_is_read_and_a_variable_overrides_it(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SPEEDRUN_REPOSITORY", raising=False)
        path = self.settings(tmp_path, f'[tool.speedrun]\nrepository = "{HUB}"')
        assert repository(path) == HUB
        assert repository(self.settings(tmp_path, "")) == ""
        monkeypatch.setenv("SPEEDRUN_REPOSITORY", "file:///srv/book.git")
        assert repository(path) == "file:///srv/book.git"
        monkeypatch.setenv("SPEEDRUN_REPOSITORY", "")
        assert repository(path) == "", "a build can be told to name no address"

    def test_the_project_has_the_setting(self):
        project = tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))
        assert set(project["tool"]["speedrun"]) == {"repository"}
        repository()

    @pytest.mark.parametrize("address", ["a book", "github.com/a/b", "https://", "ftp://a/b", 'https://a.b/"c', "https://a.b/c\nd", "--upload-pack=x", "https://me:secret@a.b/c", "https://secret@a.b/c", "ssh://git:secret@a.b/c"])  # fmt: skip
    def test_what_is_no_address_or_holds_a_password_is_refused(self, monkeypatch, address):
        monkeypatch.setenv("SPEEDRUN_REPOSITORY", address)
        with pytest.raises(UserError, match="the repository's address") as caught:
            repository()
        assert "secret" not in str(caught.value) and "OWNER/NAME" in caught.value.fix

    def test_a_number_is_no_address(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SPEEDRUN_REPOSITORY", raising=False)
        with pytest.raises(UserError, match="“5”"):
            repository(self.settings(tmp_path, "[tool.speedrun]\nrepository = 5"))

    @pytest.mark.parametrize("address", [HUB, HUB + ".git", HUB + "/", "git@github.com:somebody/a-book.git", "ssh://git@github.com/somebody/a-book"])  # fmt: skip
    def test_its_page(self, monkeypatch, address):
        monkeypatch.setenv("SPEEDRUN_REPOSITORY", address)
        assert web_address(repository()) == HUB
        assert page_of("book/credits.md", address) == f"{HUB}/blob/HEAD/book/credits.md"

    def test_an_address_without_a_page(self):
        assert page_of("a", "") == page_of("a", "file:///srv/book.git") == ""


class TestPlainMarkdown:
    def test_a_box_becomes_a_quotation(self):
        box = "Before.\n```{admonition} Cost *box*\n:class: tip\n\nOne $x^2$.\n\n- a\n- b\n```\nAfter."
        assert downloads.plain(box, "") == (
            "Before.\n\n> **Cost *box***\n>\n> One $x^2$.\n>\n> - a\n> - b\n\nAfter."
        )

    def test_boxes_in_boxes_code_in_boxes_and_boxes_without_a_title(self):
        inner = "````{note}\n```python\nx = '{cite}`henry2020`'\n```\n````"
        for fence in ("`````", ":::"):
            done = downloads.plain(f"{fence}{{admonition}} Outer\n{inner}\n{fence}", "")
            assert done == (
                "> **Outer**\n>\n> > **Note**\n> >\n> > ```python\n> > x = '{cite}`henry2020`'\n> > ```"
            )

    def test_a_formula_that_fills_lines_and_a_plain_block_of_code_stay(self):
        text = "$$\n\\begin{aligned}\nx &= 1 \\\\\n\\end{aligned}\n$$\n\n```python\n[a](13_muon.py)\n```"
        assert downloads.plain(text, HUB) == text

    def test_citations_name_authors_and_year(self):
        assert downloads.plain("a {cite}`student1908`", "") == "a (Student, 1908)"
        assert downloads.plain("{cite}`press2017`", "") == "(Press and Wolf, 2017)"
        two = downloads.plain("b\n{cite}`penedo2024, henry2020`.", "")
        assert two == "b\n([Penedo et al., 2024](https://arxiv.org/abs/2406.17557); Henry et al., 2020)."  # fmt: skip
        table = downloads.plain("| a | b |\n| - | - |\n| {cite}`press2017` | [m](13_muon.py) |", "")
        assert table.endswith("| (Press and Wolf, 2017) | m |")

    def test_cited_works_are_listed_in_full_at_the_end(self):
        cells = [new_markdown_cell("{cite}`su2021` {cite}`press2017,su2021`")]
        last = downloads.portable(new_notebook(cells=cells), "", "x").cells[-1].source
        assert last.startswith("## References\n\n- Ofir Press and Lior Wolf")
        assert last.count("\n- ") == 2 and "https://arxiv.org/abs/2104.09864" in last
        assert len(downloads.portable(new_notebook(cells=[]), "", "x").cells) == 1

    def test_links_lead_to_the_repository_or_are_text(self):
        text = "[The\nmuon](13_muon.py), [13](13_muon.ipynb#since-then), [all](../book/credits.md), [x](https://a.b)"
        assert downloads.plain(text, "") == "The\nmuon, 13, all, [x](https://a.b)"
        muon, credit = (f"{HUB}/blob/HEAD/{path}" for path in ("notebooks/13_muon.py", "book/credits.md"))  # fmt: skip
        assert downloads.plain(text, HUB) == f"[The\nmuon]({muon}), [13]({muon}), [all]({credit}), [x](https://a.b)"  # fmt: skip

    @pytest.mark.parametrize("text", ["```{figure} a.png\n```", "see {ref}`x`", "(x)=\n# A", "a {{ b }}", "a\n: b", "a[^1]\n\n[^1]: b", "% a", "![a](b.png)", "[a](#b)", "[a][b]\n\n[b]: c.md", "- a\n\n  ```{note}\n  b\n  ```", "+++", "a <b>c</b>"])  # fmt: skip
    def test_what_another_jupyter_would_show_raw_is_refused(self, text):
        with pytest.raises(UserError, match="05_x: a download cannot show"):
            downloads.plain(text, HUB, "05_x")

    def test_an_unknown_citation(self):
        with pytest.raises(UserError, match="cites “nobody1900”"):
            downloads.plain("{cite}`nobody1900`", "")

    @pytest.mark.parametrize("name", [chapter.name for chapter in chapters()])
    def test_nothing_raw_is_left_of_a_chapter(self, name):
        for address in ("", HUB):
            written = "\n".join(texts(portable(name, address)))
            assert not re.search(r"\{[a-z:-]+\}`|^(`{3,}|:{3,})\{|bdg-|\]\((?!https?:)", written, re.M)  # fmt: skip
            assert written.count("> **Cost box**") == 1
        source = "\n".join(cell.source for cell in chapters([name])[0].notebook.cells)
        assert ("## References" in written) == ("{cite}" in source)
        assert (f"({HUB}/blob/HEAD/" in written) == bool(re.search(r"\]\((\.\.|\d\d_)", source))


class TestTheNotebook:
    def test_it_begins_with_a_cell_that_any_python_can_run(self):
        for address in ("", HUB):
            notebook = portable("00", address)
            first = notebook.cells[0]
            assert first.cell_type == "code" and not first.outputs
            assert first.source.startswith(f'REPOSITORY = "{address}"')
            tree = ast.parse(first.source, feature_version=(3, 7))
            assert len(first.source.splitlines()) <= 40 and isinstance(tree.body[-1], ast.Expr)
            assert notebook.cells[1].source.startswith("# Start here")

    def test_an_address_is_data(self):
        assert ast.parse(downloads.install_cell('a"\nb').source).body[0].value.value == 'a"\nb'

    def test_metadata_fold_what_the_book_folds_and_nothing_else_is_kept(self):
        old = {"papermill": {"duration": 1}, "lines_to_next_cell": 2, "mystnb": {"image": {"alt": "x"}}}  # fmt: skip
        tags = [["solution"], ["hide-input"], ["live"], []]
        cells = [new_code_cell("x", metadata=old | {"tags": each}) for each in tags]
        cells[0].outputs = [
            new_output("stream", text=f"{root()}/a"),
            new_output("display_data", {"text/html": f"<b>{root()}/b</b>", "image/png": "aaaa"}),
        ]
        before = new_notebook(cells=cells, metadata={"papermill": {}, "jupytext": {}})
        kept = json.dumps(before)
        after = downloads.portable(before, "", "x")
        assert json.dumps(before) == kept, "the executed chapter is not changed"
        assert set(after.metadata) == {"kernelspec", "language_info"}
        assert after.metadata.kernelspec.name == "python3"
        for cell, tag in zip(after.cells[1:], tags):
            closed = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            assert cell.metadata.tags == tag and closed == bool({"solution", "hide-input"} & set(tag))  # fmt: skip
            assert "papermill" not in cell.metadata and cell.metadata.mystnb.image.alt == "x"
        outputs = after.cells[1].outputs
        assert outputs[0].text == "…/a" and outputs[1].data == {"text/html": "<b>…/b</b>", "image/png": "aaaa"}  # fmt: skip

    def test_what_a_chapter_imports_is_installed(self):
        import install_here

        named = {install_here.name_of(need).lower().replace("-", "_") for need in install_here.needs()}  # fmt: skip
        assert "ipykernel" not in named, "the kernel that runs the cell is not replaced under it"
        distributions = metadata.packages_distributions()
        optional = {"wandb", "pynvml", "flash_attn"}  # imported where they are there
        # what a requirement of ours brings: papermill PyYAML, ipykernel IPython
        brought = {"yaml": "papermill", "IPython": "ipykernel"}
        for chapter in chapters():
            for source in chapter.code:
                for name in downloads_imports(source) - optional - set(brought):
                    owners = {each.lower().replace("-", "_") for each in distributions[name]}
                    assert owners & named, f"{chapter.name} imports {name}"
        for name, bringer in brought.items():
            requires = " ".join(metadata.requires(bringer)).lower()
            assert distributions[name][0].lower() in requires


def downloads_imports(source: str) -> set[str]:
    """The modules, not of Python and not of ours, that a cell imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"speedrun"}


@pytest.fixture(scope="session")
def origin(tmp_path_factory) -> str:
    """The address of a bare repository on this disk that holds today's files."""
    folder = tmp_path_factory.mktemp("origin")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    listed = ["git", "-C", str(root()), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]  # fmt: skip
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):  # fmt: skip
        if name and (root() / name).is_file():
            target = folder / "work" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root() / name, target)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "today"]):
        subprocess.run([*git, *command], cwd=folder / "work", check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(folder / "work"), str(folder / "book.git")], check=True)  # fmt: skip
    return (folder / "book.git").as_uri()


@pytest.fixture(scope="session")
def stranger(tmp_path_factory) -> Path:
    """A Python that has everything but the package: a new environment that sees this one's packages without ours."""
    folder = tmp_path_factory.mktemp("stranger")
    seen = folder / "seen"
    seen.mkdir()
    for place in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        for entry in Path(place).iterdir():
            ours = "annotated_speedrun" in entry.name or entry.name in ("pip", "speedrun")
            if not ours and entry.suffix != ".pth" and not (seen / entry.name).exists():
                (seen / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    for entry in Path(own.strip()).iterdir():  # its own setuptools may be too old
        if not entry.name.startswith("pip"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (Path(own.strip()) / "seen.pth").write_text(f"{seen}\n")
    return python


def clean(**more: str) -> dict[str, str]:
    """This environment, without what would let another Python find the package, and with a pip that asks no network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JUPYTER_PATH", "PIP_USER") and not name.startswith("SPEEDRUN_")}  # fmt: skip
    pip = {"PIP_NO_INDEX": "1"}
    if int(metadata.version("setuptools").split(".")[0]) >= 77:
        pip["PIP_NO_BUILD_ISOLATION"] = "0"  # which is how pip spells “without isolation”
    return kept | pip | more


def run_cell(python: Path, folder: Path, cell: str, before: str = "", **more: str):
    """Run the first cell as a program in a folder; returns its status and what it said."""
    done = subprocess.run([str(python), "-c", before + cell], cwd=folder, env=clean(**more), capture_output=True, text=True)  # fmt: skip
    return done.returncode, done.stdout + done.stderr


class TestTheFirstCell:
    """As a program, where the package is not installed: what it says when it cannot go on."""

    def last_line(self, said: tuple[int, str]) -> str:
        assert said[0] == 1, said
        return said[1].strip().splitlines()[-1]

    def test_without_an_address_it_asks_for_it(self, stranger, tmp_path):
        said = run_cell(stranger, tmp_path, downloads.install_cell("").source)
        assert self.last_line(said) == "RuntimeError: Write the address of the book's repository between the quotes of REPOSITORY above, and run this cell again."  # fmt: skip

    def test_an_address_where_nothing_is(self, stranger, tmp_path):
        cell = downloads.install_cell((tmp_path / "none.git").as_uri()).source
        code, text = run_cell(stranger, tmp_path, cell)
        assert code == 1 and "Are the address, FOLDER and the network right? git says:" in text
        assert not (tmp_path / "annotated-speedrun").exists()

    def test_a_folder_of_that_name_is_left_alone(self, stranger, tmp_path, origin):
        (tmp_path / "annotated-speedrun").mkdir()
        (tmp_path / "annotated-speedrun" / "mine").touch()
        code, text = run_cell(stranger, tmp_path, downloads.install_cell(origin).source)
        assert code == 1 and "FOLDER" in text and "already exists" in text
        assert os.listdir(tmp_path / "annotated-speedrun") == ["mine"]

    def test_without_git(self, stranger, tmp_path):
        cell = downloads.install_cell(HUB).source
        said = run_cell(stranger, tmp_path, cell, PATH=str(tmp_path))
        assert "git is not installed here" in self.last_line(said)

    def test_without_pip(self, stranger, tmp_path, origin):
        hide = "import importlib.util as u; _f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'pip' else _f(n, *a)\n"
        said = run_cell(stranger, tmp_path, downloads.install_cell(origin).source, hide)
        assert "has no pip" in self.last_line(said) and "-m ensurepip" in said[1]

    def test_torch_takes_its_companions_along(self, monkeypatch, capsys):
        """torchvision fits one torch only, and transformers fails to import the other."""
        import install_here

        calls, here = [], {"torchvision"}
        monkeypatch.setattr(install_here, "pip", lambda *words: calls.append(words))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in here or None)
        monkeypatch.setattr(install_here.environment, "wants_cpu_build", lambda: False)
        install_here.install_requirements(["torch>=2", "tyro>=1"])
        install_here.install_requirements(["tyro>=1"])
        assert calls == [("torch>=2", "tyro>=1", "torchvision"), ("tyro>=1",)]
        monkeypatch.setattr(install_here.environment, "wants_cpu_build", lambda: True)
        monkeypatch.setattr(install_here.environment, "pip_is_configured", lambda python: False)
        for answers in (False, True):
            monkeypatch.setattr(install_here.environment, "answers", lambda *a, fine=answers: fine)
            install_here.install_requirements(["torch>=2"])
        index = ("--index-url", install_here.environment.CPU_INDEX)
        both = ("torch>=2", "torchvision")
        assert calls[2:] == [both, (*index, *both), both]
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "Installing torch, tyro: this takes minutes …" and said[1] == "Installing tyro …"  # fmt: skip

    @pytest.mark.parametrize("after, restart", [("1", False), ("2", True)])
    def test_what_the_kernel_holds_in_another_version(self, monkeypatch, capsys, after, restart):
        import install_here

        versions, calls = iter([{"numpy": "1"}, {"numpy": after}]), []
        monkeypatch.setattr(install_here, "loaded", lambda needs: next(versions))
        monkeypatch.setattr(install_here, "pip", lambda *words: calls.append(words))
        monkeypatch.setattr(install_here.environment, "missing", lambda needs: ["numpy>=2"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        if restart:
            with pytest.raises(RuntimeError, match="already imported another numpy. Restart it"):
                install_here.install()
        else:
            install_here.install()
            assert capsys.readouterr().out.endswith(f"Installed from {root()}.\n")
        assert calls == [("numpy>=2",), ("--no-deps", "--editable", str(root()))], "the package last"  # fmt: skip

    def test_pip_fails_with_its_reason(self, monkeypatch):
        import install_here

        monkeypatch.setattr(install_here, "PIP", [sys.executable, "-c", "import sys; sys.exit('no space left')"])  # fmt: skip
        with pytest.raises(RuntimeError, match="pip could not install .*\nno space left"):
            install_here.pip("numpy")

    def test_where_the_package_is_here_it_installs_nothing(self, tmp_path):
        cell, before = downloads.install_cell(HUB).source, f"import sys; sys.path.insert(0, {str(root())!r})\n"  # fmt: skip
        said = run_cell(Path(sys.executable), tmp_path, cell, before)
        assert said == (0, f"The package is here, nothing is installed: {root()}\n")
        assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_download_runs_where_the_package_is_not(stranger, origin, tmp_path):
    """A whole chapter in an empty folder, from a clone of the repository; its first cell, run again, does nothing."""
    from kernel import own_kernel

    monkey = subprocess.run([str(stranger), "-c", "import speedrun"], cwd=tmp_path, env=clean(), capture_output=True)  # fmt: skip
    assert b"No module named 'speedrun'" in monkey.stderr
    notebook = portable("00", origin)
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    notebook.cells += [
        new_code_cell("import speedrun; print(speedrun.__file__)"),
        new_code_cell(notebook.cells[0].source),
    ]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    environment = clean(**own_kernel(tmp_path / "jupyter"))
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.write_text(spec.read_text().replace(json.dumps(sys.executable), json.dumps(str(stranger))))
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(tmp_path / "empty")]  # fmt: skip
    command += [str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    clone = tmp_path / "empty" / "annotated-speedrun"
    said = "".join(output.text for output in cells[0].outputs)
    assert said.splitlines() == [f"Cloning {origin} into {clone} …", f"Installed from {clone}."]
    assert cells[-2].outputs[0].text.strip() == str(clone / "speedrun" / "__init__.py")
    again = f"The package is here, nothing is installed: {clone}"
    assert cells[-1].outputs[0].text.strip() == again
    assert os.listdir(tmp_path / "empty") == ["annotated-speedrun"]
    # a kernel started anew, in another folder, finds it installed
    said = run_cell(stranger, tmp_path, notebook.cells[0].source)
    assert said == (0, again + "\n")
