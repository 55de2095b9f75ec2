"""A run that pushes, as a program of its own: `python -m tests.training.pushing_run ENDPOINT FOLDER EPOCHS SECONDS`."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import HubPush, LoRACallback
from tests.training.lit import Lit, trainer


class Slowly(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)


def main(endpoint: str, folder: str, epochs: str, seconds: str) -> None:
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, save_on_exception=True)
    push = HubPush("user/run", endpoint=endpoint, timeout=5, timeout_at_end=5)
    callbacks = [LoRACallback(rank=2, push=push), checkpoint, Slowly(float(seconds))]
    print("ready", flush=True)
    trainer(*callbacks, max_epochs=int(epochs)).fit(Lit())
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
