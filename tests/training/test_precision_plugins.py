"""Lightning's precision plugins: half precision, mixed precision, and quantization by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.engine import adapter_state_dict, adapters

from .lit import WIDTH, BuiltInConfigureModel, Lit, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
# 8 bits of a number in bfloat16, 11 in float16, through three layers.
LOSES = {"bf16-true": 0.05, "16-true": 0.01, "bf16-mixed": 0.05, "16-mixed": 0.05}
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


def run(precision: Any, folder: Path, variant: str) -> Lit:
    module = Lit(lr=1e-3)
    module.net[2].p = 0.0
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(folder, filename="it")
    callback = LoRACallback(rank=2, **VARIANTS[variant])
    trainer(callback, checkpoint, max_epochs=2, precision=precision).fit(module)
    return module


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", LOSES)
def test_training_loses_what_the_precision_loses_and_no_more(precision: Any, variant: str, tmp_path: Path) -> None:
    exact = run("32-true", tmp_path / "exact", variant)
    module = run(precision, tmp_path / "half", variant)
    losses, expected = torch.stack(module.losses).float(), torch.stack(exact.losses)
    torch.testing.assert_close(losses, expected, rtol=LOSES[precision], atol=0.0)
    assert all(bool(m.lora_B.any()) and m.lora_B.dtype is torch.float32 for _, m in adapters(module))
    loaded = load_from_checkpoint(Lit, tmp_path / "half" / "it.ckpt")
    for name, tensor in adapter_state_dict(loaded).items():
        assert tensor.equal(adapter_state_dict(module)[name]), "masters are saved as they are"


class Wide(Lit):
    """As many classes as bitsandbytes can multiply by on every CPU."""

    def build(self, seed: int) -> None:
        self.net = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]).float(), batch[1])


class WideInConfigureModel(Wide, BuiltInConfigureModel):
    def build(self, seed: int) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            Wide.build(self, 0)


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4-dq", "int8"])
@pytest.mark.parametrize("style", [Wide, WideInConfigureModel])
def test_layers_are_quantized_first_and_adapted_then(style: Any, mode: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Lightning asks for a GPU, which neither bitsandbytes nor this package does."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(_AcceleratorConnector, "_validate_precision_choice", lambda self: None)
    plugin = BitsandbytesPrecision(mode, dtype=torch.float16 if mode == "int8" else torch.bfloat16)
    module = style()
    checkpoint = ModelCheckpoint(tmp_path, filename="it")
    callback = LoRACallback(rank=2, use_dora=mode == "nf4")
    trainer(callback, checkpoint, max_epochs=1, limit_val_batches=0, plugins=[plugin]).fit(module)
    adapted = dict(adapters(module))
    assert list(adapted) == ["net.0", "net.2"]
    for layer in adapted.values():
        weight: Any = layer.weight
        assert weight.dtype in (torch.uint8, torch.int8)
        assert layer.lora_B.any()
        assert layer.lora_B.isfinite().all()
        assert layer.lora_B.dtype is torch.float32
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == adapter_state_dict(module).keys(), "nothing of the base is in the checkpoint"
