"""A config that cannot be is refused when it is made, with its field and its value in the message."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import pattern_matches
from lightning_lora.errors import ConfigError

NOT_A_RANK = [0, -1, True, "8", 8.0, None, [8], math.nan]
NOT_AN_ALPHA = [0, -1.0, math.nan, math.inf, -math.inf, "x", "16", True, None, 10**400]
NOT_NAMES = [7, {"q_proj": 1}, [""], [7], ["q_proj", None], b"q", True, "(", "*proj"]
BAD = {
    "rank": NOT_A_RANK,
    "alpha": NOT_AN_ALPHA,
    "dropout": [1.0, 1, -0.1, 2, math.nan, math.inf, "0.1", True, None],
    "target_modules": [*NOT_NAMES, [], "", None],
    "exclude_modules": NOT_NAMES,
    "layers_to_transform": ["0", [], -1, 1.0, True, [0, "1"], [-1], [None], {"0": 1}, [True]],
    "layers_pattern": [*NOT_NAMES, ["("]],
    "rank_pattern": [None, [], "q_proj", {"": 1}, {1: 1}, {"(": 1}, *({"q_proj": rank} for rank in NOT_A_RANK)],
    "alpha_pattern": [None, [], 3, {"": 1}, {1: 1}, {"(": 1}, *({"q_proj": alpha} for alpha in NOT_AN_ALPHA)],
    "modules_to_save": ["head", 7, [""], [7], {"head": 1}, True],
    "target_parameters": ["experts.up", 7, [""], [7], {"up": 1}, True],
    "trainable_token_indices": [
        "7",
        7,
        [],
        [-1],
        [1.0],
        [True],
        [3, 3],
        {},
        {"": [1]},
        {"a": [-1]},
        {"a": None, 3: [1]},
    ],
    "bias": ["some", None, True, "ALL", 0, []],
    "lora_bias": [1, "yes", None],
    "use_rslora": [1, "yes", None],
    "use_dora": [0, "no", None],
    "freeze_a": [1, "A", None],
    "rank_dropout": [1.0, 1, -0.1, math.nan, "0.1", True, None],
    "module_dropout": [1.0, 2, -0.1, math.inf, "0.1", False, None],
    "init": ["xavier", None, True, 3],
    "alora_invocation_tokens": [[], [-1], [1.0], [True], 7, "7", {3: 1}],
    "adapter_dtype": ["float16", None, "bf16", 32],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values], ids=repr
)
def test_a_bad_value_is_refused_with_its_field_and_value(field: str, value: Any):
    with pytest.raises(ConfigError) as caught:
        LoRAConfig(**{field: value, **({"layers_to_transform": [0]} if field == "layers_pattern" else {})})
    message = str(caught.value)
    assert field in message
    inner = next(iter(value.items())) if isinstance(value, dict) and value else (value,)
    entries = value if isinstance(value, (list, tuple)) and value else inner
    assert any(repr(part) in message for part in (value, *entries)), message


def test_every_field_has_its_bad_values_here():
    assert set(BAD) == set(LoRAConfig().to_dict())


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="alhpa"):
        LoRAConfig(alhpa=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern has no effect without"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, "cannot be combined with a regular expression"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoRAConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "rank": 4,
            "alpha": 3,
            "dropout": 0.5,
            "target_modules": ("q_proj", "v_proj"),
            "exclude_modules": {"b", "a"},
            "layers_to_transform": 3,
            "layers_pattern": ["layers"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 2},
            "modules_to_save": ["head"],
            "bias": "all",
            "use_rslora": True,
            "init": "gaussian",
            "adapter_dtype": "base",
        },
    ],
    ids=["defaults", "everything"],
)
def test_a_config_survives_the_round_trip_through_plain_values(fields: dict[str, Any]):
    config = LoRAConfig(**fields)
    plain = config.to_dict()
    assert LoRAConfig(**plain) == config
    assert OmegaConf.to_container(OmegaConf.create(plain)) == plain
    plain["rank_pattern"]["k_proj"] = 1
    assert "k_proj" not in config.rank_pattern


def test_collections_of_every_kind_become_lists_in_an_order_of_their_own():
    assert LoRAConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]  # type: ignore[arg-type]
    assert LoRAConfig(target_modules=("b", "a")).target_modules == ["b", "a"]  # type: ignore[arg-type]
    node = OmegaConf.create({"target_modules": ["q"], "rank_pattern": {"q": 2}, "layers_to_transform": [0]})
    config = LoRAConfig(**node)
    assert type(config.target_modules) is list
    assert type(config.rank_pattern) is dict
    assert type(config.layers_to_transform) is list


def test_what_is_empty_and_optional_is_none():
    config = LoRAConfig(exclude_modules=[], modules_to_save=[], layers_pattern=[])
    assert (config.exclude_modules, config.modules_to_save, config.layers_pattern) == (None, None, None)


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        LoRAConfig().rank = 3  # type: ignore[misc]


def test_scales_are_alpha_over_rank_and_over_its_root():
    assert LoRAConfig(rank=4, alpha=16).scale_of("any") == 4
    assert LoRAConfig(rank=4, alpha=16, use_rslora=True).scale_of("any") == 8


@pytest.mark.parametrize("key", ["fc", "q_proj", "layers.1.fc", "1.fc", r"layers\.1\..*", "f.", "(fc|q_proj)", "", "."])
@pytest.mark.parametrize(
    "name", ["fc", "q_proj", "a.fc", "afc", "layers.1.fc", "layers_1_fc", "layers.11fc", "11.fc", ""]
)
def test_a_pattern_matches_what_the_whole_expression_matches(key: str, name: str) -> None:
    assert pattern_matches(key, name) == bool(re.match(rf"(.*\.)?({key})$", name))
