"""The metrics of an epoch that is not through: what `self.log(..., on_epoch=True)` and torchmetrics have summed up.

Early stopping, plateau schedules and the choice of the best checkpoint depend on them, and Lightning's checkpoints do
not hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max"}

Metrics = dict[str, Any]


def epoch_metrics(trainer: Trainer) -> Metrics:
    """What the running epoch has gathered. Logged values are not changed in place, so that they need no copy."""
    logged = {
        key: (metric, metric.has_reset, metric.value if metric.is_tensor else None, _count(metric))
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
    }
    return {"logged": logged, "modules": _metric_states(trainer.lightning_module)}


def plain_metrics(metrics: Metrics) -> Metrics:
    """`metrics` as values that a checkpoint can hold."""
    logged = {}
    for key, (metric, has_reset, value, count) in metrics["logged"].items():
        fields = {name: getattr(metric.meta, name) for name in _FIELDS}
        fields["reduce_fx"] = _REDUCTIONS.get(metric.meta.reduce_fx, "min")
        logged[key] = {"meta": fields, "has_reset": has_reset, "value": value, "count": count}
    return {"logged": logged, "modules": metrics["modules"]}


def restore_metrics(trainer: Trainer, metrics: Metrics) -> None:
    """Put back what `plain_metrics` returned."""
    module = trainer.lightning_module
    modules = {name: m for name, m in module.named_modules() if isinstance(m, Metric)}
    for name, (count, states) in metrics["modules"].items():
        if name not in modules:
            continue
        metric = modules[name]
        metric._update_count, metric._computed = count, None
        for key, value in states.items():
            setattr(metric, key, [v.to(metric.device) for v in value] if isinstance(value, list) else value.clone())
        metric.to(module.device)
    results = trainer.fit_loop.epoch_loop._results
    for key, saved in metrics["logged"].items():
        attribute = saved["meta"]["metric_attribute"]
        if saved["value"] is None and attribute not in modules:
            continue
        restored = _ResultMetric(_AnyMetadata(**saved["meta"]), saved["value"] is not None)
        restored.meta.metric = restored
        restored.has_reset = saved["has_reset"]
        restored._update_count = 1
        restored.value = modules[attribute] if saved["value"] is None else saved["value"].to(module.device)
        if saved["count"] is not None:
            restored.cumulated_batch_size = saved["count"].to(module.device)
        results[key] = restored


class _AnyMetadata(_Metadata):
    """How a restored value is logged, until the module logs it again and says so itself."""

    metric: _ResultMetric

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sync = _Sync()

    def __ne__(self, other: object) -> bool:
        self.metric.meta = other
        return False

    __hash__ = None  # type: ignore[assignment]


def _count(metric: _ResultMetric) -> Tensor | None:
    return getattr(metric, "cumulated_batch_size", None)


def _metric_states(module: LightningModule) -> dict[str, Any]:
    """torchmetrics adds in place, so that values are copied; lists only grow, so that their length is enough."""
    return {
        name: (metric._update_count, {key: _copy(getattr(metric, key)) for key in metric._defaults})
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.detach().clone()
