"""What each check takes, and what it refuses."""

from __future__ import annotations

import math

import pytest

from lightning_lora import checked
from lightning_lora.errors import ConfigError

TAKEN = [
    (checked.whole, 1, {}),
    (checked.whole, 0, {"least": 0}),
    (checked.number, -2, {}),
    (checked.number, 0.5, {"above": 0}),
    (checked.number, 0, {"least": 0}),
    (checked.share, 1, {}),
    (checked.probability, 0, {}),
    (checked.flag, False, {}),
    (checked.one_of, "a", {"choices": ("a", "b")}),
]
REFUSED = [
    *((checked.whole, value, {}) for value in (0, -1, True, 1.0, "1", None, math.nan)),
    *((checked.number, value, {}) for value in (True, "1", None, math.nan, math.inf, 10**400)),
    *((checked.number, value, {"above": 0}) for value in (0, -1, False)),
    (checked.number, -1e-9, {"least": 0}),
    *((checked.share, value, {}) for value in (0, 1.01, True)),
    *((checked.probability, value, {}) for value in (1, -0.1, None)),
    *((checked.flag, value, {}) for value in (0, 1, "true", None)),
    *((checked.one_of, value, {"choices": ("a", "b")}) for value in ("c", None, 0, ["a"])),
]


@pytest.mark.parametrize(("check", "value", "bounds"), TAKEN)
def test_what_can_be_comes_back(check, value, bounds):
    assert check("name", value, **bounds) == value


@pytest.mark.parametrize(("check", "value", "bounds"), REFUSED)
def test_what_cannot_be_is_named_with_its_value(check, value, bounds):
    with pytest.raises(ConfigError, match=r"^the name is .*not ") as raised:
        check("the name", value, **bounds)
    assert repr(value) in str(raised.value)


def test_the_choice_that_was_meant_is_named():
    with pytest.raises(ConfigError, match=r"method is one of 'ties', 'dare', not 'tie'\. Did you mean 'ties'\?$"):
        checked.one_of("method", "tie", ("ties", "dare"))
