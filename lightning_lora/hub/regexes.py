"""How long a regular expression of somebody else's may take, judged before it is tried.

Python's matcher backtracks: `(a+)+$` tries 2^n ways to match a name of n letters. Here the ways are counted from the
expression alone, from above and roughly, so that expressions as people write them for modules pass with room to spare.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from importlib import import_module
from typing import Any

# The parser of `re` has no public name.
op: Any = import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")
parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MOST_WAYS = 1e6
"""About 20 ms for one name."""
_LENGTH = 100  # of a long name of a module
_ONE = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN}
_REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, getattr(op, "POSSESSIVE_REPEAT", None)}
_MOST_TIMES = 1000
_AHEAD = 8  # of what follows a repetition, only the beginning counts; all of it takes quadratic time


def ways(expression: str) -> float:
    """How many ways there may be to match a name with `expression`; infinity where they grow with every letter.

    Raises ValueError where it is no regular expression.
    """
    try:
        return _sequence(list(parser.parse(expression)))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error) or "it is nested too deeply") from error


def _sequence(items: list[tuple[Any, Any]]) -> float:
    total = 1.0
    for i, item in enumerate(items):
        total *= _item(item, items[i + 1 : i + 1 + _AHEAD])
    return total


def _item(item: tuple[Any, Any], rest: list[tuple[Any, Any]]) -> float:
    kind, value = item
    if kind in _ONE or kind is op.AT:
        return 1.0
    if kind in _REPEATS:
        least, most, body = value
        return _repeat(int(least), int(most), body, rest)
    if kind is op.BRANCH:
        return max(_sequence(list(branch)) for branch in value[1]) * _alike(value[1])
    if kind is op.SUBPATTERN:
        return _sequence(list(value[-1]))
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return _sequence(list(value[1]))
    if kind is getattr(op, "ATOMIC_GROUP", None):
        return _sequence(list(value))
    return math.inf  # what refers back to a group makes matching exponential by itself


def _repeat(least: int, most: int, body: Any, rest: list[tuple[Any, Any]]) -> float:
    items = list(body)
    inner = _sequence(items)
    times = min(most, _LENGTH)
    is_one = len(items) == 1 and items[0][0] in _ONE
    if least > _MOST_TIMES or (inner > 1 and times > 1 and least != most):
        return math.inf
    if not is_one and least != most and times > 1 and body.getwidth()[0] == 0:
        return math.inf
    exact = inner ** min(least, _LENGTH) if inner > 1 else 1.0
    places = max(times - least + 1, 1)
    # What follows letter by letter can only be found in a few places of a name.
    letters = _literals(rest)
    if most > 1 and letters:
        places = min(places, _LENGTH // 4 if letters == 1 else 8)
    return exact * places * (inner if least != most else 1.0)


def _literals(items: list[tuple[Any, Any]]) -> int:
    """How many given letters these begin with, in the shortest of their branches."""
    count = 0
    for kind, value in items:
        if kind is op.LITERAL:
            count += 1
        elif kind is op.SUBPATTERN:
            inner = list(value[-1])
            found = _literals(inner)
            count += found
            if any(k is not op.LITERAL for k, _ in inner):
                return count
        elif kind is op.BRANCH:
            return count + min(_literals(list(branch)) for branch in value[1])
        else:
            return count
    return count


def _alike(branches: list[Any]) -> int:
    """How many of the branches may match at one place."""
    firsts = [next(iter(branch)) if len(branch) else None for branch in branches]
    letters = Counter(first[1] for first in firsts if first is not None and first[0] is op.LITERAL)
    return max(letters.values(), default=0) + sum(first is None or first[0] is not op.LITERAL for first in firsts)
