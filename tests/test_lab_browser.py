"""make lab in a browser: every chapter opened with a double click and run whole, edited, saved; and nothing left behind."""

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import jupytext
import pytest

from speedrun.lab.provenance import root

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.name == "nt", reason="a POSIX shell"),
]
CHAPTERS = sorted(path.stem for path in (root() / "notebooks").glob("*.py"))
QUICK = ("00", "93")  # make check runs these whole; all of them: python -m pytest -m browser
SCREENS = root() / "_build" / "screens" / "lab"
RAW = re.compile(r"\{[a-z][\w:-]*\}`|\{admonition\}|^:::|^```|\$\$", re.M)
BROKEN = '.katex-error, .myst-error, [title$="Not Found"]'
PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
DRAWN = (
    "shown => [...document.querySelectorAll(shown)].filter(node => node.textContent.trim()).length"
)
STATE = """() => {
  const panel = jupyterapp.shell.currentWidget;
  const cells = panel.content.widgets.map(cell => cell.model.toJSON());
  return {path: panel.context.path, kernel: panel.sessionContext.session.kernel.status, dirty: panel.context.model.dirty, cells};
}"""


def photograph(page, name: str, settles_ms: int = 500) -> None:
    """Keep what a page looks like, for whoever wants to look: SCREENS=1."""
    if os.environ.get("SCREENS"):
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(settles_ms)
        page.screenshot(path=SCREENS / f"{name}.png")


class Sink:
    """A proxy that answers nobody and counts who called: requests that would have left the machine."""

    def __init__(self):
        self.listener, self.calls = socket.create_server(("127.0.0.1", 0)), []
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            self.calls.append(connection.recv(200))
            connection.close()


def clone(folder: Path) -> Path:
    """What a fresh clone of this working tree would be."""
    tree = folder / "clone"
    words = ["git", "-C", str(root()), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root() / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root() / name, tree / name)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
        git(tree, *words)
    return tree


def git(tree: Path, *words: str) -> str:
    command = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Lab:
    """A running make lab."""

    def __init__(self, tree: Path, home: Path, sink: Sink, target: str = "lab", *words: str):
        self.tree, self.sink, self.log = tree, sink, home / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        more = f"--no-browser --allow-root --port {self.port} --IdentityProvider.token=t"
        more += " --LabApp.expose_app_in_browser=True"
        command = ["make", target, *words, f"PYTHON={sys.executable}", f"ARGS={more}"]
        hidden = {"PYTHONPATH", "JUPYTER_PATH", "IPYTHONDIR", "OMP_NUM_THREADS"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"HOME": str(home), "http_proxy": sink.address, "https_proxy": sink.address}
        environment |= {"no_proxy": "127.0.0.1,localhost"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self.answers("api"):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.3)

    def answers(self, path: str) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5).close()
        except urllib.error.HTTPError:
            return False
        except OSError:
            return False
        return True

    def ask(self, method: str, path: str):
        address = f"http://127.0.0.1:{self.port}/api/{path}"
        request = urllib.request.Request(
            address, headers={"Authorization": "token t"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def end_kernels(self) -> None:
        for session in self.ask("GET", "sessions"):
            self.ask("DELETE", f"sessions/{session['id']}")

    def close(self) -> None:
        os.killpg(self.process.pid, 15)
        self.process.wait(30)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, embedded):
    """make lab in a fresh clone, for somebody whose home is empty."""
    tree, home = clone(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("home")
    (tree / "data").mkdir()
    (tree / "data" / "embedded").symlink_to(embedded.resolve())
    if (root() / "data" / "wheels").is_dir():  # what chapter 02 fetches the first time
        (tree / "data" / "wheels").symlink_to(root() / "data" / "wheels")
    running = Lab(tree, home, Sink())
    try:
        yield running
        check_nothing_left(running)
    finally:
        running.close()


def check_nothing_left(lab) -> None:
    """Whatever was done in the lab: nothing left the machine, and nothing stays behind. Of each lab, where two processes share the tests."""
    assert status(lab) == ""
    assert not list(lab.tree.rglob(".ipynb_checkpoints")), "checkpoints are kept in _build/"
    assert lab.sink.calls == []
    home = lab.log.parent
    kept = [path for path in home.rglob("*") if path.is_file() and path != lab.log]
    assert not [path for path in kept if "settings" in str(path) or "ipython" in str(path)]


@pytest.fixture
def show(opener):
    """Open the lab as its reader does, light or dark; afterwards nothing may have complained or left the machine."""
    with opener() as open_page:
        yield open_page


@pytest.fixture(scope="class")
def one_page(opener):
    """A page of the lab in which several tests open their chapters."""
    with opener() as open_page:
        yield open_page()


@pytest.fixture(scope="module")
def opener(browser, lab):
    contexts: dict = {}
    yield functools.partial(watched, browser, lab, contexts)
    for context in contexts.values():
        context.close()


@contextlib.contextmanager
def watched(browser, lab, contexts):
    """contexts: a reader for each scheme, who has the lab's scripts from the second page on."""
    complaints, opened = [], []

    def watch(request) -> None:
        if not request.url.startswith((f"http://127.0.0.1:{lab.port}", "data:", "blob:")):
            complaints.append(f"left the machine: {request.url}")

    def open_page(path: str = "notebooks", scheme: str = "light"):
        if scheme not in contexts:
            size = {"width": 1400, "height": 1000}
            contexts[scheme] = browser.new_context(viewport=size, color_scheme=scheme)
        page = contexts[scheme].new_page()
        opened.append(page)
        page.on("request", watch)
        page.on("pageerror", lambda error: complaints.append(error.stack or str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/{path}?token=t&reset")
        page.wait_for_selector(".jp-DirListing-item", timeout=60_000)
        return page

    try:
        yield open_page
    finally:
        for page in opened:
            page.close()
        lab.end_kernels()
    assert not complaints


def double_click(page, name: str) -> None:
    page.locator(".jp-DirListing-itemName", has_text=name).dblclick()
    page.wait_for_selector(f"{PANEL} .jp-Cell", timeout=60_000)
    wait(page, lambda state: state["kernel"] == "idle", 60)


def wait(page, ready, limit_s: float) -> dict:
    """The notebook's state as soon as it is ready."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            state = page.evaluate(STATE)
        except Exception:  # no kernel yet
            state = None
        if state and ready(state):
            return state
        assert time.monotonic() < deadline, state and [c.get("execution_count") for c in state["cells"]]  # fmt: skip
        page.wait_for_timeout(300)


def follow(page, text: str, target: str) -> None:
    """Click a link until its chapter is there: JupyterLab scrolls to a cell as the mouse goes down in it, and while the notebook
    still settles the mouse may come up beside the link, for a reader as for us. A link that leads elsewhere fails at once."""
    link = page.locator(f"{PANEL} .myst a", has_text=text).first
    before = page.evaluate(STATE)["path"]
    for _ in range(5):
        link.click()
        try:
            state = wait(page, lambda state: state["path"] != before, 10)
        except AssertionError:
            continue
        assert state["path"].endswith(target)
        return
    raise AssertionError(f"five clicks on {text!r}, and no {target}")


def menu(page, name: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()


def run_all(page, limit_s: float = 300) -> list[dict]:
    menu(page, "Run", "Run All Cells")
    wait(page, lambda state: state["kernel"] != "idle", 10)

    def done(state: dict) -> bool:
        code = [cell for cell in state["cells"] if cell["cell_type"] == "code"]
        may = [cell for cell in code if "raises-exception" not in cell["metadata"].get("tags", [])]
        failed = any(out["output_type"] == "error" for cell in may for out in cell["outputs"])
        ran = all(cell["execution_count"] for cell in code if cell["source"].strip())
        return state["kernel"] == "idle" and (ran or failed)

    return wait(page, done, limit_s)["cells"]


def errors(cells: list[dict]) -> list[str]:
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    return [f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


def is_folded(cell: dict) -> bool:
    return cell["metadata"].get("jupyter", {}).get("source_hidden", False)


def status(lab) -> str:
    return git(lab.tree, "status", "--porcelain", "--untracked-files=all")


def settled(lab, limit_s: float = 30) -> str:
    """The checkout's status once it is clean again: tangling takes its time after a save. At the limit, whatever it is."""
    deadline = time.monotonic() + limit_s
    while status(lab) and time.monotonic() < deadline:
        time.sleep(0.5)
    return status(lab)


class TestEveryChapter:
    @pytest.mark.parametrize("name", CHAPTERS)
    def test_a_double_click_shows_it_as_the_book_does(self, lab, one_page, name):
        page = one_page
        double_click(page, name)
        cells = page.evaluate(STATE)["cells"]
        source = jupytext.read(root() / "notebooks" / f"{name}.py", fmt="py:percent")
        assert [cell["cell_type"] for cell in cells] == [cell.cell_type for cell in source.cells]
        for cell, written in zip(cells, source.cells):
            tags = {"hide-input", "hide-cell", "remove-cell", "solution"}
            assert is_folded(cell) == bool(tags & set(written.metadata.get("tags", [])))
        shown, counts = f"{PANEL} .jp-MarkdownCell .myst", []
        for _ in range(60):  # until nothing more is drawn for 0.6 s; a busy machine takes long
            page.wait_for_timeout(200)
            counts.append(page.evaluate(DRAWN, shown))
            if counts[-1] > 5 and counts[-4:] == 4 * counts[-1:]:
                break
        texts = [text for text in page.locator(shown).all_inner_texts() if text.strip()]
        assert len(texts) > 5 and not [RAW.search(t)[0] for t in texts if RAW.search(t)]
        assert page.locator(f"{PANEL} .jp-MarkdownCell").locator(BROKEN).count() == 0
        assert not page.evaluate(STATE)["dirty"], "opening a chapter changes nothing"
        assert page.locator(".jp-toast-button, .Toastify__toast").count() == 0, "nothing pops up"
        assert status(lab) == ""
        if len(texts) == sum(cell["cell_type"] == "markdown" for cell in cells):  # all is drawn
            # open, it would be styled anew at each step of the next chapter; half drawn, it would complain
            page.evaluate("jupyterapp.shell.currentWidget.close()")

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name[:2] in QUICK else pytest.mark.long)
            for name in CHAPTERS
        ],
    )
    def test_it_runs_whole(self, lab, show, name):
        page = show(f"notebooks/{name}.py")
        wait(page, lambda state: state["path"].endswith(f"{name}.py"), 60)
        cells = run_all(page)
        assert not errors(cells)
        assert "tier" in "".join(cells[1].get("outputs", [{}])[0].get("text", ""))
        menu(page, "File", "Save Chapter")
        wait(page, lambda state: not state["dirty"], 30)
        time.sleep(3)
        assert status(lab) == ""


class TestEditing:
    def edit(self, page, old: str, new: str) -> None:
        """Change one cell's text as typing does, and save with the menu."""
        changed = page.evaluate(
            """words => {
              const [old, young] = words;
              const cells = jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
              const found = cells.filter(cell => cell.source.includes(old));
              found.forEach(cell => cell.setSource(cell.source.replace(old, young)));
              return found.length;
            }""",
            [old, new],
        )
        assert changed == 1
        menu(page, "File", "Save Chapter")

    def toast(self, page) -> str:
        page.wait_for_selector(".Toastify__toast", timeout=20_000)
        page.wait_for_timeout(500)
        return page.locator(".Toastify__toast").last.inner_text()

    def test_saving_a_changed_cell_rewrites_the_module_and_says_so(self, lab, show):
        page = show()
        double_click(page, "06_rotary")
        before = "Cosine and sine of every position's angle"
        module = lab.tree / "speedrun" / "model" / "rotary.py"
        assert before in module.read_text()
        self.edit(page, before, "Cosines and sines of all angles")
        assert "speedrun/model/rotary.py" in self.toast(page)
        assert "Cosines and sines of all angles" in module.read_text()
        photograph(page, "saved")
        changed = " M notebooks/06_rotary.py\n M speedrun/model/rotary.py\n"
        assert status(lab) == changed
        patch = git(lab.tree, "diff", "--numstat").split()
        assert patch[:2] == ["1", "1"] and patch[3:5] == ["1", "1"], "a line each, no more"
        self.edit(page, "Cosines and sines of all angles", before)
        assert settled(lab) == ""

    def test_a_cell_that_cannot_be_tangled_is_told_to_who_saved(self, lab, show):
        page = show()
        double_click(page, "06_rotary")
        good = "return angles.cos(), angles.sin()"
        bad = "return no_such_name, angles.sin()"
        self.edit(page, good, bad)
        page.wait_for_selector(".speedrun-not-tangled", timeout=20_000)
        page.wait_for_timeout(500)
        photograph(page, "not-tangled")
        text = page.locator(".speedrun-not-tangled").inner_text()
        assert "not tangled" in text and "no_such_name" in text and "notebooks/06_rotary.py" in text
        assert "export the cell that defines it" in text, "what to do about it"
        assert status(lab) == " M notebooks/06_rotary.py\n", "the package is as it was"
        page.reload()
        page.wait_for_selector(".speedrun-not-tangled", timeout=60_000)
        wait(page, lambda state: state["kernel"] == "idle", 60)
        self.edit(page, bad, good)
        assert "what the chapters say" in self.toast(page)
        assert page.locator(".speedrun-not-tangled").count() == 0
        assert status(lab) == ""

    def test_a_copy_is_a_notebook_and_no_chapter(self, lab, show):
        name = "06_rotary-Copy1.py"
        shutil.copy2(lab.tree / "notebooks" / "06_rotary.py", lab.tree / "notebooks" / name)
        page = show()
        double_click(page, name)
        self.edit(page, "return angles.cos(), angles.sin()", "return angles.sin(), angles.cos()")
        assert "is no chapter" in self.toast(page)
        assert status(lab) == f"?? notebooks/{name}\n"
        (lab.tree / "notebooks" / name).unlink()

    def test_a_kernel_that_imported_the_old_module_says_so(self, lab, show):
        page = show()
        double_click(page, "00_start_here")
        assert "has changed" not in self.said(page, cells=6)
        double_click(page, "96_logs_and_stamps")
        old, new = "A table of the public record history", "A table of the public history"
        self.edit(page, old, new)
        assert "speedrun/lab/results.py" in self.toast(page)
        double_click(page, "00_start_here")
        said = self.said(page, cells=6)
        assert "speedrun.lab.results has changed" in said and "Restart the kernel" in said
        double_click(page, "96_logs_and_stamps")
        self.edit(page, new, old)
        assert settled(lab) == ""

    def said(self, page, cells: int) -> str:
        """What the first cells print, run one by one with the keyboard."""
        page.locator(f"{PANEL} .jp-Cell").first.click()
        page.keyboard.press("Escape")
        page.evaluate("jupyterapp.shell.currentWidget.content.activeCellIndex = 0")
        for _ in range(cells):
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(200)
        ran = wait(page, lambda state: state["kernel"] == "idle", 60)["cells"]
        assert any(cell.get("execution_count") for cell in ran) and not errors(ran)
        return json.dumps(ran)


class TestExercises:
    def test_a_hole_is_named_and_the_folded_solution_fills_it(self, lab, show):
        script = [sys.executable, str(lab.tree / "scripts" / "exercises.py"), "00"]
        environment = os.environ | {"PYTHONPATH": str(lab.tree)}
        subprocess.run(script, check=True, capture_output=True, env=environment)
        page = show("exercises")
        double_click(page, "00_start_here.ipynb")
        cells = page.evaluate(STATE)["cells"]
        tags = [cell["metadata"].get("tags", []) for cell in cells]
        answers = [n for n, own in enumerate(tags) if "answer" in own]
        holes = [n for n, own in enumerate(tags) if "exercise" in own]
        assert answers and len(answers) == len(holes)
        assert all(is_folded(cells[n]) for n in answers)
        assert not any(is_folded(cells[n]) for n in holes)
        said = errors(run_all(page))
        assert len(said) == len(holes) and all("exercise: write" in each for each in said)
        page.locator(f"{PANEL} .jp-Cell").nth(answers[0]).scroll_into_view_if_needed()
        photograph(page, "exercise")
        fill = """([hole, answer]) => {
          const cells = jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
          cells[answer].setSource(cells[answer].source.replace('if False', 'if True'));
          cells[hole].setSource(cells[answer].source);
        }"""
        for hole, answer in zip(holes, answers):
            page.evaluate(f"pair => ({fill})(pair)", [hole, answer])
        assert not errors(run_all(page))
        menu(page, "File", "Save Notebook")
        wait(page, lambda state: not state["dirty"], 30)
        kept = (lab.tree / "exercises" / "00_start_here.ipynb").read_bytes()
        again = subprocess.run(script, check=True, capture_output=True, text=True, env=environment)
        assert "00_start_here" in again.stdout + again.stderr
        assert (lab.tree / "exercises" / "00_start_here.ipynb").read_bytes() == kept
        assert status(lab) == "" and not list((lab.tree / "exercises").glob("*.py"))


class TestTheServer:
    def test_it_wants_a_token_and_listens_on_this_machine_alone(self, lab):
        assert not lab.answers("api/contents")
        try:
            others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        except OSError:  # a machine without a name has no other address
            others = set()
        for address in others - {"127.0.0.1", "::1"}:
            with pytest.raises(OSError):
                socket.create_connection((address, lab.port), timeout=2)

    def test_a_link_leads_to_the_chapter_as_a_notebook(self, lab, show):
        page = show("notebooks/06_rotary.py")
        wait(page, lambda state: state["kernel"] == "idle", 60)
        follow(page, "the last chapter", "05_modern_block.py")

    def test_the_credits_name_everyone(self, lab, show):
        page = show("notebooks/00_start_here.py")
        page.locator(f"{PANEL} .myst a", has_text="credits").first.click()
        page.wait_for_selector(".jp-MarkdownViewer td", timeout=30_000)
        text = page.locator(".jp-MarkdownViewer").inner_text()
        assert "@KellerJordan" in text or "@kellerjordan0" in text
        assert not RAW.search(text) and page.locator(".jp-MarkdownViewer tr").count() > 90
        photograph(page, "credits")

    def test_other_python_files_open_as_text(self, lab, show):
        page = show("speedrun/model")
        page.locator(".jp-DirListing-itemName", has_text="rotary.py").dblclick()
        page.wait_for_selector(".jp-FileEditor", timeout=30_000)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_is_looked_at(self, lab, show, scheme):
        page = show(scheme=scheme)
        more = ("06_rotary", "12_newton_schulz") if os.environ.get("SCREENS") else ()
        for name in ("00_start_here", *more):
            double_click(page, name)
            photograph(page, f"{name}.{scheme}", 1500)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", background)[:3])) > 380
        assert light == (scheme == "light")

    def test_nothing_left_the_machine_and_nothing_stays_behind(self, lab):
        check_nothing_left(lab)
