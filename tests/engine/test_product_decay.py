"""Decay on the product, against autograd over every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case
from torch import nn

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.engine.layers import Pair, pairs
from lightning_lora.engine.optim import lora_plus
from lightning_lora.engine.product_decay import half_square, product_decay
from lightning_lora.errors import ConfigError, TrainingError


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_square_and_its_gradients_are_those_of_the_whole_product(case: Case):
    model = case.adapted().double()
    for pair in pairs(model):
        own = [pair.A.requires_grad_(), pair.B.requires_grad_()]  # where it is frozen, too
        whole = pair.module.delta_weight(pair.parameter).square().sum() / 2
        torch.testing.assert_close(half_square(pair), whole)
        torch.testing.assert_close(torch.autograd.grad(half_square(pair), own), torch.autograd.grad(whole, own))


def linear(**fields: Any) -> tuple[nn.Module, Pair]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4))
    inject(model, LoRAConfig(**{"rank": 2, "alpha": 3, "target_modules": ["0"], **fields}))
    (pair,) = pairs(model)
    with torch.no_grad():
        pair.B.normal_()
    return model, pair


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("ratio", [None, 4.0], ids=["plain", "lora-plus"])
def test_a_step_decays_after_the_optimizers_own_by_each_factors_rate(kind: Any, ratio: float | None):
    (model, pair), (twin, other) = linear(), linear()
    optimizers = [kind([{"params": [p.A, p.B], "lr": 0.1}]) for p in (pair, other)]
    product_decay(optimizers[0], model, 0.5)
    for optimizer, net in zip(optimizers, (model, twin)):
        if ratio is not None:
            lora_plus(optimizer, net, ratio)
        net(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
    by_A, by_B = torch.autograd.grad(half_square(other), [other.A, other.B])
    torch.testing.assert_close(pair.A, other.A - 0.1 * 0.5 * by_A)
    torch.testing.assert_close(pair.B, other.B - 0.1 * (ratio or 1) * 0.5 * by_B)


def test_without_a_gradient_of_the_loss_every_step_brings_the_update_closer_to_zero():
    model, pair = linear(init="pissa")
    optimizer = torch.optim.SGD([pair.A, pair.B], lr=0.05)
    product_decay(optimizer, model, 1.0)
    sizes = []
    for _ in range(100):
        optimizer.step()
        sizes.append(half_square(pair).item())
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]
    assert float(pair.A.detach().norm()) > 0.1  # of the start, which is left out, nothing is taken


def test_a_frozen_factor_stays():
    model, pair = linear(freeze_a=True)
    before = pair.A.clone()
    optimizer = torch.optim.SGD([pair.B], lr=0.1)
    product_decay(optimizer, model, 1.0)
    changed = pair.B.clone()
    optimizer.step()
    assert pair.A.equal(before)
    assert not pair.B.equal(changed)


@pytest.mark.parametrize("strength", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_strength_that_cannot_be_is_refused(strength: Any):
    model, pair = linear()
    with pytest.raises(ConfigError, match="product_decay is a finite number above 0"):
        product_decay(torch.optim.SGD([pair.B], lr=0.1), model, strength)


def test_a_search_along_a_line_is_refused():
    model, pair = linear()
    with pytest.raises(TrainingError, match="product_decay cannot be used with LBFGS"):
        product_decay(torch.optim.LBFGS([pair.B]), model, 0.1)
