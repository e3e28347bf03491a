"""JupyterLab for the chapters (scripts/lab/__main__.py starts it): its own settings, on this machine only, nothing left in the checkout."""

import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KEPT = ROOT / "_build" / "lab"  # what Jupyter and IPython want to remember
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT)]

c = get_config()  # noqa: F821  (given by Jupyter)

# the chapters: notebooks on screen, text on disk
c.ServerApp.contents_manager_class = "contents.ChapterContents"
c.ServerApp.root_dir = str(ROOT)
c.ChapterContents.notebook_extensions = "py,ipynb"
c.ChapterContents.cell_metadata_filter = "tags,mystnb,-all"
c.ChapterContents.notebook_metadata_filter = "jupytext,kernelspec,speedrun,-all"
c.ChapterContents.preferred_jupytext_formats_read = "py:percent"

# settings below the reader's own, which are read and never written unasked. page_config.json leaves out what asks for news or packages,
# a toolbar that fails on MyST's cells, and MyST's viewer of Markdown files, which writes into the reader's settings
c.LabApp.app_settings_dir = str(HERE / "settings")
extensions = HERE / "labextensions"
if set("[]*?") & set(str(extensions)):  # JupyterLab takes the path for a pattern
    extensions = Path(tempfile.mkdtemp()) / "labextensions"
    shutil.copytree(HERE / "labextensions", extensions)
c.LabApp.extra_labextensions_path = [str(extensions)]
c.LabApp.workspaces_dir = str(KEPT / "workspaces")
c.FileCheckpoints.root_dir = str(KEPT / "checkpoints")
c.NotebookNotary.db_file = str(KEPT / "signatures.db")

# nobody else's business: this machine only (--ip on the command line says otherwise), with a token, and no news from outside
c.ServerApp.ip = "127.0.0.1"
c.LabApp.extension_manager = "readonly"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
