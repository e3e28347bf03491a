"""The book's contents: book/contents.csv has one row for each chapter, written or planned, and everything that lists chapters is made from it.

    python scripts/toc.py          write the list in README.md anew (a test compares it)

A row is a number, the part of the book, the records, the words by which the field calls the subject, and the question that the chapter
asks. Its title is the first heading of notebooks/NN_*.py; while there is no such file the chapter is planned, and its title is the row's.
"""

import csv
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from tangle import chapter_paths

from speedrun.lab.errors import UserError, run_main
from speedrun.lab.provenance import root

BACK_MATTER = ("troubleshooting", "status", "credits", "bibliography")
BEGIN, END = "<!-- contents: python scripts/toc.py -->", "<!-- end of contents -->"


@dataclass(frozen=True)
class Entry:
    """A row of the table; `slug` is the notebook's name, NN_slug, and "" while nobody has written it."""

    number: str
    part: str
    title: str
    records: tuple[int, ...]
    words: tuple[str, ...]
    question: str
    slug: str

    @property
    def heading(self) -> str:
        """The title with its number, as pages, sidebar and search show it."""
        return f"{self.number} · {self.title}"

    @property
    def anchor(self) -> str:
        """Where the contents speak of this chapter: an id on the first page."""
        return f"chapter-{self.number}"


def first_heading(path: Path) -> str:
    """A chapter's title: its first heading of the first level."""
    found = re.search(r"^# # (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise UserError(f"{path.name} has no title", "begin its first cell with “# # Title”")
    return found[1].strip()


@functools.cache
def contents() -> tuple[Entry, ...]:
    """All rows in their order. UserError where a notebook has no row, or a row neither a notebook nor a title."""
    written = {path.stem[:2]: path for path in chapter_paths(root())}
    with (root() / "book" / "contents.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = sorted(set(written) - {row["number"] for row in rows})
    if missing:
        what = f"book/contents.csv has no row for chapter {missing[0]}"
        raise UserError(what, "add one: number, part, records, words, question")
    entries = []
    for row in sorted(rows, key=lambda row: row["number"]):
        path = written.get(row["number"])
        if not path and not row["title"]:
            what = f"chapter {row['number']} has neither a notebook nor a title"
            raise UserError(what, "give its row of book/contents.csv the title that is planned")
        entries.append(
            Entry(
                number=row["number"],
                part=row["part"],
                title=first_heading(path) if path else row["title"],
                records=tuple(map(int, row["records"].split())),
                words=tuple(word for word in row["words"].split("; ") if word),
                question=row["question"],
                slug=path.stem if path else "",
            )
        )
    return tuple(entries)


def parts() -> dict[str, list[Entry]]:
    """The written chapters by part of the book."""
    found: dict[str, list[Entry]] = {}
    for entry in contents():
        if entry.slug:
            found.setdefault(entry.part, []).append(entry)
    return found


def table_of_contents() -> str:
    """_toc.yml, as Jupyter Book reads it."""
    chapters = {
        part: [f"notebooks/{entry.slug}" for entry in entries] for part, entries in parts().items()
    }
    toc = {
        "format": "jb-book",
        "root": "intro",
        "options": {"numbered": False},
        "parts": [
            {"caption": caption, "chapters": [{"file": name} for name in names]}
            for caption, names in [*chapters.items(), ("Back matter", list(BACK_MATTER))]
        ],
    }
    return yaml.safe_dump(toc, sort_keys=False)


def pages() -> list[str]:
    """Every page of the book in its order, as paths without an ending."""
    return [
        "intro",
        *(f"notebooks/{each.slug}" for some in parts().values() for each in some),
        *BACK_MATTER,
    ]


def index_entries(words: tuple[str, ...]) -> str:
    """Words as main entries of the index, which the book's search puts before all other finds; nothing is shown."""
    return f"```{{index}} {', '.join(f'! {word}' for word in words)}\n```"


def keywords(entry: Entry) -> str:
    """The line under a chapter's title: what the field calls its subject."""
    shown = f"```{{container}} keywords\n{' · '.join(entry.words)}\n```"
    return f"{index_entries(entry.words)}\n\n{shown}"


def records_of(entry: Entry) -> str:
    """A chapter's records in words; scripts/mentions.py makes links of them."""
    word = {0: "", 1: "record "}.get(len(entry.records), "records ")
    return word + ", ".join(map(str, entry.records))


def contents_page() -> str:
    """What the first page includes: the written chapters with their questions, then those that are planned."""
    lines = ["| | chapter | question | from |", "| --- | --- | --- | --- |"]
    for part, entries in parts().items():
        lines.append(f"| | **{part}** | | |")
        lines += [
            f"| {each.number} | [{each.title}](notebooks/{each.slug}.ipynb) | {each.question} | {records_of(each)} |"
            for each in entries
        ]
    gaps = [entry for entry in contents() if not entry.slug]
    lines += [
        "",
        "### Planned, and not written yet",
        "",
        index_entries(tuple(word for entry in gaps for word in entry.words)),
        "",
        "| | chapter | words | from |",
        "| --- | --- | --- | --- |",
        *(
            f'| <span id="{each.anchor}">{each.number}</span> | {each.title} | {", ".join(each.words)} | {records_of(each)} |'
            for each in gaps
        ),
    ]
    return "\n".join(lines) + "\n"


def readme_list() -> str:
    """The chapters for the README, a line for each part."""
    lines = []
    for part, entries in parts().items():
        links = (f"[{each.number} {each.title}](notebooks/{each.slug}.py)" for each in entries)
        lines.append(f"- **{part}**: {' · '.join(links)}")
    gaps = (f"{each.number} {each.title}" for each in contents() if not each.slug)
    return "\n".join([*lines, f"- Planned, and not written yet: {' · '.join(gaps)}"])


def with_list(text: str) -> str:
    """The README with today's list between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError("README.md has no list of contents", f"put {BEGIN} and {END} into it")
    return f"{before}{BEGIN}\n{readme_list()}\n{END}{after}"


def main() -> int:
    path = root() / "README.md"
    path.write_text(with_list(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{path.name}: {sum(map(len, parts().values()))} chapters")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
