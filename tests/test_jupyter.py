"""make lab: a chapter is opened as a notebook, saved as the same text, and rewrites the package."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from speedrun.lab.provenance import root

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")]
CHAPTER = "notebooks/00_start_here.py"


@pytest.fixture
def project(tmp_path) -> Path:
    """A committed copy of this project."""
    tree = tmp_path / "copy"
    tree.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for name in ("speedrun", "scripts", "book", "notebooks"):
        shutil.copytree(root() / name, tree / name, ignore=unwanted)
    git = ["git", "-C", str(tree), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init"], ["add", "-A"], ["commit", "-m", "a copy"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return tree


@pytest.fixture
def call(project):
    """A function that talks to a JupyterLab on the project: (method, path, body) → answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--config", "scripts/jupyter_config.py"]
    command += [f"--ServerApp.root_dir={project}", "--no-browser", "--allow-root"]
    command += ["--port", str(port), "--IdentityProvider.token=t"]
    environment = os.environ | {"PYTHONPATH": str(project)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=project, env=environment, **quiet)

    def ask(method: str, path: str, body=None):
        data = json.dumps(body).encode() if body else None
        headers = {"Authorization": "token t", "Content-Type": "application/json"}
        address = f"http://127.0.0.1:{port}/api/{path}"
        request = urllib.request.Request(address, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    for _ in range(120):
        try:
            ask("GET", "status")
            break
        except OSError:
            time.sleep(0.5)
    yield ask
    server.terminate()
    server.wait()


def test_a_saved_chapter_is_the_same_text_and_a_changed_one_rewrites_the_package(project, call):
    before = (project / CHAPTER).read_text()
    notebook = call("GET", f"contents/{CHAPTER}?type=notebook&content=1")["content"]
    assert len(notebook["cells"]) > 40
    body = {"type": "notebook", "format": "json", "content": notebook}
    call("PUT", f"contents/{CHAPTER}", body)
    assert (project / CHAPTER).read_text() == before
    (cell,) = [cell for cell in notebook["cells"] if "class GPU:" in cell["source"]]
    cell["source"] += "  # saved"
    call("PUT", f"contents/{CHAPTER}", body)
    module = project / "speedrun" / "lab" / "hardware.py"
    for _ in range(40):
        if "# saved" in module.read_text():
            break
        time.sleep(0.25)
    assert "# saved" in module.read_text() and "# saved" in (project / CHAPTER).read_text()
