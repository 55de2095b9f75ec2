"""Configs that mean the same for a model are the same, however they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.engine.present import injection_of
from lightning_lora.engine.targets import differences
from tests.tiny_transformers import gpt2, llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Same = tuple[dict[str, Any], dict[str, Any]]

SAME: dict[str, Same] = {
    "nothing": ({}, {}),
    "another order": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "q_proj"]}),
    "all-linear and its list": ({"target_modules": "all-linear"}, {"target_modules": LINEAR}),
    "a list and all-linear": ({"target_modules": LINEAR[::-1]}, {"target_modules": "all-linear"}),
    "an expression": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": r".*\.[qv]_proj"}),
    "exclusion": ({"target_modules": LINEAR[:-1]}, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
    ),
    "ranks": (
        {"rank": 2, "rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 4, "rank_pattern": {"v_proj": 2}, "target_modules": ["v_proj", "q_proj"]},
    ),
    "alphas": (
        {"alpha": 2, "alpha_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "v_proj"]},
        {"alpha": 4, "alpha_pattern": {r"layers\.\d\.self_attn\.v_proj": 2}, "target_modules": ["q_proj", "v_proj"]},
    ),
    "a head": ({"modules_to_save": ["lm_head", "norm"]}, {"modules_to_save": ["model.norm", "lm_head"]}),
}


@pytest.mark.parametrize("case", SAME)
def test_configs_that_mean_the_same_do_not_differ(case):
    theirs, ours = SAME[case]
    model = llama()
    inject(model, LoRAConfig(**theirs))
    before = [p.requires_grad for p in model.parameters()]
    assert differences(model, injection_of(model), LoRAConfig(**ours)) == {}
    assert [p.requires_grad for p in model.parameters()] == before


OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "one layer more": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "q_proj"]}, {"target_modules"}),
    "the head too": ({}, {"target_modules": [*LINEAR, "lm_head"]}, {"target_modules"}),
    "a layer less": (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"layers_to_transform"},
    ),
    "another rank, in another order": (
        {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
        {"rank": 4, "target_modules": ["v_proj", "q_proj"]},
        {"rank"},
    ),
    "a rank of one": ({"rank": 2}, {"rank": 2, "rank_pattern": {"q_proj": 4}}, {"rank_pattern"}),
    "an alpha": ({"alpha": 2}, {"alpha": 3, "target_modules": LINEAR}, {"alpha"}),
    "dropout alone": (
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["v_proj", "q_proj"], "dropout": 0.1},
        {"dropout"},
    ),
    "another scaling": ({}, {"use_rslora": True}, {"use_rslora"}),
    "an entry that matches nothing": ({}, {"target_modules": [*LINEAR, "c_attn"]}, {"target_modules"}),
    "a head that is trained": ({}, {"modules_to_save": ["lm_head"]}, {"modules_to_save"}),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_differs_is_named_and_nothing_else(case):
    theirs, ours, fields = OTHER[case]
    model = llama()
    inject(model, LoRAConfig(**theirs))
    assert differences(model, injection_of(model), LoRAConfig(**ours)).keys() == fields


def test_all_linear_leaves_out_a_teacher_that_was_frozen_before():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
            self.teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)

    model = Both()
    report = inject(model, LoRAConfig(rank=2))
    named = [row.name for row in report.modules]
    assert not any("teacher" in name for name in named)
    assert differences(model, injection_of(model), LoRAConfig(rank=2, target_modules=named)) == {}
    more = LoRAConfig(rank=2, target_modules=[*named, "teacher.0"])
    assert differences(model, injection_of(model), more).keys() == {"target_modules"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in named for factor in ("lora_A", "lora_B")}


def test_layers_that_are_adapted_by_their_parameters_mean_the_same_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inject(model, LoRAConfig(rank=2, target_modules=["self_attn", "linear1"]))
    assert differences(model, injection_of(model), LoRAConfig(rank=2, target_modules=["linear1", "self_attn"])) == {}
    model = gpt2()
    inject(model, LoRAConfig(rank=2, target_modules=["c_attn", "c_fc"]))
    assert differences(model, injection_of(model), LoRAConfig(rank=2, target_modules=[".*", "c_fc"][1:])).keys() == {
        "target_modules"
    }
