"""The metrics of an epoch that is not through: what `self.log(..., on_epoch=True)` and torchmetrics have summed up.

Early stopping, plateau schedules and the choice of the best checkpoint depend on them, and Lightning's checkpoints do
not hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

_FIELDS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip
_REDUCTIONS = {torch.mean: "mean", torch.sum: "sum", sum: "sum", torch.max: "max", max: "max"}

Metrics = dict[str, Any]


class EpochMetrics:
    """Those of a Trainer that trains."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        named = trainer.lightning_module.named_modules()
        self._modules = {name: module for name, module in named if isinstance(module, Metric)}

    def state(self) -> Metrics:
        """What the running epoch has gathered. Logged values are not changed in place, so that they need no copy;
        torchmetrics adds in place, but to lists only at their end."""
        logged = {
            key: (metric, metric.has_reset, metric.value if metric.is_tensor else None, _count(metric))
            for key, metric in self._trainer.fit_loop.epoch_loop._results.items()
        }
        modules = {
            name: (metric._update_count, {key: _copy(getattr(metric, key)) for key in metric._defaults})
            for name, metric in self._modules.items()
        }
        return {"logged": logged, "modules": modules}

    def load(self, state: Metrics) -> None:
        """Put back what `plain` made of a state."""
        device = self._trainer.lightning_module.device
        for name, (count, values) in state["modules"].items():
            if (metric := self._modules.get(name)) is None:
                continue
            metric._update_count, metric._computed = count, None
            for key, value in values.items():
                setattr(metric, key, [v.to(device) for v in value] if isinstance(value, list) else value.to(device))
        results = self._trainer.fit_loop.epoch_loop._results
        for key, saved in state["logged"].items():
            value = saved["value"]
            if value is None:
                value = self._modules.get(saved["meta"]["metric_attribute"])
            if value is not None:
                results[key] = _restored(saved, value, device)


def plain(state: Metrics) -> Metrics:
    """`state` as values that a checkpoint can hold."""
    logged = {}
    for key, (metric, has_reset, value, count) in state["logged"].items():
        fields = {name: getattr(metric.meta, name) for name in _FIELDS}
        fields["reduce_fx"] = _REDUCTIONS.get(metric.meta.reduce_fx, "min")
        logged[key] = {"meta": fields, "has_reset": has_reset, "value": value, "count": count}
    return {"logged": logged, "modules": state["modules"]}


def _restored(saved: dict[str, Any], value: Tensor | Metric, device: torch.device) -> _ResultMetric:
    meta = _AnyMetadata(**saved["meta"])
    restored = meta.metric = _ResultMetric(meta, isinstance(value, Tensor))
    restored.has_reset, restored._update_count = saved["has_reset"], 1
    restored.value = value.to(device) if isinstance(value, Tensor) else value
    if saved["count"] is not None:
        restored.cumulated_batch_size = saved["count"].to(device)
    return restored


class _AnyMetadata(_Metadata):
    """How a restored value is logged, until the module logs it again and says so itself."""

    metric: _ResultMetric

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sync = _Sync()

    def __ne__(self, other: Any) -> bool:
        self.metric.meta = other
        return False

    __hash__ = None  # type: ignore[assignment]


def _count(metric: _ResultMetric) -> Tensor | None:
    return getattr(metric, "cumulated_batch_size", None)


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.detach().clone()
