"""Checks an adapter that somebody else made, without the model and before anything is built.

A later check, when the adapter is loaded onto a model, finds out if it fits that model.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import pattern_matches
from lightning_lora.engine.state import is_finite
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.format import peft
from lightning_lora.format.config import from_peft
from lightning_lora.format.folder import (
    CONFIG,
    TENSORS,
    Header,
    OpenTensors,
    check_folder,
    open_tensors,
    read_config,
)

# Estimates how long it may take to match a regular expression that somebody else wrote, before it is tried.
#
# Python's matcher backtracks: `(a+)+$` tries 2^n ways to match a name of n letters. The functions below compute a rough
# upper bound of the ways from the expression alone. Expressions as people write them for modules stay far below the
# limit.

# The package `regex`, whose matches take a timeout, does not help. PEFT and vLLM match with `re`, which hangs on
# expressions that `regex` answers at once, such as (\w+\.?)*!. To compile (()){99999} takes `regex` minutes, without a
# timeout. And a folder is checked when it is pulled, when there is no model yet whose names could be tried.
#
# The parser of `re` has no public name.
op: Any = import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")
parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MOST_WAYS = 1e6
"""To try so many ways takes about 20 ms for one name."""
_LENGTH = 100  # letters in a long name of a module
_ONE = {op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN}
_REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, getattr(op, "POSSESSIVE_REPEAT", None)}
_MOST_TIMES = 1000
_AHEAD = 8  # items that are looked at after a repetition; to look at all of them takes quadratic time


def ways(expression: str) -> float:
    """A rough upper bound of the ways to match a name with `expression`; infinity where there is no useful bound.

    Raises ValueError where `expression` is no regular expression.
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
    return math.inf  # a reference back to a group makes matching exponential by itself


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
    # Given letters after the repetition are found in only a few places of a name, and it can end only there.
    letters = _literals(rest)
    if most > 1 and letters:
        places = min(places, _LENGTH // 4 if letters == 1 else 8)
    return exact * places * (inner if least != most else 1.0)


def _literals(items: list[tuple[Any, Any]]) -> int:
    """The number of given letters that `items` begin with. Of several branches, the smallest number counts."""
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
    """The number of branches that may match at one place."""
    firsts = [next(iter(branch)) if len(branch) else None for branch in branches]
    letters = Counter(first[1] for first in firsts if first is not None and first[0] is op.LITERAL)
    return max(letters.values(), default=0) + sum(first is None or first[0] is not op.LITERAL for first in firsts)


LARGEST_SCALE = 1e4
"""The largest scale that is accepted. Adapters in use have less than 100; far above that, every output is noise or not
finite."""
LARGEST_RANK = 1 << 24
_LONGEST_NAME = 1000
_MOST_ENTRIES = 10_000
_MOST_TENSORS = 100_000

# The tensors that PEFT writes for an adapted module; some of them only for variants of LoRA.
_FACTOR = re.compile(
    r"(^|\.)(lora_(embedding_)?[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(\.(weight|bias))?$"
)
_FIRST_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?A(\.weight)?$")
# PEFT also saves these, unchanged, where it believes that the vocabulary grew; loading compares them with the model's.
_VOCABULARY = re.compile(
    r"((^|\.)(\w*emb\w*|wte|lm_head|shared|output)\.(base_layer\.)?|\.token_adapter\.base_layer\.)(weight|bias)$"
)


def check_adapter(folder: Path, ignore_fields: Collection[str] = ()) -> LoRAConfig:
    """The config of the adapter in `folder`. Raises AdapterFormatError unless it is safe to load onto the model that it
    fits."""
    where = str(folder / TENSORS)
    with opened(folder, ignore_fields) as (config, file):
        check_header(config, file.header, where)
        # Tensors are read one by one: none is larger than the file, whose header was checked.
        broken = [key for key in file.header.shapes if not is_finite(file[key])]
    if broken:
        raise AdapterFormatError(f"{where} holds values that are not finite, in {listed(broken)}.")
    return config


@contextmanager
def opened(folder: Path, ignore_fields: Collection[str]) -> Iterator[tuple[LoRAConfig, OpenTensors]]:
    """The config and the open tensors of the adapter in `folder`. Raises AdapterFormatError where it holds none, and as
    `check_config` and `open_tensors` do."""
    check_folder(folder)
    config = checked_config(folder, ignore_fields)
    with open_tensors(folder) as file:
        yield config, file


def checked_config(folder: Path, ignore_fields: Collection[str]) -> LoRAConfig:
    """The config in `folder`. Raises AdapterFormatError as `check_config` does."""
    return check_config(read_config(folder), str(folder / CONFIG), ignore_fields)


def check_config(data: Any, where: str, ignore_fields: Collection[str]) -> LoRAConfig:
    """The config in `data`, the content of an `adapter_config.json`. Raises AdapterFormatError, with a message that
    begins with `where`, for a config that `from_peft` refuses, one of an absurd size or scale, and one with a regular
    expression that could keep the matcher busy for ever."""
    if isinstance(data, Mapping):
        for field, value in data.items():
            if isinstance(value, (list, dict)) and len(value) > _MOST_ENTRIES:
                raise AdapterFormatError(f"{where}: {field} has {len(value):,} entries, more than {_MOST_ENTRIES:,}.")
        for field, expression in _expressions(data):
            _check_expression(field, expression, where)
    config = from_peft(data, where, ignore_fields)
    if max([config.rank, *config.rank_pattern.values()]) > LARGEST_RANK:
        raise AdapterFormatError(f"{where}: r, or a rank in rank_pattern, is larger than any layer.")
    largest = max([config.alpha, *config.alpha_pattern.values()])
    rank = min([config.rank, *config.rank_pattern.values()])
    scale = largest / (math.sqrt(rank) if config.use_rslora else rank)
    if scale > LARGEST_SCALE:
        of_alpha = "lora_alpha" if largest == config.alpha else "the largest alpha in alpha_pattern"
        of_rank = "r" if rank == config.rank else "the smallest rank in rank_pattern"
        raise AdapterFormatError(
            f"{where}: {of_alpha} is {largest:g} and {of_rank} is {rank}, so the update would be multiplied by "
            f"{scale:g}. More than {LARGEST_SCALE:g} is no adapter that was trained."
        )
    return config


def check_header(config: LoRAConfig, header: Header, where: str) -> None:
    """Raise AdapterFormatError, with a message that begins with `where`, for a tensor that is no part of an adapter,
    and for ranks in `config` that the tensors do not have."""
    if len(header.shapes) > _MOST_TENSORS:
        raise AdapterFormatError(f"{where} holds {len(header.shapes):,} tensors, more than any adapter.")
    foreign, kinds, ranks = [], [], {}
    for key, shape in header.shapes.items():
        plain = peft.plain_key(key)
        if len(key) > _LONGEST_NAME or not key.startswith(peft.PREFIX) or not _is_expected(plain, config):
            foreign.append(key[:_LONGEST_NAME])
        elif _FACTOR.search(plain) and not (header.floating[key] and 0 < len(shape) <= 5):
            kinds.append(key)
        if _FIRST_FACTOR.search(plain) and shape:
            ranks[key] = shape[0]
    if foreign:
        raise AdapterFormatError(
            f"{where} holds what is no part of an adapter: {listed(foreign)}. Such a tensor would overwrite a weight "
            "of the base. Ask its author for a file with the adapter alone."
        )
    if kinds:
        raise AdapterFormatError(f"{where} holds {listed(kinds)}, which is of a type or a shape that no adapter has.")
    if not ranks:
        if config.trainable_token_indices and any(".token_adapter." in key for key in header.shapes):
            return
        raise AdapterFormatError(f"{where} holds no LoRA factor, only {listed(header.shapes)}.")
    most, patterns = max(ranks.values()), {**config.rank_pattern, **config.alpha_pattern}
    # An entry for a module that is not adapted has no effect, nor has it in PEFT.
    names = peft.adapted_names(map(peft.plain_key, ranks))
    above = {
        entry: rank
        for entry, rank in config.rank_pattern.items()
        if rank > most and any(pattern_matches(entry, name) for name in names)
    }
    # If the config has a rank_pattern, there may be no module with the rank in `r`.
    if not config.rank_pattern:
        above = {key: config.rank for key, rows in ranks.items() if config.rank > rows}
    if above:
        name, rank = next(iter(above.items()))
        raise AdapterFormatError(
            f"{where} does not fit its {CONFIG}: that has rank {rank} for {name}, the tensors have at most {most}."
        )
    if len(patterns) > max(256, 2 * len(ranks)):
        raise AdapterFormatError(
            f"{where} does not fit its {CONFIG}: {len(patterns):,} patterns for {len(ranks):,} adapted modules."
        )


def _is_expected(key: str, config: LoRAConfig) -> bool:
    return is_trained(key, config) or bool(_VOCABULARY.search(key)) or peft.is_untrained_original(key)


def is_trained(key: str, config: LoRAConfig) -> bool:
    """True if a tensor with this plain key was trained under `config`: it is one of an adapted module, or whole."""
    name = peft.base_name(key)
    is_bias = config.bias != "none" and name.endswith("bias")
    return bool(_FACTOR.search(key)) or is_bias or peft.is_inside(config.modules_to_save or (), name)


def _expressions(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions in a config, each with its field: as they are written, and as PEFT matches them."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(data.get(field), str):
            yield field, data[field]
    pattern = data.get("layers_pattern")
    for entry in [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, list) else []:
        if isinstance(entry, str):
            yield "layers_pattern", entry
            yield "layers_pattern", rf"(?:^|.*?\.){entry}\.(\d+)\."
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(data.get(field), Mapping):
            for entry in data[field]:
                yield field, entry
                yield field, rf"(.*\.)?({entry})$"


def _check_expression(field: str, expression: str, where: str) -> None:
    shown = expression if len(expression) <= 80 else f"{expression[:80]}..."
    try:
        many = ways(expression)
    except ValueError as error:
        raise AdapterFormatError(
            f"{where}: {field} holds {shown!r}, which is not a regular expression: {error}."
        ) from error
    if many > MOST_WAYS:
        raise AdapterFormatError(
            f"{where}: {field} holds the regular expression {shown!r}, which can take practically for ever to match "
            "(it repeats what repeats, or refers back). Write the names of the modules as a list."
        )
