"""Dropout of ranks and of whole adapters: its mean by all that can be drawn, and nothing of it in eval mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapters, inject

RANK = 3
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), (5,)),
}


def adapted(kind: str = "linear", **fields: Any) -> tuple[nn.Module, Tensor]:
    layer, shape = LAYERS[kind]
    model = nn.Sequential(layer())
    inject(model, LoRAConfig(**{"rank": RANK, "target_modules": ["0"], **fields}))
    randomise(model)
    return model, torch.randint(0, 7, shape) if kind == "embedding" else torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(("each", "whole"), [(0.4, 0.0), (0.0, 0.3), (0.4, 0.3)])
@torch.no_grad()
def test_the_mean_over_all_that_can_be_dropped_is_the_output_without_dropout(
    kind: str, init: str, each: float, whole: float, monkeypatch: pytest.MonkeyPatch
):
    model, x = adapted(kind, init=init, rank_dropout=each, module_dropout=whole)
    expected = model.eval()(x).double()
    model.train()
    mean, total = torch.zeros_like(expected), 0.0
    for kept in itertools.product([0, 1], repeat=RANK + 1):
        *ranks, module = kept
        draws = {RANK: torch.tensor(ranks).float(), 1: torch.tensor([module]).float()}
        # A number at or above the probability keeps: 1 always does, and 0 never but where nothing is dropped.
        monkeypatch.setattr(torch, "rand", lambda size, draws=draws, **_: draws[size])
        chance = (1 - whole if module else whole) * torch.tensor([1 - each if r else each for r in ranks]).prod().item()
        mean += chance * model(x)
        total += chance
    assert total == pytest.approx(1)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_dropped_is_drawn_by_its_probability():
    model, x = adapted(rank_dropout=0.3, module_dropout=0.2)
    layer: Any = model[0]
    layer.lora_B.copy_(torch.eye(4, RANK))
    bare = nn.functional.linear(x, layer._parameters["weight"], layer.bias)
    outputs = torch.stack([(model(x) - bare).abs().amax(0)[:RANK] > 0 for _ in range(4000)]).float()
    # Three deviations of a share of 4000 draws.
    assert float(outputs.any(1).float().mean()) == pytest.approx(0.8 * (1 - 0.3**RANK), abs=0.02)
    assert outputs.mean(0).tolist() == pytest.approx([0.8 * 0.7] * RANK, abs=0.024)


@torch.no_grad()
def test_in_eval_mode_nothing_is_dropped_and_nothing_drawn():
    model, x = adapted(rank_dropout=0.5, module_dropout=0.5)
    plain, _ = adapted()
    plain.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    assert model.eval()(x).equal(plain(x))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_dropped_has_a_gradient_of_zero_as_ddp_needs(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, x = adapted(kind, rank_dropout=0.5, module_dropout=0.5)
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.zeros(size))
    model(x).square().sum().backward()
    for _, layer in adapters(model):
        for p in (layer.lora_A, layer.lora_B):
            assert p.grad is not None
            assert not p.grad.any()
