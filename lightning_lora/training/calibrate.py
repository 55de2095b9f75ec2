"""Starts, inside a run, the adapters whose initialiser needs the weights or data: after a checkpoint would have been
loaded, on the strategy's device, with the run's own training data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.embedded import BASE
from lightning_lora.embedded import NAME as EMBEDDED
from lightning_lora.engine import LoRAConfig, adapter_tensors, injections, start_adapters
from lightning_lora.engine.calibration import calibrate, residuals
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.tree import submodule
from lightning_lora.engine.weights import is_sharded
from lightning_lora.errors import ConfigError, TrainingError
from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.base_weights import weights_of
from lightning_lora.training.lightning_private import moved_batch, training_loader
from lightning_lora.training.run_state import random_state, set_random_state
from lightning_lora.training.torchmetrics_private import metric_state, put_metric_state


def start_waiting(module: LightningModule, batches: int, drawing: Any = None) -> None:
    """Start the adapters of `module` that `inject(..., start=False)` left at zero and that no checkpoint has filled.

    An initialiser that needs measurements gets them from `training_step` on the first `batches` batches of the training
    data. Afterwards the random state is as before, and all processes have the adapters of the first one. `drawing` is
    the context in which A is drawn. Raises TrainingError for a module that cannot be measured in this way, and the
    errors of `calibrate`.
    """
    waiting = {name: injection.config for name, injection in injections(module) if injection.awaits_start}
    if not waiting:
        return
    before = random_state()
    measured: dict[str, Any] = {}
    try:
        for root, config in waiting.items():
            rank_zero_info(f"Starting the adapters by {config.init!r}.")
            prefix = f"{root}." if root else ""
            found = _measured(module, root, config, batches)
            measured |= {prefix + name: of for name, of in found.items()}
        with drawing or nullcontext():
            start_adapters(module, measured)
    finally:
        set_random_state(before)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in adapter_tensors(module).values():
            if not is_sharded(tensor):  # the first process has given out the sharded ones already
                torch.distributed.broadcast(tensor.detach(), 0)


def _measured(module: LightningModule, root: str, config: LoRAConfig, batches: int) -> Mapping[str, Any]:
    part = submodule(module, root)
    if INITS[config.init].reads("weights"):
        return residuals(part, config, _original(module, root, config))
    if not INITS[config.init].measures:
        return {}
    _check_measurable(module, config)
    trainer = module.trainer
    with silent(module), _batches(trainer, batches) as some:
        return calibrate(part, config, lambda batch: _loss(trainer, module, *batch), some)


def _check_measurable(module: LightningModule, config: LoRAConfig) -> None:
    how = (
        f"init={config.init!r} is measured by calling training_step on some batches, and this one {{}}. Measure with "
        "lightning_lora.engine.calibration.calibrate, call inject(module, config, measured=...) before you fit, and "
        "give the callback the same config."
    )
    if not module.automatic_optimization:
        raise TrainingError(how.format("takes steps by itself (manual optimization)"))
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise TrainingError(how.format("asks for the loader's iterator instead of a batch"))


def _loss(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Tensor | None:
    """The loss that training_step returns for a batch, called as Lightning's own loop calls it."""
    precision = trainer.precision_plugin
    batch = moved_batch(trainer, batch)
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    with precision.train_step_context():
        output = module.training_step(batch, index) if takes_index else module.training_step(batch)
    return output["loss"] if isinstance(output, Mapping) else output


@contextmanager
def _batches(trainer: Trainer, count: int) -> Iterator[Iterator[tuple[Any, int]]]:
    """The first `count` batches of the training data with their numbers; afterwards the loaders are as before."""
    loader = training_loader(trainer)
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    limit = trainer.limit_train_batches
    count = min(count, limit) if isinstance(limit, int) else count
    generators = {id(g): g for one in combined.flattened for g in _generators(one)}.values()
    states = [g.get_state() for g in generators]
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    try:
        some = itertools.islice(iter(combined), count)
        yield ((batch, i) for batch, i, _ in Tqdm(some, "Measuring", total=count, disable=not shown, leave=False))
    finally:
        combined.reset()
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    for owner in (loader, *samplers, getattr(samplers[1], "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator


@contextmanager
def silent(module: LightningModule, log: Callable[..., None] | None = None) -> Iterator[None]:
    """Inside, nothing is logged, or `log` is called in place of the module's own; afterwards metrics and buffers are as
    before."""
    trainer = module.trainer
    loggers = trainer.loggers
    attributes: dict[str, Any] = module.__dict__
    own = {name: attributes[name] for name in _LOGS if name in attributes}
    metrics = [(m, metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    buffers = [(t, t.clone()) for t in module.buffers()]
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        attributes.update(dict.fromkeys(_LOGS, _nothing))
        if log is not None:
            attributes["log"] = log
            attributes["log_dict"] = lambda values, **how: [log(name, value, **how) for name, value in values.items()]
        yield
    finally:
        trainer.loggers = loggers
        for name in _LOGS:
            del attributes[name]
        attributes.update(own)
        for metric, state in metrics:
            put_metric_state(metric, *state)
        with torch.no_grad():
            for tensor, value in buffers:
                if not tensor.equal(value):
                    tensor.copy_(value)


_LOGS = ("log", "log_dict")


def _nothing(*_: Any, **__: Any) -> None: ...


def _original(module: LightningModule, root: str, config: LoRAConfig) -> Any:
    """A function that reads the weights that a quantized base was made from, by its name on the Hub or its folder."""
    name, base = adapter_root(module)
    source = getattr(getattr(base, "config", None), "name_or_path", None)
    if not source:
        raise ConfigError(
            f"init={config.init!r} starts from the weights that the base was quantized from, and this "
            f"{type(base).__name__} does not say where they are, as a transformers model does. Give them to "
            "inject(module, config, measured=residuals(module, config, weight_of)) before you fit."
        )
    weight_of = weights_of(BASE if source == EMBEDDED else source)
    prefix, inside = f"{root}." if root else "", f"{name}." if name else ""
    return lambda weight: weight_of((prefix + weight).removeprefix(inside))
