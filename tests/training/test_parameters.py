"""Adapters of parameters in a Trainer: they learn, a checkpoint holds them alone, and a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Experts
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import CheckpointError

from .lit import WIDTH, Lit, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of ModelCheckpoint
TARGETS: dict[str, Any] = {
    "save_adapter": False,
    "target_modules": ["lstm"],
    "target_parameters": ["experts.up", "experts.down"],
}


class Mixed(Lit):
    """An LSTM, fused experts and a head."""

    def build(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.lstm = nn.LSTM(WIDTH // 2, 4, batch_first=True)
        self.experts = Experts()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(self.lstm(x.unflatten(1, (2, -1)))[0][:, -1]))


def test_a_run_trains_saves_and_goes_on_with_adapters_of_parameters(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    through = Mixed()
    trainer(LoRACallback(rank=2, **TARGETS), saver, max_epochs=2).fit(through)
    tensors = adapter_state_dict(through)
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name)
    assert set(torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]) == set(tensors)

    resumed = Mixed()
    run = trainer(LoRACallback(rank=2, **TARGETS), max_epochs=2)
    run.fit(resumed, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert all(t.equal(tensors[name]) for name, t in adapter_state_dict(resumed).items())
    loaded = load_from_checkpoint(Mixed, str(tmp_path / "epoch=1.ckpt")).eval()
    x = torch.randn(5, WIDTH)
    assert loaded(x).equal(through.eval()(x))


def test_a_checkpoint_of_another_scale_of_one_parameter_is_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last")
    trainer(LoRACallback(rank=2, **TARGETS), saver, max_epochs=1).fit(Mixed())
    other = LoRACallback(rank=2, alpha_pattern={"experts.down": 3}, **TARGETS)
    with pytest.raises(CheckpointError, match=r"'experts\.down'"):
        trainer(other, max_epochs=2).fit(Mixed(), ckpt_path=str(tmp_path / "last.ckpt"))
