"""The chapters in JupyterLab: make lab, make lab NB=06, make exercises.

python scripts/lab                      all chapters in the file browser
python scripts/lab 06                   one chapter, open
python scripts/lab --exercises          the chapters with holes where the solutions were
python scripts/lab 06 -- --port 9999    what follows -- goes to JupyterLab
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

from speedrun.lab.errors import prepare_command, run_main

if __name__ == "__main__":
    prepare_command()

import argparse
import os
import re
import subprocess

from bibliography import show_citations
from execute import chapters, prepare
from exercises import write_exercises
from kernel import own_kernel

from book import records_table
from speedrun.lab.errors import UserError
from speedrun.lab.files import atomic_write
from speedrun.lab.provenance import root


def address(wanted: str | None, exercises: bool) -> str:
    """What JupyterLab shows first: a chapter, or the folder that they are in."""
    folder, suffix = ("exercises", "ipynb") if exercises else ("notebooks", "py")
    if wanted is None:
        return f"/lab/tree/{folder}"
    found = chapters([wanted.zfill(2) if wanted.isdecimal() and wanted != "0" else wanted])
    if len(found) > 1:
        names = ", ".join(chapter.name for chapter in found)
        raise UserError(f"{wanted} begins the names of {names}", "name one: make lab NB=06")
    return f"/lab/tree/{folder}/{found[0].name}.{suffix}"


def credits_page() -> None:
    """book/credits.md as the lab can show it, _build/lab/credits.md: with its table, which the book makes when it is built, and its citations."""
    text = (root() / "book" / "credits.md").read_text(encoding="utf-8")
    whole = re.sub(r"```{include} generated/records.md\n```\n", lambda _: records_table(), text)
    atomic_write(root() / "_build" / "lab" / "credits.md", show_citations(whole))


def environment() -> dict[str, str]:
    """What the server and its kernels need to know: this interpreter's kernel, the package, and nothing of it in the checkout."""
    kept = root() / "_build" / "lab"
    variables = own_kernel(kept, "--ext=kernel_extension")
    places = [str(root()), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(places)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapter", nargs="*", help="a number or name; default: the folder")
    parser.add_argument("--exercises", action="store_true", help="with holes, to be filled in")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    if len(options.chapter) > 1:
        what = f"{' and '.join(options.chapter)} are several chapters"
        raise UserError(what, "name the first to open: the others are in the file browser")
    first = address(next(iter(options.chapter), None), options.exercises)
    prepare()
    variables = environment()
    credits_page()
    if options.exercises:
        write_exercises()
    config = HERE / "jupyter_config.py"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--config",
        str(config),
        f"--LabApp.default_url={first}",
    ]
    command += words[split + 1 :]
    if os.name == "nt":  # there exec returns at once, and quotes nothing
        return subprocess.call(command, env=variables)
    os.execve(sys.executable, command, variables)


if __name__ == "__main__":
    sys.exit(run_main(main))
