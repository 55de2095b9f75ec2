"""What a newcomer adds stands in one place: a kind of layer for every feature, and a measured initialiser."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Equal, EqualLoRA
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject, pairs
from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.engine.calibration import calibrate
from lightning_lora.engine.inits import INITS, MEASURES, Factors, init, measure
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.cell import Cell
from lightning_lora.engine.layers.linear import LinearCell
from lightning_lora.engine.product_decay import half_square
from lightning_lora.errors import ConfigError, TargetError


@pytest.fixture
def equal() -> Iterator[Any]:
    """The kind of layer of cases.py as a newcomer completes it: the vectors that its weight multiplies, and its cell
    of a bank."""

    class Whole(EqualLoRA):
        lora_by_position = True

        @staticmethod
        def inputs_of(module: Any, x: Tensor) -> Tensor:
            return 0.5 * x.reshape(-1, x.shape[-1])

    class EqualCell(LinearCell, serves=Whole):
        def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
            super().store(slot, A, B, 0.5 * scale)

    Adapter.geometries[Equal] = Whole
    yield Equal
    Adapter.geometries[Equal] = EqualLoRA
    del Cell.kinds[Whole]


def test_a_layer_of_ones_own_is_served_by_a_bank(equal: Any):
    torch.manual_seed(0)
    model, x = nn.Sequential(equal()), torch.randn(3, 8)
    W, b = model[0].weight.detach(), model[0].bias.detach()
    bank = Bank(model, target_modules=["0"], capacity=2, max_rank=2)
    made = {name: (torch.randn(2, 8), torch.randn(6, 2)) for name in "ab"}
    for name, (A, B) in made.items():
        bank.put(name, {"0": LayerFactors(A, B, scale=1.5)})
    with bank.use(["a", None, "b"]):
        output = model(x)
    changes = [1.5 * made["a"][1] @ made["a"][0], torch.zeros_like(W), 1.5 * made["b"][1] @ made["b"][0]]
    expected = torch.stack([0.5 * (W + change) @ row + b for row, change in zip(x, changes)])
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_a_layer_of_ones_own_is_measured_and_decayed(equal: Any, name: str):
    torch.manual_seed(0)
    model, x = nn.Sequential(equal()), torch.randn(20, 8)
    config = LoRAConfig(rank=2, target_modules=["0"], init=name)
    measured = calibrate(model, config, lambda x: model(x).square().sum(), [x])
    X, W = 0.5 * x, model[0].weight.detach()
    gradient = 2 * model(x).detach().T @ X  # of the sum of squares, by the weight
    for letter, matrix in measured["0"].items():
        torch.testing.assert_close(matrix, X.T @ X / len(X) if letter == "C" else gradient, rtol=1e-4, atol=1e-4)
    before = model(x)
    inject(model, config, measured=measured)
    assert model(x).equal(before)
    with torch.no_grad():
        model[0].lora_B.normal_()
    (pair,) = pairs(model)
    change = model[0].weight.double() - W.double()  # a read of the weight gives W + s B A
    torch.testing.assert_close(half_square(pair).double(), change.square().sum() / 2, rtol=1e-4, atol=1e-4)


class Reader(nn.Module):
    """A model that takes tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 8), layer

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.words(input_ids))


def test_a_layer_of_ones_own_has_an_adapter_that_acts_from_its_invocation_on(equal: Any):
    model, ids = Reader(equal()), torch.tensor([[2, 3, 1, 4]])
    before = model(input_ids=ids)
    inject(model, LoRAConfig(rank=2, target_modules=["layer"], alora_invocation_tokens=[1]))
    with torch.no_grad():
        model.layer.lora_B.normal_()
    changed = (model(input_ids=ids) != before).any(-1)
    assert changed.tolist() == [[False, False, True, True]]


def test_a_layer_whose_inputs_nobody_has_named_is_refused_by_name():
    model = nn.Sequential(Equal())
    config = LoRAConfig(rank=2, target_modules=["0"], init="eva")
    with pytest.raises(TargetError, match="The inputs of 0 cannot be measured"):
        calibrate(model, config, model, [torch.randn(2, 8)])


@pytest.fixture
def loudest() -> Iterator[str]:
    """A measured initialiser: A picks the features that are the largest in the data."""

    @measure("the mean size of each feature")
    def a(X: Tensor) -> Tensor:
        return X.abs().sum(0)

    @init
    def loudest(a: Tensor, rank: int, d_in: int) -> Tensor:
        return torch.eye(d_in)[a.topk(rank).indices]

    yield "loudest"
    del INITS["loudest"], MEASURES["a"]


def test_a_measured_initialiser_of_ones_own_is_two_functions(loudest: str):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4) * torch.tensor([1.0, 30.0, 1.0, 90.0])
    config = LoRAConfig(rank=2, target_modules=["0"], init=loudest)
    with pytest.raises(
        ConfigError, match=r"starts from the mean size of each feature, and `measured` has none for 0.*calibrate"
    ):
        inject(copy.deepcopy(model), config)
    measured = calibrate(model, config, model, [x[:5], x[5:]])
    torch.testing.assert_close(measured, {"0": {"a": x.abs().mean(0)}})
    inject(model, config, measured=measured)
    assert model[0].lora_A.argmax(1).tolist() == [3, 1]
    # Layers that do not multiply their inputs refuse a measure of inputs, though they know nothing of this one.
    for other in (nn.Embedding(4, 3), nn.ConvTranspose1d(4, 3, 2)):
        with pytest.raises(TargetError, match="loudest"):
            inject(nn.Sequential(other), config, measured=measured)


def test_a_measure_says_what_it_is_computed_from():
    with pytest.raises(ConfigError, match=r"takes x\. A measure takes X, or gradient"):

        @measure("anything")
        def strange(x: Tensor) -> Tensor:
            return x

    with pytest.raises(ConfigError, match="something else that initialisers ask for by 'W'"):

        @measure("anything")
        def W(X: Tensor) -> Tensor:
            return X

    with pytest.raises(ConfigError, match=r"asks for strange\. It may ask for: C, E, G, W, d_in"):

        @init
        def lost(strange: Tensor) -> Factors:
            raise AssertionError
