"""What a call of a convolution or of a bag may say beside its input; and when a convolution is one with its update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randomise, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.engine.layers.conv import ConvLoRA


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


# W + s B A in one convolution.


def convolution(kind: Any = nn.Conv2d, **fields: Any) -> Any:
    torch.manual_seed(0)
    options = {"groups": 2} if fields.pop("grouped", False) else {}
    return adapted(kind(4, 6, 3, padding=1, **options), **fields)["layer"].train()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each update that is computed by itself."""
    update, called = ConvLoRA.update, []

    def watched(self: Any, x: Tensor) -> Tensor:
        called.append("update")
        return update(self, x)

    monkeypatch.setattr(ConvLoRA, "update", watched)
    return called


large = torch.randn(2, 4, 16, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("fields", "x"),
    [
        ({"dropout": 0.1}, large),
        ({"use_dora": True}, large),
        ({"lora_bias": True}, large),
        ({"grouped": True}, large),
        ({"kind": lambda *a, **k: weight_norm(nn.Conv2d(*a, **k))}, large),
        ({"kind": lambda *a, **k: nn.Conv2d(4, 99, 3, padding=1)}, large),  # many channels
        ({}, large[:1, :, :4, :4]),  # few positions
    ],
    ids=["dropout", "DoRA", "bias", "groups", "parametrized", "channels", "positions"],
)
def test_what_cannot_be_in_one_or_would_take_longer_is_computed_apart(
    fields: dict[str, Any], x: Tensor, monkeypatch: pytest.MonkeyPatch
):
    called, layer = calls(monkeypatch), convolution(**fields)
    assert layer(x).isfinite().all()
    assert called


@pytest.mark.parametrize("autocast", [True, False])
def test_in_half_precision_which_would_round_an_update_of_the_weight_away_it_is_computed_apart(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
):
    called, layer = calls(monkeypatch), convolution()
    layer = layer.float() if autocast else layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert layer(large.to(layer.weight.dtype)).dtype == torch.bfloat16
    assert called


@pytest.mark.parametrize("grads", ["x A B", "A B", "x", "B", "W x A B"])
def test_in_one_all_is_as_apart(grads: str, monkeypatch: pytest.MonkeyPatch):
    called, layer, x = calls(monkeypatch), convolution(rank=3), large.clone()
    tensors = {"x": x, "A": layer.lora_A, "B": layer.lora_B, "W": layer._parameters["weight"]}
    for name, t in tensors.items():
        t.requires_grad_(name in grads.split())
    wanted = [t for t in tensors.values() if t.requires_grad]
    y = layer(x)
    assert not called
    W, A, B = tensors["W"], layer.lora_A, layer.lora_B
    apart = F.conv2d(x, W, layer.bias, padding=1) + layer.lora.scale * F.conv2d(F.conv2d(x, A, padding=1), B)
    torch.testing.assert_close(y, apart)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(apart, wanted, g))


def test_a_fresh_adapter_in_one_changes_no_bit():
    layer = nn.Conv2d(4, 6, 3)
    x = large.float()
    before = layer(x)
    inject(nn.ModuleDict({"layer": layer}), LoRAConfig(rank=2, target_modules=["layer"]))
    assert layer(x).equal(before)
