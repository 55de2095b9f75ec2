"""Weights that are different tensors in one memory: what is not adapted never changes, whoever writes."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import randomise
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject, merge, merged, remove
from lightning_lora.engine.memory import overlap, repeats
from lightning_lora.errors import TargetError


class Two(nn.Module):
    """Two layers; `also` reads what else there is."""

    def __init__(self, share: Callable[[Any], None]) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, dtype=torch.float64)
        self.other = nn.Linear(6, 6, dtype=torch.float64)
        self.also: Callable[[], Tensor | float] = lambda: 0.0
        share(self)
        for p in self.parameters():
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x))) + self.also()


def transposed(model: Any) -> None:
    model.other.weight = nn.Parameter(model.one.weight.t())


def same_data(model: Any) -> None:
    model.other.weight.data = model.one.weight.data


def through_numpy(model: Any) -> None:
    array = np.random.default_rng(0).normal(size=(6, 6))
    model.one.weight = nn.Parameter(torch.from_numpy(array))
    model.other.weight = nn.Parameter(torch.from_numpy(array[::-1].copy()))
    model.other.weight = nn.Parameter(torch.from_numpy(array))


def partly(model: Any) -> None:
    rows = torch.randn(9, 6, dtype=torch.float64)
    model.one.weight, model.other.weight = nn.Parameter(rows[:6]), nn.Parameter(rows[3:])


def in_steps(model: Any) -> None:
    flat = torch.randn(72, dtype=torch.float64)
    model.one.weight = nn.Parameter(flat[::2].view(6, 6))
    model.other.weight = nn.Parameter(flat[4::2].as_strided((6, 6), (1, 6)))


def a_buffer(model: Any) -> None:
    model.register_buffer("table", model.one.weight.data.view(-1)[3:9])
    model.also = lambda: model.table


def an_attribute(model: Any) -> None:
    model.kept = model.one.weight.detach()
    model.also = lambda: model.kept.sum()


def in_a_list(model: Any) -> None:
    model.kept = [model.one.weight.data[0]]
    model.also = lambda: model.kept[0].sum()


def in_another_dtype(model: Any) -> None:
    model.register_buffer("words", model.one.weight.data.view(torch.int32)[1, 1:3])
    model.also = lambda: model.words.double().sum() / 2**31


UNTRAINED = [transposed, same_data, through_numpy, partly, in_steps, a_buffer, in_another_dtype]
OVERLAPPING = [*UNTRAINED, an_attribute, in_a_list]


def one_buffer(model: Any) -> None:
    model.flat = torch.randn(72, dtype=torch.float64)
    model.one.weight, model.other.weight = (nn.Parameter(model.flat[i : i + 36].view(6, 6)) for i in (0, 36))


def a_registered_buffer(model: Any) -> None:
    one_buffer(model)
    flat = model.flat
    del model.flat
    model.register_buffer("flat", flat)


def columns(model: Any) -> None:
    model.both = torch.randn(6, 12, dtype=torch.float64)
    model.one.weight, model.other.weight = nn.Parameter(model.both[:, ::2]), nn.Parameter(model.both[:, 1::2])


def built(share: Callable[[Any], None]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Two(share), torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize("share", OVERLAPPING)
@pytest.mark.parametrize("targets", [["one"], ["one", "other"]])
@torch.no_grad()
def test_merging_changes_nothing_that_lies_in_the_memory_of_an_adapted_weight(share: Any, targets: list[str]):
    model, x = built(share)
    untouched = {"also": model.also(), "other": model.other.weight.clone()}
    inject(model, LoRAConfig(rank=2, target_modules=targets))
    randomise(model)
    expected = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), expected)
    with pytest.warns(UserWarning, match="Merging unties"):
        merge(model)
    torch.testing.assert_close(model(x), expected)
    assert torch.as_tensor(model.also()).equal(torch.as_tensor(untouched["also"]))
    if targets == ["one"]:
        assert model.other.weight.equal(untouched["other"])


@pytest.mark.parametrize("share", [one_buffer, a_registered_buffer, columns])
@torch.no_grad()
def test_views_of_one_buffer_that_overlap_nowhere_are_merged_where_they_lie(share: Any):
    model, x = built(share)
    places = [layer.weight.data_ptr() for layer in (model.one, model.other)]
    inject(model, LoRAConfig(rank=2, target_modules=["one", "other"]))
    randomise(model)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    assert [layer.weight.data_ptr() for layer in (model.one, model.other)] == places


@torch.no_grad()
def test_a_weight_whose_numbers_are_one_in_memory_is_merged_into_one_of_its_own():
    model = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    model[0].weight = nn.Parameter(torch.randn(1, 6, dtype=torch.float64).expand(4, 6), requires_grad=False)
    x = torch.randn(5, 6, dtype=torch.float64)
    inject(model, LoRAConfig(rank=2))
    randomise(model)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("share", UNTRAINED)
def test_what_shares_its_memory_is_not_trained_whole(share: Any):
    model, _ = built(share)
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'one' shares its weight with '(other|table|words)'"):
        inject(model, LoRAConfig(rank=2, target_modules=["other"], modules_to_save=["one"]))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("share", [one_buffer, columns])
def test_what_lies_beside_others_in_one_buffer_is_trained_whole(share: Any):
    model, x = built(share)
    before, expected = snapshot(model), model(x)
    inject(model, LoRAConfig(rank=2, target_modules=["other"], modules_to_save=["one"]))
    with torch.no_grad():
        model.one.weight.add_(1)
    remove(model)
    assert model(x).equal(expected)
    assert_same(snapshot(model), before)


def test_two_that_share_their_memory_are_trained_whole_together():
    model, x = built(same_data)
    model.extra = nn.Linear(2, 2)
    expected = model(x)
    inject(model, LoRAConfig(rank=2, target_modules=["extra"], modules_to_save=["one", "other"]))
    with torch.no_grad():
        model.one.weight.add_(1)
    remove(model)
    assert model(x).equal(expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("is_one_parameter", [True, False])
def test_a_bias_that_others_use_is_not_trained(bias: Any, is_one_parameter: bool):
    model, _ = built(lambda model: None)
    if is_one_parameter:
        model.register_parameter("shift", model.one.bias)
    else:
        model.register_parameter("shift", nn.Parameter(model.one.bias.data))
    model.also = lambda: model.shift
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'one.bias' shares its weight with 'shift'"):
        inject(model, LoRAConfig(rank=2, target_modules=["one"], bias=bias))
    assert_same(snapshot(model), before)


@torch.no_grad()
def test_a_bias_into_which_that_of_an_adapter_is_merged_is_untied_too():
    model, x = built(lambda model: None)
    model.other.bias = model.one.bias
    inject(model, LoRAConfig(rank=2, target_modules=["one"], lora_bias=True))
    randomise(model)
    expected = model(x)
    with pytest.warns(UserWarning, match="Merging unties a weight that is shared with other"):
        merge(model)
    torch.testing.assert_close(model(x), expected)


def test_a_constant_that_saved_modules_share_is_no_reason_to_refuse():
    model, _ = built(lambda model: None)
    mask = torch.ones(4)
    model.one.register_buffer("mask", mask[:3])
    model.other.register_buffer("mask", mask)
    inject(model, LoRAConfig(rank=2, target_modules=["other"], modules_to_save=["one"]))


def test_a_bias_of_two_layers_is_trained_where_both_are_asked_for():
    model, _ = built(lambda model: None)
    model.other.bias = model.one.bias
    with pytest.raises(TargetError, match=r"'one.bias' shares its weight with 'other.bias'"):
        inject(model, LoRAConfig(rank=2, target_modules=["one"], bias="lora_only"))
    inject(model, LoRAConfig(rank=2, target_modules=["one", "other"], bias="lora_only"))
    assert model.one.bias.requires_grad


def test_rows_of_an_embedding_whose_memory_a_head_shares_are_not_trained():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight.data = model[0].weight.data
    with pytest.raises(TargetError, match=r"trainable_token_indices: '0' shares its weight with '2'"):
        inject(model, LoRAConfig(rank=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]}))
    model[2].weight = model[0].weight
    inject(model, LoRAConfig(rank=2, target_modules=["1"], trainable_token_indices={"0": [1, 2]}))


def numbers(t: Tensor, of: Tensor) -> set[int]:
    """The places in `of`, a flat tensor of bytes, that `t` takes, byte by byte."""
    first = t.data_ptr() - of.data_ptr()
    at = torch.zeros(t.shape, dtype=torch.int64)
    for i, (size, stride) in enumerate(zip(t.shape, t.stride())):
        at += (torch.arange(size) * stride).view(-1, *(1,) * (t.dim() - i - 1))
    return {first + int(k) * t.element_size() + byte for k in at.flatten() for byte in range(t.element_size())}


def test_overlap_says_what_counting_bytes_says():
    draw, memory = random.Random(0), torch.zeros(512, dtype=torch.uint8)

    def drawn() -> Tensor:
        dtype = draw.choice([torch.uint8, torch.int16, torch.float32, torch.float64])
        flat = memory[draw.randrange(8) * 8 :].view(dtype) if dtype.itemsize > 1 else memory[draw.randrange(60) :]
        sizes = [draw.randint(1, 3) for _ in range(draw.randint(1, 3))]
        return flat.as_strided(sizes, [draw.randrange(5) for _ in sizes], draw.randrange(8))

    found = set()
    for _ in range(3000):
        a, b = drawn(), drawn()
        shares = bool(numbers(a, memory) & numbers(b, memory))
        assert overlap(a, b) is shares, (a.shape, a.stride(), b.shape, b.stride())
        assert repeats(a) is (len(numbers(a, memory)) < a.numel() * a.element_size())
        found.add(shares)
    assert found == {True, False}


def test_tensors_without_memory_overlap_with_nothing():
    a = torch.randn(3, 3)
    for other in (torch.empty(3, device="meta"), torch.empty(0), a[:0], torch.eye(3).to_sparse(), copy.deepcopy(a)):
        assert not overlap(a, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert overlap(a, a[1:, 1:])


class Recurrent(nn.Module):
    """A GRU of which two layers have one recurrent weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, num_layers=2, dtype=torch.float64)
        self.gru.weight_hh_l1 = self.gru.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["weight_hh_l1"], ["weight_hh_l0", "weight_hh_l1"]], ids=str)
def test_merging_changes_no_other_use_of_a_parameter_that_one_module_has_twice(names: list[str]):
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(5, 2, 4, dtype=torch.float64)
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=names))
    randomise(model)
    adapted = model(x)
    with pytest.warns(UserWarning, match="unties a weight that is shared with gru.weight_hh_l"):
        merge(model)
    # float64: some forty products of a gate's sums, in another order.
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-13)
