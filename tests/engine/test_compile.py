"""torch.compile with its own code generator, which optimizes what other backends only trace."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import CASES, Case

KINDS = ("linear-rslora", "transformers-conv1d", "embedding", "conv2d")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what inductor itself imports
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
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
