"""Expressions as people write them pass, and take no time; those that hang the matcher do not pass."""

from __future__ import annotations

import re

import pytest
from hanging import no_hang

from lightning_lora.format import inspection as regexes
from lightning_lora.format.inspection import MOST_WAYS, ways

WRITTEN = [
    "q_proj",
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(\d+)\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r"^(?!.*vision).*(q_proj|v_proj)$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
    r".*\.layers\.([0-9]|1[0-9]|2[0-3])\.attn\..*",
    r"(?:model\.)?layers\.\d{1,2}\.\w+\.[qv]_proj",
    r"transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_(fc|proj))",
    "|".join(re.escape(f"model.layers.{i}.self_attn.q_proj") for i in range(1000)),
]
NAMES = ["model.layers.17.self_attn.rotary", "a" * 100, "text.text.attn.attn.dense.dense." * 3, "layers." * 14 + "q"]
HANGING = [
    r"(a+)+$",
    r"(.*)*x",
    r"(a|aa)+$",
    r"(.|.)*x",
    r"(a?){40}a{40}",
    r"(\w+\.?)*!",
    r"([^.]+\.?)+\d!",
    r".*.*.*.*.*.*x",
    r"(.*a){25}",
    "a?" * 60 + "a" * 60,
    r"(a)\1*",
    r"(()){999999999}",
    r"(?=(a+)+$)a*",
    r"((a{1,50}){1,50}){1,50}b",
    r"(ab|cd|ab)*x",
]


@pytest.mark.parametrize("expression", WRITTEN)
def test_what_people_write_passes_and_hangs_no_matcher(expression):
    assert ways(expression) <= MOST_WAYS
    with no_hang():
        for name in NAMES:
            re.fullmatch(expression, name)


@pytest.mark.parametrize("expression", HANGING)
def test_what_hangs_does_not_pass(expression):
    assert ways(expression) > MOST_WAYS


@pytest.mark.parametrize("expression", ["(", "a)", "[", "(" * 5000 + ")" * 5000, "a{99999999999}"])
def test_what_is_no_expression_is_said(expression):
    with pytest.raises(ValueError):
        ways(expression)


def test_a_long_expression_takes_a_time_that_grows_no_faster_than_its_length(monkeypatch):
    looked_at = []
    monkeypatch.setattr(regexes, "_item", lambda item, rest: looked_at.append(len(rest)) or 1.0)
    assert ways("x" * 1000) == 1
    assert len(looked_at) == 1000
    assert max(looked_at) < 10
