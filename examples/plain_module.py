"""LoRA for a LightningModule that was written for anything else: one callback, and nothing in the module changes.

    python examples/plain_module.py

A small network learns sin(x) + sin(3x), and is then adapted to the same curve, shifted and scaled. The adapter is saved
in PEFT's format beside the checkpoint; loaded onto a fresh copy of the base, it gives the same outputs.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, load_adapter


class Regression(pl.LightningModule):
    """An ordinary module; it has never heard of LoRA."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:  # (rows, 1) -> (rows, 1)
        return self.model(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def curve(x: Tensor) -> Tensor:
    return x.sin() + (3 * x).sin()


def rows(y: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)


def fit(module: pl.LightningModule, y: Tensor, **options: object) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=60, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, rows(y))
    return trainer


torch.set_num_threads(1)  # so small a network gains nothing from more
pl.seed_everything(0)
folder = Path(tempfile.mkdtemp(prefix="plain_module-"))
x = torch.linspace(-3, 3, 1024)[:, None]
new = 0.5 * curve(x + 1) - 1

base = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
base.append(nn.Linear(64, 1))
fit(Regression(base, learning_rate=5e-3), curve(x), enable_checkpointing=False)
module = Regression(copy.deepcopy(base), learning_rate=1e-2)
with torch.no_grad():
    before = nn.functional.mse_loss(module(x), new)

# The one line that is new. Any entry of target_modules that matches nothing is an error.
lora = LoRACallback(rank=4, alpha=8, target_modules=["model.2", "model.4"], bias="all")
trainer = fit(module, new, callbacks=[lora], default_root_dir=folder)

# Beside every checkpoint lies its adapter; the base is not in either of them.
checkpoint = Path(trainer.checkpoint_callback.best_model_path)
adapter = checkpoint.with_name(f"{checkpoint.stem}-adapter")
fresh = copy.deepcopy(base)
load_adapter(fresh, adapter)
with torch.no_grad():
    after = nn.functional.mse_loss(module(x), new)
    assert torch.equal(fresh(x), module(x))

print(f"\nmean squared error on the new curve: {before:.4f} before, {after:.4f} after; reloaded: the same outputs")
print(f"adapter: {adapter}")
