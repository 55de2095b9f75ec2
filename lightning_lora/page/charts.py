"""Charts as SVG, drawn here, without a script: lines over an axis, and heat maps.

They are drawn in pixels of a screen, and the browser fits them to the width of the page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

from lightning_lora.page.numbers import number

Point = tuple[float, float]
Cell = float | None
Bar = tuple[float, float, float]
"""(x, the lower end, the upper end)."""

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
    ticks_x: Mapping[float, str] | None = None,
    bars: Mapping[str, Sequence[Bar]] | None = None,
    joined: bool = True,
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
        ticks_x: What is written below the axis x, by its place; by default round numbers.
        bars: Upright bars beside the points of a line, by its name: a spread.
        joined: Draw lines through the points; without it, the points alone.

    Returns:
        SVG for `Page.figure`. A chart without a point says so.
    """
    drawn = {name: [p for p in points if _is_drawn(p, log_x, log_y)] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return _svg(title, "There is nothing to draw.", 40, '<text x="12" y="24" class="label">nothing to draw</text>')
    across = _Axis([p[0] for points in drawn.values() for p in points], _LEFT, _WIDTH - _RIGHT, log_x, True)
    ends = [end for own in (bars or {}).values() for _, *pair in own for end in pair]
    up = _Axis(between or [*(p[1] for points in drawn.values() for p in points), *ends], _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = []
    for value, text in _texts(up.ticks()).items():
        at = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in (ticks_x or _texts(across.ticks())).items():
        at = across.place(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - 39}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{_HEIGHT - 25}" text-anchor="middle">{escape(text)}</text>')
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
        marks = "" if (joined and len(placed) > 40) or place is None else "".join(_mark(place, *p) for p in placed)
        is_line = joined or place is None
        lines = [placed] if is_line else []
        lines += [[(across.place(px), up.place(end)) for end in ends] for px, *ends in (bars or {}).get(name, ())]
        paths = (" ".join(f"{px:.1f},{py:.1f}" for px, py in points) for points in lines)
        drawing = "".join(f'<polyline points="{path}"/>' for path in paths)
        parts.append(f'<g class="{style}">{drawing}{marks}</g>')
        wide = 34 + 6.6 * len(name)
        if at_x + wide > _WIDTH and at_x > _LEFT:
            row, at_x = row + 1, float(_LEFT)
        y_at = _HEIGHT + 16 + 20 * row
        mark = "" if place is None else _mark(place, at_x + 11, y_at)
        line = f'<polyline points="{at_x:.0f},{y_at} {at_x + 22:.0f},{y_at}"/>' if is_line else ""
        legend.append(f'<g class="{style}">{line}{mark}</g>')
        legend.append(f'<text class="key" x="{at_x + 28:.0f}" y="{y_at + 4}">{escape(name)}</text>')
        at_x += wide + 12
    said = "; ".join(f"{n}: from {number(p[0][1])} to {number(p[-1][1])}" for n, p in drawn.items())
    description = f"{'Line' if joined else 'Point'} chart of {y} over {x}. {said}."
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


def _texts(ticks: Sequence[float]) -> dict[float, str]:
    """What is written at each tick: as many digits as tell them apart."""
    for digits in range(3, 13):
        texts = {value: number(value, digits) for value in ticks}
        if len({*texts.values()}) == len(texts):
            break
    return texts


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
