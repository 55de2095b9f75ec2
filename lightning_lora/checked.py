"""Checks of arguments. Each function returns the value, or raises ConfigError, which says what values are allowed;
`closest` finds what was meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from lightning_lora.errors import ConfigError, listed


def whole(name: str, value: Any, least: int = 1) -> int:
    """An int of at least `least`. True and False, which are ints in Python, are refused."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is a whole number from {least} on, not {value!r}.")
    return value


def number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, unit: str = "", why: str = ""
) -> float:
    """A finite float above `above` and of at least `least`; the message names its `unit`, and ends with `why`."""
    found = _float(value)
    if not (math.isfinite(found) and found > above and found >= least):
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        kind = f"number of {unit}" if unit else "finite number"
        raise ConfigError(f"{name} is a {kind}{bound}, not {value!r}{f': {why}' if why else ''}.")
    return found


def share(name: str, value: Any) -> float:
    """A float above 0 and at most 1."""
    if not 0 < (found := _float(value)) <= 1:
        raise ConfigError(f"{name} is a share above 0 and at most 1, not {value!r}.")
    return found


def probability(name: str, value: Any) -> float:
    """A float from 0 to below 1. With a dropout probability of 1, nothing would be left."""
    if not 0 <= (found := _float(value)) < 1:
        raise ConfigError(f"{name} is a probability from 0 to below 1, not {value!r}.")
    return found


def _float(value: Any) -> float:
    """`value` as a float; NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an int that no float can hold
        return math.inf


def flag(name: str, value: Any) -> bool:
    """True or False; not 0, "no" or None."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is True or False, not {value!r}.")
    return value


def one_of(name: str, value: Any, choices: Iterable[str], hint: str = "") -> str:
    """One of `choices`. The message ends with `hint`, or else with the choice that was most likely meant."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        near = closest(value, choices, count=1) if isinstance(value, str) else []
        hint = hint or (f"Did you mean {near[0]!r}?" if near else "")
        raise ConfigError(f"{name} is one of {listed(map(repr, choices))}, not {value!r}. {hint}".rstrip())
    return value


def closest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` that a user most likely meant by `name`, best first; maybe none."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A sentence, after a space, that asks for the names of `known` closest to `name`; `otherwise` if none is close."""
    near = closest(name, known)
    return f" Did you mean {listed(map(repr, near))}?" if near else otherwise
