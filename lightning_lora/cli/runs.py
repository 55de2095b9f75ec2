"""Parts of a run that several commands share: its bars, its end, what it starts from, and its trained model."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, load_adapter
from lightning_lora.cli.process import is_terminal, quieten, use_available_cores
from lightning_lora.cli.results import METRICS
from lightning_lora.cli.settings import HYDRA_KEYS, build, target, task_and_data
from lightning_lora.errors import ConfigError
from lightning_lora.hub.address import hub_address
from lightning_lora.hub.pull import adapter_folder
from lightning_lora.page import written
from lightning_lora.training.lightning_private import rows_still_to_log
from lightning_lora.training.loggers import Settings, log_settings, optimizer_settings

# Progress of a run: Lightning's bars on a terminal, one line for each validation in a log.


def shows_progress(settings: dict[str, Any], callbacks: list[pl.Callback]) -> tuple[list[pl.Callback], dict[str, Any]]:
    """`callbacks` with one that shows the progress of the Trainer, if the settings want it, and the Trainer's argument
    that goes with it."""
    wanted = settings["trainer"].get("enable_progress_bar", True)
    if not wanted or any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks, {}
    if not is_terminal():
        return [*callbacks, Lines()], {"enable_progress_bar": False}
    try:
        return [*callbacks, Bars()], {}
    except ModuleNotFoundError:  # rich is not installed
        return [*callbacks, TQDMProgressBar()], {}


class Bars(RichProgressBar):
    """Lightning's bars. Without a number of epochs to reach, "Epoch 0" is shown (Lightning would show "Epoch 0/-2")."""

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs not in (None, -1):
            return super()._get_train_description(current_epoch)
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"


class Lines(pl.Callback):
    """One line for each validation while training."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if not n.endswith(("_step", "_epoch"))}
            values = "  ".join(f"{name} {written(value)}" for name, value in sorted(metrics.items()))
            print(f"step {trainer.global_step:,}  {values}", flush=True)


# The settings of a run, for its loggers.


def tell_loggers(settings: dict[str, Any], callbacks: list[pl.Callback]) -> None:
    """Have the settings of a run logged as hyper-parameters. Its LoRACallback logs them, and the adapter's own; if
    there is none, a callback that logs them is added to `callbacks`."""
    groups = settings_for_loggers(settings)
    adapting = [callback for callback in callbacks if isinstance(callback, LoRACallback)]
    if adapting:
        adapting[0].settings_of_run = groups
    else:
        callbacks.append(LoggedSettings(groups))


def settings_for_loggers(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a run as its loggers get them: group -> name -> value."""
    used = [value for name in ("task", "data") for value in settings[name].values()]
    shared = [name for name in ("model", "optimizer", "scheduler") if settings[name] and settings[name] in used]
    nodes = [settings[name] for name in shared]
    groups = {name: dict(_flat(settings[name], nodes)) for name in ("data", "task", *shared)}
    return groups | {"run": {"seed": settings["seed"]}}


def _flat(node: dict[str, Any], elsewhere: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The settings of a node by name; those of a node inside it are named "name/name". Nodes in `elsewhere`, which are
    groups of their own, are left out."""
    for name, value in node.items():
        if name == "_target_":
            yield "class", value.rpartition(".")[2]
        elif isinstance(value, dict) and "_target_" in value:
            if value not in elsewhere:
                yield from ((f"{name}/{inner}", setting) for inner, setting in _flat(value, elsewhere))
        elif name not in HYDRA_KEYS:
            yield name, value


class LoggedSettings(pl.Callback):
    """Logs the settings of a run without adapters."""

    def __init__(self, groups: Settings) -> None:
        self._groups = groups

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed run takes its learning rates from the checkpoint, whatever its settings say.
        rates = optimizer_settings(trainer) if trainer.ckpt_path is None else {"lr": None}
        log_settings(trainer, pl_module, self._groups, {"optimizer": rates})


# The start of a run: its data come in the same order whatever adapters start from.


class SeededStart(pl.Callback):
    """Seeds the run once more before its first batch: how many random numbers an adapter's start takes does not change
    the order of the data, so runs with different ranks see the same batches."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._seed is not None:
            pl.seed_everything(self._seed, workers=True, verbose=False)


# The end of a run is validated and saved, even in the middle of an epoch.


class MeasuredEnd(pl.Callback):
    """Makes Lightning validate when `max_steps` ends the training, as it does at the end of an epoch. Otherwise no
    metric and no checkpoint would have the steps since the last validation, which may be all steps."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it stops


def end_of(trainer: pl.Trainer, folder: Path) -> str:
    """Save a checkpoint of the final state of `trainer` below `folder`; returns its path. It is for a run that saved
    none: it was never validated, or its settings have no callback that saves checkpoints."""
    path = folder / "checkpoints" / f"end-step{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


# A run that starts from a saved adapter (`adapter=`), or that goes on in the folder of an interrupted run.


def start_from(settings: dict[str, Any], overrides: list[str]) -> None:
    """Give the LoRACallback in `settings` the adapter that they name, and only those fields of the config that the user
    asked for: fields in `overrides`, and values that differ from the defaults. The callback compares them with the
    adapter's own config.

    Raises ConfigError if there is no LoRACallback, or if the adapter's folder does not exist.
    """
    adapter = settings["adapter"]
    looks_like_a_folder = adapter.startswith((".", "/", "~")) or adapter.count("/") != 1
    if (
        hub_address(adapter) is None
        and looks_like_a_folder
        and not Path(adapter).is_dir()
        and settings["ckpt_path"] is None
    ):
        raise ConfigError(f"adapter={adapter}: there is no such folder.")
    nodes = [node for node in (settings["callbacks"] or {}).values() if node and is_callback(node)]
    if not nodes:
        raise ConfigError(f"adapter={adapter} is for a LoRACallback, and the settings have none (lora=none?).")
    defaults = LoRAConfig().to_dict()
    named = {o.lstrip("+").partition("=")[0].removeprefix("lora.") for o in overrides if "lora." in o.partition("=")[0]}
    for node in nodes:
        config = node.pop("config", None) or {}
        known = {f.name: config[f.name] for f in fields(LoRAConfig) if f.name in config}
        asked = {name: value for name, value in known.items() if name in named or value != defaults[name]}
        node.update(asked, adapter=adapter, **{name: settings[name] for name in ("subfolder", "ignore_fields")})


def is_callback(node: dict[str, Any]) -> bool:
    """True if the target of `node` is a LoRACallback."""
    kind: Any = target(node["_target_"])
    return isinstance(kind, type) and issubclass(kind, LoRACallback)


class EarlierMetrics(pl.Callback):
    """Lets a run that is resumed in its own folder continue its metrics.csv, which Lightning's logger would begin anew,
    and keeps the metrics measured before its first step."""

    def __init__(self, folder: Path) -> None:
        self.before: dict[str, float] = {}
        self._folder = folder.resolve()
        self._aside = self._folder / f".{METRICS}.earlier"

    def set_aside(self, trainer: pl.Trainer) -> None:
        """Rename metrics.csv; called before the logger's first line, at which the logger would delete it. A renamed
        file that is there already stays: a run was killed before it could continue it."""
        if trainer.is_global_zero and self._loggers(trainer) and not self._aside.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._folder / METRICS, self._aside)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rows = 0
        for logger in self._loggers(trainer) if trainer.is_global_zero else ():
            logger.save()  # what was logged before a checkpoint is then on the disk, however the run ends
            rows = len(_rows(self._folder / METRICS)) + rows_still_to_log(trainer)
        checkpoint[_KEY] = {"rows": rows, "before": self.before}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get(_KEY, {})
        self.before = self.before or saved.get("before", {})
        is_own = Path(str(trainer.ckpt_path)).resolve().is_relative_to(self._folder)
        if not (trainer.is_global_zero and is_own and self._aside.is_file()):
            return
        rows = _rows(self._aside)
        if "rows" in saved:
            rows = rows[: saved["rows"]]
        else:  # a checkpoint of an earlier version of this package
            rows = [row for row in rows if int(row["step"]) < checkpoint["global_step"]]
        for logger in self._loggers(trainer):
            writer = logger.experiment
            (self._folder / METRICS).unlink(missing_ok=True)
            writer.metrics, writer.metrics_keys = rows, []
            writer.save()
        self._aside.unlink()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self._aside.is_file():
            self._aside.unlink()
            rank_zero_info(
                f"This run does not go on from a checkpoint of the one in {self._folder}: it writes {METRICS} anew."
            )

    def _loggers(self, trainer: pl.Trainer) -> list[CSVLogger]:
        """The loggers that write into the run's folder."""
        known = (logger for logger in trainer.loggers if isinstance(logger, CSVLogger))
        return [logger for logger in known if Path(logger.log_dir).resolve() == self._folder]


_KEY = "lightning_lora_run"


def _rows(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.is_file():
        return []
    with metrics.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_requeued(trainer: pl.Trainer) -> bool:
    """True if Slurm has started this job again. Lightning then loads the checkpoint of the first start wherever it is
    given none, even where the base is to be measured."""
    return SLURMEnvironment.detect() and any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))


# The trained model of evaluate and predict: task, data and Trainer; the adapter is loaded once the model is built.


class LoadedAdapter(pl.Callback):
    """Puts the adapter onto the model, right after the model is built and before it moves to its device."""

    def __init__(self, adapter: str, subfolder: str | None, ignore_fields: list[str], check_base: bool) -> None:
        folder = adapter_folder(adapter, subfolder=subfolder, ignore_fields=ignore_fields)
        if not folder.is_dir():
            raise ConfigError(f"adapter={adapter}: there is no such folder ({folder}).")
        self.folder = folder
        """Where the adapter lies; a command that measures several puts one after the other here."""
        self._options: Any = {"check_base": check_base, "ignore_fields": ignore_fields}

    def load(self, model: nn.Module) -> None:
        load_adapter(model, self.folder, **self._options)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Layers may be built by the module's own hooks, which run after this one: load after the last of them.
        last = next((hook for hook in ("configure_model", "setup") if is_overridden(hook, pl_module)), None)
        if last is None:
            self.load(pl_module)
            return
        build_layers = getattr(pl_module, last)

        @functools.wraps(build_layers)  # Lightning looks at the wrapped function to see if the hook is overridden
        def build_and_load(*args: Any, **kwargs: Any) -> None:
            setattr(pl_module, last, build_layers)
            build_layers(*args, **kwargs)
            self.load(pl_module)

        setattr(pl_module, last, build_and_load)


def trained(
    settings: dict[str, Any], *callbacks: pl.Callback
) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
    """Trainer, task and data as `settings` describe them. A callback loads the adapter; `callbacks`, if given, do it
    instead."""
    checkpoint = settings["ckpt_path"]
    if checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).exists():
        raise ConfigError(f"ckpt_path={checkpoint}: there is no such checkpoint.")
    quieten()
    use_available_cores()
    if settings["seed"] is not None:
        pl.seed_everything(settings["seed"], workers=True, verbose=False)
    task, data = task_and_data(settings)
    if settings["adapter"] is not None and not callbacks:
        reading = (settings[name] for name in ("adapter", "subfolder", "ignore_fields", "check_base"))
        callbacks = (LoadedAdapter(*reading),)
    bars = {} if is_terminal() else {"enable_progress_bar": False}
    trainer = build(settings, "trainer", callbacks=list(callbacks), logger=False, enable_checkpointing=False, **bars)
    return trainer, task, data
