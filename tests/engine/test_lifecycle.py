"""Inject, remove and merge in every order; a call that raises leaves the model as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import randomise
from snapshot import assert_same, snapshot
from torch import nn

from lightning_lora.engine import LoRAConfig, adapter_state_dict, adapters, inject, injection_of, merge, merged, remove
from lightning_lora.engine.inits import INITS, Init
from lightning_lora.errors import AdapterStateError

CONFIG = LoRAConfig(rank=2, target_modules=["a"])


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 4), norm=nn.BatchNorm1d(4), out=nn.Linear(4, 2)))


def nested() -> nn.Module:
    return nn.Sequential(OrderedDict(body=net(), a=nn.Linear(2, 4)))


def test_injecting_twice_is_an_error_that_says_what_to_do():
    model = net()
    inject(model, CONFIG)
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match=r"has adapters already \(a\).*remove\(model\)"):
        inject(model, CONFIG)
    with pytest.raises(AdapterStateError, match="has adapters already"):
        inject(nn.Sequential(model), CONFIG)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("call", [remove, merge, adapter_state_dict, injection_of])
def test_what_needs_adapters_says_that_there_are_none(call: Any):
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="Sequential"):
        call(model)
    assert_same(snapshot(model), before)


def test_merged_without_adapters_says_that_there_are_none():
    with pytest.raises(AdapterStateError, match="has no adapters"), merged(net()):
        pass


def test_removing_from_another_module_than_the_adapted_one_names_the_right_one():
    model = nested()
    inject(model.body, CONFIG)
    with pytest.raises(AdapterStateError, match="its submodule 'body'"):
        remove(model)
    inner = nested()
    inject(inner, CONFIG)
    for undo in (remove, merge):
        with pytest.raises(AdapterStateError, match="inject was"):
            undo(inner.body)
    assert len(list(adapters(inner))) == 2


@pytest.mark.parametrize("undo", [remove, merge])
def test_a_model_can_be_adapted_again_after(undo: Any):
    model = net()
    attributes = set(model.__dict__)
    for _ in range(2):
        inject(model, CONFIG)
        randomise(model)
        undo(model)
        assert set(model.__dict__) == attributes
        assert all(p.requires_grad for p in model.parameters())
        assert type(model.a) is nn.Linear
        assert type(model.norm) is nn.BatchNorm1d


def test_frozen_parameters_stay_frozen_and_the_others_come_back_trainable():
    for undo in (remove, merge):
        model = net()
        model.a.weight.requires_grad_(False)
        model.out.bias.requires_grad_(False)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["out"]))
        assert model.out.bias.requires_grad
        undo(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_gradients_of_what_is_frozen_again_are_dropped():
    model = net()
    model.out.bias.requires_grad_(False)
    inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["out"]))
    model(torch.randn(3, 4)).sum().backward()
    remove(model)
    assert model.out.bias.grad is None


def test_an_initialiser_that_fails_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fails_the_second_time(rank: int, d_in: int) -> torch.Tensor:
        calls.append(rank)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return torch.zeros(rank, d_in)

    monkeypatch.setitem(INITS, "kaiming", Init(fails_the_second_time, frozenset(("rank", "d_in"))))
    model = nested()
    model.body.out.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        inject(model, CONFIG)
    assert_same(snapshot(model), before)


def test_two_parts_of_a_model_can_be_adapted_apart_and_removed_apart():
    model = nn.Sequential(net(), net())
    before = snapshot(model)
    inject(model[0], CONFIG)
    inject(model[1], LoRAConfig(rank=1, target_modules=["out"], modules_to_save=["a"]))
    assert list(adapter_state_dict(model)) == [
        "0.a.lora_A", "0.a.lora_B", "1.out.lora_A", "1.out.lora_B", "1.a.weight", "1.a.bias",
    ]  # fmt: skip
    remove(model[1])
    assert [name for name, _ in adapters(model)] == ["0.a"]
    remove(model[0])
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("undo", [remove, merge])
def test_an_adapted_part_of_an_adapted_model_is_undone_with_it(undo: Any):
    model = nested()
    trainable = [p.requires_grad for p in model.parameters()]
    inject(model, LoRAConfig(rank=2, target_modules=r"a"))
    inject(model.body, CONFIG)
    undo(model)
    assert not list(adapters(model))
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert type(model.body.norm) is nn.BatchNorm1d
    inject(model, CONFIG)


def test_inside_merged_neither_inject_nor_remove_nor_merge_is_let_through():
    model = net()
    inject(model, CONFIG)
    before = snapshot(model)
    with merged(model):
        for call in (inject, remove, merge):
            with pytest.raises(AdapterStateError, match="leave `with merged"):
                call(model)
    assert_same(snapshot(model), before)


def test_a_head_that_was_replaced_after_injection_is_named_and_nothing_is_changed():
    model = net()
    inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["out"]))
    model.out = nn.Linear(4, 7)
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match=r"out\.weight, out\.bias.*replaced"):
        remove(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_adapter_that_was_made_without_gradients_can_be_trained(context: Any):
    model = net()
    with context():
        inject(model, CONFIG)
    model(torch.randn(3, 4)).sum().backward()
    assert model.a.lora_B.grad is not None


def test_a_model_that_was_compiled_before_follows_every_change():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.a(x)

    model, x = Doubled(), torch.randn(3, 4)
    model.compile(fullgraph=True, backend="eager")
    base = model(x)
    inject(model, CONFIG)
    randomise(model)
    output = model(x)
    assert not torch.allclose(output, base)
    with merged(model):
        torch.testing.assert_close(model(x), output)
    assert model(x).equal(output)
    remove(model)
    assert model(x).equal(base)
    torch._dynamo.reset()


def test_hooks_and_isinstance_survive_injection():
    model, seen = net(), []
    model.a.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    module, weight = model.a, model.a.weight
    inject(model, CONFIG)
    model(torch.randn(3, 4))
    assert seen == [(3, 4)]
    assert model.a is module
    assert model.a._parameters["weight"] is weight
    assert isinstance(model.a, nn.Linear)
    assert "rank=2, scale=8" in repr(model.a)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dropout_is_on_the_adapters_input_alone_and_in_training_alone(training: bool):
    model = nn.Sequential(nn.Linear(64, 3))
    x = torch.randn(8, 64)
    base = model(x)
    inject(model, LoRAConfig(rank=2, dropout=0.5))
    randomise(model)
    model.train(training)
    assert model(x).equal(model(x)) is not training
    with torch.no_grad():
        model[0].lora_B.zero_()
    assert model(x).equal(base)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_frozen_batch_norm_keeps_its_statistics_and_gets_its_mode_back(mode: bool):
    model = net()
    model.norm.train(mode)
    before = snapshot(model)
    inject(model, LoRAConfig(rank=2, target_modules=["a"], bias="all"))
    for twin in (model, copy.deepcopy(model)):
        twin(torch.randn(6, 4) + 1)
        assert not twin.norm.training
        assert twin.norm.running_mean.equal(before["values"]["norm.running_mean"])
    remove(model)
    assert_same(snapshot(model), before)
    model.train(mode)
    inject(model, CONFIG)
    model.train(not mode)
    remove(model)
    assert model.norm.training is not mode


def test_a_norm_that_was_replaced_after_injection_is_left_alone_by_remove():
    model = net()
    inject(model, CONFIG)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    remove(model)
    assert type(model.norm) is nn.SyncBatchNorm
    assert type(model.a) is nn.Linear


def test_a_batch_norm_that_is_trained_whole_moves_its_statistics_and_they_are_saved_and_restored():
    model = net()
    before = snapshot(model)
    report = inject(model, LoRAConfig(rank=2, target_modules=["a"], modules_to_save=["norm"]))
    buffers = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert report.trained_whole == ("norm.weight", "norm.bias", *buffers)
    model(torch.randn(6, 4) + 1)
    saved = adapter_state_dict(model)
    assert not saved["norm.running_mean"].equal(before["values"]["norm.running_mean"])
    assert int(saved["norm.num_batches_tracked"]) == 1
    remove(model)
    assert_same(snapshot(model), before)
