"""Compares two configs by what they select in a model, however they say it: endings in another order, an expression
for a list, "all-linear" for the layers that it selects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.present import Injection
from lightning_lora.engine.targets import Selection, meant_by, with_plain_names
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import TargetError

# Fields that select something together.
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_RANKS = ("rank", "rank_pattern")
_ALPHAS = ("alpha", "alpha_pattern")
_SAVED = ("modules_to_save",)


def differences(model: nn.Module, injection: Injection, config: LoRAConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> its value in `injection.config` and in `config`, for the fields whose difference matters for `model`,
    which `injection.config` adapted."""
    tree = Tree.of(model)
    theirs, ours = injection.config, with_plain_names(config, tree)
    both = {f.name: (getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(LoRAConfig)}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    if not differing.keys() & {*_TARGETS, *_RANKS, *_ALPHAS, *_SAVED}:
        return differing
    with _as_before(tree, injection):
        try:
            meant = [_meaning(meant_by(c, tree), c) for c in (theirs, ours)]
        except TargetError:  # an entry of `config` matches nothing, so the configs do differ
            return differing
    for names in (_TARGETS, _RANKS, _ALPHAS, _SAVED):
        if meant[0][names] == meant[1][names]:
            differing = {name: values for name, values in differing.items() if name not in names}
    return differing


def _meaning(selection: Selection, config: LoRAConfig) -> dict[tuple[str, ...], Any]:
    """Group of fields -> what it selects: the targets, their ranks, their alphas, the modules trained whole."""
    known = {
        (target.name, parameter): target.names_of(parameter)
        for target in selection.targets
        for parameter in target.parameters or (None,)
    }
    return {
        _TARGETS: set(known),
        _RANKS: {key: config.rank_of(*names) for key, names in known.items()},
        _ALPHAS: {key: config.alpha_of(*names) for key, names in known.items()},
        _SAVED: set(selection.saved),
    }


@contextmanager
def _as_before(tree: Tree, injection: Injection) -> Iterator[None]:
    """Inside, parameters require grad as before `inject`, since "all-linear" depends on what was frozen then."""
    now = [(p, p.requires_grad) for _, p in tree.parameters]
    try:
        for name, p in tree.parameters:
            if p.requires_grad is not (before := name in injection.was_trainable):
                p.requires_grad_(before)
        yield
    finally:
        for p, is_trained in now:
            if p.requires_grad is not is_trained:
                p.requires_grad_(is_trained)
