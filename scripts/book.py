"""Build the book from the executed chapters: _build/site/index.html. Warnings are errors, and all of them are shown."""

import ast
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from downloads import without_paths, write_downloads
from execute import EXECUTED, Chapter, chapters, run_chapters, why_stale
from history_links import folder, pull_request, records, time_of
from toc import contents, contents_page, keywords, table_of_contents

from speedrun.lab import provenance
from speedrun.lab.errors import run_main
from speedrun.lab.provenance import root
from speedrun.lab.results import freshness

for pure in ("code_hash", "imported_names", "module_file"):  # asked again for every result
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


def provenance_of(facts: dict) -> str:
    """One line under a chapter's title: when it was executed, and how fresh its measurements are; each of them is folded below."""
    device = facts["state"]["device"]
    where = f"{facts['cores']} CPU cores" if device == "cpu" else ", ".join(device)
    versions = facts["state"]["versions"]
    line = f"page executed {facts['date'][:10]}"
    how = f"in {facts['seconds']:.0f} s on {where}, torch {versions['torch']}"
    measured = results_of(facts)
    if not measured:
        return f"```{{container}} provenance\n{line} {how}\n```"
    kinds = [freshness(result) for _, result in measured]
    counts = [
        f"{kinds.count(kind)} {kind}"
        for kind in ("fresh", "same behaviour", "stale")
        if kind in kinds
    ]
    word = "measurement" if len(measured) == 1 else "measurements"
    alike: dict[str, list[str]] = {}
    for name, result in measured:
        alike.setdefault(badge(result), []).append(name)
    lines = [f"- {shown} {', '.join(names)}" for shown, names in alike.items()]
    return "\n".join(
        [
            f":::{{dropdown}} {line} · {len(measured)} {word}: {', '.join(counts)}",
            ":class-container: provenance",
            f"The page was executed {how}. It draws on",
            "",
            *lines,
            "",
            "[What these words mean](../status.md).",
            ":::",
        ]
    )


def rewrite_links(text: str) -> str:
    """Links between sources become links between pages."""
    return re.sub(r"\]\((\d\d_\w+)\.py", r"](\1.ipynb", text).replace("](../book/", "](../")


def only_asserts(source: str) -> bool:
    """Is a cell nothing but assertions?"""
    body = ast.parse(source).body
    return bool(body) and all(isinstance(statement, ast.Assert) for statement in body)


def fold_cells(notebook: nbformat.NotebookNode) -> None:
    """Fold solutions, and assertions that stand by themselves: those behind an exported cell or a solution are for the reader."""
    before = ""  # what the last code cell was
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tags, label = set(cell.metadata.get("tags", [])), ""
            if "solution" in tags:
                before, label = "solution", "Solution"
            elif cell.source.startswith("#|"):
                before = "exported"
            elif only_asserts(cell.source):
                label = "" if before else "Check"
            else:
                before = ""
            if label:
                cell.metadata["tags"] = sorted(tags | {"hide-cell"})
                shown = {"code_prompt_show": label, "code_prompt_hide": label}
                cell.metadata["mystnb"] = {**cell.metadata.get("mystnb", {}), **shown}


def with_table_class(cell: nbformat.NotebookNode) -> None:
    """Give tables that a cell shows as HTML the class that the book's style knows."""
    for output in cell.get("outputs", ()):
        shown = output.get("data", {})
        if "text/html" in shown:
            shown["text/html"] = re.sub(
                r"<table(?![^>]*\bclass=)", '<table class="table"', shown["text/html"]
            )


def page(chapter: Chapter) -> nbformat.NotebookNode:
    """An executed chapter as the book shows it: number, field's words and provenance at the top, folds, links between pages."""
    notebook = nbformat.read(chapter.output, as_version=4)
    facts = json.loads(chapter.ledger.read_text(encoding="utf-8"))
    fold_cells(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = rewrite_links(cell.source)
        with_table_class(cell)
        without_paths(cell)
    (entry,) = (each for each in contents() if each.slug == chapter.name)
    rest = notebook.cells[0].source.partition("\n")[2]
    top = f"# {entry.heading}\n\n{keywords(entry)}\n\n{provenance_of(facts)}\n"
    notebook.cells[0].source = f"{top}{rest}"
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
    """Every record with its people, for the credits; each row can be linked to, and leads to where the record is kept."""
    lines = ["| record | date | time | what | by |", "| --- | --- | --- | --- | --- |"]
    for number, row in records().items():
        what = row["description"].replace("*", chr(92) + "*")
        people = html.escape(row["contributors"].strip(" -")).replace("@", "&#64;")
        kept = {f"PR {row['pr']}": pull_request(row), "folder": folder(row)}
        links = ", ".join(f"[{name}]({address})" for name, address in kept.items() if address)
        lines.append(
            f'| <span id="record-{number}">{number}</span> | {row["date"]} | {time_of(row).replace(" ", "&nbsp;")} | {what}{f" ({links})" if links else ""} | {people or "the maintainers"} |'
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
        root() / "book",
        SOURCE,
        ignore=shutil.ignore_patterns("results", "data", "*.mplstyle", "contents.csv"),
        copy_function=shutil.copy,  # as new files: Sphinx forgets index entries of pages that it does not read again
    )
    (SOURCE / "_toc.yml").write_text(table_of_contents(), encoding="utf-8")
    (SOURCE / "notebooks").mkdir()
    (SOURCE / "generated").mkdir()
    for chapter in chapters():
        nbformat.write(page(chapter), SOURCE / "notebooks" / f"{chapter.name}.ipynb")
    (SOURCE / "status.md").write_text(status_page(), encoding="utf-8")
    (SOURCE / "generated" / "records.md").write_text(records_table(), encoding="utf-8")
    (SOURCE / "generated" / "contents.md").write_text(contents_page(), encoding="utf-8")


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
    here = os.pathsep.join(
        [str(root()), str(root() / "scripts")]
    )  # Sphinx imports scripts/mentions.py
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": here})
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
