"""Measures a module beside its training, and leaves no trace: a metric of its own validation_step, on other data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from lightning_lora.checked import closest
from lightning_lora.engine.calibration import evaluating
from lightning_lora.errors import ConfigError, DataError, listed
from lightning_lora.training.calibrate import silent
from lightning_lora.training.lightning_private import moved_batch
from lightning_lora.training.run_state import random_state, set_random_state


@contextmanager
def apart(trainer: Trainer, module: LightningModule, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Inside, `module` is in eval mode, records no gradients, and logs nothing, or to `log`. Afterwards modes, random
    generators, metrics, buffers, and the numbers, lists and dicts that the module keeps itself are as before."""
    state, kept = random_state(), _kept(module)
    try:
        # What a metric keeps from inference mode, in which Lightning validates, could not be used in training.
        precision = trainer.precision_plugin.val_step_context
        with torch.inference_mode(False), torch.no_grad(), evaluating(module), silent(module, log), precision():
            yield
    finally:
        for name, value, before in kept:
            if isinstance(value, list):
                value[:] = before
            elif isinstance(value, dict):
                value.clear()
                value.update(before)
            vars(module)[name] = value
        set_random_state(state)


_KEPT = (int, float, bool, str, type(None), list, dict)


def _kept(module: LightningModule) -> list[tuple[str, Any, Any]]:
    """The name, the value and a copy of what the module keeps itself as plain values: outputs that it gathers in a
    list, for example."""
    others = {*vars(LightningModule()), "log", "log_dict"}
    own = ((name, value) for name, value in vars(module).items() if name not in others)
    return [(name, value, copy.copy(value)) for name, value in own if type(value) in _KEPT]


class OwnValidation:
    """The mean of a metric that a module's validation_step logs, over the batches of a loader."""

    def __init__(self, trainer: Trainer, module: LightningModule, loader: Iterable[Any], metric: str) -> None:
        """Raises ConfigError for a module whose validation_step cannot be called with the batches of a loader."""
        if not is_overridden("validation_step", module):
            raise ConfigError(f"{type(module).__name__} has no validation_step, which would measure the dataloader.")
        if is_param_in_hook_signature(module.validation_step, "dataloader_iter", explicit=True):
            raise ConfigError("validation_step asks for the loader's iterator instead of a batch: give texts.")
        self._trainer, self._module, self._loader, self.metric = trainer, module, loader, metric
        self._names: set[str] = set()
        self._whole: Metric | None = None
        self._sum = self._weight = 0.0
        self._batch: Any = None

    def measure(self) -> float:
        """The metric, with the adapters of the module as they are used now.

        A number counts as often as its batch has rows (`batch_size` of `self.log`); a metric of torchmetrics is reset,
        updated with all batches and computed. Raises ConfigError where validation_step does not log it, or not as a
        mean, and DataError where the loader has no batch.
        """
        self._sum = self._weight = 0.0
        self._whole = None
        trainer, module = self._trainer, self._module
        step = module.validation_step
        takes_index, takes_loader = (
            is_param_in_hook_signature(step, name, min_args=least)
            for name, least in (("batch_idx", 2), ("dataloader_idx", 3))
        )
        with apart(trainer, module, self._log):
            for metric in (m for m in module.modules() if isinstance(m, Metric)):
                metric.reset()
            count = 0
            for count, batch in enumerate(self._loader, 1):
                self._batch = moved_batch(trainer, batch)
                step(self._batch, *[count - 1] * takes_index, *[0] * takes_loader)
            self._batch = None
            if self._whole is not None:
                return float(self._whole.compute())
        if not count:
            raise DataError("The dataloader that shows what was forgotten has no batch.")
        if not self._weight:
            near = closest(self.metric, self._names, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"metric={self.metric!r}: validation_step logs no such metric. It logs {listed(sorted(self._names))}."
                f"{hint}"
            )
        return self._sum / self._weight

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self._names.add(name)
        if name != self.metric:
            return
        if kwargs.get("reduce_fx", "mean") not in ("mean", torch.mean):
            raise ConfigError(
                f"metric={name!r} is logged with reduce_fx={kwargs['reduce_fx']!r}; only means are taken."
            )
        if isinstance(value, Metric):
            self._whole = value
            return
        weight = kwargs.get("batch_size") or extract_batch_size(self._batch)
        self._sum += weight * float(value)
        self._weight += weight
