"""JupyterLab for the chapters (make lab): jupytext opens the .py as notebooks, saving one rewrites the package."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tangle

c = get_config()  # noqa: F821  (given by Jupyter)
c.ServerApp.contents_manager_class = "jupytext.TextFileContentsManager"
c.TextFileContentsManager.notebook_extensions = "py,ipynb"
c.TextFileContentsManager.cell_metadata_filter = "tags,mystnb,-all"
c.TextFileContentsManager.notebook_metadata_filter = "jupytext,kernelspec,speedrun,-all"
c.TextFileContentsManager.formats = "py:percent"
c.TextFileContentsManager.preferred_jupytext_formats_read = "py:percent"
ROOT = Path(__file__).resolve().parent.parent


def tangle_on_save(model, os_path, contents_manager, **kwargs) -> None:
    """After a chapter is saved, tangle. What is wrong is shown in the log; the chapter itself is saved in any case."""
    path = Path(os_path)
    if path.parent != ROOT / "notebooks" or path.suffix != ".py":
        return
    text = path.read_text(encoding="utf-8")
    # without versions, which would differ from machine to machine; with the line ends that git keeps
    clean = re.sub(r"^#       (format|jupytext)_version: .*\n", "", text, flags=re.M).encode()
    try:
        if clean != path.read_bytes():
            part = path.with_suffix(".part")
            part.write_bytes(clean)
            os.replace(part, path)
        changed = tangle.tangle(ROOT)
        contents_manager.log.info("tangled: %s", ", ".join(changed) or "nothing changed")
    except (tangle.TangleError, OSError) as error:
        contents_manager.log.error("not tangled:\n%s", error)


c.FileContentsManager.post_save_hook = tangle_on_save
c.TextFileContentsManager.post_save_hook = tangle_on_save
