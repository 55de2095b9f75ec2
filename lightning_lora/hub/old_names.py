"""Names that modules had in older transformers, read by transformers' own tables, as it reads old checkpoints.

LLaVA, PaliGemma, Gemma 3 and others moved `language_model.model.layers` to `model.language_model.layers` (4.52), and an
adapter that was trained before has the old names in its keys, its patterns and its regular expressions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.targets import name_matches
from lightning_lora.engine.tree import Tree
from lightning_lora.hub import peft
from lightning_lora.hub.peft_config import exact_pattern
from lightning_lora.hub.spelling import exact_targets

Renaming = Callable[[str], str]

_ABOUT_A_PAIR = re.compile(r"\.lora_\w+(\.\w+)?$|\.token_adapter\.\w+$")


def todays_names(root: nn.Module, keys: Iterable[str], adapted: Set[str]) -> dict[str, str]:
    """Of the modules `adapted`, and of other tensors called `keys`: each old name -> what it is called in `root` today.
    Only those that `root` does not have under their old names; experts are not there under today's either."""
    tree = Tree.of(root)
    absent = adapted - {name for name, _ in tree.every}
    others = [name for key in keys if not _ABOUT_A_PAIR.search(key) for name in [peft.base_name(key)]]
    tensors = set(others).difference(name for name, _ in tree.tensors) if others else set()
    renaming = _of_transformers(root) if absent or tensors else None
    if renaming is None:
        return {}
    there = {name for name, _ in tree.tensors}
    # The tables are about tensors.
    found = {name: renaming(f"{name}.weight").removesuffix(".weight") for name in absent}
    found |= {name: new for name in tensors if (new := renaming(name)) in there}
    return {old: new for old, new in found.items() if new != old}


def renamed_key(key: str, names: dict[str, str]) -> str:
    """`key` with the module, or the tensor, that it is about under the name that it has today."""
    parts = peft.base_name(key).split(".") if names else []
    for i in range(len(parts), 0, -1):
        old = ".".join(parts[:i])
        if old in names:
            return key.replace(f"{peft.PREFIX}{old}", f"{peft.PREFIX}{names[old]}", 1)
    return key


def renamed_config(config: LoRAConfig, root: nn.Module, adapted: Iterable[str], names: dict[str, str]) -> LoRAConfig:
    """`config`, which is about the old names of the modules `adapted`, for those of today."""
    if not names:
        return config
    today = {old: names.get(old, old) for old in adapted}
    targets = config.target_modules
    changes: dict[str, Any] = {
        "rank_pattern": exact_pattern({new: config.rank_of(old) for old, new in today.items()}, config.rank),
        "alpha_pattern": exact_pattern({new: config.alpha_of(old) for old, new in today.items()}, config.alpha),
    }
    if targets and targets != "all-linear" and not all(name_matches(targets, new) for new in today.values()):
        others = [name for name, _ in Tree.of(root).every if name not in today.values()]
        changes |= {
            "target_modules": exact_targets(list(today.values()), others),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    return replace(config, **changes)


def _of_transformers(root: Any) -> Renaming | None:
    """How transformers renames the tensors of an old checkpoint for `root`, if that is one of its models."""
    if "transformers" not in sys.modules or not hasattr(root, "config"):
        return None
    table = getattr(root, "_checkpoint_conversion_mapping", None)  # of transformers 4
    if table:
        return lambda name: _replaced(name, table)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return None
    renamings = [step for step in get_model_conversion_mapping(root) if isinstance(step, WeightRenaming)]
    return lambda name: str(rename_source_key(name, renamings, [])[0])


def _replaced(name: str, table: dict[str, str]) -> str:
    """As transformers 4 does: the first pattern that matches, and what it puts in its place without groups."""
    for pattern, replacement in table.items():
        plain = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
        new, count = re.subn(pattern, plain, name)
        if count:
            return new
    return name
