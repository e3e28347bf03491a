"""Every chapter, executed whole (make check). The executor keeps what is up to date, so this costs nothing after make book."""

import json
import subprocess
import sys

import execute
import nbformat
import pytest

from speedrun.lab.provenance import root

pytestmark = pytest.mark.chapters
CHAPTERS = execute.chapters()


@pytest.fixture(scope="session")
def executed() -> dict[str, str]:
    """Chapter → error, for the chapters that fail; brings all of them up to date."""
    failed = execute.run_chapters([])
    return dict.fromkeys(failed, "failed: see _build/executed")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
class TestExecuted:
    def test_it_runs_from_top_to_bottom(self, executed, chapter):
        assert chapter.name not in executed
        cells = nbformat.read(chapter.output, as_version=4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        assert code and all(cell.execution_count for cell in code)
        assert not any(out.output_type == "error" for cell in code for out in cell.outputs)

    def test_it_is_quick(self, executed, chapter):
        facts = json.loads(chapter.ledger.read_text())
        assert facts["seconds"] <= {"C": 60, "1": 180}[facts["state"]["tier"]]

    def test_its_first_line_is_the_tier(self, executed, chapter):
        cells = nbformat.read(chapter.output, as_version=4).cells
        first = next(cell for cell in cells if cell.cell_type == "code" and cell.outputs)
        tier = json.loads(chapter.ledger.read_text())["state"]["tier"]
        assert first.outputs[0].text.startswith(f"tier {tier}: ")

    def test_what_it_read_is_known(self, executed, chapter):
        opened = json.loads(chapter.ledger.read_text())["opened"]
        text = "\n".join(chapter.code)
        # chapter 96 makes `load_result`, and reads what it has written itself
        if "load_result(" in text and "def load_result(" not in text:
            assert any(path.startswith("book/results/") for path in opened)
        if "public_table(" in text and "def public_table(" not in text:
            assert any(path.startswith("book/data/") for path in opened)
        assert execute.why_stale(chapter) is None

    def test_nothing_that_it_shows_names_the_machine_or_warns(self, executed, chapter):
        for cell in nbformat.read(chapter.output, as_version=4).cells:
            for out in cell.get("outputs", []):
                text = out.get("text", "") + str(out.get("data", {}).get("text/plain", ""))
                assert "Warning" not in text, cell.source[:80]


def test_all_together_in_twelve_minutes_on_the_cpu(executed):
    facts = [json.loads(chapter.ledger.read_text()) for chapter in CHAPTERS]
    assert sum(fact["seconds"] for fact in facts if fact["state"]["tier"] == "C") <= 720


def test_a_chapter_also_runs_as_a_plain_script(executed):
    """No magics, no notebook: `python notebooks/NN_slug.py`, on the shortest one."""
    done = subprocess.run(
        [sys.executable, str(root() / "notebooks" / "00_start_here.py")],
        capture_output=True,
        text=True,
        env={"MPLBACKEND": "agg", "PATH": "/usr/bin:/bin", "HOME": str(root() / "_build")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


class TestStaleness:
    """A chapter is executed again when what it rests on has changed, and only then."""

    @pytest.fixture
    def chapter(self, executed):
        return next(chapter for chapter in CHAPTERS if chapter.name.startswith("01"))

    @pytest.mark.parametrize(
        ("part", "words"),
        [(part, f"{part} changed") for part in ("code", "python", "tier", "device")],
    )
    def test_another_state(self, chapter, monkeypatch, part, words):
        state = execute.state_of(chapter)
        monkeypatch.setattr(execute, "state_of", lambda c: state | {part: "another"})
        assert execute.why_stale(chapter) == words

    def test_a_module_or_a_library_is_named(self, chapter, monkeypatch):
        state = execute.state_of(chapter)
        modules = state["modules"] | {"speedrun.lab.stats": "another"}
        monkeypatch.setattr(execute, "state_of", lambda c: state | {"modules": modules})
        assert execute.why_stale(chapter) == "modules changed: speedrun.lab.stats"
        versions = state["versions"] | {"torch": "9.9"}
        monkeypatch.setattr(execute, "state_of", lambda c: state | {"versions": versions})
        assert execute.why_stale(chapter) == "versions changed: torch"

    def test_a_file_that_it_read(self, chapter, monkeypatch):
        real = execute.hash_of
        monkeypatch.setattr(execute, "hash_of", lambda path: "x" if "variance" in path else real(path))  # fmt: skip
        assert execute.why_stale(chapter) == "book/data/variance.csv changed"

    def test_prose_alone_is_refreshed_without_executing(self, chapter):
        notebook = nbformat.from_dict(chapter.notebook)
        notebook.cells[0].source += "\n\nOne more sentence."
        execute.refresh_prose(execute.Chapter(chapter.name, notebook))
        fresh = nbformat.read(chapter.output, as_version=4)
        assert fresh.cells[0].source.endswith("One more sentence.")
        assert any(cell.get("outputs") for cell in fresh.cells)
        execute.refresh_prose(chapter)
