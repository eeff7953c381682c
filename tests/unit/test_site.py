"""The documentation site builds from the repository, leads nowhere wrong, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import site_pages
from browser import browser
from house import ROOT

NO_TEXT = re.compile(r"^(?:[-*] |\d+\. |\||```)", re.MULTILINE)
QUIET = {"NO_MKDOCS_2_WARNING": "1"}


def built(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(site)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = built(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """Everything that a page loads, every link, every anchor, and the text of its paragraphs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.paragraphs: list[str] = []
        self.policy = ""
        self._in_paragraph = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attributes}
        if "id" in has:
            self.anchors.add(has["id"])
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        elif tag == "link" and has.get("rel") not in ("next", "prev"):
            self.loads.append(has["href"])
        elif "src" in has:
            self.loads.append(has["src"])
        if has.get("http-equiv") == "Content-Security-Policy":
            self.policy = has["content"]
        if tag == "p":
            self._in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_a_page_loads_nothing_from_elsewhere_and_forbids_it(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [load for load in page.loads if urlsplit(load).scheme not in ("", "data")], path
        assert page.policy.startswith("default-src 'self'"), path


def test_every_link_of_a_page_leads_to_a_file_of_the_site_and_an_anchor_in_it(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            assert goal.exists(), f"{path}: {link}"
            anchor = unquote(parts.fragment)
            assert not anchor or anchor == "__skip" or anchor in pages[goal].anchors, f"{path}: {link}"


def test_every_document_is_on_the_site_with_the_pages_that_it_links_to(site: Path) -> None:
    for document in (ROOT / "docs").glob("*.md"):
        assert (site / f"{document.stem}.html").is_file(), document
    for path in ("index", "CONTRIBUTING", "CHANGELOG", "benchmarks/real/RESULTS", "examples/real-model/index"):
        assert (site / f"{path}.html").is_file(), path


def test_lists_and_tables_are_not_left_as_text(pages: dict[Path, Page]) -> None:
    """Markdown on the site needs an empty line before a list, where that of the repository's readers does not."""
    for path, page in pages.items():
        assert not [text for text in page.paragraphs if NO_TEXT.search(text)], path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[away](nowhere.md)", "nowhere.md"),
        ("[away](other.md#nothing)", "nothing"),
        ("[away](/other.md)", "/other.md"),
    ],
)
def test_a_broken_link_ends_the_build(tmp_path: Path, text: str, complaint: str) -> None:
    before, _, after = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    before = before.replace("custom_dir: tools/", f"custom_dir: {ROOT}/tools/")
    before = before.replace("hooks: [tools/site_pages.py]", "")
    (tmp_path / "mkdocs.yml").write_text(before + "\nvalidation:\n" + after.partition("\nvalidation:\n")[2])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{text}\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    done = built(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert complaint in done.stderr


class Folder(SimpleHTTPRequestHandler):
    """Serves files without a line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_a_browser_shows_pages_and_finds_words_with_nothing_from_elsewhere(site: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Folder, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    with browser(tmp_path) as shown:
        shown.open(f"http://127.0.0.1:{server.server_address[1]}/job-keys.html?q=dropout")
        shown.until("document.querySelectorAll('.md-search-result__item').length > 1")
        assert shown.evaluate("getComputedStyle(document.querySelector('.md-header')).position") == "sticky"
        loaded = "performance.getEntriesByType('resource').map(one => one.name)"
        assert shown.evaluate(f"{loaded}.every(name => name.startsWith(location.origin))")
    server.shutdown()
    server.server_close()


def test_links_follow_files_to_their_places_on_the_site() -> None:
    def moved(text: str, source: str) -> str:
        return site_pages.rewritten(text, source)

    assert moved("[a](../README.md)", "docs/privacy.md") == "[a](index.md)"
    assert moved("[a](docs/privacy.md#the-promise)", "README.md") == "[a](privacy.md#the-promise)"
    assert moved("[a](../../docs/privacy.md)", "benchmarks/real/RESULTS.md") == "[a](../../privacy.md)"
    assert moved("[a](../examples/real-model)", "docs/quickstart.md") == "[a](examples/real-model/README.md)"
    assert moved("see [deploy/](../deploy)", "docs/operations.md") == "see deploy/"
    assert moved("[a](https://flower.ai) [b](#here)", "docs/x.md") == "[a](https://flower.ai) [b](#here)"
