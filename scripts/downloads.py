"""Chapters as notebooks for any Jupyter: _build/downloads/*.ipynb. The book's download button gives these.

Each begins with a cell that installs the package where it is missing. Its text is plain Markdown, for Colab and VS Code know no MyST.
"""

import functools
import inspect
import json
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from bibliography import CITE, author_year, bibliography, keys_of
from execute import Chapter, chapters
from folds import fold
from install_cell import install
from myst_parser.config.main import MdParserConfig
from myst_parser.mdit_to_docutils.base import DocutilsRenderer
from myst_parser.parsers.mdit import create_md_parser
from nbformat.v4 import new_code_cell, new_markdown_cell
from pybtex.backends.markdown import Backend
from pybtex.style.formatting.unsrt import Style
from repository import page_of, repository

from speedrun.lab.errors import UserError, run_main, visible
from speedrun.lab.provenance import root

FOLDER = "annotated-speedrun"
BOXES = {"admonition", "attention", "caution", "danger", "error", "hint", "important", "note", "seealso", "tip", "warning"}  # fmt: skip
# what every Jupyter shows: CommonMark, tables and formulas, under markdown-it's names of tokens
PLAIN = {"amsmath", "blockquote", "bullet_list", "code_block", "code_inline", "em", "fence", "hardbreak", "heading", "hr", "image", "inline", "link", "list_item", "math_block", "math_inline", "ordered_list", "paragraph", "softbreak", "strong", "table", "tbody", "td", "text", "th", "thead", "tr"}  # fmt: skip


@functools.cache
def parser():
    """The book's own parser of MyST, with the extensions that book/_config.yml turns on."""
    extensions = {"amsmath", "colon_fence", "deflist", "dollarmath", "substitution"}
    return create_md_parser(MdParserConfig(enable_extensions=extensions), DocutilsRenderer)


def boxes_as_quotes(text: str) -> str:
    """Admonitions, one inside another too, as quotations under a bold title."""
    lines = text.split("\n")
    for token in reversed(parser().parse(text)):
        found = re.fullmatch(r"\{([\w-]+)\}\s*(.*)", token.info.strip())
        if token.map and not token.level and found and found[1] in BOXES:
            title = found[2] or found[1].capitalize()
            body = re.sub(r"\A(:[\w-]+:.*\n)*\n*", "", token.content).rstrip()
            shown = f"**{title}**\n\n{boxes_as_quotes(body)}".rstrip()
            quoted = [f"> {line}".rstrip() for line in shown.split("\n")]
            begin, end = token.map
            before = [""] if begin and lines[begin - 1] else []  # apart from its neighbours
            after = [""] if lines[end : end + 1] not in ([], [""]) else []
            lines[begin:end] = [*before, *quoted, *after]
    return "\n".join(lines)


def cited(key: str) -> str:
    """How a text cites an entry, with a link where it has an address."""
    label, address = author_year(key)
    return f"[{label}]({address})" if address else label


LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(?:#[^)\s]*)?\)")


def link_out(found: re.Match, address: str) -> str:
    """A link from chapter to chapter, or to the book's pages, as one to the repository; only its text where no address is known."""
    path = posixpath.normpath(posixpath.join("notebooks", found[2]))
    path = re.sub(r"^(notebooks/\d\d_\w+)\.ipynb$", r"\1.py", path)
    page = page_of(path, address)
    return f"[{found[1]}]({page})" if page else found[1]


def plain(text: str, address: str, where: str = "a chapter") -> str:
    """A Markdown cell for any Jupyter: boxes as quotations, citations as author and year, links that lead out of the notebook."""
    lines = boxes_as_quotes(text).split("\n")
    for token in reversed(parser().parse("\n".join(lines))):
        if token.type == "inline":  # and never what stands in a block of code
            prose = "\n".join(lines[slice(*token.map)])
            prose = CITE.sub(lambda found: f"({'; '.join(map(cited, keys_of(found)))})", prose)  # fmt: skip
            lines[slice(*token.map)] = [LINK.sub(lambda found: link_out(found, address), prose)]
    done = "\n".join(lines)
    for token in (each for block in parser().parse(done) for each in [block, *(block.children or [])]):  # fmt: skip
        kind = re.sub("_(open|close)$", "", token.type)
        target = str(token.attrs.get("href") or token.attrs.get("src") or "https:")
        if kind not in PLAIN or token.info.startswith("{"):
            raise unknown(where, token.info.strip() or f"{kind} {token.content}")
        if not target.startswith(("https:", "http:", "mailto:")):
            raise unknown(where, target)
    return done


def unknown(where: str, what: str) -> UserError:
    """The refusal of a form that would stand raw, or lead nowhere, in a notebook outside the book."""
    fix = "write it another way, or teach plain() in scripts/downloads.py this form"
    return UserError(f"{where}: a download cannot show “{visible(what)}”", fix)


def references(sources: list[str]) -> list[nbformat.NotebookNode]:
    """A last cell with the entries that these texts cite, in full; no cell where none is cited."""
    keys = sorted({key for text in sources for found in CITE.finditer(text) for key in keys_of(found)})  # fmt: skip
    shown = Style().format_entries([bibliography()[key] for key in keys])
    entries = [f"- {' '.join(each.text.render(Backend()).split())}" for each in shown]
    cell = new_markdown_cell("## References\n\n" + "\n".join(entries), id="references")
    return [cell] if keys else []


def install_cell(address: str) -> nbformat.NotebookNode:
    """The first cell of every download."""
    lines = [
        f"REPOSITORY = {json.dumps(address)}  # the address of the book's repository, as git clone takes it",
        f'FOLDER = "{FOLDER}"  # where a clone of it is put; one that is there is used',
    ]
    source = "\n".join([*lines, "\n", inspect.getsource(install), "\ninstall(REPOSITORY, FOLDER)"])
    return new_code_cell(source, id="install", metadata={"tags": ["install"]})


def without_paths(cell: nbformat.NotebookNode) -> None:
    """Take the folder of the building machine out of a cell's outputs."""
    if cell.cell_type == "code":
        text = json.dumps(cell.outputs).replace(json.dumps(str(root()))[1:-1], "…")
        cell.outputs = [nbformat.from_dict(output) for output in json.loads(text)]


def portable(notebook: nbformat.NotebookNode, address: str, where: str) -> nbformat.NotebookNode:
    """An executed chapter for any Jupyter, outputs and all."""
    cells = []
    for cell in notebook.cells:
        cell = nbformat.from_dict(cell)
        kept = {key: cell.metadata[key] for key in ("tags", "mystnb") if key in cell.metadata}
        cell.metadata = nbformat.from_dict(kept)
        fold(cell, colab=True)
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, address, where)
        without_paths(cell)
        cells.append(cell)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    new = nbformat.v4.new_notebook(
        cells=[install_cell(address), *cells, *references(texts)], metadata=metadata
    )
    nbformat.validate(new)
    return new


def write_downloads(folder: Path, chosen: list[Chapter]) -> None:
    """Write executed chapters into a folder, each under its own name."""
    address = repository()
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in chosen:
        if not chapter.output.exists():
            raise UserError(f"{chapter.name} was never executed", "make book executes all chapters")
        executed = nbformat.read(chapter.output, as_version=4)
        nbformat.write(portable(executed, address, chapter.name), folder / f"{chapter.name}.ipynb")


def main() -> int:
    folder = root() / "_build" / "downloads"
    write_downloads(folder, chapters(sys.argv[1:]))
    print(f"the chapters for any Jupyter: {folder.relative_to(root())}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
