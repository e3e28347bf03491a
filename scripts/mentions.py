"""A Sphinx extension: where a page mentions a chapter, a record or a person in plain text, the words become a link."""

import re
from collections.abc import Iterator

from docutils import nodes
from history_links import PERSON, in_a_line, people, records
from sphinx.transforms.post_transforms import SphinxPostTransform
from toc import contents

NEXT = r"(?:\s\([^()]{1,90}\))?(?:, and |, or |; |, | and | or | to |–)"
CHAPTER = re.compile(rf"\b[Cc]hapters?\s\d\d(?!\d)(?:{NEXT}\d\d(?![\d,.]\d|\d))*")
RECORD = re.compile(
    rf"\b[Rr]ecords?\s\d{{1,2}}(?![\d,.]?\d)(?:{NEXT}\d{{1,2}}(?![,.]?\d|\w|\s?%))*"
)
KEPT = (nodes.reference, nodes.literal, nodes.FixedTextElement, nodes.title, nodes.math, nodes.raw, nodes.comment)  # fmt: skip


def pieces(words: str, pattern: str) -> Iterator[tuple[int, int, int]]:
    """The numbers of a mention such as “records 5, 8 and 9”: where the words of each begin and end, and the number."""
    for place, found in enumerate(re.finditer(pattern, words)):
        yield (0 if place == 0 else found.start()), found.end(), int(found[0])


def mentions(text: str) -> list[tuple[int, int, str, int | str]]:
    """(begin, end, kind, which) of everything that a text mentions, in order; what a parenthesis counts is not a record."""
    found: list[tuple[int, int, str, int | str]] = []
    for kind, pattern in (("chapter", CHAPTER), ("record", RECORD)):
        for match in pattern.finditer(text):
            words = re.sub(r"\([^()]*\)", lambda hidden: "·" * len(hidden[0]), match[0])
            found += [
                (match.start() + begin, match.start() + end, kind, number)
                for begin, end, number in pieces(words, r"(?<!\d)\d{1,2}(?!\d)")
            ]
    found += [(each.start(), each.end(), "person", each[0]) for each in PERSON.finditer(text)]
    return sorted(found)


class LinkMentions(SphinxPostTransform):
    """Runs when a page is written, after all links of its own are resolved."""

    default_priority = 500
    formats = ("html",)

    def run(self, **kwargs) -> None:
        if self.env.docname == "bibliography":
            return
        for node in list(self.document.findall(nodes.Text)):
            parent, kept = node.parent, False
            while parent is not None and not kept:
                kept = isinstance(parent, KEPT) or "cell_output" in parent.get("classes", ())
                parent = parent.parent
            if not kept:
                self.link(node)

    def link(self, node: nodes.Text) -> None:
        """Put links for the mentions of one text in its place."""
        text, done, new = node.astext(), 0, []
        for begin, end, kind, which in mentions(text):
            address, title = self.target(kind, which)
            if address:
                new.append(nodes.Text(text[done:begin]))
                shown = nodes.reference("", text[begin:end], refuri=address, internal="://" not in address)  # fmt: skip
                if title:
                    shown["reftitle"] = title
                new.append(shown)
                done = end
        if new:
            node.parent.replace(node, [each for each in [*new, nodes.Text(text[done:])] if each.astext()])  # fmt: skip

    def target(self, kind: str, which: int | str) -> tuple[str, str]:
        """The address of what is mentioned, seen from this page, and what to say of it; "" where there is none, or it is this page."""
        if kind == "person":
            return people().get(str(which), ""), ""
        if kind == "record":
            known = int(which) in records()
            return (self.page("credits", f"#record-{which}"), in_a_line(int(which))) if known else ("", "")  # fmt: skip
        entry = next((each for each in contents() if int(each.number) == which), None)
        if entry is None or self.env.docname == f"notebooks/{entry.slug}":
            return "", ""
        if not entry.slug:
            return self.page("intro", f"#{entry.anchor}"), f"{entry.heading} (not written yet)"
        return self.page(f"notebooks/{entry.slug}", ""), entry.heading

    def page(self, name: str, anchor: str) -> str:
        if self.env.docname == name:
            return anchor
        return self.app.builder.get_relative_uri(self.env.docname, name) + anchor


def setup(app) -> dict:
    app.add_post_transform(LinkMentions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
