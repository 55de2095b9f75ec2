"""The picture in a card: the curves of the metrics, drawn without a window and without a style of the user's."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 3
"""The most panels in one picture."""


def curve_picture(history: Sequence[tuple[int, Mapping[str, float]]], monitor: str | None = None) -> bytes | None:
    """A PNG of `history`, the metrics by optimizer step; None where no metric was seen at two steps.

    Losses share a panel; `monitor` comes first.
    """
    curves: dict[str, dict[int, float]] = {}
    for step, metrics in history:
        for name, value in metrics.items():
            if math.isfinite(value):
                curves.setdefault(name, {})[step] = value
    curves = {
        name: curve for name, curve in curves.items() if len(curve) > 1 and not name.endswith(("_step", "_epoch"))
    }
    if not curves:
        return None
    panels: dict[str, list[str]] = {}
    for name in sorted(curves, key=lambda name: (name != monitor, "loss" not in name, name)):
        panels.setdefault("loss" if "loss" in name else name, []).append(name)

    # A figure without pyplot: no global state, and safe beside a thread that draws as well.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(len(panels), MOST)
    figure = Figure(figsize=(5.2 * count + 0.8, 3.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Sequence[Any] = figure.subplots(1, count, squeeze=False)[0]
    for axis, (panel, names) in zip(axes, panels.items()):
        for name in names:
            axis.plot(list(curves[name]), list(curves[name].values()), marker="o", markersize=3, label=name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(panel)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
