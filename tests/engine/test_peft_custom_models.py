"""The combinations of layers on which PEFT tests LoRA for models of one's own (its tests/test_custom_models.py).

Each behaves here as its tests ask: it starts equal, trains nothing but adapters, computes and learns as PEFT does,
merges to the same output, and is taken out again without a trace. Of PEFT's list are not here: KaSA, MiCA, VeLoRA and
MonteCLoRA, which are other methods; DoRA with groups, where PEFT norms a weight whose rows it has mixed up, and which
is refused; nn.MultiheadAttention, in test_attention.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from snapshot import assert_same, snapshot
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.test_peft import both
from lightning_lora.engine import LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict, merged, remove
from lightning_lora.errors import TargetError

Layers = dict[str, nn.Module]


class Product(nn.Module):
    """Multiplies by a parameter of its own, (in, out)."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size_in, size_out))
        self.bias = nn.Parameter(torch.ones(size_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def mlp() -> Layers:
    return {"lin0": nn.Linear(10, 20), "relu": nn.ReLU(), "lin1": nn.Linear(20, 2), "sm": nn.LogSoftmax(-1)}


def products() -> Layers:
    return {"lin0": Product(10, 20), "relu": nn.ReLU(), "lin1": Product(20, 2)}


def embedded() -> Layers:
    return {"emb": nn.Embedding(11, 5), "conv1d": Conv1D(1, 5), "flat": nn.Flatten(), "lin0": nn.Linear(4, 2)}


def convolved(name: str, layer: Callable[[], nn.Module], features: int) -> Callable[[], Layers]:
    return lambda: {name: layer(), "relu": nn.ReLU(), "flat": nn.Flatten(), "lin0": nn.Linear(features, 2)}


CONV1D = convolved("conv1d", lambda: nn.Conv1d(1, 1, 2), 9)
POINTWISE1D = convolved("conv1d", lambda: nn.Conv1d(3, 10, 1), 100)
GROUPS1D = convolved("conv1d", lambda: nn.Conv1d(8, 8, 3, groups=2), 64)
CONV2D = convolved("conv2d", lambda: nn.Conv2d(5, 10, 3), 10)
POINTWISE2D = convolved("conv2d", lambda: nn.Conv2d(1, 10, 1), 90)
GROUPS2D = convolved("conv2d", lambda: nn.Conv2d(16, 16, 3, groups=8), 16)
PADDED_GROUPS2D = convolved("conv2d", lambda: nn.Conv2d(16, 32, 3, padding=1, groups=2), 32 * 25)
CONV3D = convolved("conv3d", lambda: nn.Conv3d(5, 10, 3), 10)

LISTED: list[tuple[str, Callable[[], Layers], tuple[int, ...], dict[str, Any]]] = [
    ("mlp-regex", mlp, (9, 10), {"target_modules": "lin0"}),
    ("mlp-0", mlp, (9, 10), {"target_modules": ["lin0"]}),
    ("mlp-1", mlp, (9, 10), {"target_modules": ["lin1"]}),
    ("mlp-both", mlp, (9, 10), {"target_modules": ["lin0", "lin1"]}),
    ("mlp-head-saved", mlp, (9, 10), {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("mlp-dropout", mlp, (9, 10), {"target_modules": ["lin0"], "alpha": 4, "dropout": 0.1}),
    ("mlp-dora", mlp, (9, 10), {"target_modules": ["lin0"], "use_dora": True}),
    ("mlp-dora-both", mlp, (9, 10), {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    ("mlp-dora-alpha", mlp, (9, 10), {"target_modules": "lin1", "use_dora": True, "alpha": 32}),
    ("mlp-bias-of-b", mlp, (9, 10), {"target_modules": ["lin0", "lin1"], "lora_bias": True, "alpha": 32}),
    ("emb-conv1d", embedded, (9, 4), {"target_modules": ["conv1d"]}),
    ("emb", embedded, (9, 4), {"target_modules": ["emb"]}),
    ("emb-and-conv1d", embedded, (9, 4), {"target_modules": ["emb", "conv1d"]}),
    ("emb-conv1d-dora", embedded, (9, 4), {"target_modules": ["conv1d"], "use_dora": True}),
    ("emb-dora", embedded, (9, 4), {"target_modules": ["emb"], "use_dora": True}),
    ("emb-and-conv1d-dora", embedded, (9, 4), {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    ("tokens", embedded, (9, 4), {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    ("conv1d", CONV1D, (9, 1, 10), {"target_modules": ["conv1d"]}),
    ("conv1d-dora", CONV1D, (9, 1, 10), {"target_modules": ["conv1d"], "use_dora": True}),
    ("conv1d-pointwise", POINTWISE1D, (9, 3, 10), {"target_modules": ["conv1d"]}),
    ("conv1d-groups", GROUPS1D, (9, 8, 10), {"target_modules": ["conv1d"]}),
    ("conv2d", CONV2D, (9, 5, 3, 3), {"target_modules": ["conv2d"]}),
    ("conv2d-and-head", CONV2D, (9, 5, 3, 3), {"target_modules": ["conv2d", "lin0"]}),
    ("conv2d-dora", CONV2D, (9, 5, 3, 3), {"target_modules": ["conv2d"], "use_dora": True}),
    ("conv2d-and-head-dora", CONV2D, (9, 5, 3, 3), {"target_modules": ["conv2d", "lin0"], "use_dora": True}),
    ("conv2d-pointwise", POINTWISE2D, (9, 1, 3, 3), {"target_modules": ["conv2d"]}),
    ("conv2d-groups", GROUPS2D, (2, 16, 3, 3), {"target_modules": ["conv2d"]}),
    ("conv2d-padded-groups", PADDED_GROUPS2D, (2, 16, 5, 5), {"target_modules": ["conv2d"]}),
    ("conv2d-bias-of-b", CONV2D, (9, 5, 3, 3), {"target_modules": ["conv2d"], "lora_bias": True, "alpha": 32}),
    ("conv3d", CONV3D, (9, 5, 3, 3, 3), {"target_modules": ["conv3d"]}),
    ("conv3d-and-head", CONV3D, (9, 5, 3, 3, 3), {"target_modules": ["conv3d", "lin0"]}),
    ("conv3d-dora", CONV3D, (9, 5, 3, 3, 3), {"target_modules": ["conv3d"], "use_dora": True}),
    ("conv3d-and-head-dora", CONV3D, (9, 5, 3, 3, 3), {"target_modules": ["conv3d", "lin0"], "use_dora": True}),
    ("conv3d-bias-of-b", CONV3D, (9, 5, 3, 3, 3), {"target_modules": ["conv3d"], "lora_bias": True, "alpha": 32}),
    ("parameter", products, (9, 10), {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    ("module-and-parameter", mlp, (9, 10), {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
]
CASES = [Case(name, layers, shape, {"rank": 8, "alpha": 8, **fields}) for name, layers, shape, fields in LISTED]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
pytestmark = [
    pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side"),  # PEFT's default of 8, on small layers
    pytest.mark.filterwarnings("ignore:Merged, a convolution with groups"),
]


@every
def test_it_learns_as_in_peft_and_merges_to_what_it_learned(case: Case):
    model, theirs, together = both(case)
    model.eval()
    theirs.eval()
    x = case.input()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    base = copy.deepcopy(case.model()).eval()(x)
    torch.testing.assert_close(model(x), base)
    for net, parameters in (
        (model, [own for own, _ in together.values()]),
        (theirs, [o for _, o in together.values()]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    for own, other in together.values():
        torch.testing.assert_close(own, other.view_as(own), rtol=1e-4, atol=1e-5)
    assert not model(x).allclose(base)
    assert all(p.equal(frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    with torch.no_grad():
        learned = model(x)
        with merged(model):
            torch.testing.assert_close(model(x), learned, rtol=1e-4, atol=1e-4)


@every
@torch.no_grad()
def test_it_is_saved_loaded_and_taken_out_without_a_trace(case: Case):
    model, other, x = case.adapted(), case.model().eval(), case.input()
    before, output = snapshot(other), other(x)
    inject(other, case.lora_config())
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert other(x).equal(model(x))
    remove(other)
    assert_same(snapshot(other), before)
    assert other(x).equal(output)


@pytest.mark.parametrize("layers", [GROUPS2D, PADDED_GROUPS2D])
def test_dora_with_groups_is_refused(layers: Callable[[], Layers]):
    with pytest.raises(TargetError, match="DoRA has no meaning for a convolution with groups"):
        inject(Case("", layers, ()).model(), LoRAConfig(target_modules=["conv2d"], use_dora=True))
