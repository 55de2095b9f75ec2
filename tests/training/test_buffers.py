"""What a module keeps in buffers while it trains is back when a run resumes; the base's own are in no checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.errors import CheckpointError

from .lit import Lit, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


class Averaging(Lit):
    """Each loss is scaled by a moving average of those before; a table of the base and a batch norm never change."""

    def __init__(self, seed: int = 0, size: int = 4) -> None:
        super().__init__(seed)
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(size))
        self.register_buffer("table", torch.arange(6.0).view(2, 3))
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch) * (1 + self.average)
        self.losses.append(loss.detach())
        self.average.data.mul_(0.9).add_(0.1 * loss.detach())  # .data: unseen by torch's count of versions
        self.queue = torch.cat([self.queue[1:], loss.detach()[None]])  # another tensor each time
        self.step += 1
        return loss


def fit(folder: Path, ckpt: Path | None = None, **settings: Any) -> Averaging:
    pl.seed_everything(1 if ckpt is None else 7, verbose=False)
    module = Averaging()
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    run = trainer(LoRACallback(rank=2), saver, max_epochs=2, **settings)
    run.fit(module, ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return module


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_buffers_that_training_changes_resume_exactly(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    for step in (2, 4):  # the second from a run that was itself resumed
        resumed = fit(tmp_path / f"{step}", tmp_path / ("whole" if step == 2 else "2") / f"step={step}.ckpt")
        assert [a.item() for a in resumed.losses] == [a.item() for a in whole.losses[step:]]
        assert torch.equal(resumed.queue, whole.queue)
    saved = torch.load(tmp_path / "4" / "step=6.ckpt", weights_only=True)["lightning_lora"]["buffers"]
    assert set(saved) == {"average", "queue"}
    loaded = load_from_checkpoint(Averaging, tmp_path / "whole" / "step=10.ckpt")
    assert torch.equal(loaded.average, whole.average)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_buffers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit Averaging: queue \(4,\) where it has \(3,\)"):
        load_from_checkpoint(Averaging, tmp_path / "step=2.ckpt", size=3)

    class Without(Averaging):
        def __init__(self) -> None:
            super().__init__()
            del self.average

    with pytest.warns(UserWarning, match="holds average, and Without has no such buffer"):
        load_from_checkpoint(Without, tmp_path / "step=2.ckpt")


def test_nothing_is_kept_of_buffers_that_stay_as_they_are(tmp_path: Path) -> None:
    class Still(Averaging):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch)

    run = trainer(LoRACallback(rank=2), max_epochs=1, precision="bf16-true", num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        run.fit(Still())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert "buffers" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_lora"]
