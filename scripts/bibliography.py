"""book/references.bib for readers without Sphinx: a key as author and year, with the address of the work."""

import functools
import re

from pybtex.database import Entry, parse_file

from speedrun.lab.errors import UserError, visible
from speedrun.lab.provenance import root

ADDRESSES = {"doi": "https://doi.org/", "url": "", "eprint": "https://arxiv.org/abs/"}


@functools.cache
def bibliography() -> dict[str, Entry]:
    """The entries of book/references.bib by their key, their address in `url` or `eprint`."""
    entries = dict(parse_file(str(root() / "book" / "references.bib")).entries)
    for entry in entries.values():
        where = entry.fields.get("howpublished", "")
        if where.startswith(("http", "arXiv:")):
            del entry.fields["howpublished"]
            field = "url" if where.startswith("http") else "eprint"
            entry.fields[field] = where.removeprefix("arXiv:")
    return entries


def surname(person) -> str:
    """The part of a name that a citation shows, LaTeX's accents as letters."""
    return " ".join(map(str, [*person.rich_prelast_names, *person.rich_last_names]))


def author_year(key: str) -> tuple[str, str]:
    """How a text cites an entry (Jordan et al., 2024), and its address, "" where it has none."""
    if key not in bibliography():
        what = f"a chapter cites “{visible(key)}”, and book/references.bib has no such entry"
        raise UserError(what, "look for a misspelt key, or add the entry")
    entry = bibliography()[key]
    names = [surname(person) for person in entry.persons["author"]]
    short = len(names) < 3 and "others" not in names
    people = " and ".join(names) if short else f"{names[0]} et al."
    field = next((field for field in ADDRESSES if field in entry.fields), None)
    address = ADDRESSES[field] + entry.fields[field] if field else ""
    return f"{people}, {entry.fields['year']}", address


CITE = re.compile(r"\{cite\}`([^`]+)`")
SHOWN = re.compile(r'\((\[[^\[\]]*\]\(\S+ "cite [^"]+"\)(; )?)+\)')


def keys_of(found: re.Match) -> list[str]:
    """The entries that one {cite} names."""
    return [key.strip() for key in found[1].split(",")]


def show_citations(text: str) -> str:
    """MyST's {cite} roles as links, for where there is no bibliography; hide_citations turns them back. Unknown keys stay as they are."""

    def links(found: re.Match) -> str:
        if not set(keys_of(found)) <= set(bibliography()):
            return found[0]
        shown = [(key, *author_year(key)) for key in keys_of(found)]
        each = [
            f'[{label}]({at or "../book/references.bib"} "cite {key}")' for key, label, at in shown
        ]
        return f"({'; '.join(each)})"

    return CITE.sub(links, text)


def hide_citations(text: str) -> str:
    """What show_citations made of a text, as it was."""
    return SHOWN.sub(
        lambda found: "{cite}`" + ",".join(re.findall('"cite ([^"]+)"', found[0])) + "`", text
    )
