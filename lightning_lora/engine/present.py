"""Finds adapters that a model has already: ours, a bank's, and those of other libraries.

If such a model was adapted once more, its old adapters would be frozen, their own A and B adapted, and none of them
saved. Other libraries are known by the package of their classes, so that none is imported, and by typical names of
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, listed

RECORD = "lora_injection"
"""The attribute under which `inject` leaves its record on the module that it was given."""

_PACKAGES = {"peft": "PEFT", "adapters": "the adapters library"}
_PAIRS = (
    ("lora_A", "lora_B"),  # loralib, LitGPT
    ("lora_a", "lora_b"),  # torchtune
    ("lora_down", "lora_up"),  # kohya, LyCORIS, older diffusers
    ("hada_w1_a", "hada_w1_b"),  # LoHa
    ("adapter_down", "adapter_up"),  # bottleneck adapters
)
_PART = re.compile(rf"(?P<owner>(?:.*\.)?)(?P<own>{'|'.join(name for pair in _PAIRS for name in pair)})(?:\.|$)")


def check_none_of_ours(model: nn.Module, tree: Tree) -> None:
    """Raise AdapterStateError if `model`, or a part of it, is adapted by this package, merged, or served by a bank."""
    if present := [name for name, _ in tree.of_classes(is_adapter)]:
        raise AdapterStateError(
            f"{type(model).__name__} has adapters already ({listed(present, 3)}). "
            "Call remove(model) or merge(model) first, or save them and add them to an AdapterBank, which holds "
            "several on one base."
        )
    if hidden := _where_they_are(model, tree):
        raise AdapterStateError(hidden)
    for name, module in tree.modules:
        if "bank_cell" in module.__dict__:
            raise AdapterStateError(f"A bank serves {name or type(model).__name__} already: call bank.close() first.")


def check_some_of_ours(model: nn.Module, tree: Tree) -> None:
    """Raise AdapterStateError, which says why, if `model` has no adapters of this package at the moment."""
    if not tree.of_classes(is_adapter):
        why = _where_they_are(model, tree)
        raise AdapterStateError(why or f"{type(model).__name__} has no adapters: call inject(model, config) first.")


def are_merged(model: nn.Module, tree: Tree) -> bool:
    """True if `model`, on which `inject` was called, is merged: it has no adapters, and still contains a layer that
    was adapted."""
    adapted = model.__dict__[RECORD].adapted.values()
    is_there = not adapted or not {id(m) for m in adapted}.isdisjoint(id(m) for _, m in tree.modules)
    return is_there and not tree.of_classes(is_adapter)


def _where_they_are(model: nn.Module, tree: Tree) -> str | None:
    """Why `model` has no adapters though it has a record of `inject`, in words; None if it has no record."""
    for name, module in tree.modules:
        if RECORD in module.__dict__:
            what = f"{type(model).__name__}{f' ({name!r} in it)' if name else ''}"
            if are_merged(module, Tree.of(module)):
                return f"{what} is merged: leave `with merged(model)` first."
            return f"All adapted layers of {what} were replaced since inject: call remove on it first."
    return None


def check_none_of_others(model: nn.Module, tree: Tree, meant: Callable[[], Iterable[str]] | None = None) -> None:
    """Raise AdapterStateError if another library has put adapters into `model`.

    `meant` gives the names of the modules to adapt. A part with foreign adapters is accepted if it is wholly frozen and
    none of those modules lies inside it: a teacher may have adapters.
    """
    found = _of_others(tree)
    if not found:
        return
    names = None if meant is None else list(meant())
    for name, (library, module) in found.items():
        is_free = names is not None and not any(_lies_in(other, name) for other in names)
        if is_free and not any(p.requires_grad for p in module.parameters()):
            continue
        places = listed((repr(place) if place else "its root" for place in found), 3)
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise AdapterStateError(
            f"{type(model).__name__} has adapters of {library} already, at {places} ({kind}). They would be adapted "
            "themselves, frozen, and not saved. To go on from a saved PEFT adapter, call load_adapter(base, folder) on "
            "the bare base. To keep them in the base weights, merge them first (PEFT: merge_and_unload()); to drop "
            "them, take the base itself (PEFT: unload()). To leave them as they are (a teacher's, for example), freeze "
            "them (requires_grad_(False)) and name the modules to adapt in target_modules."
        )


def _of_others(tree: Tree) -> dict[str, tuple[str, nn.Module]]:
    """Name of an outermost module that holds adapters of another library -> that library, and the module."""
    libraries = {cls: library for cls in tree.classes if (library := _library(cls)) is not None}
    found = {name: (libraries[type(m)], m) for name, m in tree.modules if type(m) in libraries} if libraries else {}
    owners: dict[str, set[str]] = {}
    for name, _ in tree.parameters:
        if ("lora_" in name or "hada_" in name or "adapter_" in name) and (part := _PART.match(name)):
            owners.setdefault(part["owner"].removesuffix("."), set()).add(part["own"])
    modules = dict(tree.every) if owners else {}
    for owner, names in owners.items():
        for pair in _PAIRS:
            if names.issuperset(pair):
                found.setdefault(owner, (f"another library ({' and '.join(pair)})", modules[owner]))
    outermost: dict[str, tuple[str, nn.Module]] = {}
    for name in sorted(found):
        if not any(_lies_in(name, outer) for outer in outermost):
            outermost[name] = found[name]
    return outermost


def _lies_in(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def _library(cls: type[nn.Module]) -> str | None:
    """The library of adapters that `cls` comes from, if any."""
    for parent in cls.__mro__:
        package, _, rest = parent.__module__.partition(".")
        if package == "peft" or (package == "adapters" and rest.startswith(("model_mixin", "methods."))):
            return _PACKAGES[package]
    return None
