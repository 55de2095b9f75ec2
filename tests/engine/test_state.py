"""Adapters as tensors: strict both ways, and the fingerprint of a base."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import randomise
from snapshot import assert_same, snapshot
from torch import nn

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    base_fingerprint,
    inject,
    load_adapter_state_dict,
)
from lightning_lora.engine.state import is_finite
from lightning_lora.errors import AdapterFormatError


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), out=nn.Linear(4, 2)))
    inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["out", "norm"]))
    return model


def test_a_state_dict_is_detached_and_shares_the_models_memory():
    model = adapted()
    state = adapter_state_dict(model)
    assert not any(t.requires_grad for t in state.values())
    assert state["a.lora_A"].data_ptr() == model.a.lora_A.data_ptr()
    assert all(p.requires_grad for p in adapter_tensors(model).values() if isinstance(p, nn.Parameter))


def _without(name: str) -> Any:
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("a.lora_B"), "missing: a.lora_B"),
        (_without("out.bias"), "missing: out.bias"),
        (lambda state: {**state, "b.lora_A": torch.zeros(1)}, "unexpected: b.lora_A"),
        (lambda state: {**state, 7: torch.zeros(1)}, "unexpected: 7"),
        (lambda state: {**state, "a.lora_A": torch.zeros(3, 4)}, r"a.lora_A has shape \(3, 4\) .*\(2, 4\)"),
        (lambda state: {**state, "a.lora_A": state["a.lora_A"] * float("nan")}, "a.lora_A holds values .* not finite"),
        (lambda state: {**state, "a.lora_A": torch.zeros(2, 4, dtype=torch.int)}, "a.lora_A is torch.int32"),
        (lambda state: {**state, "a.lora_A": [[0.0]]}, "a.lora_A is a list"),
        (lambda state: {}, "missing: a.lora_A"),
        (lambda state: list(state), "is a list, not a state dict"),
        (lambda state: None, "is a NoneType, not a state dict"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_is_loaded(spoil: Any, message: str):
    model = adapted()
    state = {name: t + 1 for name, t in adapter_state_dict(model).items()}
    before = snapshot(model)
    with pytest.raises(AdapterFormatError, match=message):
        load_adapter_state_dict(model, spoil(state))
    assert_same(snapshot(model), before)


def test_all_that_does_not_fit_is_named_at_once():
    model = adapted()
    with pytest.raises(AdapterFormatError, match=r"missing: .*unexpected: x"):
        load_adapter_state_dict(model, {"x": torch.zeros(1)})


def test_a_state_in_half_precision_is_widened_as_it_is_loaded():
    model = adapted()
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in adapter_state_dict(model).items()}
    load_adapter_state_dict(model, state)
    assert model.a.lora_A.dtype == torch.float32
    assert model.a.lora_A.equal(state["a.lora_A"].float())


def test_the_fingerprint_is_the_bases_whatever_is_trained_and_however_it_was_cast():
    first = adapted()
    mark = base_fingerprint(first)
    randomise(first)
    with torch.no_grad():
        first.out.weight.add_(1)
    assert base_fingerprint(first) == mark
    assert base_fingerprint(adapted().to(torch.bfloat16)) == mark
    other = adapted()
    with torch.no_grad():
        other.a.weight[0, 0] += 1
    assert base_fingerprint(other) != mark


def test_the_fingerprint_of_a_base_is_the_one_that_files_carry():
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(2**11, 2**10 + 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.arange(p.numel()) % 251).reshape(p.shape) / 7)
    model.register_parameter("steps", nn.Parameter(torch.tensor([3, 1, 2]), requires_grad=False))
    assert base_fingerprint(model) == "a80cbdb849ec89c9"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_each_number_is_even_where_their_sum_overflows(dtype):
    largest = torch.full((8,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    for broken in (float("inf"), float("-inf"), float("nan")):
        one = torch.zeros(8, dtype=dtype)
        one[3] = broken
        assert not is_finite(one)
        assert not is_finite(torch.stack([one, -one]))
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.empty(0))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_weight_of_the_base_is_a_part_of_its_fingerprint(layout):
    class Graph(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            edges = (weight * torch.eye(4)).to_sparse(layout=layout)
            self.edges = nn.Parameter(edges, requires_grad=False)
            self.linear = nn.Linear(4, 4)

    prints = [base_fingerprint(Graph(weight)) for weight in (1.0, 1.0, 2.0)]
    assert prints[0] == prints[1] != prints[2]
    model = Graph(1.0)
    inject(model, LoRAConfig(rank=2, target_modules=["linear"]))
    assert base_fingerprint(model) == prints[0]
