"""Adapters that are started later than they are made; an initialiser of one's own, and the promises that it keeps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict, start_adapters
from lightning_lora.engine.inits import INITS, Factors, Whole, init
from lightning_lora.errors import ConfigError

from . import test_contract as contract
from .test_inits import D_IN, LAYERS, RANK, covariance, matrix, model, started

# Left at zero, for what is loaded right after.


@pytest.mark.parametrize("name", ["kaiming", "pissa", "eva", "orthogonal"])
def test_adapters_that_were_left_at_zero_start_later_as_they_would_have(name: str):
    measured = {"0": {"C": covariance()}}
    early, late = model(), model()
    config = LoRAConfig(rank=RANK, target_modules=["0"], init=name)
    torch.manual_seed(1)
    inject(early, config, measured=measured)
    inject(late, config, start=False)
    assert not any(t.any() for t in adapter_state_dict(late).values())
    identities = snapshot(late)["identities"]
    torch.manual_seed(1)
    start_adapters(late, measured)
    assert_same(snapshot(late) | {"identities": {}}, snapshot(early) | {"identities": {}})
    assert snapshot(late)["identities"] == identities
    before = snapshot(late)
    start_adapters(late)  # nothing waits any more
    assert_same(snapshot(late), before)


def test_what_was_loaded_is_not_started_again(monkeypatch: pytest.MonkeyPatch):
    trained, resumed = model(), model()
    started(trained, "pissa")
    with torch.no_grad():
        trained[0].lora_B.add_(1)  # type: ignore[operator]

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("a second decomposition")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    inject(resumed, LoRAConfig(rank=RANK, alpha=6, target_modules=["0"], init="pissa"), start=False)
    load_adapter_state_dict(resumed, adapter_state_dict(trained))
    start_adapters(resumed)
    x = torch.randn(3, D_IN)
    assert resumed(x).equal(trained(x))


def test_parts_of_a_model_start_by_their_names_in_it():
    net = nn.Sequential(model(), model())
    for part in net:
        inject(part, LoRAConfig(rank=RANK, target_modules=["0"], init="eva"), start=False)
    before = snapshot(net)
    with pytest.raises(ConfigError, match=r"for 1\.0"):
        start_adapters(net, {"0.0": {"C": covariance()}})
    assert_same(snapshot(net), before)
    start_adapters(net, {"0.0": {"C": covariance()}, "1.0": {"C": covariance()}})
    assert all(net.get_submodule(name).lora_A.any() for name in ("0.0", "1.0"))


# An initialiser of one's own.


@pytest.fixture
def first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INITS, "first_rows", INITS["kaiming"])  # taken out again after the test

    @init
    def first_rows(W: Tensor, rank: int, scale: float) -> Factors:
        """s B A is the first rows of W."""
        return Factors(A=W[:rank] / scale, B=torch.eye(W.shape[0], rank))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("first_rows")
def test_a_function_of_ones_own_is_an_initialiser(kind: str):
    net = model(kind)
    W = matrix(net, kind)
    A, B, scale = started(net, "first_rows")
    torch.testing.assert_close((scale * B @ A)[:RANK], W[:RANK])
    assert not net[0].delta_weight().any()  # type: ignore[operator]


PROMISES = [
    test
    for name, test in vars(contract).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["case"]
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda test: test.__name__)
@pytest.mark.parametrize("name", ["linear", "transformers-conv1d", "conv2d", "linear-dora"])
@pytest.mark.usefixtures("first_rows")
def test_with_it_every_promise_of_an_adapted_layer_is_kept(name: str, promise: Callable[[Case], None]):
    (case,) = (case for case in CASES if case.name == name)
    if case.differentiable or "finite_differences" not in promise.__name__:
        promise(replace(case, config={**case.config, "init": "first_rows"}))


def test_an_initialiser_that_asks_for_what_there_is_not_is_refused_when_it_is_registered():
    def unknown(rank: int, width: int) -> Tensor:
        return torch.zeros(rank, width)

    def unsaid(rank: int, d_in: int):
        return torch.zeros(rank, d_in)

    with pytest.raises(ConfigError, match=r"'unknown' asks for width. It may ask for: C, E, G, W, d_in"):
        init(unknown)
    with pytest.raises(ConfigError, match=r"'unsaid' needs an annotation of what it returns: -> Tensor"):
        init(unsaid)
    assert not {"unknown", "unsaid"} & set(INITS)
    assert issubclass(Whole, Factors)
