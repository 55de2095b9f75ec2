"""Where in a model the base lies to which an adapter's names are relative.

PEFT's users load an adapter onto the base model itself; here it was trained inside a LightningModule, whose own name
for that base ("model.") must not get into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors, adapters
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.wrappers import unwrapped
from lightning_lora.errors import AdapterFormatError, listed

Place = tuple[str, nn.Module]
"""A module, and its name in the model."""


def adapter_root(model: nn.Module) -> Place:
    """The module of `model` to which the names in an adapter folder are relative, with its name in `model`; neither has
    to do with wrappers.

    It is the transformers model that holds the whole adapter; else the child of a LightningModule that does, whatever
    that has besides (a teacher, a metric); else `model` itself, with the name "". A model without adapters is judged by
    its shape alone: it is the one transformers model, or the one child of a LightningModule that has parameters.
    """
    tree = Tree.of(model)
    model = tree.root
    if any(True for _ in adapters(model)):
        whole = {id(t) for t in adapter_tensors(model).values()}
        models, children = ([p for p in found if _holds(p, whole)] for found in (_models(tree), _children(tree)))
        found = _outermost(models or children)
    else:
        found = _models(tree) or [p for p in _children(tree) if next(p[1].parameters(), None) is not None]
    return found[0] if len(found) == 1 else ("", model)


def place_of(
    model: nn.Module, wanted: Set[str], module: str, is_meant: Callable[[nn.Module], bool] = lambda root: True
) -> Place | None:
    """The module of `model` in which all the modules that an adapter adapts, `wanted`, have their names; None where
    there is none. `module` is what it was called in the model that was trained, "" where that is not known.

    Raises AdapterFormatError where several have them, and `is_meant` does not tell which.
    """
    tree = Tree.of(model)
    named = tree.by_name.get(module) if module else None
    by_name = (module, named) if named is not None and _named(named, wanted) else None
    if not wanted or (by_name is not None and is_lightning_module(tree.root)):
        return by_name
    # Of those in which the names mean the same modules, one child that is also known as a part of another, the last.
    found = {
        tuple(modules): place
        for place in (("", tree.root), *_models(tree), *_children(tree))
        if (modules := _named(place[1], wanted))
    }
    places = list(found.values())
    if not is_lightning_module(tree.root):
        if places and places[0][1] is tree.root:
            return places[0]
        if by_name is not None:
            return by_name
    if len(places) > 1:
        meant = [place for place in places if is_meant(place[1])]
        if len(meant) != 1:
            raise AdapterFormatError(
                f"The adapter fits several parts of this {type(tree.root).__name__}: "
                f"{listed(name or 'itself' for name, _ in places)}. Pass the one that is meant, such as "
                f"model.{places[-1][0]}. Nothing was changed."
            )
        return meant[0]
    return places[0] if places else None


def is_lightning_module(model: nn.Module) -> bool:
    """Whether `model` is a LightningModule, of either package name (asked by its methods, so neither is imported)."""
    return hasattr(model, "configure_optimizers") and hasattr(model, "training_step")


def _models(tree: Tree) -> list[Place]:
    """The outermost transformers models."""
    inside: set[int] = set()
    found = []
    for name, module in tree.modules:
        if id(module) not in inside and hasattr(module, "config") and hasattr(module, "save_pretrained"):
            inside.update(id(m) for m in module.modules())
            found.append((name, module))
    return found


def _children(tree: Tree) -> list[Place]:
    """Those of a LightningModule; there are none where it is a transformers model itself, or no LightningModule."""
    if not is_lightning_module(tree.root):
        return []
    return [(name, unwrapped(child)) for name, child in tree.root.named_children()]


def _holds(place: Place, whole: Set[int]) -> bool:
    """Whether all of the tensors `whole` are inside. An adapted layer itself cannot be the root: it would have no name
    there."""
    return whole <= {id(t) for t in _tensors(place[1])} and "lora_A" not in place[1]._parameters


def _outermost(places: list[Place]) -> list[Place]:
    """Those that lie in none of the others."""
    places = _distinct(places)
    parts = {id(p): {id(m) for m in p.modules()} for _, p in places}
    return [(n, p) for n, p in places if not any(id(p) in parts[id(o)] for _, o in places if o is not p)]


def _distinct(places: Iterable[Place]) -> list[Place]:
    first: dict[int, Place] = {}
    for place in places:
        first.setdefault(id(place[1]), place)
    return list(first.values())


def _named(root: nn.Module, wanted: Set[str]) -> list[int]:
    """The modules called `wanted` in `root`, by identity; none where some are not there."""
    there = dict(Tree.of(root).every)
    return [id(there[name]) for name in sorted(wanted)] if wanted <= there.keys() else []


def _tensors(root: nn.Module) -> Iterator[Tensor]:
    yield from root.parameters()
    yield from root.buffers()
