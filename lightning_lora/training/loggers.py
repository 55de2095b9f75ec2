"""What the loggers of a run are told of its adapters: their settings, as hyper-parameters, and both rates of LoRA+."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.swap import swapped_class

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    _Monitor = LearningRateMonitor
else:
    _Monitor = Callback  # its own base: only then do the layouts agree, and Python allows the swap

Settings = Mapping[str, Mapping[str, Any]]
"""Group ("lora", "optimizer", "data") -> name -> value."""


def log_settings(trainer: Trainer, module: LightningModule, *several: Settings) -> None:
    """Give each logger the settings as hyper-parameters, named "group/name"; of `several` a later one is stronger.

    With them goes what the module and its data have by save_hyperparameters: Lightning logs that after on_fit_start,
    and TensorBoard shows only the first hyper-parameters that it is given. A group whose name is taken there is called
    "run/group". A logger that refuses (MLflow, where an earlier part of its run had another value) does not end the
    run.
    """
    wanted = getattr(trainer, "enable_autolog_hparams", True)  # Lightning before 2.6 has no such setting
    if not (wanted and trainer.loggers and trainer.is_global_zero):
        return
    holders = [holder for holder in (module, trainer.datamodule) if getattr(holder, "_log_hyperparams", False)]  # type: ignore[attr-defined]
    theirs = {name: value for holder in holders for name, value in holder.hparams_initial.items()}
    theirs.pop("_class_path", None)  # LightningCLI's own
    taken = {str(name).partition("/")[0] for name in theirs}
    ours = {
        f"{'run/' if group in taken else ''}{group}/{name}": str(value) if isinstance(value, dict) else value
        for settings in several
        for group, values in settings.items()
        for name, value in values.items()
    }
    given = theirs | {name: value for name, value in ours.items() if value is not None}
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(given)
        except Exception as error:
            rank_zero_warn(f"{type(logger).__name__} did not take the settings of this run: {error}")


def adapter_settings(config: LoRAConfig, **others: Any) -> dict[str, Any]:
    """Rank, alpha, targets, and every other field of `config` that is not as it is by default; with `others`."""
    defaults = LoRAConfig().to_dict()
    always = ("rank", "alpha", "target_modules")
    return {n: v for n, v in config.to_dict().items() if n in always or v != defaults[n]} | others


def optimizer_settings(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's class and learning rate, of several groups or optimizers all that differ: the rates that
    schedules start from."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups if group.get("lr") is not None]
    different = list(dict.fromkeys(rates))
    return {
        "class": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
        "lr": different[0] if len(different) == 1 else different or None,
    }


def data_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The class of the training data: the data module's, or the data set's where a loader was given to fit."""
    given = trainer.datamodule or trainer.fit_loop._data_source.instance or module  # type: ignore[attr-defined]
    return {"class": type(getattr(given, "dataset", given)).__name__}


class ShowsBothRates(_Monitor):
    """Mixin in front of LearningRateMonitor: under LoRA+ it sees B's groups, which are there while a step runs alone."""

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_start(trainer, *args, **kwargs)  # type: ignore[safe-super]

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_epoch_start(trainer, *args, **kwargs)  # type: ignore[safe-super]

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_batch_start(trainer, *args, **kwargs)  # type: ignore[safe-super]


@contextmanager
def _both_rates(trainer: Trainer) -> Iterator[None]:
    policy = getattr(trainer.strategy, "lora", None)  # a monitor may be used in a later run without adapters
    with ExitStack() as shown:
        for rates in policy.rates if policy is not None else ():
            shown.enter_context(rates.shown())
        yield


def show_both_rates(trainer: Trainer) -> None:
    """Have every LearningRateMonitor of `trainer` show B's rate beside A's."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LearningRateMonitor) and not isinstance(callback, ShowsBothRates):
            callback.__class__ = swapped_class("LoRA", ShowsBothRates, type(callback))
