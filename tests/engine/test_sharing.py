"""Modules registered twice and weights with two users: handled right, or refused, never half done."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import randomise, reference
from snapshot import assert_same, snapshot
from tiny_transformers import llama
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_state_dict, adapters, inject, merge, merged, remove
from lightning_lora.errors import TargetError


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


def twice() -> nn.Module:
    """One Linear under two names, so it is called twice."""
    shared = nn.Linear(4, 4)
    return nn.Sequential(OrderedDict(a=shared, act=nn.Tanh(), b=shared, out=nn.Linear(4, 2)))


@pytest.mark.parametrize("entry", ["a", "b"])
@torch.no_grad()
def test_a_module_registered_twice_is_adapted_under_both_names(entry: str):
    model = twice()
    report = inject(model, LoRAConfig(rank=2, target_modules=[entry]))
    randomise(model)
    assert isinstance(model.a, type(model.b))
    assert model.a is model.b
    assert "also registered as b" in str(report)
    assert list(adapter_state_dict(model)) == ["a.lora_A", "a.lora_B"]
    x = torch.randn(3, 4, dtype=torch.float64)
    model.double()
    exact = reference(model)(x)
    torch.testing.assert_close(model(x), exact)
    with merged(model):
        torch.testing.assert_close(model(x), exact)
    merge(model)
    torch.testing.assert_close(model(x), exact)


def test_a_module_registered_twice_comes_back_bit_for_bit():
    model = twice()
    before = snapshot(model)
    inject(model, LoRAConfig(rank=2))
    randomise(model)
    remove(model)
    assert_same(snapshot(model), before)


def test_excluding_a_module_by_its_second_name_excludes_it():
    report = inject(twice(), LoRAConfig(rank=2, target_modules=["a", "out"], exclude_modules=["b"]))
    assert [m.name for m in report.modules] == ["out"]


@pytest.mark.parametrize("target", ["embed", "head"])
@torch.no_grad()
def test_merging_one_user_of_a_tied_weight_unties_it_and_leaves_the_other_alone(target: str):
    model, x = Tied().eval(), torch.randint(0, 9, (2, 5))
    other = model.head if target == "embed" else model.embed
    report = inject(model, LoRAConfig(rank=2, target_modules=[target]))
    assert "shares its weight with" in str(report)
    assert "only this module's use of it is adapted" in str(report)
    randomise(model)
    weight, value, output = other.weight, other.weight.clone(), model(x)
    before = snapshot(model)
    with merged(model):
        assert other.weight is weight
        torch.testing.assert_close(model(x), output)
    assert_same(snapshot(model), before)
    with pytest.warns(UserWarning, match="unties a weight"):
        merge(model)
    torch.testing.assert_close(model(x), output)
    assert other.weight is weight
    assert weight.equal(value)
    assert model.embed.weight is not model.head.weight
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_both_users_of_a_tied_weight_can_be_adapted_and_merged():
    model, x = Tied().eval(), torch.randint(0, 9, (2, 5))
    inject(model, LoRAConfig(rank=2, target_modules=["embed", "head"]))
    randomise(model)
    output = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), output)
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    with pytest.warns(UserWarning, match="unties a weight"):
        merge(model)
    torch.testing.assert_close(model(x), output)


def test_an_untying_merge_that_is_not_wanted_changes_nothing():
    model = Tied()
    inject(model, LoRAConfig(rank=2, target_modules=["embed"]))
    randomise(model)
    before = snapshot(model)
    with pytest.raises(UserWarning, match="unties"):  # warnings are errors here
        merge(model)
    assert_same(snapshot(model), before)


def test_training_one_user_of_a_tied_weight_whole_is_refused():
    model = Tied()
    before = snapshot(model)
    with pytest.raises(TargetError, match="'head' shares its weight with 'embed'"):
        inject(model, LoRAConfig(rank=2, target_modules=["mix"], modules_to_save=["head"]))
    assert_same(snapshot(model), before)


def test_training_both_users_of_a_tied_weight_whole_trains_and_saves_it_once():
    model = Tied()
    before = snapshot(model)
    report = inject(model, LoRAConfig(rank=2, target_modules=["mix"], modules_to_save=["head", "embed"]))
    assert report.trained_whole == ("embed.weight",)
    with torch.no_grad():
        model.head.weight.add_(1)
    remove(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model_with_tied_embeddings_adapts_merges_and_saves(tied: bool, tmp_path: Any):
    model, x = llama(tied=tied).eval(), torch.randint(0, 32, (2, 5))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    head = model.lm_head.weight.detach().clone()
    inject(model, LoRAConfig(rank=2, target_modules=["embed_tokens", "q_proj"]))
    randomise(model)
    with torch.no_grad():
        output = model(x).logits
        with merged(copy.deepcopy(model)):
            torch.testing.assert_close(model(x).logits, output)
        if tied:
            with pytest.warns(UserWarning, match="tie_word_embeddings"):
                merge(model)
        else:
            merge(model)
        assert model.lm_head.weight.equal(head)
        torch.testing.assert_close(model(x).logits, output)
        model.config.tie_word_embeddings = False
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(x).logits, output)
    assert not list(adapters(model))
