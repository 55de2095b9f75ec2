"""A page as one HTML file without network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from lightning_lora.errors import CheckpointError
from lightning_lora.files import written_beside


class Page:
    """A page that is written from top to bottom: sections, paragraphs, tables and figures.

    All texts are plain: they are escaped. Charts come from `line_chart` and `heat_map`.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._sections: list[str] = []
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>', ""]
        self._contents = len(self._parts) - 1

    def section(self, heading: str) -> None:
        self._sections.append(heading)
        self._parts.append(f'<h2 id="s{len(self._sections)}">{escape(heading)}</h2>')

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        self._parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        """A table that scrolls where it is large; columns of numbers are set to the right. Without `columns` it has no
        head."""
        self._parts.append(_table(columns, rows, caption))

    def figure(
        self, title: str, chart: str, caption: str, *, columns: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()
    ) -> None:
        """A chart between its title and what it means, and, where `columns` are given, its numbers to unfold."""
        unfold = ""
        if columns:
            table = _table(columns, rows, f"The numbers of: {title}")
            unfold = f"<details><summary>The numbers</summary>{table}</details>"
        label = escape(title, quote=True)
        chart = (
            f'<h3>{escape(title)}</h3><div class="chart" tabindex="0" role="group" aria-label="{label}">{chart}</div>'
        )
        self._parts.append(f"<figure>{chart}<figcaption>{escape(caption)}</figcaption>{unfold}</figure>")

    def html(self) -> str:
        """The whole page. It refers to nothing outside of itself, and forbids the browser to fetch anything."""
        links = [f'<li><a href="#s{i}">{escape(name)}</a></li>' for i, name in enumerate(self._sections, 1)]
        contents = f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>' if len(links) > 1 else ""
        body = [*self._parts[: self._contents], contents, *self._parts[self._contents + 1 :]]
        return _HTML.format(title=escape(self.title), style=_STYLE, body="\n".join(part for part in body if part))

    def write(self, path: Path) -> Path:
        """Write the page to the file `path`, whole or not at all; returns it.

        Raises CheckpointError if it cannot be written; a file that was there is as it was.
        """
        try:
            with written_beside(path) as beside:
                beside.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"The page could not be written to {path}: {error.strerror or error}.") from error
        return path


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    wide = len(columns or next(iter(rows), ()))
    right = [bool(columns and rows) and all(_is_number(row[i]) for row in rows) for i in range(wide)]
    style = [' class="number"' if is_number else "" for is_number in right]
    head = "".join(f'<th scope="col"{own}>{escape(name)}</th>' for name, own in zip(columns, style))
    head = f"<thead><tr>{head}</tr></thead>" if columns else ""
    body = "".join(
        "<tr>" + "".join(f"<td{own}>{escape(text)}</td>" for text, own in zip(row, style)) + "</tr>" for row in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{escape(caption)}'
        f"</caption>{head}<tbody>{body}</tbody></table></div>"
    )


def _is_number(text: str) -> bool:
    return text in ("", "-", "NaN", "infinite") or text.lstrip("-")[:1].isdigit()


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = (
    """
:root { --paper: #fdfdfb; --ink: #1d2126; --soft: #5a626c; --rule: #d9dce0; --heat: #1f5d8f; --on-heat: #ffffff;
  --on-mid: #1d2126; --c0: #1f6fb0; --c1: #c2491d; --c2: #2b7d4f; --c3: #7a4fa3; --c4: #9a6a00; --c5: #b0306a;
  --c6: #1c7f86; --c7: #5d5d5d }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e7e9ec; --soft: #a3abb5; --rule: #353b43; --heat: #7cc0f2; --on-heat: #0d1013;
    --on-mid: #0d1013; --c0: #6db3ee; --c1: #f08a5d; --c2: #6ecb93; --c3: #bd97e6; --c4: #e0b341; --c5: #f07fae;
    --c6: #57c7ce; --c7: #b5b5b5 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--rule) }
p, li, figcaption { max-width: 44rem } .lead { font-size: 1.1rem; color: var(--soft); margin-top: 0 }
li { overflow-wrap: anywhere }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: 1rem 0; list-style: none }
a { color: var(--c0) }
:focus-visible { outline: 3px solid var(--c1); outline-offset: 2px }
h3 { font-size: 1rem; margin: 0 0 .5rem } figure { margin: 1.2rem 0 2.2rem }
figcaption { color: var(--soft); font-size: .95rem; margin-top: .5rem }
.chart { overflow-x: auto }
svg { display: block; width: 100%; min-width: 34rem; height: auto; font: 11px system-ui, sans-serif }
svg text { fill: var(--ink) } svg .tick, svg .label { fill: var(--soft) } svg .key { font-size: 12px }
.grid { stroke: var(--rule); stroke-width: 1 } .axis { stroke: var(--soft); stroke-width: 1 }
.line polyline, .reference polyline { fill: none; stroke-width: 1.8 }
.reference polyline { stroke: var(--soft); stroke-dasharray: 5 4 }
.heat { fill: var(--heat) } .cold { fill: var(--c1) } .none { fill: none; stroke: var(--rule); stroke-width: .7 }
svg .on-low, svg .on-mid, svg .on-high { font-size: 9.5px; text-anchor: middle }
svg .on-mid { fill: var(--on-mid) } svg .on-high { fill: var(--on-heat) }
.scroll { overflow: auto; max-height: 28rem; margin: 1rem 0; border: 1px solid var(--rule); border-radius: 4px }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100% }
caption { text-align: left; padding: .5rem .7rem; color: var(--soft) }
th, td { text-align: left; padding: .28rem .7rem; border-top: 1px solid var(--rule); white-space: nowrap }
th { position: sticky; top: 0; background: var(--paper) } .number { text-align: right }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-top: .5rem; width: fit-content }
"""
    + "".join(f".c{i} polyline {{ stroke: var(--c{i}) }} .c{i} {{ fill: var(--c{i}) }}\n" for i in range(8))
    + """
@media print {
  :root { --paper: #ffffff; --ink: #000000; --soft: #333333; --rule: #bbbbbb; --heat: #1f5d8f; --on-heat: #ffffff;
    --on-mid: #000000 }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  main { max-width: none; padding: 0 } svg { min-width: 0; max-width: 15cm }
  nav, summary { display: none } body { font-size: 11px }
  figure, tr { break-inside: avoid } h2 { break-after: avoid } .scroll { max-height: none; overflow: visible }
  th { position: static } table { font-size: 7px } th, td { padding: .1rem .25rem; white-space: normal }
}
"""
)
