"""A run that goes on from what there is: from a saved adapter (`adapter=`), or in the folder of an interrupted run."""

from __future__ import annotations

import contextlib
import csv
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.cli.results import METRICS
from lightning_lora.cli.signature import target
from lightning_lora.errors import ConfigError
from lightning_lora.hub.local import hub_address


def start_from(settings: dict[str, Any], overrides: list[str]) -> None:
    """Give the LoRACallback in `settings` the adapter that they name, and of the config what the user asked for alone:
    what `overrides` say, and what differs from the defaults. The callback compares that with the adapter's own config.

    Raises ConfigError where there is no LoRACallback, and where a folder is named that is not there.
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
    nodes = [node for node in (settings["callbacks"] or {}).values() if node and _is_callback(node)]
    if not nodes:
        raise ConfigError(f"adapter={adapter} is for a LoRACallback, and the settings have none (lora=none?).")
    defaults = LoRAConfig().to_dict()
    named = {o.lstrip("+").partition("=")[0].removeprefix("lora.") for o in overrides if "lora." in o.partition("=")[0]}
    for node in nodes:
        config = node.pop("config", None) or {}
        known = {f.name: config[f.name] for f in fields(LoRAConfig) if f.name in config}
        asked = {name: value for name, value in known.items() if name in named or value != defaults[name]}
        node.update(asked, adapter=adapter)


def _is_callback(node: dict[str, Any]) -> bool:
    kind: Any = target(node["_target_"])
    return isinstance(kind, type) and issubclass(kind, LoRACallback)


class EarlierMetrics(pl.Callback):
    """Lets a run that is resumed in its own folder go on with its metrics.csv, which Lightning's logger would begin
    anew, and with what was measured before its first step."""

    def __init__(self, folder: Path) -> None:
        self.before: dict[str, float] = {}
        self._folder = folder.resolve()
        self._aside = self._folder / f".{METRICS}.earlier"

    def set_aside(self, trainer: pl.Trainer) -> None:
        """Before the logger's first line, at which it would delete the file. One that is there already was left by a
        run that was killed before it could go on with it."""
        if trainer.is_global_zero and self._loggers(trainer) and not self._aside.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._folder / METRICS, self._aside)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        rows = 0
        for logger in self._loggers(trainer) if trainer.is_global_zero else ():
            logger.save()  # what was logged before a checkpoint is there after it, however the run ends
            rows = len(_rows(self._folder / METRICS)) + _logs_after(trainer)
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
        """Those that write into the run's folder."""
        known = (logger for logger in trainer.loggers if isinstance(logger, CSVLogger))
        return [logger for logger in known if Path(logger.log_dir).resolve() == self._folder]


_KEY = "lightning_lora_run"


def _logs_after(trainer: pl.Trainer) -> int:
    """How many rows Lightning logs of a batch after the hooks at its end, in which a checkpoint may be saved; a resumed
    run does not log them again."""
    epoch_loop = trainer.fit_loop.epoch_loop
    batches: Any = epoch_loop.batch_progress.total
    if batches.completed == batches.processed or not trainer._logger_connector.should_update_logs:
        return 0
    return int(bool(epoch_loop._results.metrics(on_step=True)["log"]))


def _rows(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.is_file():
        return []
    with metrics.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_requeued(trainer: pl.Trainer) -> bool:
    """Whether Slurm started this job again: Lightning then loads the checkpoint of the first start into whatever it is
    asked to do without one, to measure the base as well."""
    return SLURMEnvironment.detect() and any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
