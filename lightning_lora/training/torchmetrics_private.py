"""Private names of torchmetrics: only they hold what a metric has gathered."""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric

from lightning_lora.borrowed import attribute, replace

_GATHERS = "puts back what a metric of torchmetrics has gathered"


def metric_state(metric: Metric) -> tuple[int, dict[str, Any]]:
    """How often `metric` was updated, and copies of what it has gathered. An update adds to tensors in place, but to
    lists only at their end. Raises MovedError where torchmetrics keeps them elsewhere."""
    gathered = {name: getattr(metric, name) for name in attribute(metric, "_defaults", _GATHERS)}
    copies = {n: list(v) if isinstance(v, list) else v.detach().clone() for n, v in gathered.items()}
    return attribute(metric, "_update_count", _GATHERS), copies


def put_metric_state(metric: Metric, count: int, values: dict[str, Any]) -> None:
    """Put back what `metric_state` returned. Raises MovedError as it does; the metric is then as it was."""
    replace(metric, _GATHERS, _update_count=count, _computed=None)
    for name, value in values.items():
        setattr(metric, name, value)
