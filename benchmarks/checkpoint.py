"""Checkpoints of a run: what LoRACallback writes beside plain Lightning, with and without PEFT.

python benchmarks/checkpoint.py
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from contenders import peft_default
from side_by_side import Report, Row, Spread, arguments, settings
from torch import nn
from torch.utils.data import DataLoader
from workloads import decoder

from lightning_lora import LoRACallback

RANK = 8


class Plain(pl.LightningModule):
    """One random batch again and again."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model = model
        self.rows = torch.randint(0, vocabulary, (4, 32))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.model(input_ids=self.rows, labels=self.rows).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4)

    def train_dataloader(self) -> Any:
        return DataLoader(range(2))  # type: ignore[arg-type]


def trained(module: Plain, callbacks: list[pl.Callback]) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module)
    return trainer


def main() -> None:
    given = arguments(__doc__, rounds=7)
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    workload = decoder(**({"hidden": 64, "layers": 1} if given.quick else {"hidden": 512, "layers": 6})).with_(
        rank=RANK
    )
    adapting = LoRACallback(rank=RANK, alpha=2 * RANK, target_modules=list(workload.targets))
    sides: dict[str, tuple[Plain, list[pl.Callback]]] = {
        "LoRACallback": (Plain(workload.base(), 1024), [adapting]),
        "PEFT in plain Lightning": (Plain(peft_default(workload.frozen_base(), workload), 1024), []),
        "full fine-tuning": (Plain(workload.base(), 1024), []),
    }
    trainers = {name: trained(module, callbacks) for name, (module, callbacks) in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    bytes_of: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(given.rounds):
            for name, trainer in trainers.items():
                target = Path(place, "last.ckpt")
                target.unlink(missing_ok=True)
                started = time.perf_counter()
                trainer.save_checkpoint(target)
                times[name].append(time.perf_counter() - started)
                bytes_of[name] = target.stat().st_size
    rows: list[Row] = [
        {
            "side": name,
            "checkpoint, MB": bytes_of[name] / 1e6,
            "time, ms": Spread.of(1e3 * t for t in own),
            "x LoRACallback": Spread.of(t / u for t, u in zip(own, times["LoRACallback"])),
        }
        for name, own in times.items()
    ]
    report = Report(
        "checkpoint",
        "Checkpoints",
        settings(seed=given.seed, rounds=given.rounds, rank=RANK, dtype="float32", shapes=workload.name),
        "Trainer.save_checkpoint after two steps, the optimizer's state included.",
    )
    report.table("Size and time", rows)
    report.write(given.results)


if __name__ == "__main__":
    main()
