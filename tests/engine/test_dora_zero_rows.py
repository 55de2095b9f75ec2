"""DoRA on weights of an output that are all zero: they have no direction, and everything stays finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict, merged, remove
from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.engine.layers.dora import dora_update

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(6, 5), torch.randn(3, 6)),
    "without bias": lambda: (nn.Linear(6, 5, bias=False), torch.randn(3, 6)),
    "convolution": lambda: (nn.Conv1d(6, 5, 3), torch.randn(3, 6, 7)),
    "transposed convolution": lambda: (nn.ConvTranspose1d(6, 5, 3), torch.randn(3, 6, 7)),
    "embedding": lambda: (nn.Embedding(9, 5), torch.randint(0, 9, (3, 4))),
    "bilinear": lambda: (nn.Bilinear(6, 4, 5), torch.randn(3, 6)),
    "half": lambda: (nn.Linear(6, 5, dtype=torch.bfloat16), torch.randn(3, 6, dtype=torch.bfloat16)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[:, :4]) if isinstance(self.layer, nn.Bilinear) else self.layer(x)


def rows(layer: Any) -> Tensor:
    """The weight with the weights of each output in a row; a view."""
    W = layer._parameters["weight"].data
    return W.T if isinstance(layer, nn.Embedding) else W.transpose(0, 1) if isinstance(layer, nn.ConvTranspose1d) else W


def built(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    rows(layer)[2] = 0
    return One(layer), x


@every_layer
def test_a_fresh_adapter_changes_no_bit(kind: str):
    model, x = built(kind)
    expected = model(x)
    inject(model, LoRAConfig(rank=2, target_modules=["layer"], use_dora=True))
    assert model(x).equal(expected)
    with merged(model):
        assert model(x).equal(expected)
    remove(model)
    assert model(x).equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_adapter_in_the_precision_of_a_narrow_base_changes_no_bit(dtype: torch.dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64)).to(dtype), torch.randn(5, 64, dtype=dtype)
    expected = model(x)
    inject(model, LoRAConfig(rank=2, use_dora=True, adapter_dtype="base"))
    assert model(x).equal(expected)


@every_layer
def test_training_starts_from_zero_and_gets_away_from_it(kind: str):
    model, x = built(kind)
    inject(model, LoRAConfig(rank=2, target_modules=["layer"], use_dora=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    first = None
    for _ in range(4):
        output = model(x)
        assert output.isfinite().all()
        first = output.detach() if first is None else first
        (output.float() - 1).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    dim = -1 if kind == "embedding" or x.dim() == 2 else 1
    at, was = model(x).select(dim, 2), first.select(dim, 2)
    assert not at.equal(was)
    with merged(model):
        torch.testing.assert_close(model(x).select(dim, 2), at, rtol=0.02, atol=0.02)


def test_a_row_that_the_adapter_makes_zero_gives_the_bias_alone():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.mul(64).round() / 64)  # numbers whose products are exact
    inject(model, LoRAConfig(rank=5, alpha=5, use_dora=True))
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_B.zero_()
        layer.lora_B[2, 0] = -1
        layer.lora_A[0] = layer.weight[2]
        layer.lora_magnitude_vector.fill_(3)
        assert model(x)[:, 2].allclose(layer.bias[2].expand(3), atol=1e-6)  # W x and s B A x, once rounded each
        assert model(x).isfinite().all()
        adapted = layer.adapted_weight()
        assert adapted[2].equal(torch.zeros(6))
        V = layer.dense_weight()[[0, 1, 3, 4]]
        torch.testing.assert_close(adapted[[0, 1, 3, 4]], 3 * V / V.norm(dim=1, keepdim=True))
        W, A, B = layer.dense_weight(), layer.lora_A, layer.lora_B
        torch.testing.assert_close(W + dora_update(W, A, B, 1.0, layer.lora_magnitude_vector).float(), adapted)


def test_a_bank_serves_it_and_files_bring_it_back():
    model, x = built("linear")
    config = LoRAConfig(rank=2, alpha=2, target_modules=["layer"], use_dora=True)
    inject(model, config)
    with torch.no_grad():
        model.layer.lora_B.normal_()
    saved = {name: t.clone() for name, t in adapter_state_dict(model).items()}
    expected = model(x)
    remove(model)
    inject(model, config)
    load_adapter_state_dict(model, saved)
    assert model(x).equal(expected)
    remove(model)
    bare = copy.deepcopy(model)
    bank = Bank(model, 2, max_rank=4, target_modules=["layer"])
    A, B, m = (saved[f"layer.{name}"] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    bank.put("it", {"layer": LayerFactors(A, B, 1.0, m)})
    bank.put("fresh", {"layer": LayerFactors(A, torch.zeros_like(B), 1.0, m)})
    with torch.no_grad():
        with bank.use("it"):
            torch.testing.assert_close(model(x), expected)
        with bank.use("fresh"):
            torch.testing.assert_close(model(x), bare(x))
