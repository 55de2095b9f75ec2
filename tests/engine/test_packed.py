"""Several adapters that share the products of one layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRAConfig, inject
from lightning_lora.engine.packed import routed

ADAPTERS, ROWS = 8, 512  # many: one element in thousands has other bits, where the order of its sum is another


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize(("wide", "high"), [(64, 1728), (1728, 64)])
def test_in_16_bits_a_pack_has_the_sums_of_each_adapter_alone(wide: int, high: int, rank: int) -> None:
    """Else roundings add up over the layers, until the gradients of a packed step seem to be others."""
    torch.manual_seed(0)
    layer = nn.Linear(wide, high, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(ADAPTERS, ROWS, wide, dtype=torch.bfloat16)
    g = torch.randn(ADAPTERS, ROWS, high, dtype=torch.bfloat16)
    for rows, W in ((x, layer.weight.T), (g, layer.weight)):
        if not all(torch.equal(each, rows[0] @ W) for each in (rows.flatten(0, 1) @ W).split(ROWS)[:1]):
            pytest.skip("on this processor the bits of a product depend on its number of rows")
    parts = []
    for _ in range(ADAPTERS):
        model = nn.Sequential(nn.Linear(wide, high, dtype=torch.bfloat16))
        model[0].weight, model[0].bias = layer.weight, layer.bias
        inject(model, LoRAConfig(rank=rank, target_modules=["0"]))
        nn.init.normal_(model[0].lora_B, std=0.1)
        parts.append(model[0])

    def gradients(of: nn.Module, y: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, of.lora_A, of.lora_B], g, retain_graph=True)

    together = x.flatten(0, 1).requires_grad_()
    y = routed(together, layer, parts)
    for i, part in enumerate(parts):
        own = x[i].clone().requires_grad_()
        alone = part(own)
        assert torch.equal(y.view(ADAPTERS, ROWS, high)[i], alone)
        through, *factors = gradients(part, y, together, g.flatten(0, 1))
        for a, b in zip((through.view(x.shape)[i], *factors), gradients(part, alone, own, g[i]), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(F.linear(x[0], layer.weight, layer.bias), alone)
