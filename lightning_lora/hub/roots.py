"""Where in a model the base lies to which an adapter's names are relative.

PEFT's users load an adapter onto the base model itself; here it was trained inside a LightningModule, whose own name
for that base ("model.") must not get into the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors, adapters
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.wrappers import unwrapped


def adapter_root(model: nn.Module) -> tuple[str, nn.Module]:
    """The module of `model` to which the names in an adapter folder are relative, with its name in `model`; neither has
    to do with wrappers.

    It is the transformers model, where exactly one lies in `model` and holds the whole adapter; else the one child of a
    LightningModule that has parameters, if it holds the whole adapter; else `model` itself, with the name "". A model
    without adapters is judged by its shape alone.
    """
    tree = Tree.of(model)
    model = tree.root
    found = [("", model)]
    outermost = list(_outermost_transformers(tree))
    if len(outermost) == 1:
        found = outermost
    elif not outermost and is_lightning_module(model):
        children = ((n, unwrapped(child)) for n, child in model.named_children())
        found = [(n, child) for n, child in children if next(child.parameters(), None) is not None]
    if len(found) != 1:
        return "", model
    name, root = found[0]
    if root is model:
        return "", model
    adapted = any(True for _ in adapters(model))
    whole = {id(t) for t in adapter_tensors(model).values()} if adapted else set()
    inside = {id(t) for t in _tensors(root)}
    # An adapted layer cannot be the root itself: it would have no name there.
    return (name, root) if whole <= inside and "lora_A" not in root._parameters else ("", model)


def is_lightning_module(model: nn.Module) -> bool:
    """Whether `model` is a LightningModule, of either package name (asked by its methods, so neither is imported)."""
    return hasattr(model, "configure_optimizers") and hasattr(model, "training_step")


def _outermost_transformers(tree: Tree) -> Iterator[tuple[str, nn.Module]]:
    inside: set[int] = set()
    for name, module in tree.modules:
        if id(module) not in inside and hasattr(module, "config") and hasattr(module, "save_pretrained"):
            inside.update(id(m) for m in module.modules())
            yield name, module


def _tensors(root: nn.Module) -> Iterator[Tensor]:
    yield from root.parameters()
    yield from root.buffers()
