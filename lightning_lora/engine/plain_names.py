"""Rewrites names in a config that mention wrappers, such as "model._orig_mod.up", to plain names ("model.up")."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_lora.engine.config import LoRAConfig, pattern_matches
from lightning_lora.engine.tree import NAMES, Tree, entry_matches

_MENTIONED = re.compile(rf"(?<![^.(|])(?:{'|'.join(sorted(NAMES))})(?:\\?\.|$)")

_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_DICTS = ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def with_plain_names(config: LoRAConfig, tree: Tree, *, of_file: bool = False) -> LoRAConfig:
    """`config` without the names of wrappers, in those names and expressions that match nothing in `tree` as they are.

    Nothing is changed if the model has no wrappers, unless the config is `of_file`: then it may come from a model that
    was wrapped."""
    if not (tree.wrappers or of_file):
        return config
    names = [name for name, _ in (*tree.every, *tree.tensors)]
    changes: dict[str, Any] = {}
    for field in _LISTS:
        value = getattr(config, field)
        if isinstance(value, list):
            changes[field] = [_plain(entry, names, entry_matches) for entry in value]
        elif isinstance(value, str) and value != "all-linear":
            changes[field] = _plain(value, names, _fullmatch)
    for field in _DICTS:
        value = getattr(config, field)
        if isinstance(value, dict):
            matches = entry_matches if field == "trainable_token_indices" else pattern_matches
            changes[field] = {_plain(entry, names, matches): of for entry, of in value.items()}
    return replace(config, **changes)


def _plain(entry: str, names: list[str], matches: Callable[[str, str], bool]) -> str:
    plain = without_wrappers(entry)
    return entry if plain in ("", entry) or any(matches(entry, name) for name in names) else plain


@functools.cache
def without_wrappers(entry: str) -> str:
    """A name, or an expression, without the names of wrappers in it."""
    return _MENTIONED.sub("", entry).removesuffix(".").removesuffix("\\")


def _fullmatch(expression: str, name: str) -> bool:
    return re.fullmatch(expression, name) is not None
