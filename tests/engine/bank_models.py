"""A small base, adapters for it as a bank takes them, and the same adapters alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import adapters
from lightning_lora.engine.bank import Bank, LayerFactors

MOST = 4
"""The largest rank in the cases."""


def factors_of(model: nn.Module) -> dict[str, LayerFactors]:
    """The adapters of `model` as a bank takes them."""
    return {
        name: LayerFactors(
            *(factor.detach() for factor in module.factors(dropped=False)),
            module.lora.scale,
            getattr(module, "lora_magnitude_vector", None),
            getattr(module, "lora_B_bias", None),
        )
        for name, module in adapters(model)
    }


def close_to(output: Tensor, exact: Tensor) -> bool:
    """Within what a float32 product of this size loses in another order of summation."""
    return torch.allclose(output, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


class Small(nn.Module):
    """Two linear layers, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, ..., 6) -> (N, ..., 4)
        return self.second(self.first(x).tanh())


def served(model: nn.Module, capacity: int = 64, max_rank: int = 16, **options: Any) -> Bank:
    """Of both layers: "all-linear" would take the last for the head."""
    return Bank(model, capacity, max_rank=max_rank, target_modules=["first", "second"], **options)


def small(count: int) -> tuple[nn.Module, dict[str, Mapping[str, LayerFactors]], dict[str, nn.Module]]:
    """A base, factors by name, and the same adapters alone, by plain weights W + s B A."""
    torch.manual_seed(0)
    base = Small().eval()
    factors, alone = {}, {}
    for i in range(count):
        rank, scale = 1 + i % MOST, (1.0, 0.5, 1.7)[i % 3]
        part = {
            name: LayerFactors(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank), scale)
            for name, m in base.named_children()
            if i % 5 or name == "first"
        }
        model = copy.deepcopy(base)
        for name, values in part.items():
            model.get_submodule(name).weight += values.scale * values.B @ values.A
        factors[f"a{i}"], alone[f"a{i}"] = part, model
    return base, factors, alone
