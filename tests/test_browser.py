"""The built book in headless Chromium (make check): pages, figures, formulas, search, downloads, and no request that leaves the machine."""

import functools
import http.server
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import urlencode

import execute
import pytest
from mentions import mentions
from toc import contents, pages

from speedrun.lab.provenance import root

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
SITE, SCREENS = root() / "_build" / "site", root() / "_build" / "screens"
PAGES = pages()
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


FIRST = {  # what somebody types → the page that must be found first
    "RoPE": "06_rotary",
    "softcap": "08_logits",
    "FlexAttention": "09_flex_attention",
    "FP8": next(row.slug for row in contents() if row.number == "15")
    or "intro",  # or planned, which the contents say
    "8xH100": "20_many_gpus",
    "out of memory": "troubleshooting",
    "NaN": "troubleshooting",
    "learning rate": "14_schedule",
    "batch size": "14_schedule",
    "how long": "24_speedrun",
}
CLIPPED = """() => [...document.querySelectorAll("article mjx-container")].filter(formula => {
    const edge = document.querySelector("article").getBoundingClientRect().right + 1;
    for (let box = formula; box.tagName !== "ARTICLE"; box = box.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
    return formula.getBoundingClientRect().right > edge;
}).map(formula => formula.textContent)"""
PLAIN_TEXT = """() => {
    const skipped = "a, code, pre, h1, h2, h3, h4, .admonition-title, .math, .cell_output, .sd-summary-title, script, .tocsection";
    const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
    const found = [];
    while (walk.nextNode())
        if (!walk.currentNode.parentElement.closest(skipped)) found.push(walk.currentNode.data);
    return found;
}"""  # the texts of a page that are not links, code or titles


def own_slug(kind: str, which: int | str) -> str:
    """The name of the chapter that is mentioned; a page does not link to itself."""
    slugs = [each.slug for each in contents() if kind == "chapter" and int(each.number) == which]
    return slugs[0] if slugs and slugs[0] else "no page"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the built book, served on this machine."""
    assert (SITE / "index.html").exists(), "there is no built book: make book"
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def photograph(page, name: str) -> None:
    """Keep what a page looks like, for whoever wants to look: SCREENS=1. Drawing a whole page takes longer than reading it."""
    if os.environ.get("SCREENS"):
        SCREENS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENS / name, full_page=True)


@pytest.fixture(scope="module")
def contexts(browser):
    """One visitor for each width, who has the book's scripts and fonts from the second page on."""
    made = {
        name: browser.new_context(viewport={"width": size[0], "height": size[1]})
        for name, size in WIDTHS.items()
    }
    yield made
    for context in made.values():
        context.close()


@pytest.fixture
def visit(contexts, site):
    """Open a page at a width; afterwards nothing may have failed, complained or gone elsewhere."""
    complaints, opened = [], []

    def watch(request) -> None:
        if not request.url.startswith((site, "file:", "data:", "blob:")):
            complaints.append(f"left the machine: {request.url}")

    def note_failure(request) -> None:
        if "ERR_ABORTED" not in (request.failure or ""):  # given up when a page is left: no fault
            complaints.append(f"failed: {request.url}: {request.failure}")

    def open_page(name: str, width: str = "desktop", address: str = site):
        page = contexts[width].new_page()
        opened.append(page)
        page.on("request", watch)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", note_failure)
        page.goto(f"{address}/{name}.html", wait_until="load")
        return page

    yield open_page
    for page in opened:
        page.close()
    assert not complaints


@functools.cache
def anchors(path: Path) -> set[str]:
    """What links into a page may name."""
    return set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))


def check_links(page, site: str) -> None:
    """Links inside the book lead to pages, and to places in them, that there are."""
    links = page.eval_on_selector_all("a[href]", "nodes => nodes.map(node => node.href)")
    for link in {link for link in links if link.startswith(site)}:
        target, _, anchor = link.removeprefix(site + "/").partition("#")
        path = SITE / (target or "index.html")
        assert path.exists(), link
        assert not anchor or path.suffix != ".html" or anchor in anchors(path), link


def check_mentions(page, name: str) -> None:
    """What a text says of chapters and records is a link."""
    left = [
        text[begin:end]
        for text in page.evaluate(PLAIN_TEXT)
        for begin, end, kind, which in mentions(text)
        if kind != "person" and not name.endswith(own_slug(kind, which))
    ]
    assert not left, name


@pytest.mark.parametrize("name", PAGES)
class TestPages:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_it_is_whole_at_two_widths(self, visit, name, width, site):
        page = visit(name, width)
        assert page.locator("article h1, main h1").first.inner_text().strip()
        for image in page.locator("article img").all():
            image.scroll_into_view_if_needed()
            assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
            assert image.get_attribute("alt"), "a figure without a description"
        if page.locator("article .math").count():
            page.wait_for_selector("mjx-container")
            assert page.locator("mjx-merror").count() == 0
        clipped = page.evaluate(CLIPPED)
        assert not clipped, "formulas that reach beyond what shows them, and do not scroll"
        for table in page.locator("article table").all():
            assert "table" in (table.get_attribute("class") or "").split()
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 1, f"the page is {overflow} pixels wider than the screen"
        photograph(page, f"{name.replace('/', '-')}.{width}.png")
        if width == "desktop":  # the same at every width
            check_links(page, site)
            check_mentions(page, name)
            if name.startswith("notebooks/"):
                self.check_outputs_figures_and_download(page, name)

    def check_outputs_figures_and_download(self, page, name):
        """What a chapter has and other pages have not."""
        page.evaluate("scrollTo(0, 0)")
        assert page.locator("article .cell_output").count() >= 5
        source = (root() / f"{name}.py").read_text(encoding="utf-8")
        drawn = source.count('mystnb={"image"')
        assert drawn or int(name.split("/")[1][:2]) >= 90, "the workshop may do without figures"
        assert page.locator("article .cell_output img").count() >= drawn
        assert page.locator(".admonition", has_text="Cost box").count() == 1
        assert page.locator("article h1").first.inner_text().startswith(f"{Path(name).name[:2]} · ")
        assert page.locator(".provenance", has_text="page executed").count() == 1
        assert page.locator(".keywords").inner_text().strip()
        (entry,) = (each for each in contents() if name.endswith(each.slug or "/"))
        assert page.locator(".keywords").bounding_box()["y"] < WIDTHS["desktop"][1], entry.words
        solutions = source.count('"solution"')
        assert page.locator("details.hide summary", has_text="Solution").count() >= solutions
        hidden = page.locator("details.hide summary")
        assert hidden.count() >= 1
        before = page.locator("details.hide[open]").count()
        hidden.first.click()
        assert page.locator("details.hide[open]").count() == before + 1
        link = page.locator("a.btn-download-source-button").first.get_attribute("href")
        notebook = json.loads((SITE / "notebooks" / link).resolve().read_text(encoding="utf-8"))
        assert any(cell.get("outputs") for cell in notebook["cells"]), "the executed notebook"
        assert link.endswith(f"{Path(name).name}.ipynb")
        first, *rest = ("".join(cell["source"]) for cell in notebook["cells"])
        assert first.startswith("REPOSITORY = ") and rest[0].startswith("# ")
        prose = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
        assert not any("{bdg-" in text or "```{" in text for text in prose), "plain Markdown"
        assert str(root()) not in json.dumps(notebook), "the machine that built it"


class TestTheBook:
    def test_navigation_leads_through_it(self, visit):
        page = visit("intro")
        for name in PAGES[1:]:
            page.locator("a.right-next").first.click()
            page.wait_for_url(f"**/{name}.html", wait_until="domcontentloaded")

    def test_search_finds_a_word_of_a_chapter(self, visit):
        page = visit("search")
        page.goto(page.url + "?q=lifeline")
        page.wait_for_selector("#search-results li a")
        found = page.eval_on_selector_all("#search-results li a", "nodes => nodes.map(n => n.href)")
        assert any("92_a_run_that_survives" in link for link in found)

    @pytest.mark.parametrize("query", FIRST)
    def test_the_fields_word_leads_to_its_chapter_first(self, visit, query):
        page = visit("search")
        page.goto(f"{page.url}?{urlencode({'q': query})}")
        page.wait_for_selector("#search-results .search-summary:not(:empty)")
        first = page.locator("#search-results li a").first.get_attribute("href") or ""
        name, _, anchor = first.split("?")[0].partition("#")
        assert name.removesuffix(".html").split("/")[-1] == FIRST[query]
        if anchor:
            assert f'id="{anchor}"' in (SITE / name).read_text(encoding="utf-8")

    def test_dark_mode_is_dark_and_stays(self, visit):
        page = visit("notebooks/00_start_here")

        def mode() -> str:
            return page.evaluate("document.documentElement.dataset.theme")

        button = page.locator("button.theme-switch-button:visible").first
        for _ in range(3):
            if mode() == "dark":
                break
            button.click()
        assert mode() == "dark"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
        page.reload()
        assert mode() == "dark"
        photograph(page, "dark.png")
        page.evaluate("localStorage.clear()")  # the next page's visitor has chosen nothing

    def test_it_opens_from_the_disk(self, visit):
        page = visit("notebooks/01_are_you_faster", address=SITE.as_uri())
        page.wait_for_selector("mjx-container")
        assert page.locator("article .cell_output img").count() >= 1

    def test_the_status_page_names_every_chapter_and_measurement(self, visit):
        text = visit("status").locator("article").inner_text()
        assert all(chapter.name in text for chapter in execute.chapters())
        for path in (root() / "book" / "results").rglob("*.json"):
            assert f"{path.parent.name}/{path.stem}" in text

    def test_no_page_names_the_machine_that_built_it(self):
        for path in SITE.rglob("*.html"):
            assert str(root()) not in path.read_text(encoding="utf-8"), path
        assert not list(SITE.rglob(str(Path("_sources") / "*.py")))


@pytest.fixture(scope="module")
def report(embedded, tmp_path_factory) -> str:
    """The address of a short run's report."""
    from speedrun.config import vary
    from speedrun.presets import preset
    from speedrun.report import write_report
    from speedrun.train import train

    folder = tmp_path_factory.mktemp("report") / "run"
    short = {"steps": 4, "val_every": 2, "val_tokens": 4096, "data.path": str(embedded)}
    train(vary(preset("smoke"), short), folder, echo=lambda line: None)
    return write_report(folder).as_uri()


class TestReport:
    def test_a_runs_html_opens_without_a_network(self, visit, browser, tmp_path):
        import nbformat
        from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

        from speedrun.report import write_html

        cells = [new_markdown_cell("# A run\n\n$x^2$"), new_code_cell("1 + 1")]
        nbformat.write(new_notebook(cells=cells), tmp_path / "speedrun.ipynb")
        write_html(tmp_path / "speedrun.ipynb")
        page = visit("speedrun", address=tmp_path.as_uri())
        assert "A run" in page.locator("body").inner_text()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [420, 1280])
    def test_the_report_fits_and_shows_the_figures_of_its_scheme(
        self, browser, scheme, width, report
    ):
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page.goto(report)
        wide = page.evaluate("document.documentElement.scrollWidth")
        shown = page.evaluate("[...document.images].map(i => [i.currentSrc, i.naturalWidth])")
        page.locator("summary").click()
        text, background = page.locator("body").inner_text(), page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")  # fmt: skip
        page.close()
        assert wide <= width and all(size > 500 for _, size in shown)
        assert (
            "bits a byte" in text and "optim.adam.lr" in text and background == (scheme == "dark")
        )
        other = {source for source, _ in shown}
        assert len(other) == 2
