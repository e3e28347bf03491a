"""What the lab adds to Jupyter, without a browser (that is test_lab_browser.py): contents, header, folds, kernels, the command."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedrun.lab.provenance import root

sys.path.insert(0, str(root() / "scripts" / "lab"))
CHAPTERS = sorted((root() / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The lab's contents manager on a copy of the chapters; what it would tell the page is in `told`, nothing is tangled."""
    import contents as lab
    from traitlets.config import Config

    tree = tmp_path_factory.mktemp("copy")
    shutil.copytree(root() / "notebooks", tree / "notebooks")
    config = {}

    def get_config():
        return config.setdefault("c", Config())

    path = root() / "scripts" / "lab" / "jupyter_config.py"
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    before = list(sys.path)
    exec(code, {"get_config": get_config, "__file__": str(path)})
    sys.path[:] = before
    patch = pytest.MonkeyPatch()
    patch.setattr(lab, "ROOT", tree.resolve())
    patch.setattr(lab.IOLoop, "current", lambda: None)
    told: list[str] = []
    manager = lab.ChapterContents(root_dir=str(tree), config=config["c"])
    manager.told, manager.tree = told, tree
    manager.tangle = lambda path, loop: told.append(path)
    yield manager
    patch.undo()


def opened(contents, path: Path) -> tuple[str, dict]:
    name = f"notebooks/{path.name}"
    return name, contents.get(name, type="notebook")["content"]


class TestContents:
    @pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
    def test_opened_and_saved_a_chapter_is_the_same_text(self, contents, path):
        name, notebook = opened(contents, path)
        notebook.metadata["kernelspec"]["display_name"] = "Python 3 (ipykernel)"  # as the lab does
        notebook.metadata["language_info"] = {"name": "python", "version": "3.99"}
        saved = contents.save({"type": "notebook", "content": notebook}, name)
        assert (contents.tree / name).read_bytes() == path.read_bytes()
        contents.tangling.submit(lambda: None).result()
        assert contents.told[-1] == name
        disk = contents.get(name, content=False, type="notebook")
        assert saved["last_modified"] == disk["last_modified"], "or the page would see a conflict"

    def test_citations_are_links_on_screen_and_roles_on_disk(self, contents):
        name, notebook = opened(contents, root() / "notebooks" / "00_start_here.py")
        text = notebook.cells[0].source
        assert "](../_build/lab/credits.md)" in text and "../book/" not in text
        assert "{cite}" not in text and '"cite jordan2024"))' in text and "Jordan" in text
        notebook.cells[0].source = text.replace("You would like", "You may like")
        contents.save({"type": "notebook", "content": notebook}, name)
        saved = (contents.tree / name).read_text(encoding="utf-8")
        assert "](../book/credits.md)" in saved and "_build" not in saved
        assert "You may like" in saved and "{cite}`jordan2024`" in saved and '"cite' not in saved

    def test_an_unknown_citation_stays(self):
        from bibliography import hide_citations, show_citations

        assert show_citations("{cite}`nobody1900`") == "{cite}`nobody1900`"
        text = "a {cite}`student1908` and (a [link](x)) and {cite}`jordan2024` and {cite}`su2021,student1908`"
        assert hide_citations(show_citations(text)) == text != show_citations(text)

    def test_what_the_book_folds_is_folded(self, contents):
        folded = {"hide-input": True, "solution": True, "remove-cell": True, "live": False}
        seen = set()
        for path in CHAPTERS:
            for cell in opened(contents, path)[1].cells:
                tags = set(cell.metadata.get("tags", []))
                seen |= tags
                hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
                assert hidden == any(folded.get(tag, False) for tag in tags)
        assert set(folded) <= seen

    def test_a_new_chapter_gets_a_header_without_versions(self, contents):
        import nbformat

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}  # fmt: skip
        contents.save({"type": "notebook", "content": notebook}, "notebooks/99_new.py")
        text = (contents.tree / "notebooks" / "99_new.py").read_text()
        assert "# %%\n1 + 1" in text and "version" not in text and "filter" not in text
        (contents.tree / "notebooks" / "99_new.py").unlink()

    def test_a_notebook_elsewhere_is_left_alone(self, contents):
        import nbformat

        cells = [nbformat.v4.new_markdown_cell("{cite}`jordan2024`")]
        notebook = nbformat.v4.new_notebook(cells=cells)
        contents.tangling.submit(lambda: None).result()  # what was saved before has been told
        told = len(contents.told)
        contents.save({"type": "notebook", "content": notebook}, "other.ipynb")
        contents.tangling.submit(lambda: None).result()
        read = nbformat.read(contents.tree / "other.ipynb", as_version=4)
        assert read.cells[0].source == "{cite}`jordan2024`" and len(contents.told) == told
        assert not (contents.tree / "other.py").exists(), "no text beside it"


class TestTangling:
    def test_the_page_is_told_what_changed_or_what_is_wrong(self, monkeypatch):
        import contents as lab

        events: list[dict] = []

        class Loop:
            def add_callback(self, call, event):
                call(event)  # as the server would send it
                events.append(event)

        monkeypatch.setattr(lab, "ROOT", root())
        manager = lab.ChapterContents(root_dir=str(root()))
        monkeypatch.setattr(lab.tangle, "tangle", lambda folder: ["speedrun/lab/stats.py"])
        manager.tangle("notebooks/01_a.py", Loop())

        def refuse(folder):
            raise lab.tangle.TangleError("notebooks/01.py, cell 3: no\n  → yes")

        monkeypatch.setattr(lab.tangle, "tangle", refuse)
        manager.tangle("notebooks/01_a.py", Loop())
        assert events[0] == {"path": "notebooks/01_a.py", "changed": ["speedrun/lab/stats.py"], "error": "", "note": ""}  # fmt: skip
        assert events[1]["error"].endswith("→ yes") and events[1]["changed"] == []

        class Later:
            def call_later(self, seconds, call, event):
                events.append(event)

        monkeypatch.setattr(lab.IOLoop, "current", Later)
        manager.get("notebooks/06_rotary.py", type="notebook")
        assert events[2] == events[1] | {"path": "notebooks/06_rotary.py"}, (
            "told again to who loads a page"
        )
        monkeypatch.setattr(lab.tangle, "tangle", lambda folder: [])
        manager.tangle("notebooks/01_a.py", Loop())
        manager.get("notebooks/06_rotary.py", type="notebook")
        assert len(events) == 4 and manager.wrong == {}


class TestKernelExtension:
    @pytest.fixture
    def watch(self, tmp_path, monkeypatch):
        import types

        import kernel_extension

        module = types.ModuleType("speedrun.made_up")
        module.__file__ = str(tmp_path / "made_up.py")
        Path(module.__file__).write_text("x = 1\n")
        reloader = types.SimpleNamespace(modules_mtimes={})
        watch = kernel_extension.Watch(reloader)
        watch.before_cell()
        monkeypatch.setitem(sys.modules, "speedrun.made_up", module)
        return watch

    def touch(self, ahead_s: float = 5.0) -> None:
        file = sys.modules["speedrun.made_up"].__file__
        os.utime(file, (time.time() + ahead_s, time.time() + ahead_s))

    def test_a_module_that_changed_is_named_once(self, watch, capsys):
        self.touch(-60)
        watch.after_cell()
        watch.before_cell()
        assert capsys.readouterr().err == ""
        self.touch()
        watch.before_cell()
        said = capsys.readouterr().err
        assert said.startswith("speedrun.made_up has changed and will be imported again.")
        assert "Restart the kernel" in said
        watch.before_cell()
        assert capsys.readouterr().err == ""

    def test_a_module_that_changed_while_its_cell_ran_is_named_too(self, watch, capsys):
        self.touch(30)
        watch.after_cell()
        assert watch.reloader.modules_mtimes == {"speedrun.made_up": 0}, "autoreload takes it again"
        watch.before_cell()
        assert "speedrun.made_up has changed" in capsys.readouterr().err


class TestTheCommand:
    def lab(self, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root() / "scripts" / "lab"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    @pytest.mark.parametrize(
        ("words", "said"), [(["0"], "begins the names of"), (["77"], "no chapter begins with 77")]
    )
    def test_a_chapter_that_cannot_be_opened_is_refused(self, words, said):
        done = self.lab(*words)
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr

    def test_help(self):
        done = self.lab("--help")
        assert done.returncode == 0 and "--exercises" in done.stdout

    def test_the_extension_is_what_jupyterlab_loads(self):
        folder = root() / "scripts" / "lab" / "labextensions" / "speedrun-lab"
        package = json.loads((folder / "package.json").read_text())
        assert (folder / package["jupyterlab"]["_build"]["load"]).is_file()
        for name in ("overrides", "page_config"):
            json.loads((root() / "scripts" / "lab" / "settings" / f"{name}.json").read_text())
