"""Two processes, of which the first fails alone, or both do, in the middle of a batch.

python alone_run.py FOLDER [both]    leaves FOLDER/on_exception.ckpt, and may then wait for ever for the other
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_lora import LoRACallback
from training.ddp_run import Shared
from training.lit import trainer


class Fails(Shared):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3 and (self.trainer.is_global_zero or "both" in sys.argv):
            raise ValueError("alone")
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    saver = OnExceptionCheckpoint(sys.argv[1])
    settings = {"strategy": "ddp", "devices": 2, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer(LoRACallback(rank=2), saver, max_epochs=1, **settings).fit(Fails())
