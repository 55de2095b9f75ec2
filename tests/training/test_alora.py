"""Activated LoRA in a run: a transformers model inside of a LightningModule that knows nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tiny_transformers import llama
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.engine import adapter_state_dict, adapters

from .lit import trainer

TOKENS = [5, 6]
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


def rows(invoked: bool) -> Tensor:
    ids = torch.randint(7, 32, (8, 9), generator=torch.Generator().manual_seed(1))
    if invoked:
        ids[:, 3:5] = torch.tensor(TOKENS)
    return ids


class LM(pl.LightningModule):
    def __init__(self, invoked: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.model: Any = llama(layers=2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(rows(self.hparams.invoked)), 4, shuffle=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(module: LM, *callbacks: pl.Callback, ckpt: Any = None) -> LM:
    pl.seed_everything(1, verbose=False)
    lora = LoRACallback(rank=2, alora_invocation_tokens=TOKENS)
    trainer(lora, *callbacks, max_epochs=3).fit(module, ckpt_path=ckpt)
    return module


def test_it_trains_resumes_exactly_and_loads(tmp_path: Path) -> None:
    def saver(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    whole = fit(LM(), saver("whole"), EMAWeightAveraging(decay=0.5))
    assert all(m.lora_B.any() for _, m in adapters(whole))
    resumed = fit(LM(), saver("again"), EMAWeightAveraging(decay=0.5), ckpt=str(tmp_path / "whole" / "step=3.ckpt"))
    for name, tensor in adapter_state_dict(whole).items():
        assert tensor.equal(adapter_state_dict(resumed)[name])
    loaded, base = load_from_checkpoint(LM, tmp_path / "whole" / "step=6.ckpt").eval(), LM().eval()
    with torch.no_grad():
        ours, bare = (m.model(rows(True)).logits for m in (loaded, base))
    assert ours[:, :3].equal(bare[:, :3])
    assert not torch.allclose(ours[:, 3:], bare[:, 3:], atol=1e-3)


def test_rows_without_the_tokens_leave_it_as_it_was_and_have_a_gradient_of_zero() -> None:
    module = fit(LM(invoked=False))
    assert not any(m.lora_B.any() for _, m in adapters(module))
    module.training_step([rows(False)], 0).backward()
    for _, m in adapters(module):
        assert m.lora_A.grad is not None
        assert not m.lora_A.grad.any()
