"""What merging into 16 bits takes away from an update is said, layer by layer, before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, inject, merge, merged
from lightning_lora.errors import AdapterStateError

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(96, 64), {}),
    "dora": (lambda: nn.Linear(96, 64), {"use_dora": True}),
    "convolution": (lambda: nn.Conv1d(32, 64, 3), {}),
    "convolution with groups": (lambda: nn.Conv1d(32, 64, 3, groups=2), {}),
    "embedding": (lambda: nn.Embedding(80, 64), {}),
    "attention": (lambda: nn.MultiheadAttention(64, 4), {}),
    "recurrent": (lambda: nn.GRU(48, 32), {}),
    "parameter": (lambda: nn.Linear(96, 64), {"target_modules": [], "target_parameters": ["layer.weight"]}),
}


def adapted(kind: str, dtype: torch.dtype, size: float) -> Any:
    """A model in `dtype` whose updates are about `size` times as large as its weights."""
    torch.manual_seed(0)
    make, fields = LAYERS[kind]
    model = nn.Module()
    model.layer = make()
    model.to(dtype)
    inject(model, LoRAConfig(**{"rank": 4, "alpha": 4, "target_modules": ["layer"], **fields}))
    with torch.no_grad():
        for name, t in adapter_tensors(model).items():
            if "magnitude" not in name:
                t.normal_()
        for module in model.modules():
            for pair in getattr(module, "lora_pairs", lambda name: ())(""):
                W, change = module.dense_weight(pair.parameter), module.delta_weight(pair.parameter)
                pair.B.mul_(size * W.float().norm() / change.norm())
    return model


def told(model: nn.Module) -> dict[str, float]:
    """What `merged` says is left, by the names of the updates."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with merged(model):
            pass
    texts = [str(w.message) for w in said if "Merging rounds" in str(w.message)]
    assert len(texts) <= 1
    found = re.findall(r"(\S+) (\d\.\d\d)(?=[,.] )", texts[0].partition("is left: ")[2]) if texts else []
    return {name: float(share) for name, share in found}


@HALF
@pytest.mark.parametrize("kind", LAYERS)
def test_a_weak_update_is_said_to_be_lost_and_a_strong_one_is_not(kind: str, dtype: torch.dtype):
    eps = torch.finfo(dtype).eps
    # Far below half of the distance between neighbours, nothing is kept; far above it, all.
    weak = told(adapted(kind, dtype, eps / 20))
    assert weak
    # Where a convolution with groups has no weight, there is nothing beside which the update is small.
    assert all(share < (0.9 if "groups" in kind else 0.5) for share in weak.values())
    assert told(adapted(kind, dtype, 20 * eps)) == {}
    assert told(adapted(kind, torch.float32, eps / 20)) == {}


@HALF
def test_the_share_is_that_of_the_change_which_the_stored_weight_has(dtype: torch.dtype):
    for size in (0.02, 0.05, 0.1):
        model = adapted("linear", dtype, size * torch.finfo(dtype).eps)
        W, change = model.layer._parameters["weight"].double(), model.layer.delta_weight().detach().double()
        stored = (W + change).to(dtype).double()
        share = float(((stored - W) * change).sum() / change.square().sum())
        assert share < 0.9
        assert told(model)["layer"] == pytest.approx(share, abs=0.006)


def test_layers_are_named_the_worst_first_and_only_those_that_lose():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).bfloat16()
    inject(model, LoRAConfig(rank=4, target_modules=["0", "1", "2"]))
    for i, size in enumerate((5e-5, 1.0, 2e-4)):
        with torch.no_grad():
            model[i].lora_B.normal_().mul_(size)
    shares = told(model)
    assert list(shares) == ["0", "2"]
    assert shares["0"] < shares["2"]
    with pytest.warns(UserWarning, match="2 of 3 updates are partly lost"):
        merge(model)


@pytest.mark.parametrize("how", [merge, lambda model: merged(model).__enter__()])
def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(how: Any):
    model = adapted("linear", torch.bfloat16, 1e-3)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Merging rounds"):
            how(model)
    assert_same(snapshot(model), before)


@HALF
def test_in_float32_as_the_warning_says_nothing_is_lost(dtype: torch.dtype):
    model = adapted("linear", dtype, 1e-4)
    wanted = model.layer.adapted_weight()
    model.float()
    merge(model)
    assert model.layer.weight.equal(wanted)


@HALF
def test_a_fresh_adapter_loses_nothing(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    inject(model, LoRAConfig(rank=2))
    merge(model)


@HALF
def test_rows_of_tokens_and_biases_are_said_too(dtype: torch.dtype):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(9, 64), nn.Linear(64, 64)).to(dtype)
    inject(model, LoRAConfig(rank=2, target_modules=["1"], lora_bias=True, trainable_token_indices={"0": [2, 5]}))
    with torch.no_grad():
        model[0].lora_tokens.mul_(1 + torch.finfo(dtype).eps / 8)
        model[1].lora_B.normal_()
        model[1].bias.fill_(1)
        model[1].lora_B_bias.normal_().mul_(torch.finfo(dtype).eps / 100)
    assert set(told(model)) == {"0", "1.bias"}


def test_half_of_a_pair_of_neighbours_is_rounded_as_torch_rounds():
    """One number, W = 1, to which bfloat16 adds 2^-7 or nothing."""
    for change, share in ((0.0030, 0.0), (0.0045, 2**-7 / 0.0045)):
        model: Any = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
        model[0].weight.data.fill_(1)
        inject(model, LoRAConfig(rank=1, alpha=1))
        with torch.no_grad():
            model[0].lora_A.fill_(1)
            model[0].lora_B.fill_(change)
        kept = told(model)
        assert kept == ({"0": 0.0} if not share else {})
        y: Tensor = model[0].adapted_weight().detach().to(torch.bfloat16)
        assert float(y) - 1 == pytest.approx(share * change)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 7e4), (torch.float32, float("inf"))])
@pytest.mark.parametrize("how", [merge, lambda model: merged(model).__enter__()])
def test_what_would_not_be_a_number_is_not_merged(dtype: torch.dtype, value: float, how: Any):
    model: Any = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    inject(model, LoRAConfig(rank=1, alpha=1))
    with torch.no_grad():
        model[0].lora_A.fill_(1)
        model[0].lora_B[1] = value
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match=r"weights of 0 \(in float\d\d\) would hold values that are not finite"):
        how(model)
    assert_same(snapshot(model), before)
