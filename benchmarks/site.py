"""What MkDocs asks while it builds the site (`make site`): hooks, so that the pages can stay plain Markdown.

The pages are read on GitHub, too, so what only a site can do is done here: pages that the navigation does not name get
a place in it, links to files beside `docs` become words, pictures are set into the page so that they take its colours,
and the package is laid out as it is imported, for the API to be read from its source.
"""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks")  # whose warnings --strict counts
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("passes", "kernels", "export")  # beside kvpass/ in the repository, inside it when imported
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*pictures/[^"]+\.svg)"\s*/?>')


def on_startup(**_: Any) -> None:
    """Lay out the package, before anything looks for it."""
    _tree(ROOT / "build" / "tree")


def on_config(config: Any) -> Any:
    """Give every page a place in the navigation."""
    named = set(_pages(config.nav))
    others = sorted(p.name for p in DOCS.glob("*.md") if p.name not in named)
    next(part["Measured"] for part in config.nav if "Measured" in part).extend(others)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository that are no pages: the words alone."""
    folder = posixpath.dirname(page.file.src_uri)

    def words(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if ":" in match[2] or not target.startswith(".."):
            return match[0]  # which MkDocs checks
        if not (DOCS / target).exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, match[2])
        return match[1]

    return LINK.sub(words, markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Set the pictures in, without the colours that they have when they stand alone."""
    folder = posixpath.dirname(page.file.src_uri)

    def drawn(match: re.Match[str]) -> str:
        text = (DOCS / posixpath.normpath(posixpath.join(folder, match[2]))).read_text(encoding="utf-8")
        return re.sub(r"<style>.*?</style>\n?", "", text, flags=re.S)

    return IMAGE.sub(drawn, html)


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(part)]


def _tree(folder: Path) -> None:
    package = folder / "kvpass"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in [*(ROOT / "kvpass").iterdir(), *(ROOT / name for name in FOLDERS)]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
