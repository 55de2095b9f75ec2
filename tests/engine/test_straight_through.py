"""Layers that round their inputs pass the gradient on, as if they did not: what lies below trains as it would there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, inject, remove
from lightning_lora.engine.weights import dense
from lightning_lora.errors import TargetError

torchao = pytest.importorskip("torchao.quantization")

ROUNDING = {
    "int8": torchao.Int8DynamicActivationInt8WeightConfig,
    "int4": torchao.Int8DynamicActivationIntxWeightConfig,
}
every_kind = pytest.mark.parametrize("kind", ROUNDING)


def build(kind: str) -> nn.Sequential:
    """A plain layer, and two that round their inputs, with what writes in place behind them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Linear(32, 64))
    torchao.quantize_(model, ROUNDING[kind](), filter_fn=lambda _, name: name in ("1", "3"))
    return model


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))


def numbers(layer: Any) -> Tensor:
    return dense(layer, layer._parameters["weight"])


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


# float32 sums of 64 terms at most, twice.
ROUNDED = 1e-5


@every_kind
@pytest.mark.parametrize("variant", [{}, {"lora_bias": True}, {"bias": "all"}, {"rank_dropout": 1e-9}], ids=str)
def test_the_gradient_of_an_input_is_that_of_the_weight_and_of_the_update(kind: str, variant: dict[str, Any]):
    model = build(kind)
    inject(model, LoRAConfig(rank=2, target_modules=["1"], **variant))
    shake(model)
    layer: Any = model[1]
    x, G = torch.randn(5, 64, requires_grad=True), torch.randn(5, 32)
    layer(x).backward(G)
    assert error(x.grad, G @ numbers(layer) + layer.lora.scale * G @ layer.lora_B @ layer.lora_A) <= ROUNDED
    if variant.get("bias"):
        assert error(layer.bias.grad, G.sum(0)) <= ROUNDED


@every_kind
def test_with_dora_it_is_that_of_the_weight_as_dora_scales_it(kind: str):
    model = build(kind)
    inject(model, LoRAConfig(rank=2, target_modules=["1"], use_dora=True))
    shake(model)
    layer: Any = model[1]
    x, G = torch.randn(5, 64, requires_grad=True), torch.randn(5, 32)
    layer(x).backward(G)
    V = numbers(layer) + layer.lora.scale * layer.lora_B @ layer.lora_A
    W = (layer.lora_magnitude_vector / V.norm(dim=1))[:, None] * V
    assert error(x.grad, G @ W) <= ROUNDED


@every_kind
def test_a_layer_without_an_adapter_passes_it_on_to_those_below_and_is_itself_after_remove(kind: str):
    model = build(kind)
    x, before = torch.randn(5, 16), copy.deepcopy(model)
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert torch.equal(model(x), before(x))
    shake(model)
    h = model[0](x).detach().requires_grad_()
    inner = model[1](h)
    active = inner.detach() > 0
    G = torch.randn(5, 64)
    model[3](model[2](inner)).backward(G)
    assert error(h.grad, (G @ numbers(model[3]) * active) @ numbers(model[1])) <= ROUNDED
    remove(model)
    assert [type(m) for m in model] == [type(m) for m in before]
    assert torch.equal(model(x), before(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of torch's own compiler
@every_kind
def test_compiled_it_has_the_same_gradients(kind: str):
    model = build(kind)
    inject(model, LoRAConfig(rank=2, target_modules=["0", "1"]))
    shake(model)
    x = torch.randn(5, 16)

    def gradients(of: Any) -> list[Tensor]:
        model.zero_grad()
        of(x).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    eager = gradients(model)
    compiled = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(eager) == len(compiled) == 4
    assert all(error(a, b) <= ROUNDED for a, b in zip(compiled, eager))


def test_four_bits_that_are_stored_in_bfloat16_are_no_weight_to_add_to():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32, quant_storage=torch.bfloat16)
    model = nn.Sequential(layer, nn.Linear(32, 4)).to("cpu")
    with pytest.raises(TargetError, match="its weight holds quantized weights"):
        inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["0.weight"]))
