"""The app's own module and data: is a line Python source, or prose about Python?"""

from __future__ import annotations

import argparse
import calendar
import difflib
import inspect
from collections.abc import Callable
from pydoc_data.topics import topics

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from lightning_lora.embedded import BASE


class LineClassifier(pl.LightningModule):
    """The embedded language model's last hidden state, and a new linear head on it."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.body = AutoModel.from_pretrained(BASE).train()
        self.head = nn.Linear(self.body.config.hidden_size, 2)
        self.optimizer = optimizer

    def forward(self, ids: Tensor) -> Tensor:  # (rows, bytes) -> (rows, 2)
        return self.head(self.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        return nn.functional.cross_entropy(self(ids), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, labels = batch
        self.log("accuracy", (self(ids).argmax(dim=1) == labels).float().mean(), batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Lines(pl.LightningDataModule):
    """Lines cut to `length` bytes, as many of source as of prose; a fifth of them held back."""

    def __init__(self, length: int, batch_size: int) -> None:
        super().__init__()
        self.length = length
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        prose = self._cut("\n".join(topics.values())[:50_000])
        source = self._cut("\n".join(map(inspect.getsource, (argparse, calendar, difflib)))[:50_000])
        count = min(len(prose), len(source))
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        ids = torch.tensor(tokenizer(prose[:count] + source[:count])["input_ids"])
        order = torch.randperm(2 * count)
        labels = (torch.arange(2 * count) >= count).long()
        rows = list(zip(ids[order], labels[order]))
        self.training, self.held_back = rows[count // 5 * 2 :], rows[: count // 5 * 2]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_back, self.batch_size)

    def _cut(self, text: str) -> list[str]:
        # Indentation would tell them apart at once; only ASCII, so that a character is one token.
        lines = (line.strip() for line in text.splitlines() if line.isascii())
        return [line[: self.length] for line in lines if len(line) >= self.length]
