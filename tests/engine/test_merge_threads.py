"""Layers that change while another thread runs the model: its output is right, or an error says so."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import randomise
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject, merge, merged, remove
from lightning_lora.errors import AdapterStateError


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def adapted(layers: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input, and the output by plain weights W + s B A in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    inject(model, LoRAConfig(rank=2, alpha=2, target_modules=r"\d+"))
    randomise(model)
    x = torch.randn(4, 8)
    exact = x.double()
    for layer in model:
        W = layer._parameters["weight"] + layer.lora_B @ layer.lora_A
        exact = exact @ W.double().T + layer.bias.double()
    return model, x, exact


def is_close(y: Tensor, exact: Tensor) -> bool:
    # Eight terms a layer, in float32: far above what they lose, and far below what one layer's update changes.
    return torch.allclose(y.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@contextmanager
def forward_elsewhere(model: nn.Module, called: nn.Module, x: Tensor) -> Iterator[tuple[Callable[[], None], list[Any]]]:
    """`called` runs in another thread, and waits between two layers of `model` until it may `go_on`."""
    inside, may_end, results = threading.Event(), threading.Event(), []

    def pause(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert may_end.wait(60)

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(called(x))
        except AdapterStateError as error:
            results.append(error)

    hook = model[1].register_forward_pre_hook(pause)
    thread = threading.Thread(target=run)
    thread.start()

    def go_on() -> None:
        may_end.set()
        thread.join()

    assert inside.wait(60)
    try:
        yield go_on, results
    finally:
        go_on()
        hook.remove()


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model[:3], nn.Sequential])
@pytest.mark.parametrize("call", [merge, remove, lambda model: merged(model).__enter__()])
def test_layers_are_not_changed_while_another_thread_runs_the_model(call: Any, wrap: Any):
    model, x, exact = adapted()
    called = wrap(model)  # the model, a part of it, and what holds it
    with forward_elsewhere(model, called, x) as (go_on, results):
        before = snapshot(model)
        with pytest.raises(AdapterStateError, match="runs in another thread"):
            call(model)
        assert_same(snapshot(model), before)
        go_on()
    assert is_close(results[0], exact)
    with merged(model):
        assert is_close(model(x), exact)


def test_a_forward_that_was_merged_when_it_began_and_is_not_when_it_ends_is_an_error():
    model, x, exact = adapted()
    before = snapshot(model)
    block = merged(model)
    block.__enter__()
    with forward_elsewhere(model, model, x) as (go_on, results):
        with pytest.raises(AdapterStateError, match="was left while the Sequential ran in another thread"):
            block.__exit__(None, None, None)
        assert_same(snapshot(model), before)
        go_on()
    assert isinstance(results[0], AdapterStateError)
    assert "while this forward ran" in str(results[0])
    assert is_close(model(x), exact)


def test_an_error_of_the_block_is_not_hidden_by_another_thread():
    model, x, _ = adapted()
    block = merged(model)
    block.__enter__()
    with forward_elsewhere(model, model, x):
        assert block.__exit__(ValueError, ValueError("of the block"), None) is False


def test_a_forward_may_merge_its_own_model():
    class Task(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            with merged(self):
                return self.net(x)

    torch.manual_seed(0)
    model, x = Task(nn.Linear(8, 8)), torch.randn(4, 8)
    inject(model, LoRAConfig(rank=2, target_modules=["net"]))
    randomise(model)
    outside = model.net(x)
    torch.testing.assert_close(model(x), outside)
    torch.testing.assert_close(model(x), outside)


def test_whoever_computes_while_a_model_is_merged_and_unmerged_gets_its_output_or_an_error():
    model, x, exact = adapted(12)
    wrong: list[float] = []
    right, done = threading.Event(), threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not done.wait(0.0005):  # time for the other in between
                try:
                    y = model(x)
                except AdapterStateError:
                    continue
                right.set()
                if not is_close(y, exact):
                    wrong.append(float((y - exact).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns within a forward, and within a merge
    for thread in threads:
        thread.start()
    entered = 0
    try:
        while entered < 30 or not right.is_set():
            try:
                with merged(model):
                    entered += 1
                    if not is_close(model(x), exact):
                        wrong.append(-1.0)
            except AdapterStateError:
                pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong
    assert is_close(model(x), exact)
