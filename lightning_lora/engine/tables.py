"""Counts embedding tables to an adapter: those of a vocabulary that was resized before the adapter was trained.

The tables are not trained and stay frozen. But they belong to the adapter: they are saved, loaded and removed with it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.engine.inject import injection_of
from lightning_lora.engine.tree import Tree


def take_tables(model: nn.Module, names: Iterable[str]) -> None:
    """Count the tensors `names` of `model`, which has just been adapted, to its adapter. `remove` puts their present
    values back, whatever is loaded into them later."""
    injection = injection_of(model)
    there = dict(Tree.of(model).tensors)
    taken = {name: there[name].detach().clone() for name in names}
    injection.originals.update(taken)
    injection.tables |= taken.keys()
