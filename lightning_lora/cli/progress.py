"""How far a run has come: Lightning's bars where a person watches, one line for each validation in a log."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.imports import _RICH_AVAILABLE

from lightning_lora.cli.noise import is_terminal
from lightning_lora.cli.table import written


def shows_progress(settings: dict[str, Any], callbacks: list[pl.Callback]) -> tuple[list[pl.Callback], dict[str, Any]]:
    """`callbacks` with what shows the progress of the Trainer that `settings` describe, and the argument for it that
    goes with them."""
    wanted = settings["trainer"].get("enable_progress_bar", True)
    if not wanted or any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks, {}
    if not is_terminal():
        return [*callbacks, Lines()], {"enable_progress_bar": False}
    return [*callbacks, Bars() if _RICH_AVAILABLE else TQDMProgressBar()], {}


class Bars(RichProgressBar):
    """Lightning's bars; a run without a number of epochs to reach is shown without one (Lightning: "Epoch 0/-2")."""

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
