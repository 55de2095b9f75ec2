"""The gradients of each kind of layer while it trains, with what is drawn at random then, by finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, Any]] = {
    "dropouts": {"dropout": 0.3, "rank_dropout": 0.4, "module_dropout": 0.1},
    "mostly dropped": {"dropout": 0.7},
    "frozen A": {"freeze_a": True, "dropout": 0.3},
    "more ranks than width": {"rank": 16},
    "a bias of B": {"lora_bias": True, "dropout": 0.1},
}
# By torch's definition a padding_idx has no gradient, though the output depends on it.
KINDS = [c for c in CASES if c.differentiable and c.name != "embedding-padding-idx"]
TAKE_A_BIAS = ("linear", "conv", "transformers-conv1d", "own-layer", "multihead")
pairs = [
    pytest.param(replace(case, config={**case.config, **config}), id=f"{case.name}-{variant}")
    for case in KINDS
    for variant, config in VARIANTS.items()
    if "lora_bias" not in config or (case.name.startswith(TAKE_A_BIAS) and case.name != "linear-parameter")
]


@pytest.mark.parametrize("case", pairs)
@pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side")
def test_gradients_in_training_are_those_of_finite_differences(case: Case):
    model, x = case.adapted().double().train(), case.input(torch.float64)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    given = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    if x.is_floating_point():
        given.append(x.requires_grad_())

    def output(*tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return torch.func.functional_call(model, dict(zip(names, tensors)), (tensors[-1] if x.requires_grad else x,))

    assert torch.autograd.gradcheck(output, given, fast_mode=True)
    # One that is spread out, as that of a sum is, and one whose elements lie in another order.
    y = output(*given)
    for g in (torch.ones((), dtype=y.dtype).expand(y.shape), torch.randn(y.mT.shape, dtype=y.dtype).mT):
        found = torch.autograd.grad(y, given, g, retain_graph=True)
        expected = torch.autograd.grad(y, given, g.contiguous(), retain_graph=True)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "case",
    [c for c in KINDS if c.input().is_floating_point() and c.name != "lstm-bidirectional-projected"],  # torch refuses
    ids=lambda case: case.name,
)
def test_an_empty_batch_has_gradients_of_zero(case: Case):
    model = replace(case, config={**case.config, "dropout": 0.3}).adapted().train()
    batch = 1 if any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in model.modules()) else 0
    y = model(case.input().narrow(batch, 0, 0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for gradient in torch.autograd.grad(y.sum(), parameters, allow_unused=True):
        assert gradient is None or not gradient.any()
