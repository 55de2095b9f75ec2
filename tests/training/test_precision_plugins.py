"""Lightning's precision plugins: half precision, mixed precision, and quantization by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from rounding import Condition
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.engine import adapter_state_dict, adapters

from .lit import WIDTH, BuiltInConfigureModel, Lit, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.bfloat16,  # on a CPU
}
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


class LossAndGradient(nn.Module):
    """The loss of a batch's labels, or its gradient with respect to the parameters whose name ends in `which`."""

    def __init__(self, net: nn.Module, labels: Tensor, which: str) -> None:
        super().__init__()
        self.net, self.labels, self.which = net, labels, which

    def forward(self, x: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(x), self.labels)
        if self.which == "loss":
            return loss
        trained = [p for name, p in self.net.named_parameters() if name.endswith(self.which)]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained, create_graph=True)])


class Watched(Lit):
    """Finds in each step by how much its loss and its gradients are off, at the parameters that the step has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(lr=1e-3)
        self.net[2].p = 0.0
        self.net[1] = self.net[4] = nn.Tanh()  # where ReLU's slope jumps, no bound holds for a gradient
        self.dtype_of_run, self.excesses = dtype, []

    def on_train_start(self) -> None:
        for _, layer in adapters(self):
            nn.init.normal_(layer.lora_B)  # an update as large as W, whose loss can be seen

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            self.conditions = {
                which: Condition(LossAndGradient(self.net, batch[1], which), batch[0])
                for which in ("loss", "lora_A", "lora_B")
            }
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        found = {"loss": self.losses[-1]}
        for which in ("lora_A", "lora_B"):
            gradients = [p.grad for name, p in self.net.named_parameters() if name.endswith(which)]
            assert all(g.dtype is torch.float32 for g in gradients)
            found[which] = torch.cat([g.flatten() for g in gradients])
        if found["lora_B"].isfinite().all():  # else it is too large for float16, and the step is left out
            self.excesses.append({w: self.conditions[w].excess(f, dtype=self.dtype_of_run) for w, f in found.items()})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_loses_what_the_precision_loses_and_no_more(precision: Any, variant: str, tmp_path: Path) -> None:
    module = Watched(PRECISIONS[precision])
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(tmp_path, filename="it")
    callback = LoRACallback(rank=2, **VARIANTS[variant])
    trainer(callback, checkpoint, max_epochs=2, precision=precision).fit(module)
    assert len(module.excesses) >= 8, "of 10 steps"
    for step, excesses in enumerate(module.excesses):
        assert max(excesses.values()) <= 1, (step, excesses)
    assert all(bool(m.lora_B.any()) and m.lora_B.dtype is torch.float32 for _, m in adapters(module))
    loaded = load_from_checkpoint(Lit, tmp_path / "it.ckpt")
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
