"""LoRA for a layer type of your own: one small class, which the line that names the layer registers.

    python examples/own_layer.py

`EqualLinear` multiplies by its weight times a gain (equalised learning rates, as in StyleGAN). It is no nn.Linear, so
nothing knows how to adapt it until `EqualLinearLoRA` says so. From then on it is merged, removed, saved, given DoRA or
another initialiser like any layer.
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, inject, load_adapter, merged, save_adapter
from lightning_lora.engine import Adapter


class EqualLinear(nn.Module):
    """y = gain * W x + b, with W of unit variance."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_out, features_in))
        self.bias = nn.Parameter(torch.zeros(features_out))
        self.gain = 1 / math.sqrt(features_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * self.weight, self.bias)


class EqualLinearLoRA(Adapter, adapts=EqualLinear):  # this registers it
    """What changes is the weight, W + s B A: so the update is what the layer makes of B A instead of W."""

    @staticmethod
    def shapes(module: EqualLinear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_out, features_in = module.weight.shape
        return (rank, features_in), (features_out, rank)

    def update(self, x: Tensor) -> Tensor:  # without the scale s, which every layer gets alike
        A, B, bias = self.factors_in(x.dtype)
        return F.linear(F.linear(self.lora_dropout(x), A), self.gain * B, bias)


def fit(model: nn.Module, y: Tensor, steps: int) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


torch.set_num_threads(1)  # so small a network gains nothing from more
torch.manual_seed(0)
x = torch.linspace(-3, 3, 256)[:, None]
base = nn.Sequential(EqualLinear(1, 32), nn.Tanh(), EqualLinear(32, 32), nn.Tanh(), EqualLinear(32, 1))
fit(base, x.sin(), steps=400)

new = (x + 1).sin() / 2
model = copy.deepcopy(base)
print(inject(model, LoRAConfig(rank=4, alpha=8, target_modules=["0", "2", "4"], rank_pattern={"0|4": 1})))
before = F.mse_loss(model(x), new).item()
after = fit(model, new, steps=400)

folder = Path(tempfile.mkdtemp(prefix="own_layer-"))
save_adapter(model, folder)
fresh = copy.deepcopy(base)
load_adapter(fresh, folder)
with torch.no_grad():
    assert torch.equal(fresh(x), model(x))
    with merged(fresh):
        torch.testing.assert_close(fresh(x), model(x))

print(f"\nmean squared error on the new curve: {before:.4f} before, {after:.4f} after; reloaded: the same outputs")
print(f"adapter: {folder}")
