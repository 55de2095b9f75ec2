from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from lightning_lora.engine import adapter_state_dict

from .lit import Lit, data, trainer

EPOCHS, STEPS = 3, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's own
]


class Augmented(Dataset):  # type: ignore[type-arg]
    """Draws random numbers of every kind for each item, as augmentations do."""

    def __init__(self) -> None:
        self.rows = data()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from data()


class Resumed(Lit):
    """Dropout, a schedule by step, and hooks that draw random numbers."""

    kind = "plain"

    def train_dataloader(self) -> Any:
        if self.kind == "stateful":
            return StatefulDataLoader(Augmented(), batch_size=8, shuffle=True)
        if self.kind == "stream":
            return DataLoader(Stream(), batch_size=8)
        workers = 2 if self.kind == "workers" else 0
        return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers, drop_last=True)

    def on_train_start(self) -> None:
        torch.rand(3)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=2 * EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, kind: str = "plain", ckpt: str | None = None, seed: int = 1, **settings: Any) -> Resumed:
    pl.seed_everything(seed, verbose=False)
    module = Resumed()
    module.kind = kind
    every = settings.pop("checkpoints", {"every_n_train_steps": 1})
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    run = trainer(LoRACallback(rank=2, dropout=0.1), saver, max_epochs=EPOCHS, **settings)
    run.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def assert_same_end(whole: Resumed, resumed: Resumed, step: int) -> None:
    rest = whole.losses[step:]
    assert [a.item() for a in resumed.losses] == [a.item() for a in rest]
    for name, tensor in adapter_state_dict(whole).items():
        assert torch.equal(tensor, adapter_state_dict(resumed)[name])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("plain", {}),
        ("plain", {"precision": "bf16-mixed"}),
        ("plain", {"precision": "bf16-true"}),
        ("plain", {"val_check_interval": 2}),
        ("plain", {"limit_val_batches": 0}),
        ("plain", {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 2}),
        ("stateful", {}),
        ("workers", {}),
    ],
)
def test_resuming_after_any_step_gives_the_run_that_was_not_interrupted(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", kind, **settings)
    assert len(whole.losses) == EPOCHS * STEPS
    # With workers each resumed run starts processes: the first step, mid-epoch, the last of an epoch, the one after.
    steps = (2, 5, 6) if kind == "workers" else range(1, EPOCHS * STEPS)
    for step in steps:
        resumed = fit(tmp_path / f"{step}", kind, str(tmp_path / "whole" / f"step={step}.ckpt"), seed=7, **settings)
        assert_same_end(whole, resumed, step)


@pytest.mark.parametrize("kind", ["plain", "stateful"])
@pytest.mark.parametrize("checkpoints", [{"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_resuming_at_an_epochs_end_gives_the_run_that_was_not_interrupted(
    kind: str, checkpoints: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", kind, checkpoints=checkpoints)
    for step in (5, 10):
        path = str(tmp_path / "whole" / f"step={step}.ckpt")
        assert_same_end(whole, fit(tmp_path / f"{step}", kind, path, seed=7, checkpoints=checkpoints), step)


def test_how_often_checkpoints_are_saved_does_not_change_the_run(tmp_path: Path) -> None:
    often, rarely = fit(tmp_path / "often"), fit(tmp_path / "rarely", checkpoints={"every_n_epochs": 2})
    assert_same_end(often, rarely, 0)


def test_a_stream_that_cannot_go_back_to_its_place_is_said(tmp_path: Path) -> None:
    fit(tmp_path / "whole", "stream")
    with pytest.warns(UserWarning, match="IterableDataset has no position to go back to"):
        fit(tmp_path / "again", "stream", str(tmp_path / "whole" / "step=2.ckpt"))


def test_a_checkpoint_can_be_resumed_with_accumulated_gradients(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", accumulate_grad_batches=2, checkpoints={"every_n_train_steps": 2})
    path = str(tmp_path / "whole" / "step=2.ckpt")
    again = fit(tmp_path / "2", ckpt=path, seed=7, accumulate_grad_batches=2, checkpoints={"every_n_train_steps": 2})
    assert_same_end(whole, again, 4)
