"""Tells the loggers of a run about its adapters: their settings, as hyper-parameters; both learning rates of LoRA+; and
the adapter folder beside a checkpoint that is logged as a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.swap import swap
from lightning_lora.training import lightning_private as private
from lightning_lora.training.strategy import adapter_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    _Monitor = LearningRateMonitor
    _MLFlow = MLFlowLogger
    _Wandb = WandbLogger
else:
    _Monitor = Callback  # the bases of these classes: Python swaps classes only if their layouts agree
    _MLFlow = _Wandb = Logger

Settings = Mapping[str, Mapping[str, Any]]
"""Group ("lora", "optimizer", "data") -> name -> value."""


def log_settings(trainer: Trainer, module: LightningModule, *several: Settings) -> None:
    """Give each logger the settings as hyper-parameters, named "group/name"; among `several`, later ones win.

    The hyper-parameters of the module and its data (save_hyperparameters) are given with them: Lightning logs those
    after on_fit_start, and TensorBoard shows only the first hyper-parameters that it is given. A group whose name is
    taken by one of them is called "run/group". A logger that refuses (MLflow, where an earlier part of its run had
    another value) does not end the run.
    """
    if not (trainer.enable_autolog_hparams and trainer.loggers and trainer.is_global_zero):
        return
    holders = [holder for holder in (module, trainer.datamodule) if private.logs_hyperparameters(holder)]  # type: ignore[attr-defined]
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


def log_run(
    trainer: Trainer,
    module: LightningModule,
    config: LoRAConfig,
    optimizer: Mapping[str, Any] | None,
    further: Settings,
    **plus: Any,
) -> None:
    """Give each logger the settings of adapter (with `plus`), optimizer and data; they win over `further`."""
    lora, data = adapter_settings(config, **plus), data_settings(trainer, module)
    log_settings(trainer, module, further, {"lora": lora, "optimizer": optimizer or {"lr": None}, "data": data})


def adapter_settings(config: LoRAConfig, **others: Any) -> dict[str, Any]:
    """Rank, alpha, targets, every other field of `config` that differs from its default, and `others`."""
    defaults = LoRAConfig().to_dict()
    always = ("rank", "alpha", "target_modules")
    return {n: v for n, v in config.to_dict().items() if n in always or v != defaults[n]} | others


def optimizer_settings(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's class, and the learning rate that its schedule starts from: a list where groups or optimizers
    have different ones."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups if group.get("lr") is not None]
    different = list(dict.fromkeys(rates))
    return {
        "class": ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers),
        "lr": different[0] if len(different) == 1 else different or None,
    }


def data_settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The class of the training data: the data module's, or the data set's where a loader was given to fit."""
    given = trainer.datamodule or private.data_given(trainer) or module  # type: ignore[attr-defined]
    return {"class": type(getattr(given, "dataset", given)).__name__}


class ShowsBothRates(_Monitor):
    """Mixin in front of LearningRateMonitor: under LoRA+ it sees B's groups, which else exist only during a step."""

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_epoch_start(trainer, *args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        with _both_rates(trainer):
            super().on_train_batch_start(trainer, *args, **kwargs)


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
            swap(callback, "LoRA", ShowsBothRates)


class MLFlowAdapters(_MLFlow):
    """Mixin in front of MLFlowLogger: with each checkpoint that `log_model` logs, it logs the adapter folder beside it,
    as the artifact "CHECKPOINT/adapter"."""

    def _scan_and_log_checkpoints(self, checkpoint_callback: Any) -> None:
        before = private.logged_models(self)
        super()._scan_and_log_checkpoints(checkpoint_callback)
        for path, folder in _new_adapters(before, private.logged_models(self)):
            self.experiment.log_artifacts(self.run_id, str(folder), f"{Path(path).stem}/adapter")


class WandbAdapters(_Wandb):
    """Mixin in front of WandbLogger: with each checkpoint that `log_model` logs, it logs the adapter folder beside it,
    as an artifact with the name of the checkpoint's and "-adapter" behind."""

    def _scan_and_log_checkpoints(self, checkpoint_callback: Any) -> None:
        import wandb

        before = private.logged_models(self)
        super()._scan_and_log_checkpoints(checkpoint_callback)
        for path, folder in _new_adapters(before, private.logged_models(self)):
            name, metadata = f"{private.model_name(self)}-adapter", {"checkpoint": Path(path).name}
            artifact = wandb.Artifact(name=name, type="model", metadata=metadata)
            artifact.add_dir(str(folder))
            is_best = path == checkpoint_callback.best_model_path
            self.experiment.log_artifact(artifact, aliases=["latest", "best"] if is_best else ["latest"])


def _new_adapters(before: Mapping[str, float], logged: Mapping[str, float]) -> list[tuple[str, Path]]:
    """The newly logged checkpoints (in `logged`, not in `before`) that have an adapter folder, each with its folder."""
    new = [path for path, time in logged.items() if before.get(path) != time]
    folders = [(path, adapter_folder(str(Path(path).resolve()))) for path in new]  # last.ckpt may be a link
    return [(path, folder) for path, folder in folders if folder.is_dir()]


def log_adapters(trainer: Trainer) -> None:
    """Have MLflow's and W&B's loggers of `trainer` log adapter folders where they log checkpoints."""
    for logger in trainer.loggers:
        for kind, mixin in ((MLFlowLogger, MLFlowAdapters), (WandbLogger, WandbAdapters)):
            if isinstance(logger, kind) and not isinstance(logger, mixin) and private.logs_models(logger):
                swap(logger, "LoRA", mixin)
