"""Build the book from the executed chapters: _build/site/index.html. Warnings are errors, and all of them are shown."""

import functools
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from downloads import without_paths, write_downloads
from execute import EXECUTED, Chapter, chapters, run_chapters, why_stale

from speedrun.lab import provenance
from speedrun.lab.errors import run_main
from speedrun.lab.provenance import root
from speedrun.lab.results import freshness, public_table

for pure in ("code_hash", "imported_names"):  # asked again for every result, of the same texts
    setattr(provenance, pure, functools.cache(getattr(provenance, pure)))
SOURCE, SITE = root() / "_build" / "book", root() / "_build" / "site"


def results_of(facts: dict) -> list[tuple[str, dict]]:
    """The measurements that a chapter read when it was executed: (slug/name, the result)."""
    paths = [Path(path) for path in facts["opened"] if path.startswith("book/results/")]
    return [
        (f"{path.parent.name}/{path.stem}", json.loads((root() / path).read_text(encoding="utf-8")))
        for path in paths
        if (root() / path).exists()
    ]


def badge(result: dict) -> str:
    """A measurement's hardware, date and freshness, as a coloured badge."""
    color = {"fresh": "success", "same behaviour": "info", "stale": "warning"}[freshness(result)]
    stamp = result["stamp"]
    return f"{{bdg-{color}}}`{stamp['gpu'] or stamp['cpu']} · torch {stamp['torch']} · {stamp['date']} · {freshness(result)}`"


def badges(facts: dict) -> str:
    """The lines under a chapter's title: when it was executed, and which measurements it draws on."""
    device = facts["state"]["device"]
    where = f"{facts['cores']} CPU cores" if device == "cpu" else ", ".join(device)
    versions = facts["state"]["versions"]
    lines = [
        f"{{bdg-secondary}}`page executed {facts['date'][:10]} in {facts['seconds']:.0f} s on {where}, torch {versions['torch']}`"
    ]
    alike: dict[str, list[str]] = {}
    for name, result in results_of(facts):
        alike.setdefault(badge(result), []).append(name)
    lines += [f"{{bdg-light}}`{', '.join(names)}` {shown}" for shown, names in alike.items()]
    return "\n".join(lines)


def rewrite_links(text: str) -> str:
    """Links between sources become links between pages."""
    return re.sub(r"\]\((\d\d_\w+)\.py", r"](\1.ipynb", text).replace("](../book/", "](../")


def page(chapter: Chapter) -> nbformat.NotebookNode:
    """An executed chapter as the book shows it: badges under the title, solutions folded, links between pages."""
    notebook = nbformat.read(chapter.output, as_version=4)
    facts = json.loads(chapter.ledger.read_text(encoding="utf-8"))
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if "solution" in tags:
            cell.metadata["tags"] = sorted(tags | {"hide-cell"})
        if cell.cell_type == "markdown":
            cell.source = rewrite_links(cell.source)
        without_paths(cell)
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{badges(facts)}\n{rest}"
    notebook.metadata.pop("papermill", None)
    return notebook


def status_page() -> str:
    """What produced these pages, and how fresh the measurements are."""
    lines = [
        "# Status",
        "",
        "What produced the pages of this book. A page is executed again when its code, a module that it rests on, a library or a file that it read has changed.",
        "",
        "| chapter | executed | seconds | on | torch |",
        "| --- | --- | --- | --- | --- |",
    ]
    measured: dict[str, dict] = {}
    for chapter in chapters():
        facts = json.loads(chapter.ledger.read_text(encoding="utf-8"))
        device = facts["state"]["device"]
        where = f"{facts['cores']} CPU cores" if device == "cpu" else ", ".join(device)
        lines.append(
            f"| [{chapter.name}](notebooks/{chapter.name}.ipynb) | {facts['date']} | {facts['seconds']:.0f} | {where} | {facts['state']['versions']['torch']} |"
        )
        measured |= dict(results_of(facts))
    lines += [
        "",
        "## Measurements",
        "",
        "| result | runs | on | text | command |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in sorted(measured.items()):
        stamp = result["stamp"]
        corpus = stamp["corpus"]["name"] if stamp["corpus"] else ""
        lines.append(
            f"| {name} | {stamp['n']} | {badge(result)} | {corpus} | `{stamp['command']}` |"
        )
    lines += [
        "",
        "*fresh*: the code that was measured is today's. *same behaviour*: it has changed and was shown to train bit for bit alike, so losses stand and times do not. *stale*: it has changed.",
        "",
    ]
    libraries = json.loads(chapters()[0].ledger.read_text(encoding="utf-8"))["state"]["versions"]
    lines += [
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in libraries.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def records_table() -> str:
    """Every record with its people, for the credits."""
    lines = ["| record | date | time | what | by |", "| --- | --- | --- | --- | --- |"]
    for row in public_table("records"):
        if not row["note"].startswith("retiming"):
            seconds = float(row["record_time_s"])
            time = f"{seconds / 60:.1f} min" if seconds >= 600 else f"{seconds:.1f} s"
            people = html.escape(row["contributors"]).replace("@", "&#64;") or "the maintainers"
            lines.append(
                f"| {row['record']} | {row['date']} | {time} | {row['description'].replace('*', chr(92) + '*')} | {people} |"
            )
    return "\n".join(lines) + "\n"


def without_thebe(text: str) -> str:
    """A page without the live-code scripts that the theme adds even if told not to: they name a host on the network."""
    scripts = r'\s*<script[^>]*?(?:src="[^"]*sphinx-thebe\.js[^"]*"|type="text/x-thebe-config")[^>]*>.*?</script>'
    return re.sub(scripts + r"|\s*<script>const THEBE_JS_URL.*?</script>", "", text, flags=re.S)


def assemble() -> None:
    """Lay out what Jupyter Book reads: front matter, generated pages, executed chapters."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(
        root() / "book", SOURCE, ignore=shutil.ignore_patterns("results", "data", "*.mplstyle")
    )
    (SOURCE / "notebooks").mkdir()
    (SOURCE / "generated").mkdir()
    for chapter in chapters():
        nbformat.write(page(chapter), SOURCE / "notebooks" / f"{chapter.name}.ipynb")
    (SOURCE / "status.md").write_text(status_page(), encoding="utf-8")
    (SOURCE / "generated" / "records.md").write_text(records_table(), encoding="utf-8")


def main() -> int:
    stale = [chapter.name for chapter in chapters() if why_stale(chapter)]
    if stale and run_chapters([]):
        print(
            f"the book is not built: chapters failed (see {EXECUTED.relative_to(root())})",
            file=sys.stderr,
        )
        return 1
    assemble()
    out = root() / "_build" / "jb"
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(SOURCE),
        "--path-output",
        str(out),
        "-W",
        "-n",
        "--keep-going",
        "--quiet",
    ]
    done = subprocess.run(command)
    if done.returncode:
        return done.returncode
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(out / "_build" / "html", SITE)
    for path in SITE.rglob("*.html"):
        path.write_text(without_thebe(path.read_text(encoding="utf-8")), encoding="utf-8")
    write_downloads(SITE / "_sources" / "notebooks", chapters())  # what the download button gives
    print(f"the book: {SITE.relative_to(root())}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
