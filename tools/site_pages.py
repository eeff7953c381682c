"""Makes the documentation site out of the repository; mkdocs calls it as a hook while `make docs` builds.

The site has the pages of docs/, the README as its home, and every file of the repository that one of its pages links
to: Markdown becomes a page, everything else is copied as it is. A link to a folder leads to its README, or becomes the
folder's name. So the same documents and links serve readers of the repository and of the site.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
NAMES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""The pages from outside docs/ that are in the navigation: path in the repository -> path on the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")
DRAWING = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)
NO_DRAWING = "Readers of the repository see a drawing of the imports here; the table below it has the same arrows.\n"


def site_path(path: str) -> str:
    """Returns where a file of the repository is on the site."""
    return NAMES.get(path, path.removeprefix(DOCS))


def repository_path(page: str) -> str:
    """Returns the path in the repository of a page of the site."""
    beside = {name: path for path, name in NAMES.items()}
    return beside.get(page) or (page if (ROOT / page).is_file() else DOCS + page)


def target(source: str, link: str) -> str:
    """Returns the path that a relative link in the file `source` leads to, a folder's README in its place."""
    path = os.path.normpath(PurePosixPath(source).parent / link)
    readme = f"{path}/README.md"
    return readme if (ROOT / readme).is_file() else path


def linked(source: str) -> Iterator[str]:
    """Yields the paths of the files that a Markdown file of the repository links to."""
    for _, _, link, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
        path = target(source, link)
        if link and not path.startswith("..") and (ROOT / path).is_file():
            yield path


def further_files() -> list[str]:
    """Returns the paths of all files of the site that are not in docs/."""
    waiting = [*NAMES, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / DOCS).glob("*.md")))]
    found = dict.fromkeys(waiting)
    while waiting:
        for path in linked(waiting.pop()):
            if path not in found:
                found[path] = None
                if path.endswith(".md"):
                    waiting.append(path)
    return sorted(path for path in found if not path.startswith(DOCS))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files from outside docs/ to the site."""
    for path in further_files():
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def rewritten(markdown: str, source: str) -> str:
    """Returns a page's Markdown with its links as they are on the site.

    Args:
        source: path of the page's file in the repository.
    """

    def place(found: re.Match[str]) -> str:
        mark, text, link, anchor = found.groups(default="")
        if not link:
            return found.group()
        path = target(source, link)
        if (ROOT / path).is_dir():
            return text
        relative = os.path.relpath(site_path(path), PurePosixPath(site_path(source)).parent)
        return f"{mark}[{text}]({relative}{anchor})"

    return DRAWING.sub(NO_DRAWING, LINK.sub(place, markdown))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapts the links of a page to the places of files on the site."""
    del config, files
    return rewritten(markdown, repository_path(page.file.src_uri))
