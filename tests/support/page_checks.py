"""Checks of a written HTML page: tags, ids, links and headers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Check that tags are closed; collect ids and URLs."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.header_cells: list[str | None] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loads.append(str(value))
        if tag == "th":
            self.header_cells.append(dict(attributes).get("scope"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check_page(page: Path) -> Checker:
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert not [load for load in checker.loads if re.match(r"(?i)\s*(\w+:)?//|javascript:", load)]
    assert "url(http" not in text and "@import" not in text
    anchors = [load[1:] for load in checker.loads if load.startswith("#")]
    assert set(anchors) <= set(checker.ids)
    assert all(scope in ("col", "row") for scope in checker.header_cells)
    return checker
