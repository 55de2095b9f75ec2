"""torch.compile with its own code generator, which optimizes what other backends only trace."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from cases import CASES, Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_lora.engine import fused

KINDS = ("linear-rslora", "transformers-conv1d", "embedding", "conv2d")


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what inductor itself imports
needs_a_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("case", [c for c in CASES if c.name in KINDS], ids=lambda case: case.name)
def test_inductor_computes_what_eager_does(case: Case):
    """torch 2.13's inductor loses the alpha of torch.add when it fuses it with a matrix product."""
    model = case.adapted()
    x = case.input()
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().mean(), [p for p in model.parameters() if p.requires_grad])
    output = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(output, expected)
    output.square().mean().backward()
    for p, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients):
        torch.testing.assert_close(p.grad, gradient)
    torch._dynamo.reset()


@needs_a_compiler
@pytest.mark.parametrize(
    ("backend", "p", "checkpointed"),
    [
        *itertools.product(["aot_eager"], [0.01, 0.3, 0.7], [False, True]),
        pytest.param("inductor", 0.3, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_compiled_dropout_drops_each_element_by_chance_and_the_same_in_the_backward_pass(
    backend: str, p: float, checkpointed: bool
):
    def drop(x: Tensor) -> Tensor:
        # The sine keeps its input, which with a checkpoint is computed again.
        return fused.dropout(x, p).sin()

    def function(x: Tensor) -> Tensor:
        return checkpoint(drop, x, use_reentrant=False) if checkpointed else drop(x)

    torch.manual_seed(0)
    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    for rows in (100, 1, 0) if backend == "aot_eager" else (100,):
        x = torch.full((rows, 96), 0.1, requires_grad=True)
        y = compiled(x)
        factor = 1 / (1 - p)
        (g,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, (torch.where(g == 0, 0, 0.1) * factor).sin())
        torch.testing.assert_close(g, torch.where(y == 0, 0, factor * torch.cos(torch.tensor(0.1 * factor))))
        if rows == 100:
            dropped = (y == 0).float()
            # Five standard deviations of a share of 9,600.
            assert abs(float(dropped.mean()) - p) < 5 * (p * (1 - p) / 9600) ** 0.5
            assert dropped.mean(0).std() > 0
            assert dropped.mean(1).std() > 0
            assert not (compiled(x) == 0).float().equal(dropped)
    torch._dynamo.reset()


@needs_a_compiler
def test_compiled_layers_that_read_one_input_drop_apart():
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return fused.dropout(x, 0.5), fused.dropout(x, 0.5)

    one, other = torch.compile(function, backend="aot_eager")(torch.ones(100, 9))
    assert not one.equal(other)
    torch._dynamo.reset()
