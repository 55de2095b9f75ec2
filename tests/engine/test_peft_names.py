"""Who comes with PEFT's names and forms is told ours."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject
from lightning_lora.errors import ConfigError, TargetError


@pytest.mark.parametrize("make", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": 8}, "'r' of PEFT is 'rank' here"),
        ({"lora_alpha": 8}, "'lora_alpha' of PEFT is 'alpha' here"),
        ({"lora_dropout": 0.1}, "'lora_dropout' of PEFT is 'dropout' here"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' of PEFT is 'init' here"),
        ({"task_type": "CAUSAL_LM"}, "Leave it out; it is not needed"),
        ({"rnak": 8}, "Did you mean 'rank'"),
        ({"something": 8}, "It has: rank, alpha,"),
    ],
)
def test_a_name_of_pefts_is_answered_with_ours(make, given, said):
    with pytest.raises(ConfigError, match=said):
        make(**given)


def test_a_config_of_pefts_is_answered_with_the_one_that_says_the_same():
    theirs = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["v_proj", "q_proj"], use_dora=True, task_type="CAUSAL_LM"
    )
    said = "LoRAConfig(rank=4, target_modules=['q_proj', 'v_proj'], alpha=32, use_dora=True)."
    for call in (lambda: inject(nn.Linear(4, 4), theirs), lambda: LoRACallback(theirs)):
        with pytest.raises(ConfigError) as raised:
            call()
        assert said in str(raised.value)


def test_what_pefts_config_has_and_ours_has_not_is_said():
    theirs = peft.LoraConfig(layer_replication=[(0, 4)])
    with pytest.raises(ConfigError, match=r"target_modules=\[...\].* nothing here for layer_replication"):
        inject(nn.Linear(4, 4), theirs)


@pytest.mark.parametrize("config", [{"rank": 4}, "all-linear", 8, SimpleNamespace(rank=4)])
def test_what_is_no_config_is_refused_before_anything_is_changed(config):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="config must be a LoRAConfig, not a"):
        inject(model, config)
    assert all(type(layer) is nn.Linear and layer.weight.requires_grad for layer in model)


@pytest.mark.parametrize("text", ["q_proj", "q_proj,v_proj", "q_proj v_proj", "q_proj|v_proj"])
def test_a_string_of_endings_is_answered_with_the_list(text):
    model = nn.ModuleDict({"block": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj", "out")})})
    names = ["q_proj", "v_proj"] if "v" in text else ["q_proj"]
    with pytest.raises(TargetError) as raised:
        inject(model, LoRAConfig(rank=2, target_modules=text))
    assert f"target_modules={names!r}" in str(raised.value)
    assert len(inject(model, LoRAConfig(rank=2, target_modules=names)).modules) == len(names)


def test_a_config_is_still_copied_replaced_and_pickled():
    config = LoRAConfig(rank=4)
    assert pickle.loads(pickle.dumps(config)) == replace(config) == config
    with pytest.raises(ConfigError, match="by name, such as rank=8"):
        LoRAConfig(8)
