"""Tables of the base that come with an adapter: those of a vocabulary that was resized before it was trained.

They are no part of the training, so they stay frozen; but they belong to the adapter, which is saved, loaded and
removed with them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_lora.engine.inject import injection_of
from lightning_lora.engine.tree import Tree


def take_tables(model: nn.Module, names: Iterable[str]) -> None:
    """Count the tensors `names` of `model`, which was adapted just now, to its adapter: `remove` puts back what they
    hold now, whatever is loaded into them."""
    injection = injection_of(model)
    there = dict(Tree.of(model).tensors)
    taken = {name: there[name].detach().clone() for name in names}
    injection.originals.update(taken)
    injection.tables |= taken.keys()
