"""A LightningModule and its data whose author has never heard of this package; small enough to train in a test."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Regression(pl.LightningModule):
    def __init__(self, width: int = 8, activations: tuple[str, ...] = ("relu",), optimizer=None):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )
        self.optimizer = optimizer or torch.optim.AdamW

    def loss(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log_dict({"val_loss": loss, "val_accuracy": 1 / (1 + loss)})

    def predict_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return {"prediction": self.net(x)[:, 0]}

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Remembering(Regression):
    def __init__(self, width: int = 8, optimizer=None):
        super().__init__(width, optimizer=optimizer)
        self.save_hyperparameters("width")


class Unannotated(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Narrow(Regression):
    def __init__(self, width: int = 8):
        if width > 100:
            raise ValueError("no more than 100")
        super().__init__(width)


class Interrupting(Regression):
    """Its user presses Ctrl-C in the second epoch."""

    def training_step(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


class Terminated(Regression):
    """Somebody sends SIGTERM to its process, in the step of that number."""

    def __init__(self, width: int = 8, at: int = 5, optimizer=None):
        super().__init__(width, optimizer=optimizer)
        self.at = at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


class Failing(Regression):
    """It raises in the step of that number."""

    def __init__(self, width: int = 8, at: int = 5, optimizer=None):
        super().__init__(width, optimizer=optimizer)
        self.at = at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.at:
            raise ValueError("no more")
        return super().training_step(batch, batch_idx)


class Requeued(Regression):
    """Slurm announces the end of its time in the step of that number, and then ends it."""

    def __init__(self, width: int = 8, at: int = 5):
        super().__init__(width)
        self.at = at

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.at:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/hpc_ckpt_1.ckpt")  # as its handler does
            os.kill(os.getpid(), signal.SIGTERM)


class TerminatedEarly(Regression):
    """Somebody sends SIGTERM to its process while it validates."""

    def validation_step(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().validation_step(batch, batch_idx)


class Sums(pl.LightningDataModule):
    """Rows of eight numbers, and their sum."""

    def __init__(self, rows: int = 32, batch_size: int = 8):
        super().__init__()
        self.rows = rows
        self.batch_size = batch_size

    def train_dataloader(self):
        x = torch.randn(self.rows, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader


class Shuffled(Sums):
    """Its training rows come in a random order."""

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size, shuffle=True)

    val_dataloader = Sums.train_dataloader


class NamedSums(Sums):
    """Its rows as dicts, every other one naming an adapter."""

    def __init__(self, rows: int = 32, batch_size: int = 8, names: bool = True):
        super().__init__(rows, batch_size)
        self.names = names

    def predict_dataloader(self):
        return DataLoader(self.train_dataloader().dataset, batch_size=self.batch_size, collate_fn=self.named)

    def named(self, rows):
        batch = {"x": torch.stack([x for x, _ in rows])}
        return {**batch, "skill": ["sums", ""] * (len(rows) // 2)} if self.names else batch
