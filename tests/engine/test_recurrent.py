"""Recurrent layers: every option of torch's, packed sequences, moves and casts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import randomise, reference
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_lora.engine import LoRAConfig, inject, merge, merged, remove
from lightning_lora.errors import TargetError

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def adapted(layer: nn.Module, **fields: Any) -> Any:
    model = nn.ModuleDict({"layer": layer})
    inject(model, LoRAConfig(rank=2, target_modules=["layer"], **fields))
    randomise(model)
    return model


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_packed_sequences_and_a_first_state_give_the_output_of_the_formula(kind: Any):
    torch.manual_seed(0)
    model = adapted(kind(4, 6, 2, bidirectional=True, batch_first=True)).double()
    plain = reference(model)
    x = pack_padded_sequence(torch.randn(3, 5, 4).double(), torch.tensor([5, 3, 2]), batch_first=True)
    h = torch.randn(4, 3, 6).double()
    state = (h, h.tanh()) if kind is nn.LSTM else h
    ours, theirs = model["layer"](x, state), plain["layer"](x, state)
    torch.testing.assert_close(pad_packed_sequence(ours[0])[0], pad_packed_sequence(theirs[0])[0])
    torch.testing.assert_close(ours[1], theirs[1])


@torch.no_grad()
def test_a_layer_that_was_moved_cast_flattened_or_given_new_weights_computes_with_what_it_has_now():
    model = adapted(nn.LSTM(4, 6))
    layer, x = model["layer"], torch.randn(3, 2, 4)
    model.double()
    layer.flatten_parameters()
    torch.testing.assert_close(layer(x.double())[0], reference(model)["layer"](x.double())[0])
    layer.weight_hh_l0 = nn.Parameter(torch.randn_like(layer._parameters["weight_hh_l0"]))
    torch.testing.assert_close(layer(x.double())[0], reference(model)["layer"](x.double())[0])
    model.float()
    layer._parameters["weight_ih_l0"].add_(1)
    torch.testing.assert_close(layer(x)[0].double(), reference(model)["layer"](x.double())[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_merged_and_removed_layers_compute_with_their_own_weights_again():
    base = nn.GRU(4, 6)
    x = torch.randn(3, 2, 4)
    before = base(x)[0]
    model = adapted(base)
    output = base(x)[0]
    with merged(model):
        assert type(base) is nn.GRU
        torch.testing.assert_close(base(x)[0], output)
        base.flatten_parameters()
        torch.testing.assert_close(base(x)[0], output)
    torch.testing.assert_close(base(x)[0], output)
    baked = copy.deepcopy(model)
    merge(baked)
    torch.testing.assert_close(baked["layer"](x)[0], output)
    assert all(w is p for w, p in zip(baked["layer"]._flat_weights, baked["layer"].parameters()))
    remove(model)
    assert base(x)[0].equal(before)
    assert all(w is p for w, p in zip(base._flat_weights, base.parameters()))


def test_every_weight_of_a_layer_learns():
    model = adapted(nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, dropout=0.1), dropout=0.1)
    report = [pair.parameter for pair in model["layer"].lora_pairs("layer")]
    assert len(report) == 12
    model["layer"](torch.randn(5, 2, 4))[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_its_biases_are_trained_where_that_is_asked_for(bias: Any):
    model = nn.ModuleDict({"layer": nn.LSTM(4, 6), "other": nn.Linear(4, 4)})
    report = inject(model, LoRAConfig(rank=2, target_modules=["layer"], bias=bias))
    own = ("layer.bias_ih_l0", "layer.bias_hh_l0")
    assert report.trained_whole == (own if bias == "lora_only" else (*own, "other.bias"))
    model["layer"](torch.randn(3, 2, 4))[0].sum().backward()
    assert model["layer"].bias_ih_l0.grad is not None


def test_weights_that_are_computed_from_others_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0")
    with pytest.raises(TargetError, match="its weight_hh_l0 is computed from other parameters"):
        inject(nn.ModuleDict({"layer": layer}), LoRAConfig(rank=2, target_modules=["layer"]))


@torch.no_grad()
def test_a_layer_registered_twice_is_adapted_once():
    shared = nn.GRU(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = inject(model, LoRAConfig(rank=2, target_modules=["b"]))
    randomise(model)
    assert [m.name for m in report.modules] == ["a.weight_ih_l0", "a.weight_hh_l0"]
    assert "also registered as b" in str(report)
    x = torch.randn(3, 2, 4).double()
    model.double()
    torch.testing.assert_close(model["b"](model["a"](x)[0])[0], reference(model)["b"](reference(model)["a"](x)[0])[0])
