"""LoftQ on bases that bitsandbytes quantized: what quantization took, as far as the rank goes, is given back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_state_dict, inject, remove, start_adapters
from lightning_lora.engine.calibration import residuals
from lightning_lora.engine.weights import dense
from lightning_lora.errors import TargetError

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
RANK = 4
LAYERS = {
    "nf4": lambda: bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32),
    "fp4": lambda: bnb.nn.Linear4bit(64, 32, quant_type="fp4", compute_dtype=torch.float32),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
}


def quantized(kind: str) -> tuple[Any, nn.Module]:
    """A model with a quantized layer, and the one that it was made from."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind](), nn.Tanh(), nn.Linear(32, 3))
    with torch.no_grad():
        model[0].weight.data = torch.randn(32, 64)
    original = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
    original.load_state_dict(copy.deepcopy(model.state_dict()))
    return model.to("cpu"), original


def weights(original: nn.Module) -> Any:
    return dict(original.named_parameters()).__getitem__


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_the_adapter_starts_as_the_best_approximation_of_what_was_lost(kind: str):
    model, original = quantized(kind)
    config = LoRAConfig(rank=RANK, alpha=6, target_modules=["0"], init="loftq")
    inject(model, config, measured=residuals(model, config, weights(original)))
    W, layer = original[0].weight, model[0]
    lost: Tensor = W - dense(layer, layer.weight)
    theirs = _low_rank_decomposition(lost, RANK)
    torch.testing.assert_close(layer.delta_weight(), theirs["L"] @ theirs["R"], rtol=1e-3, atol=1e-5)
    S = torch.linalg.svdvals(lost)
    left = (lost - layer.delta_weight()).square().sum()
    torch.testing.assert_close(left, S[RANK:].square().sum(), rtol=1e-3, atol=1e-5)
    x = torch.randn(50, 64)
    before = remove_copy(model)(x)
    assert (model(x) - original(x)).norm() < (before - original(x)).norm()


def remove_copy(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    remove(bare)
    return bare


def test_it_trains_and_is_a_plain_pair():
    model, original = quantized("nf4")
    config = LoRAConfig(rank=RANK, target_modules=["0"], init="loftq")
    inject(model, config, start=False)
    start_adapters(model, residuals(model, config, weights(original)))
    assert set(adapter_state_dict(model)) == {"0.lora_A", "0.lora_B"}
    model(torch.randn(3, 64)).square().sum().backward()
    assert model[0].lora_A.grad.any()
    assert model[0].lora_B.grad.any()


def test_a_weight_that_is_not_quantized_yet_is_said_to_be_not():
    model = nn.Sequential(LAYERS["nf4"]())
    config = LoRAConfig(rank=RANK, target_modules=["0"], init="loftq")
    with pytest.raises(TargetError, match=r"0 is not quantized.*moves to its device"):
        residuals(model, config, dict(model.named_parameters()).__getitem__)


def test_an_original_of_another_shape_is_refused():
    model, _ = quantized("nf4")
    config = LoRAConfig(rank=RANK, target_modules=["0"], init="loftq")
    with pytest.raises(TargetError, match=r"shape \(32, 64\), and its original weight has the shape \(3, 3\)"):
        residuals(model, config, lambda name: torch.zeros(3, 3))


@pytest.mark.parametrize("name", ["pissa", "olora"])
@torch.no_grad()
def test_a_start_from_the_weight_takes_the_numbers_that_a_quantized_one_stands_for(name: str):
    model, _ = quantized("nf4")
    x = torch.randn(5, 64)
    before = model(x)
    inject(model, LoRAConfig(rank=32, alpha=32, target_modules=["0"], init=name))
    torch.testing.assert_close(
        model[0].lora_B @ model[0].lora_A, dense(model[0], model[0].weight).float(), rtol=1e-3, atol=1e-4
    )
    assert model(x).equal(before)
