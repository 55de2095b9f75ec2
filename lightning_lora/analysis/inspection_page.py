"""The page of an inspection: figures, each with what it means and what it does not mean."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.analysis.inspected import Column, InspectedLayer, Inspection, short_names, spread
from lightning_lora.hub.address import local_path
from lightning_lora.page import Cell, Page, Point, heat_map, line_chart, number

_MOST_LINES = 8


@dataclass(frozen=True)
class InspectionReport(Inspection):
    """An inspection, and its page."""

    def write_page(self, path: str | os.PathLike[str], *, curves: Mapping[str, Sequence[Point]] | None = None) -> Path:
        """Write the report as one HTML file that needs no network.

        Args:
            path: The file; one that is there is replaced.
            curves: Metrics of the run that trained the adapter, each as points (step, value), to be shown as well.

        Returns:
            The path of the file.

        Raises:
            CheckpointError: The file cannot be written; one that was there is as it was.
        """
        return page_of(self, curves or {}).write(local_path(path))


def page_of(report: Inspection, curves: Mapping[str, Sequence[Point]]) -> Page:
    """The page of `report`, with the metrics of its run as `curves`."""
    compared = "" if report.other is None else f", beside {report.other}"
    page = Page(f"Adapter {report.adapter}", f"What it changes in its base, layer by layer{compared}.")
    _summary(page, report)
    page.section("How large the updates are")
    _sizes(page, report)
    page.section("How many directions are used")
    _ranks(page, report)
    if report.base is not None:
        page.section("Beside the base")
        _beside_base(page, report)
    if report.other is not None:
        page.section(f"Beside {report.other}")
        _beside_other(page, report)
    if curves:
        page.section("The training run")
        _curves(page, curves)
    page.section("All numbers")
    _numbers(page, report)
    return page


def _summary(page: Page, report: Inspection) -> None:
    layers = list(report.layers.values())
    ranks = sorted({layer.rank for layer in layers})
    page.paragraph(
        "A LoRA adapter leaves the base model as it is and adds an update dW = s B A to some of its weight matrices W. "
        "An update of rank r is a sum of r directions: each reads one pattern from the layer's input and writes one "
        "pattern to its output, with a strength of its own (a singular value of dW)."
    )
    facts = [
        ("adapter", report.adapter),
        ("compared with", report.other),
        ("base", None if report.base is None else f"{report.base}, {report.dtype}"),
        ("adapted layers", f"{len(layers)}, of {len(report.kinds)} kind{'' if len(report.kinds) == 1 else 's'}"),
        ("rank, the most directions", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
        ("directions that are used", spread([layer.effective_rank for layer in layers])),
        ("size beside the weight", spread([layer.relative_norm for layer in layers]) if report.base else None),
    ]
    shown = [[name, value] for name, value in facts if value is not None]
    page.table([], shown, "In short; of what differs by layer, the median (smallest to largest)")
    page.section("What is odd")
    page.items(report.odd or ["Nothing odd was found: every update is there, finite, and not zero."])
    if report.notes:
        page.paragraph("Not looked into:")
        page.items(report.notes)


def _sizes(page: Page, report: Inspection) -> None:
    if report.base is not None:
        _map(
            page,
            report,
            ("|dW| / |W|", lambda layer: layer.relative_norm),
            "Size of the update beside its weight",
            "The Frobenius norm of the update over that of the weight: 0.01 means that the numbers of the weight move "
            "by about one hundredth. Large says that much was changed, not that it was changed well. In short "
            "trainings of two small language models it was 0.002 to 0.1.",
            low=0,
        )
        return
    _map(
        page,
        report,
        ("|dW|", lambda layer: layer.norm),
        "Size of the update",
        "The Frobenius norm of the update. Layers of different shapes have different norms even if they are changed "
        "alike: give model= to see each update beside its own weight.",
        low=0,
    )


def _ranks(page: Page, report: Inspection) -> None:
    _map(
        page,
        report,
        ("effective rank", lambda layer: layer.effective_rank),
        "Directions that the update uses",
        "The effective rank: r where all r directions are equally strong, 1 where one direction is all there is. A "
        "small number does not say that the rank was chosen too high: the weak directions may still matter. What a "
        "smaller rank costs shows only when the adapter is cut to it and the loss measured.",
        low=1,
    )
    kinds = _kinds(report)
    falls: dict[str, list[Point]] = {}
    for name, own in kinds.items():
        count = max(len(layer.singular_values) for layer in own)
        shares = [
            [s / layer.singular_values[0] for s in layer.singular_values if s > 1e-9 * layer.singular_values[0]]
            for layer in own
            if layer.norm
        ]
        at = [[one[i] for one in shares if len(one) > i] for i in range(count)]
        falls[name] = [(i + 1.0, statistics.median(values)) for i, values in enumerate(at) if values]
    if all(len(points) < 2 for points in falls.values()):
        return  # of rank 1
    _lines(
        page,
        falls,
        "How fast the strengths fall",
        "direction, the strongest first",
        "strength, of the first",
        "Each line is the median over the layers of one kind. A line that stays high uses its directions evenly; one "
        "that falls fast puts nearly all of the update into the first few.",
        log_y=True,
    )


def _beside_base(page: Page, report: Inspection) -> None:
    _map(
        page,
        report,
        ("amplification", lambda layer: layer.amplification),
        "Amplification",
        "How much stronger the update is than the base along the update's own directions, |dW| / |U'WV| (arXiv:"
        "2106.09685, section 7.3). A large factor says that the adapter turns up patterns that the base has, but "
        "hardly uses; 1 says that it changes them as strongly as the base already uses them.",
        low=0,
    )
    _map(
        page,
        report,
        ("alignment", lambda layer: layer.alignment),
        "Alignment with the base",
        "How much stronger the base is along the update's directions than along random ones. 1 is chance; above it, "
        "the adapter works on patterns that the base knows.",
        low=0,
    )
    if any(layer.base is not None and layer.base.intruders is not None for layer in report.layers.values()):
        _map(
            page,
            report,
            ("intruders", lambda layer: None if layer.base is None else layer.base.intruders),
            "Intruder dimensions",
            "How many of the ten strongest directions of W + dW resemble no direction of W (a cosine below 0.5 with "
            "every one; arXiv:2410.21228). That paper found that models with many of them forget more of what the base "
            "knew. It is a hint, not a measure of forgetting: that shows on other tasks only.",
            low=0,
            high=10,
        )
    if any(layer.base is not None and layer.base.kept < 0.999 for layer in report.layers.values()):
        _map(
            page,
            report,
            ("kept", lambda layer: None if layer.base is None else layer.base.kept),
            "What survives merging",
            f"The share of the update that is left when it is added to the weight and rounded to {report.dtype}. 1 is "
            "all of it. Used unmerged, the adapter loses nothing of this kind.",
            low=0,
            high=1,
        )


def _beside_other(page: Page, report: Inspection) -> None:
    _map(
        page,
        report,
        ("cosine", lambda layer: None if layer.other is None else layer.other.cosine),
        "Cosine of the two updates",
        "1: both change the layer in the same way. 0: what they do has nothing in common. -1: one undoes the other. "
        "Two trainings on the same data can differ here and still do the same: many updates have one effect.",
        low=-1,
        high=1,
    )
    sides: tuple[tuple[str, Callable[[InspectedLayer], tuple[float, ...]], int], ...] = (
        ("read", lambda layer: layer.other.inputs if layer.other else (), 1),
        ("write", lambda layer: layer.other.outputs if layer.other else (), 0),
    )
    for verb, of, side in sides:
        lines: dict[str, list[Point]] = {}
        chance: list[Point] = []
        kinds = {n: [layer for layer in own if layer.other is not None] for n, own in _kinds(report).items()}
        for name, own in kinds.items():
            count = max((len(of(layer)) for layer in own), default=0)
            at = [[of(layer)[i] for layer in own if len(of(layer)) > i] for i in range(count)]
            lines[name] = [(i + 1.0, statistics.median(values)) for i, values in enumerate(at)]
        compared = [layer for own in kinds.values() for layer in own]
        if compared:
            wide = statistics.median(layer.shape[side] for layer in compared)
            most = max(len(of(layer)) for layer in compared)
            chance = [(float(i), min(1.0, i / wide)) for i in range(1, most + 1)]
        _lines(
            page,
            {**lines, "chance": chance},
            f"Shared directions: what both {verb}",
            "the first i directions of each",
            "phi, 0 to 1",
            f"phi(i, i) of arXiv:2106.09685, section 7.2: how much of the first i directions that one update {verb}s "
            "lies in the first i of the other. 1 is the same subspace, the dashed line is chance. The paper found that "
            "adapters of different rank or seed share their first directions and hardly the others.",
            between=(0.0, 1.0),
        )


_MONITORED = {
    "Directions that were used": ("effective_rank", "stable_rank"),
    "Size of the updates beside the weights": ("relative_norm",),
    "Where the energy of the updates lay": ("energy_top_quarter", "energy_last_quarter"),
    "Who got the gradient": ("gradient_share_A", "gradient_share_B"),
    "Updates that were zero": ("is_zero",),
}
"""The metrics that AdapterMonitor logs over all layers, by the figure that they share."""


def _curves(page: Page, curves: Mapping[str, Sequence[Point]]) -> None:
    losses = {name: curve for name, curve in curves.items() if "loss" in name}
    others = {name: curve for name, curve in curves.items() if name.startswith("val_") and name not in losses}
    said = "As the run logged it."
    if losses:
        _lines(page, losses, "Loss", "optimizer step", "loss", f"{said} A loss of single batches jumps.")
    for name, curve in others.items():
        _lines(page, {name: curve}, name, "optimizer step", name, said)
    for title, names in _MONITORED.items():
        own = {name: curves[f"lora/{name}"] for name in names if f"lora/{name}" in curves}
        if own:
            caption = "Logged by AdapterMonitor, over all layers, while the run went on."
            _lines(page, own, title, "optimizer step", "number" if "zero" in title else "value", caption)


def _numbers(page: Page, report: Inspection) -> None:
    page.paragraph(
        "Stable rank counts strong directions only. Top and last quarter are the shares of the update's energy "
        "(|dW| squared) in the strongest and the weakest quarter of its directions."
    )
    columns = ["layer", "rank", *(name for name, _ in report.columns)]
    rows = [
        [name, str(layer.rank), *(_text(of(layer)) for _, of in report.columns)]
        for name, layer in report.layers.items()
    ]
    page.table(columns, rows, "Every layer")


# Figures of one number of each layer, and of lines for each kind of layer.


def _kinds(report: Inspection) -> dict[str, list[InspectedLayer]]:
    names = short_names(list(report.kinds))
    return {names[kind]: [report.layers[name] for name in own.values()] for kind, own in report.kinds.items()}


def _map(
    page: Page,
    report: Inspection,
    column: Column,
    title: str,
    caption: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    kinds = report.kinds
    names = short_names(list(kinds))
    places = sorted({at for own in kinds.values() for at in own}, key=lambda at: -1 if at is None else at)
    values: list[list[Cell]] = [
        [column[1](report.layers[own[at]]) if at in own else None for at in places] for own in kinds.values()
    ]
    rows, columns = [names[kind] for kind in kinds], ["" if at is None else str(at) for at in places]
    x = "layer" if any(columns) else ""
    chart = heat_map(values, rows=rows, columns=columns, title=title, x=x, low=low, high=high)
    texts = [[name, *map(_text, row)] for name, row in zip(rows, values)]
    page.figure(title, chart, caption, columns=["", *columns], rows=texts)


def _lines(
    page: Page,
    lines: Mapping[str, Sequence[Point]],
    title: str,
    x: str,
    y: str,
    caption: str,
    log_y: bool = False,
    between: tuple[float, float] | None = None,
) -> None:
    shown = {name: points for name, points in lines.items() if points}
    solid = [name for name in shown if name != "chance"]
    left = solid[_MOST_LINES:]
    shown = {name: points for name, points in shown.items() if name not in left}
    chart = line_chart(shown, title=title, x=x, y=y, log_y=log_y, dashed=["chance"], between=between)
    more = f" Of {len(solid)} kinds of layers the first {_MOST_LINES} are drawn; the table has all." if left else ""
    steps = sorted({step for points in lines.values() for step, _ in points})
    kept = steps[:: max(1, math.ceil(len(steps) / 200))]
    known = {name: dict(points) for name, points in lines.items() if points}
    rows = [[number(step, 6), *(_text(own.get(step)) for own in known.values())] for step in kept]
    page.figure(title, chart, caption + more, columns=[x, *known], rows=rows)


def _text(value: float | None) -> str:
    return "-" if value is None else number(value)
