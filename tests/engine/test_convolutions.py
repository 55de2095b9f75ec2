"""What a call of a convolution or of a bag may say beside its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randomise, reference
from torch import nn

from lightning_lora.engine import LoRAConfig, inject


def adapted(layer: nn.Module, **fields: Any) -> Any:
    model = nn.ModuleDict({"layer": layer})
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["layer"], **fields}))
    randomise(model)
    return model.double().eval()


@pytest.mark.parametrize("size", [[11], [12]])
@torch.no_grad()
def test_a_transposed_convolution_is_asked_for_an_output_size(size: list[int]):
    model, x = adapted(nn.ConvTranspose1d(4, 6, 3, stride=2)), torch.randn(2, 4, 5).double()
    output = model["layer"](x, output_size=size)
    assert output.shape[-1] == size[0]
    torch.testing.assert_close(output, reference(model)["layer"](x, output_size=size))


@pytest.mark.parametrize("options", [{"mode": "sum"}, {"mode": "mean"}, {"mode": "sum", "include_last_offset": True}])
@torch.no_grad()
def test_a_bag_takes_offsets(options: Any):
    model = adapted(nn.EmbeddingBag(11, 6, **options))
    x, offsets = torch.tensor([1, 2, 3, 2, 2, 9, 10]), torch.tensor([0, 3, 3, 7])
    offsets = offsets if "include_last_offset" in options else offsets[:-1]
    torch.testing.assert_close(model["layer"](x, offsets), reference(model)["layer"](x, offsets))


@torch.no_grad()
def test_a_bag_weighs_its_samples():
    model = adapted(nn.EmbeddingBag(11, 6, mode="sum"))
    x, weights = torch.randint(0, 11, (4, 3)), torch.rand(4, 3).double()
    ours = model["layer"](x, per_sample_weights=weights)
    torch.testing.assert_close(ours, reference(model)["layer"](x, per_sample_weights=weights))


@torch.no_grad()
def test_the_maximum_over_a_bag_is_adapted_by_its_parameter():
    model = nn.ModuleDict({"layer": nn.EmbeddingBag(11, 6, mode="max")})
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["layer.weight"]))
    randomise(model)
    x = torch.randint(0, 11, (4, 3))
    torch.testing.assert_close(model["layer"](x).double(), reference(model)["layer"](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lazy", [nn.LazyConv2d(6, 3), nn.LazyConvTranspose2d(6, 3), nn.LazyLinear(6)], ids=lambda m: type(m).__name__
)
def test_a_lazy_layer_is_adapted_once_it_has_a_shape(lazy: Any):
    lazy(torch.randn(2, 4, 5, 5))
    adapted(lazy)["layer"](torch.randn(2, 4, 5, 5).double()).sum().backward()
    assert lazy.lora_B.grad is not None
