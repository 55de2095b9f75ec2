"""Trains under one or two processes on the same global batches; run as a script, it is what `strategy="ddp"` launches.

python ddp_run.py STRATEGY DEVICES STYLE OUT [CHECKPOINT]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Sampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_lora import LoRACallback
from lightning_lora.engine import adapter_state_dict
from training.lit import Lit, data, trainer

BATCH, BATCHES = 8, 5


class Share(Sampler[int]):
    """The rows of each global batch that one process trains on. Lightning's own sampler would shuffle."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.rows = rank, BATCH // world

    def __iter__(self) -> Iterator[int]:
        for batch in range(BATCHES):
            first = batch * BATCH + self.rank * self.rows
            yield from range(first, first + self.rows)

    def __len__(self) -> int:
        return BATCHES * self.rows


class Shared(Lit):
    dropout = 0.0

    def build(self, seed: int) -> None:
        super().build(seed)
        self.net[2] = nn.Dropout(self.dropout)

    def train_dataloader(self) -> Any:
        share = Share(self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(data(), batch_size=share.rows, sampler=share)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class SharedInConfigureModel(Shared):
    def build(self, seed: int) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().build(0)


class SharedInSetup(Shared):
    def build(self, seed: int) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            super().build(0)


class WithDropout(Shared):
    """Each process draws its own random numbers."""

    dropout = 0.3


def fit(
    style: type[Shared],
    folder: Path,
    strategy: Any = "auto",
    devices: int = 1,
    ckpt: str | None = None,
    **settings: Any,
) -> Any:
    """The module after two epochs, and its Trainer; the adapter is in `folder`/adapter.pt as well."""
    pl.seed_everything(3 if ckpt is None else 4, verbose=False)
    module = style()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    run = trainer(
        LoRACallback(rank=2, **settings),
        saver,
        strategy=strategy,
        devices=devices,
        max_epochs=2,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    run.fit(module, ckpt_path=ckpt)
    return module, run


if __name__ == "__main__":
    strategy, devices, style, out, *ckpt = sys.argv[1:]
    module, run = fit(globals()[style], Path(out), strategy, int(devices), *ckpt)
    if run.is_global_zero:
        torch.save(adapter_state_dict(module), Path(out) / "adapter.pt")
