"""Layers that share their weight, of which PEFT's config names one and its file has both (ensure_weight_tying)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.inject import weight_users
from lightning_lora.engine.targets import name_matches
from lightning_lora.engine.tree import Tree
from lightning_lora.hub import peft


def with_tied(root: nn.Module, config: LoRAConfig, keys: Iterable[str]) -> LoRAConfig:
    """`config` with the modules that the file has beside one that it names and that shares its weight.

    Where PEFT keeps tied layers tied (ensure_weight_tying), it adapts or trains both, and writes one of the names."""
    tree = Tree.of(root)
    users = weight_users(tree.modules)
    tied = {id(m): {n for n, _ in group} for group in users.values() if len(group) > 1 for _, m in group}
    if not tied:
        return config
    adapted = peft.adapted_names(keys)
    whole = {peft.base_name(key).rpartition(".")[0] for key in keys} - adapted
    targets, saved = config.target_modules, config.modules_to_save or []

    def beside(pattern: str | list[str], there: set[str]) -> list[str]:
        named = [m for name, m in tree.modules if name and id(m) in tied and name_matches(pattern, name)]
        found = {name for m in named for name in tied[id(m)]} & there
        return sorted(name for name in found if not name_matches(pattern, name))

    if targets and targets != "all-linear" and (more := beside(targets, adapted)):
        if isinstance(targets, str):
            targets = "|".join([f"(?:{targets})", *map(re.escape, more)])
        else:
            targets = [*targets, *more]
    return replace(config, target_modules=targets, modules_to_save=[*saved, *beside(saved, whole)] or None)
