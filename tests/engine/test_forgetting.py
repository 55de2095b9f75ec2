"""What is remembered of classes goes away with them: a process that makes models for days ends as it began."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject, merge, remove
from lightning_lora.engine.bank import Bank
from lightning_lora.engine.swap import swapped_class


def trial(use: Any) -> list[weakref.ref[type]]:
    """A model whose classes were made in a function, and closed over something large, is used and dropped."""
    kept = torch.zeros(1000)

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + kept.sum()

    class Norm(nn.BatchNorm1d):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = Layer(4, 4), Norm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    model = Model()
    inject(model, LoRAConfig(rank=2, target_modules=["first", "second"]))
    model(torch.randn(3, 4)).sum().backward()
    use(model)
    return [weakref.ref(Layer), weakref.ref(Norm), weakref.ref(Model)]


def bank(model: nn.Module) -> None:
    remove(model)
    with Bank(model, capacity=1).use(None):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("use", [lambda model: None, remove, merge, bank], ids=["adapted", "removed", "merged", "bank"])
def test_a_class_that_a_function_made_goes_away_with_its_model(use: Any) -> None:
    left = [found for _ in range(3) for found in trial(use)]
    gc.collect()
    assert [found() for found in left if found() is not None] == []


def test_a_class_is_made_once_for_as_long_as_its_base_lives() -> None:
    def adapted() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        return model

    first = type(adapted()[0])
    gc.collect()
    assert type(adapted()[0]) is first


def test_a_subclass_does_not_take_its_parents_class_for_its_own() -> None:
    class Child(nn.Linear):
        pass

    class Mixin:
        pass

    made = swapped_class("X", Mixin, nn.Linear)
    assert swapped_class("X", Mixin, Child) is not made
    assert issubclass(swapped_class("X", Mixin, Child), Child)
    assert pickle.loads(pickle.dumps(vars(nn.Linear)["_lora_remembered"])) == {}
