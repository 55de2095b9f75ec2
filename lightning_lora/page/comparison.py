"""The page of several trainings side by side: their table, a metric against each setting that differs, their curves."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lora.page.charts import Bar, Point, line_chart
from lightning_lora.page.document import Page
from lightning_lora.page.numbers import number, written

_MOST_LINES, _MOST_CATEGORIES, _MOST_TICKS = 6, 12, 8
_LOGARITHMIC = 4.0
"""Settings whose largest value is so many times the smallest are drawn on a logarithmic axis."""


_MEANINGS = {
    "rank": "how many directions the update of each layer has; more of them can change more",
    "alpha": "the update of each layer is multiplied by alpha / rank, with rsLoRA by alpha / sqrt(rank)",
    "lr": "the learning rate, how far a step of training goes; too small a one learns little, too large a one diverges",
    "dropout": "the share of an adapter's inputs that each step of training leaves out at random",
    "seed": "where random numbers begin; what runs differ by that differ in it alone is chance",
    "parameters": "how many numbers were trained; those of the base stay as they are",
    "seconds": "the time that training took; runs that were trained together have equal parts of theirs",
    "folder": "where the files of the run are, in the folder of this page",
    "validations": "how often the metrics were measured while it trained",
}
"""The last part of a column's name -> its meaning, for a reader who knows LoRA by name."""


@dataclass(frozen=True)
class Run:
    """One of the trainings that are compared."""

    name: str
    settings: Mapping[str, Any]
    """Those that differ between the trainings."""
    value: float | None
    """The metric that is compared; None where the training failed."""
    parameters: int | None = None
    """The number of trained parameters."""
    seconds: float | None = None
    curve: Sequence[Point] = field(default=())
    """The metric while the training went on, as (step, value)."""
    error: str | None = None


def comparison(
    title: str,
    lead: str,
    runs: Sequence[Run],
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    mode: str = "min",
    base: float | None = None,
) -> Page:
    """The page of `runs`.

    Args:
        title, lead: What was trained, and how the runs differ.
        runs: The trainings, the best first.
        rows: The rows of the table, as they are printed elsewhere; the first has all columns.
        metric: The name of the metric.
        mode: "min" or "max": which values of the metric are the best.
        base: The metric of the bare base, where it is known.
    """
    page = Page(title, lead)
    page.section("All runs")
    columns = list(rows[0]) if rows else []
    page.table(columns, [[written(row.get(c)) for c in columns] for row in rows], "The best first")
    better = "lower" if mode == "min" else "higher"
    meanings = {name: _MEANINGS[end] for name in columns if (end := name.rpartition(".")[2]) in _MEANINGS}
    meanings |= {metric: f"what the runs are compared by; {better} is better"}
    if base is not None:
        meanings |= {"bare base": "the model without an adapter, as it was before all of these"}
    page.paragraph("What the words mean:")
    page.items([f"{name}: {meaning}." for name, meaning in meanings.items()])
    found = [run for run in runs if run.value is not None and math.isfinite(run.value)]
    if failed := [run for run in runs if run not in found]:
        page.paragraph(f"{len(failed)} of {len(runs)} have no result:")
        page.items([f"{run.name}{_settings_of(run)}: {run.error or f'its {metric} is not finite'}" for run in failed])
    drawn = [run for run in found if _is_in_sight(run, found, mode, base)]
    if drawn:
        if len(drawn) > 1:
            page.section(f"What {metric} depends on")
        aside = [run.name for run in found if run not in drawn]
        left_out = f" Left out, since they are far worse: {', '.join(aside)}." if aside else ""
        chart = _Charts(page, drawn, metric, base, f"{better.capitalize()} is better.{left_out}")
        for setting in dict.fromkeys(name for run in drawn for name in run.settings):
            if not _is_seed(setting):
                chart.against(setting, [run.settings.get(setting) for run in drawn])
        chart.against("trained parameters", [run.parameters for run in drawn], is_cause=False)
        chart.against("seconds", [run.seconds for run in drawn], is_cause=False)
        _curves(page, drawn, metric)
    return page


def differing(settings: Collection[Mapping[str, Any]]) -> list[str]:
    """The names of those settings of several trainings that differ between them; one that is lacking counts as None."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if len({own.get(name) for own in settings}) > 1]


def _settings_of(run: Run) -> str:
    said = ", ".join(f"{name}={written(value)}" for name, value in run.settings.items() if value is not None)
    return f" ({said})" if said else ""


def _is_seed(setting: str) -> bool:
    """True for a setting that only repeats a training: its values are the spread, no axis."""
    return setting.rpartition(".")[2] == "seed"


def _is_in_sight(run: Run, found: Sequence[Run], mode: str, base: float | None) -> bool:
    """False for a run so much worse than the others that they would lie on one line beside it: worse than the bare
    base where that is known, else ten times as far from the best as the median."""
    values = [one.value for one in found if one.value is not None]
    sign = 1 if mode == "min" else -1
    best = min(sign * v for v in values)
    reach = 10 * (statistics.median(sign * v for v in values) - best)
    if base is not None and sign * base > best:
        reach = 1.2 * (sign * base - best)
    assert run.value is not None
    return reach == 0 or sign * run.value <= best + reach


class _Charts:
    """Figures of the metric of `runs` against one thing each."""

    def __init__(self, page: Page, runs: Sequence[Run], metric: str, base: float | None, caption: str) -> None:
        self._page, self._runs, self._metric, self._base = page, runs, metric, base
        self._values = [run.value for run in runs if run.value is not None]
        said = "" if base is None or self._is_near(base) else f" The bare base has {written(base)}."
        self._caption = caption + said

    def _is_near(self, base: float) -> bool:
        """False where a line for the bare base would leave the runs no room."""
        low, high = min(self._values), max(self._values)
        return low - 2 * (high - low) <= base <= high + 2 * (high - low)

    def against(self, name: str, values: Sequence[Any], *, is_cause: bool = True) -> None:
        """Draw the metric against `values`, one for each run. With `is_cause` they are those of a setting: lines join
        runs that differ in it alone."""
        if len(set(values)) < 2:
            return
        places, ticks = _places(values)
        title = f"{self._metric} against {name}"
        if len(places) > _MOST_CATEGORIES and ticks is not None:
            self._page.paragraph(f"{title} is not drawn, since it has {len(places)} values: see the table.")
            return
        is_log = ticks is None and min(places.values()) > 0
        is_log = is_log and max(places.values()) >= _LOGARITHMIC * min(places.values())
        lines: dict[str, dict[float, list[float]]] = {}
        for run, value in sorted(zip(self._runs, values, strict=True), key=lambda pair: _order(pair[0], name)):
            others = ", ".join(_short(n, v) for n, v in _others(run, name)) if is_cause else ""
            if value in places and run.value is not None:
                lines.setdefault(others or self._metric, {}).setdefault(places[value], []).append(run.value)
        is_joined = is_cause and len(lines) <= _MOST_LINES and any(len(own) > 1 for own in lines.values())
        if not is_joined:
            lines = {"each run": _together(lines.values())}
        if not any(len(own) > 1 for own in lines.values()):
            return
        series = {n: [(x, statistics.fmean(own[x])) for x in sorted(own)] for n, own in lines.items()}
        bars: dict[str, list[Bar]] = {
            n: [(x, min(own[x]), max(own[x])) for x in sorted(own) if len(own[x]) > 1] for n, own in lines.items()
        }
        if not is_joined:
            series, bars = {n: [(x, v) for x in sorted(own) for v in own[x]] for n, own in lines.items()}, {}
        places_of = [x for own in lines.values() for x in own]
        if self._base is not None and self._is_near(self._base):
            series["bare base"] = [(min(places_of), self._base), (max(places_of), self._base)]
        chart = line_chart(
            series, title=title, x=f"{name}{', logarithmic' if is_log else ''}", y=self._metric, log_x=is_log,
            dashed=["bare base"], ticks_x=ticks or _ticks(places_of, is_log), bars=bars,
            joined=is_joined and ticks is None,
        )  # fmt: skip
        several = " Points are means of several runs, bars reach from the smallest to the largest of them."
        caption = self._caption + (several if any(bars.values()) else "")
        names = {x: written(v) for v, x in places.items()}
        rows = [
            [line, names[x], *map(written, (statistics.fmean(own[x]), min(own[x]), max(own[x]))), str(len(own[x]))]
            for line, own in lines.items()
            for x in sorted(own)
        ]
        columns = ["runs", name, f"{self._metric}, mean", "smallest", "largest", "number"]
        self._page.figure(title, chart, caption, columns=columns, rows=rows)


def _others(run: Run, setting: str) -> list[tuple[str, Any]]:
    return [(n, v) for n, v in run.settings.items() if n != setting and not _is_seed(n)]


def _order(run: Run, setting: str) -> list[tuple[bool, float, str]]:
    """By the settings but for `setting`: numbers by size, texts after them."""
    others = [value for _, value in _others(run, setting)]
    return [(False, v, "") if isinstance(v, (int, float)) else (True, 0.0, str(v)) for v in others]


def _short(setting: str, value: Any) -> str:
    return f"{setting.rpartition('.')[2]} {value}"  # in full: rounded values could share a line


def _together(lines: Any) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for x, values in itertools.chain.from_iterable(own.items() for own in lines):
        found.setdefault(x, []).extend(values)
    return found


def _places(values: Sequence[Any]) -> tuple[dict[Hashable, float], dict[float, str] | None]:
    """Value -> its place on the axis, and the text at each place where the values are no numbers."""
    known = [v for v in dict.fromkeys(values) if v is not None]
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in known):
        return {v: float(v) for v in known}, None
    texts = sorted(written(v) for v in known)
    places: dict[Hashable, float] = {v: float(texts.index(written(v))) for v in known}
    return places, {float(i): text if len(text) <= 16 else f"{text[:15]}\u2026" for i, text in enumerate(texts)}


def _ticks(places: Sequence[float], is_log: bool) -> dict[float, str] | None:
    """The values themselves, where they are few and do not touch; None: round numbers."""
    values = sorted(set(places))
    at = [math.log(v) if is_log else v for v in values]
    if len(values) > _MOST_TICKS or any(b - a < 0.08 * (at[-1] - at[0]) for a, b in itertools.pairwise(at)):
        return None
    return {v: number(v) for v in values}


def _curves(page: Page, runs: Sequence[Run], metric: str) -> None:
    curves = {run.name: run.curve for run in runs if len(run.curve) > 1}
    if not curves:
        return
    page.section("While they trained")
    shown = dict(itertools.islice(curves.items(), _MOST_LINES))
    title = f"{metric} while they trained"
    chart = line_chart(shown, title=title, x="optimizer step", y=metric)
    caption = f"Of {len(curves)} runs the best {len(shown)}." if len(shown) < len(curves) else "Each run."
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    steps = steps[:: math.ceil(len(steps) / 200)]
    known = {name: dict(curve) for name, curve in curves.items()}
    rows = [[number(s, 6), *(written(own.get(s)) for own in known.values())] for s in steps]
    page.figure(title, chart, caption, columns=["step", *curves], rows=rows)
