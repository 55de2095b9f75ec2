"""The end of a run is measured and kept, wherever in an epoch it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class MeasuredEnd(pl.Callback):
    """Has Lightning validate where `max_steps` ends the training, as it does at the end of an epoch: else what was
    learned since the last validation, which may be all of it, is in no metric and in no checkpoint."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates before it stops


def end_of(trainer: pl.Trainer, folder: Path) -> str:
    """Save a checkpoint of what `trainer` ended with below `folder`; returns its path. For a run that made none, since
    it was never validated or its settings have no callback for that."""
    path = folder / "checkpoints" / f"end-step{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return str(path)
