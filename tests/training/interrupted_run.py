"""A run that can be stopped in the middle of a step, or of a save.

python interrupted_run.py FOLDER MOMENT    at that moment, "at-work" (in its second step) or "saving" (half of its
                                           second checkpoint), writes FOLDER/MOMENT and waits for FOLDER/signalled
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_lora import LoRACallback
from training.lit import Lit, trainer

folder = Path(sys.argv[1])
write = TorchCheckpointIO.save_checkpoint


def stop_at(moment: str) -> None:
    if moment == sys.argv[2]:
        (folder / moment).touch()
        while not (folder / "signalled").exists():
            time.sleep(0.01)


def write_slowly(self: Any, checkpoint: Any, path: Any, *rest: Any, **settings: Any) -> None:
    if "step=1" in str(path) or not str(path).endswith(".tmp"):
        write(self, checkpoint, path, *rest, **settings)
        return
    Path(path).write_bytes(b"the first half of a checkpoint")
    stop_at("saving")
    write(self, checkpoint, path, *rest, **settings)


class Slow(Lit):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 2:
            stop_at("at-work")


if __name__ == "__main__":
    TorchCheckpointIO.save_checkpoint = write_slowly  # type: ignore[method-assign]
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(LoRACallback(rank=2), saver, max_epochs=100).fit(Slow())
