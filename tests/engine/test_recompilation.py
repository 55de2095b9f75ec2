"""A compiled model is compiled once: not again when an adapter's values, its scale or its activity change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, randomise
from torch._dynamo.testing import CompileCounter

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    inject,
    load_adapter_state_dict,
    merged,
    remove,
)

KINDS = ("linear", "linear-dora", "embedding", "conv2d")
every_kind = pytest.mark.parametrize("case", [c for c in CASES if c.name in KINDS], ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: torch.nn.Module) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


@every_kind
def test_other_values_of_an_adapter_compile_nothing_again(case: Case):
    model, x = case.adapted(), case.input()
    run, counter = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
        assert counter.frame_count == 1
        other = case.adapted()
        for tensor in adapter_tensors(other).values():
            tensor.mul_(1.5)
        load_adapter_state_dict(model, adapter_state_dict(other))
        torch.testing.assert_close(run(x), other(x))
        randomise(model)
        torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 1


@every_kind
def test_steps_of_training_compile_nothing_again(case: Case):
    model, x = case.adapted().train(), case.input()
    run, counter = compiled(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))


@every_kind
@torch.no_grad()
def test_merged_and_unmerged_are_compiled_once_each(case: Case):
    model, x = case.adapted(), case.input()
    run, counter = compiled(model)
    for _ in range(3):
        expected = run(x)
        with merged(model):
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


@torch.no_grad()
def test_another_adapter_of_another_scale_and_none_at_all_are_followed():
    (case,) = (c for c in CASES if c.name == "linear")
    model, x = case.model().eval(), case.input()
    run, counter = compiled(model)
    bare = run(x)
    for alpha in (3.0, 5.0, 3.0, 7.0):
        inject(model, LoRAConfig(rank=2, alpha=alpha, target_modules=["layer"]))
        randomise(model)
        torch.testing.assert_close(run(x), model(x))
        remove(model)
        torch.testing.assert_close(run(x), bare)
    # The bare model, and the adapted one with its scale as a constant, and then as a number that may be any.
    assert counter.frame_count <= 4
