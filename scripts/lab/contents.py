"""The chapters as JupyterLab sees them: notebooks made from text, folded as in the book; saving one rewrites the package."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tangle
from bibliography import hide_citations, show_citations
from folds import fold
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict
from jupytext import TextFileContentsManager
from tornado.ioloop import IOLoop

from speedrun.lab.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent.parent
TANGLED = {
    "$id": "urn:annotated-speedrun:tangled",
    "version": "1",
    "title": "A chapter was saved, and tangled or not",
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "changed": {"type": "array", "items": {"type": "string"}},
        "error": {"type": "string"},
        "note": {"type": "string"},
    },
    "required": ["path", "changed", "error", "note"],
}


CREDITS = (
    "](../book/credits.md)",
    "](../_build/lab/credits.md)",
)  # the page without MyST, which make lab writes


def shown(text: str) -> str:
    """Markdown of a chapter or exercise as the page gets it; written() is its inverse."""
    return show_citations(text).replace(CREDITS[0], CREDITS[1])


def written(text: str) -> str:
    """What shown() made of a text, as it was."""
    return hide_citations(text).replace(CREDITS[1], CREDITS[0])


def as_the_kernel_will_say(metadata) -> None:
    """Write what JupyterLab notes when a kernel answers, or a notebook would be unsaved as soon as it is open."""
    if metadata.get("kernelspec", {}).get("name") == "python3":
        metadata["kernelspec"]["display_name"] = get_kernel_dict()["display_name"]
        metadata["language_info"] = dict(IPythonKernel.language_info)


def markdown_cells(notebook) -> list:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


HEADER = re.compile(r"\A# ---\n(?:#.*\n)*?# ---\n")
UNWANTED = re.compile(r"^# +(\w+_version|\w+_metadata_filter): .*\n", re.M)


def with_header_of(before: str, text: str) -> str:
    """A chapter's text under the header that it had: kernels and jupytext write their names and versions into it, which differ between machines."""
    old, new = HEADER.match(before), HEADER.match(text)
    if not new:
        return text
    return (old[0] if old else UNWANTED.sub("", new[0])) + text[new.end() :]


class ChapterContents(TextFileContentsManager):
    """jupytext's contents manager, for one project."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tangling = ThreadPoolExecutor(1)  # two seconds, in which the server goes on serving
        self.event_logger.register_event_schema(TANGLED)
        self.wrong: dict = {}  # what the last tangling told, if it failed

    def is_chapter(self, path: str) -> bool:
        file = Path(self._get_os_path(path))
        return file.suffix == ".py" and file.parent.resolve() == ROOT / "notebooks"

    def is_ours(self, path: str) -> bool:
        """A chapter or an exercise."""
        folder = Path(self._get_os_path(path)).parent.resolve()
        return self.is_chapter(path) or folder == ROOT / "exercises"

    def get(self, path, content=True, **kwargs):
        model = super().get(path, content=content, **kwargs)
        if not content or model["type"] != "notebook":
            return model
        as_the_kernel_will_say(model["content"].metadata)
        if self.is_ours(path):
            for cell in markdown_cells(model["content"]):
                cell["source"] = shown(cell["source"])
        if self.is_chapter(path):
            for cell in model[
                "content"
            ].cells:  # not among what saving keeps, so the text stays as it is
                fold(cell)
            if self.wrong:  # a page that was loaded again has lost it
                event = self.wrong | {"path": path.strip("/")}
                IOLoop.current().call_later(3, self.tell, event)
        return model

    def save(self, model, path=""):
        if model["type"] == "notebook" and self.is_ours(path):
            for cell in markdown_cells(model["content"]):
                cell["source"] = written(cell["source"])
        if not self.is_chapter(path):
            return super().save(model, path)
        file = Path(self._get_os_path(path))
        before = file.read_bytes().decode(errors="replace") if file.is_file() else ""
        saved = super().save(model, path)
        text = file.read_text(encoding="utf-8")
        if model["type"] == "notebook":
            text = with_header_of(before, text)
        if text.encode() != file.read_bytes():  # git keeps \n, whatever the system ends lines with
            atomic_write(file, text)
        self.tangling.submit(self.tangle, path.strip("/"), IOLoop.current())
        return self.get(path, content=False, type=saved["type"])  # of the text as it is now

    def tangle(self, path: str, loop: IOLoop) -> None:
        """Rewrite the package, and tell the page what came of it. The chapter itself is saved in any case."""
        event: dict = {"path": path, "changed": [], "error": "", "note": ""}
        if not tangle.is_chapter(Path(path).name):
            event["note"] = (
                f"Saved. {path} is no chapter (they are named NN_slug.py), so nothing is tangled from it."
            )
        try:
            event["changed"] = tangle.tangle(ROOT)
            self.log.info("tangled: %s", ", ".join(event["changed"]) or "nothing changed")
        except (tangle.TangleError, OSError) as error:
            event["error"] = str(error)
            self.log.error("not tangled:\n%s", error)
        except Exception as error:  # whoever saved must hear of it
            event["error"] = (
                f"{type(error).__name__}: {error}\n  → the terminal of make lab says where"
            )
            self.log.exception("not tangled")
        self.wrong = event if event["error"] else {}
        loop.add_callback(self.tell, event)

    def tell(self, event: dict) -> None:
        self.event_logger.emit(schema_id=TANGLED["$id"], data=event)
