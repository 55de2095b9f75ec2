"""Reads a page strictly, and keeps what tests ask for."""

from __future__ import annotations

from html.parser import HTMLParser


class Strict(HTMLParser):
    """Raises for a tag that is closed in another order than it was opened, and keeps what the tests ask for."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[list[str]]] = []
        """The cells of each table, row by row, its head first."""
        self.points: list[tuple[float, float]] = []
        """Where round marks are drawn, in the order of the page."""
        self._is_cell = False
        self.reachable = 0
        self.scrolling = 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert not {"src", "srcset", "onclick", "data"} & set(given), tag
        assert tag not in ("script", "link", "iframe", "object", "img")
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        if tag == "svg":
            assert given["role"] == "img"
            self.named += given["aria-labelledby"].split()
        if given.get("class") == "scroll":
            self.scrolling += 1
            self.reachable += given["tabindex"] == "0" and bool(given["aria-label"])
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._is_cell = True
        elif tag == "circle":
            self.points.append((float(given["cx"]), float(given["cy"])))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._is_cell = self._is_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._is_cell:
            self.tables[-1][-1][-1] += data
