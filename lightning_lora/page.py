"""Pages that tell what was found: one HTML file without network, with headings, tables, line charts and heat maps.

    page = Page("A sweep", "Which rank and learning rate did best.")
    page.section("Loss")
    chart = line_chart({"rank 4": [(1, 2.0), (2, 1.5)]}, title="Validation loss", x="step", y="loss")
    page.figure("Validation loss", chart, "Lower is better.")
    page.table(["rank", "loss"], [["4", "1.5"]], "The end of each run.")
    path.write_text(page.html(), encoding="utf-8")

Charts are SVG inside of the page, drawn here, without a script. The colours follow the reader's light or dark setting,
a keyboard reaches all that scrolls or opens, and each chart has a text that says what it shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float]
Cell = float | None

# Charts. They are drawn in pixels of a screen, and the browser fits them to the width of the page.

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 44
_ids = itertools.count(1)


def line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    dashed: Sequence[str] = (),
    between: tuple[float, float] | None = None,
) -> str:
    """Lines over one another, each with its name below the chart, as SVG.

    Args:
        series: The points (x, y) of each line, by its name. Points that are not finite are left out, and those that
            are not above zero where an axis is logarithmic.
        title: What the chart shows; screen readers say it.
        x, y: What the axes are, with their units.
        log_x, log_y: Draw this axis logarithmically.
        between: The ends of the axis y; by default those of the points.
        dashed: Names of lines to compare with (a bound, chance), which are drawn dashed and grey.

    Returns:
        SVG for `Page.figure`. A chart without a point says so.
    """
    drawn = {name: [p for p in points if _is_drawn(p, log_x, log_y)] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return _svg(title, "There is nothing to draw.", 40, '<text x="12" y="24" class="label">nothing to draw</text>')
    across = _Axis([p[0] for points in drawn.values() for p in points], _LEFT, _WIDTH - _RIGHT, log_x, True)
    up = _Axis(between or [p[1] for points in drawn.values() for p in points], _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = []
    for value in up.ticks():
        at = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in across.ticks():
        at = across.place(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - 39}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - 25}" text-anchor="middle">{number(value)}</text>')
    floor = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">')
    parts.append(f"{escape(x)}</text>")
    middle = (_TOP + floor) / 2
    parts.append(f'<text class="label" transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y)}</text>")
    solid = [name for name in drawn if name not in dashed]
    legend, row, at_x = [], 0, float(_LEFT)
    for name, points in drawn.items():
        place = solid.index(name) if name in solid else None
        style = "reference" if place is None else f"line c{place % 8}"
        placed = [(across.place(px), up.place(py)) for px, py in points]
        marks = "" if len(placed) > 40 or place is None else "".join(_mark(place, *p) for p in placed)
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
        parts.append(f'<g class="{style}"><polyline points="{path}"/>{marks}</g>')
        wide = 34 + 6.6 * len(name)
        if at_x + wide > _WIDTH and at_x > _LEFT:
            row, at_x = row + 1, float(_LEFT)
        y_at = _HEIGHT + 16 + 20 * row
        mark = "" if place is None else _mark(place, at_x + 11, y_at)
        line = f'<polyline points="{at_x:.0f},{y_at} {at_x + 22:.0f},{y_at}"/>'
        legend.append(f'<g class="{style}">{line}{mark}</g>')
        legend.append(f'<text class="key" x="{at_x + 28:.0f}" y="{y_at + 4}">{escape(name)}</text>')
        at_x += wide + 12
    said = "; ".join(f"{n}: from {number(p[0][1])} to {number(p[-1][1])}" for n, p in drawn.items())
    description = f"Line chart of {y} over {x}. {said}."
    return _svg(title, description, _HEIGHT + 30 + 20 * row, "".join([*parts, *legend]))


def heat_map(
    values: Sequence[Sequence[Cell]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    x: str,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """A grid of numbers as a grid of shades, the strongest for the largest, as SVG. Where `low` is below zero, negative
    numbers have a colour of their own, and the shade is that of their size.

    Args:
        values: Rows of numbers; None where there is none.
        rows, columns: The names beside and above the grid.
        title: What the numbers are; screen readers say it.
        x: What the columns are.
        low, high: The numbers of the weakest and the strongest shade; by default the smallest and largest there are.

    Returns:
        SVG for `Page.figure`. Numbers are written into the cells where there is room.
    """
    found = [v for row in values for v in row if v is not None and math.isfinite(v)]
    low = min(found, default=0.0) if low is None else low
    high = max(found, default=1.0) if high is None else high
    left = 24 + 6.6 * max((len(name) for name in rows), default=0)
    side = max(5.0, min(52.0, (_WIDTH - left - 8) / max(1, len(columns))))
    tall = max(16.0, min(24.0, side))
    every = max(1, math.ceil(24 / side))  # so that the names of columns do not touch
    has_room = side >= 3 + 6.0 * max((len(number(v, digits=2)) for v in found), default=0)  # in all cells, or in none
    parts = [
        f'<text class="tick" x="{left + side * (i + 0.5):.1f}" y="32" text-anchor="middle">{escape(name)}</text>'
        for i, name in enumerate(columns)
        if i % every == 0
    ]
    parts.append(f'<text class="label" x="{left:.0f}" y="14">{escape(x)}</text>')
    for j, (name, row) in enumerate(zip(rows, values)):
        top = 40 + tall * j
        parts.append(f'<text class="tick" x="{left - 8:.0f}" y="{top + tall / 2 + 4:.1f}" text-anchor="end">')
        parts.append(f"{escape(name)}</text>")
        for i, value in enumerate(row):
            box = left + side * i, top, side, tall
            parts.append(_cell(value, f"{name}, {x} {columns[i]}", box, low, high, has_room))
    height = 40 + tall * len(rows)
    parts.append(_scale(left, height + 14, low, high))
    said = f"from {number(min(found))} to {number(max(found))}" if found else "empty"
    description = f"Heat map of {len(rows)} rows and {len(columns)} columns ({x}), {said}. The table has the numbers."
    return _svg(title, description, height + 36, "".join(parts))


def _cell(
    value: Cell, where: str, place: tuple[float, float, float, float], low: float, high: float, has_room: bool
) -> str:
    x, y, side, tall = place
    box = f'x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}" height="{tall - 1:.1f}"'
    if value is None or not math.isfinite(value):
        said = "none" if value is None else number(value)
        return f'<rect class="none" {box}><title>{escape(where)}: {said}</title></rect>'
    least, size, most = (0.0, abs(value), max(-low, high)) if low < 0 else (low, value, high)
    share = min(1.0, max(0.0, (size - least) / (most - least))) if most > least else 0.5
    cell = f'<rect class="{"cold" if value < 0 else "heat"}" {box} fill-opacity="{0.06 + 0.94 * share:.2f}">'
    cell += f"<title>{escape(where)}: {number(value)}</title></rect>"
    if has_room:
        style = "on-low" if share < 0.5 else "on-mid" if share < 0.75 else "on-high"
        at = f'x="{x + side / 2 - 0.5:.1f}" y="{y + tall / 2 + 3:.1f}"'
        cell += f'<text class="{style}" {at}>{number(value, digits=2)}</text>'
    return cell


def _scale(x: float, y: float, low: float, high: float) -> str:
    boxes = []
    for i in range(11):
        value = low + (high - low) * i / 10
        share = abs(value) / max(-low, high) if low < 0 else i / 10
        colour = "cold" if value < 0 else "heat"
        box = f'x="{x + 12 * i:.0f}" y="{y:.0f}" width="12" height="10" fill-opacity="{0.06 + 0.94 * share:.2f}"'
        boxes.append(f'<rect class="{colour}" {box}/>')
    text = f'<text class="tick" x="{x + 140:.0f}" y="{y + 9:.0f}">{number(low)} to {number(high)}</text>'
    return "".join(boxes) + text


def _svg(title: str, description: str, height: float, content: str) -> str:
    at = next(_ids)
    names = f'<title id="t{at}">{escape(title)}</title><desc id="d{at}">{escape(description)}</desc>'
    head = f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-labelledby="t{at} d{at}">'
    return f"{head}{names}{content}</svg>"


def _mark(place: int, x: float, y: float) -> str:
    """A shape for each line, so that lines are told apart without their colours."""
    if place % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    if place % 4 == 1:
        return f'<rect x="{x - 2.8:.1f}" y="{y - 2.8:.1f}" width="5.6" height="5.6"/>'
    corners = ((0, -3.8), (3.6, 2.8), (-3.6, 2.8)) if place % 4 == 2 else ((0, -4), (4, 0), (0, 4), (-4, 0))
    return f'<polygon points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def _is_drawn(point: Point, log_x: bool, log_y: bool) -> bool:
    x, y = point
    return math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0) and not (log_y and y <= 0)


class _Axis:
    """Maps numbers to places between `start` and `end`; whole numbers that are `is_counted` get no ticks between."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, is_log: bool, is_counted: bool = False
    ) -> None:
        self.start, self.end, self.is_log = start, end, is_log
        is_whole = is_counted and max(values) - min(values) >= 1 and all(v == round(v) for v in values)
        self.least_step = 1.0 if is_whole else 0.0
        low, high = min(map(self._of, values)), max(map(self._of, values))
        if low == high:
            low, high = (low - 0.5, high + 0.5) if is_log or low == 0 else sorted((0.9 * low, 1.1 * low))
        room = 0.04 * (high - low)
        self.low, self.high = low - room, high + room

    def _of(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def place(self, value: float) -> float:
        return self.start + (self._of(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, about five."""
        if self.is_log and self.high - self.low > 1:
            decades = max(1, round((self.high - self.low) / 5))
            return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1, decades)]
        low, high = (10.0**self.low, 10.0**self.high) if self.is_log else (self.low, self.high)
        rough = (high - low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
        step = max(step, self.least_step)
        first = math.ceil(low / step - 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, digits: int = 3) -> str:
    """`value` for a reader: so many significant digits, without an exponent where it is short."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{places}f}" if abs(value) >= 10000 else f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# The page.


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
