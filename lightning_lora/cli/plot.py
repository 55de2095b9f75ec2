"""Plots of training, drawn by matplotlib directly into a file, without a window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[int, float]]
"""(step, value) in the order of the steps."""

TRAIN, VALIDATION, REFERENCE = "#4878a8", "#d1603d", "#6b6b6b"
PALETTE = (VALIDATION, TRAIN, "#5a9e6f", "#8d6cab")


def plot_training(curves: Mapping[str, Curve], path: Path, *, title: str, monitor: str, mode: str) -> bool:
    """Draw the training loss, and the validation metrics each on its own scale, to the PNG file `path`.

    `curves` are those of metrics.csv. The best value of `monitor` is marked. Returns whether there was
    anything to draw.
    """
    losses = {name: curves[name] for name in ("train_loss", "val_loss") if curves.get(name)}
    metric = monitor if monitor != "val_loss" else _second_metric(curves)
    panels: list[Mapping[str, Curve]] = [losses] if losses else []
    if metric and curves.get(metric) and metric not in losses:
        panels.append({metric: curves[metric]})
    if not panels:
        return False

    figure, axes = _figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        for name, curve in panel.items():
            if name == "train_loss":
                _draw_noisy(axis, curve)
            else:
                axis.plot(*zip(*curve, strict=True), color=VALIDATION, marker="o", markersize=4, label=_words(name))
            if name == monitor:
                _mark_best(axis, curve, mode)
        axis.set_ylabel("loss" if panel is losses else _words(metric or ""))
        _finish(axis)
    _save(figure, path, title)
    return True


def plot_comparison(
    curves: Mapping[str, Curve], reference: tuple[str, float], path: Path, *, title: str, y: str
) -> None:
    """Draw several methods' curves of one metric against the horizontal line (name, value) of the `reference`."""
    figure, (axis,) = _figure(1)
    name, value = reference
    axis.axhline(value, color=REFERENCE, linestyle="--", label=f"{name}: {value:.2f}")
    for colour, (label, curve) in zip(PALETTE, curves.items(), strict=False):
        axis.plot(
            *zip(*curve, strict=True), color=colour, marker="o", markersize=4, label=f"{label}: {curve[-1][1]:.2f}"
        )
    axis.set_ylabel(y)
    _finish(axis)
    _save(figure, path, title)


def plot_advice(
    trained: Sequence[tuple[str, float, int, Sequence[float]]],
    ranks: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    base: float,
    path: Path,
    *,
    metric: str,
    mode: str,
) -> None:
    """Draw a metric against the learning rate, one line for each adapter and length of training, and against the rank.

    `trained` holds (adapter, learning rate, steps, values over seeds); `ranks` a curve of (rank, values over seeds) for
    each way to come to a rank. Bars span the seeds. The axis ends at the bare base's `base`: what is worse is left out.
    """
    figure, (left, right) = _figure(2)
    lines: dict[tuple[str, int], list[tuple[float, Sequence[float]]]] = {}
    for name, rate, steps, values in trained:
        lines.setdefault((name, steps), []).append((rate, values))
    most = max(steps for _, steps in lines)
    for i, ((name, steps), points) in enumerate(lines.items()):
        _draw_seeds(left, points, f"{name}, {steps} steps", PALETTE[i % 4], alpha=1 if steps == most else 0.5)
    for colour, (name, curve) in zip(PALETTE, ranks.items(), strict=False):
        _draw_seeds(right, curve, name, colour, linestyle="" if name.startswith("trained") else "-")
    values = [v for points in (*lines.values(), *ranks.values()) for _, values in points for v in values]
    best = (min if mode == "min" else max)([base, *filter(math.isfinite, values)])
    margin = 0.1 * abs(best - base) or 1.0
    for axis, x in ((left, "learning rate"), (right, "rank (mean over the layers)")):
        axis.axhline(base, color=REFERENCE, linestyle="--", label=f"bare base: {base:.4g}")
        axis.set_xscale("log", base=10 if axis is left else 2)
        axis.set_ylim(min(best, base) - margin, max(best, base) + margin)
        axis.set_ylabel(_words(metric))
        _finish(axis, x)
    _save(figure, path, "Measured on your data")


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    # A figure without pyplot: no global state, no window system, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * panels + 0.8, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _draw_noisy(axis: Any, curve: Curve) -> None:
    """Draw the values faintly, and their running mean over a twentieth of the run."""
    steps, values = zip(*curve, strict=True)
    span = max(1, len(values) // 20)
    means = [sum(values[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(values))]
    if span > 1:
        axis.plot(steps, values, color=TRAIN, alpha=0.3, linewidth=1)
    axis.plot(steps, means, color=TRAIN, label="training loss" + (f" (mean of {span})" if span > 1 else ""))


def _mark_best(axis: Any, curve: Curve, mode: str) -> None:
    step, best = (min if mode == "min" else max)(curve, key=lambda point: point[1])
    axis.plot([step], [best], marker="*", markersize=14, color=VALIDATION, linestyle="", label=f"best: {best:.4g}")


def _second_metric(curves: Mapping[str, Curve]) -> str | None:
    """The validation metric to show beside the loss: the first in the alphabet (accuracy, f1, perplexity)."""
    return min((name for name in curves if name.startswith("val_") and name != "val_loss"), default=None)


def _words(metric: str) -> str:
    return metric.replace("val_", "validation ").replace("_", " ")


def _draw_seeds(
    axis: Any, points: Sequence[tuple[float, Sequence[float]]], label: str, colour: str, **style: Any
) -> None:
    """Draw the mean of each point's values over its x, and a bar from the smallest to the largest."""
    points = sorted(points)
    means = [sum(values) / len(values) for _, values in points]
    below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
    above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
    axis.errorbar(
        [x for x, _ in points], means, [below, above], color=colour, marker="o", markersize=4, capsize=3, label=label,
        **style,
    )  # fmt: skip


def _finish(axis: Any, x: str = "optimizer step") -> None:
    axis.set_xlabel(x)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    figure.savefig(path)
