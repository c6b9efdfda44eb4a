"""Fail if a built page would fetch anything from the network: python docs/check_offline.py docs/_build/html

Links that a reader may follow are fine. Scripts, styles, fonts, images and frames must lie beside the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

REMOTE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
CSS_FETCH = re.compile(r"(?:@import\s+|url\()\s*[\"']?\s*((?:https?:)?//[^\s\"')]+)", re.IGNORECASE)
NOT_FETCHED = {"canonical", "author", "license", "next", "prev", "index", "search", "help"}


class Fetches(HTMLParser):
    """Collects what a browser would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        fetched = [attributes.get("src", ""), attributes.get("poster", ""), *attributes.get("srcset", "").split(",")]
        if tag == "link" and attributes.get("rel", "") not in NOT_FETCHED:
            fetched.append(attributes.get("href", ""))
        if tag == "object":
            fetched.append(attributes.get("data", ""))
        self.found += [address.strip() for address in fetched if REMOTE.match(address)]
        self.found += CSS_FETCH.findall(attributes.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += CSS_FETCH.findall(data)


def remote_fetches(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every page or style sheet under ``folder`` with an address that it would fetch from the network."""
    for page in sorted(folder.rglob("*.html")):
        parser = Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        yield from ((page, address) for address in parser.found)
    for sheet in sorted(folder.rglob("*.css")):
        yield from ((sheet, address) for address in CSS_FETCH.findall(sheet.read_text(encoding="utf-8")))


def main(folder: str) -> int:
    """Print what would be fetched; the number of pages says that there was something to check."""
    pages = len(list(Path(folder).rglob("*.html")))
    found = list(remote_fetches(Path(folder)))
    for page, address in found:
        print(f"{page}: fetches {address}")
    print(f"{pages} pages, {len(found)} of their addresses would be fetched from the network")
    return 1 if found or pages == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
