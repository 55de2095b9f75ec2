"""LightningModules that know nothing of adapters, in the styles that people write."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

WIDTH, CLASSES = 8, 3


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(WIDTH, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)
        )


class Lit(pl.LightningModule):
    """Layers are built in `__init__`."""

    net: nn.Sequential

    def __init__(self, seed: int = 0, lr: float = 1e-2, batch_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["batch_size"])
        self.lr, self.batch_size = lr, batch_size
        self.losses: list[Tensor] = []
        self.build(seed)

    def build(self, seed: int) -> None:
        self.net = net(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(20)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(20)

    def predict_dataloader(self) -> DataLoader[Any]:
        return loader(20)


class BuiltInSetup(Lit):
    def build(self, seed: int) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = net(self.hparams.seed)


class BuiltInConfigureModel(Lit):
    def build(self, seed: int) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = net(self.hparams.seed)


class OverridesSetup(Lit):
    """Layers in `__init__`, but `setup` is overridden for something else, as is common."""

    def setup(self, stage: str) -> None:
        self.stage = stage


STYLES = [Lit, BuiltInSetup, BuiltInConfigureModel, OverridesSetup]


def data(rows: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())


def loader(batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(data(), batch_size=batch_size, shuffle=shuffle)


def trainer(*callbacks: pl.Callback, **settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **settings})
