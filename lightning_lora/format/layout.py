"""Maps PEFT's keys to the tensors of a model. Every name is relative to one module, the root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors, adapters
from lightning_lora.engine.layers.pair import START
from lightning_lora.engine.tree import Tree, submodule, unwrapped
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.format.peft import shape_in_file, tensor_key


@dataclass(frozen=True)
class Adapted:
    """One adapted module."""

    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of the tensors of its adapter, by the engine's names."""
    ranks: Mapping[str, int]
    """The rank of each pair, by the suffix in the names of its tensors: none, or `_<parameter>` for each adapted
    parameter."""

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(end for end in self.ranks if end)

    @cached_property
    def has_start(self) -> bool:
        """True if the module has a frozen start."""
        return any(own.removesuffix(self.end(own)) in START for own in self.shapes)

    def end(self, own: str) -> str:
        """The suffix, a key of `ranks`, in `own`, the name of one of the module's tensors."""
        for end in self._ends:
            if own.endswith(end):
                return end
        return ""


@dataclass(frozen=True)
class Layout:
    """The adapted modules and the tensors that are trained whole, of one root, as PEFT sees them."""

    adapted: dict[str, Adapted]
    """The adapted modules, by the first name of each; also the modules of which single rows are trained."""
    parameters: dict[str, tuple[str, ...]]
    """The adapted parameters of each module, in its own order; empty where the module as a whole is adapted."""
    embeddings: frozenset[str]
    """The adapted modules that are embeddings."""
    whole: dict[str, tuple[int, ...]]
    """Parameters and buffers that are trained whole, with their shapes."""
    aliases: dict[str, tuple[str, ...]]
    """First name of an adapted module, or of a tensor that is trained whole -> its further names."""
    doubled: frozenset[str]
    """Modules whose update PEFT adds twice, so that a file holds half of it. These are the out_proj of an
    nn.MultiheadAttention (lora.MultiheadAttention.merge adds the update to the weight, and out_proj adds it again)."""

    def keys(self) -> dict[str, str]:
        """PEFT's keys -> the engine's names. Of the keys of one name, errors mention the first."""
        parameters = {n: own for module, own in self.parameters.items() for n in self._every(module)}
        embeddings = {n for module in self.embeddings for n in self._every(module)}
        keys: dict[str, str] = {}
        for module, adapted in self.adapted.items():
            names = self._every(module)
            for own in adapted.shapes:
                if adapted.has_start and own.removesuffix(adapted.end(own)) in START:
                    continue
                for alias in names:
                    keys[tensor_key(member(alias, own), parameters, embeddings, parameters)] = member(module, own)
        for name in self.whole:
            for alias in self._every(name):
                keys[tensor_key(alias, parameters, embeddings, parameters)] = name
        return keys

    def written_keys(self) -> dict[str, str]:
        """The part of `keys()` that PEFT writes. It writes an adapted module under its first name alone, and a module
        that is trained whole under every name, since it has a copy for each."""
        adapted: set[str] = set()
        written: dict[str, str] = {}
        for key, name in self.keys().items():
            if name in self.whole or name not in adapted:
                written[key] = name
                adapted.add(name)
        return written

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that the engine calls `name`."""
        module, _, last = name.rpartition(".")
        return self.whole[name] if name in self.whole else self.adapted[module].shapes[last]

    def shape_in_file(self, name: str) -> tuple[int, ...]:
        """The shape of the same tensor in a file, without the further ranks of a frozen start."""
        if name in self.whole:
            return self.whole[name]
        module, _, last = name.rpartition(".")
        adapted = self.adapted[module]
        return shape_in_file(last, self.shape(name), adapted.shapes.get("lora_A" + adapted.end(last), ()))

    def value_in_file(self, name: str, value: Callable[[str], Tensor]) -> Tensor:
        """The tensor that a file holds for `name`. `value` returns the engine's tensor of a name."""
        if name in self.whole:
            return value(name)
        tensor, factor = self._plain(name, value), self._factor(name)
        tensor = tensor if factor == 1 else tensor * factor
        own, written = self.shape(name), self.shape_in_file(name)
        return tensor.reshape(written) if own != written and tensor.shape == own else tensor

    def value(self, name: str, in_file: Tensor) -> Tensor:
        """The engine's tensor for `name`, made from the tensor in a file."""
        tensor, factor = in_file.reshape(self.shape(name)), self._factor(name)
        return tensor if factor == 1 else tensor / factor  # a buffer of integers stays one

    def _factor(self, name: str) -> float:
        module, _, last = name.rpartition(".")
        return 0.5 if self.doubled and module in self.doubled and last.startswith("lora_B") else 1

    def _plain(self, name: str, value: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name`, with a frozen start as further ranks, B A - B0 A0 = [B - B0, B0] [A; A - A0]. The file
        then fits the unchanged base. PEFT converts its PiSSA and OLoRA in the same way."""
        module, _, last = name.rpartition(".")
        tensor, adapted = value(name), self.adapted[module]
        if not adapted.has_start:
            return tensor
        end = adapted.end(last)
        A0, B0 = (start + end for start in START)
        if last == "lora_A" + end:  # for each matrix of a stack by itself
            start = tensor - value(member(module, A0)).to(tensor)
            return torch.cat([t.unflatten(0, (-1, adapted.ranks[end])) for t in (tensor, start)], dim=1).flatten(0, 1)
        if last == "lora_B" + end:
            start = value(member(module, B0)).to(tensor)
            both = [t.unflatten(1, (adapted.ranks[end], -1)) for t in (tensor - start, start)]
            return torch.cat(both, dim=1).flatten(1, 2)
        return tensor

    def _every(self, name: str) -> tuple[str, ...]:
        return (name, *self.aliases.get(name, ()))


def layout_of(
    root: nn.Module, adapted: Mapping[str, Adapted], whole: Iterable[Tensor], doubled: Iterable[str]
) -> Layout:
    """The layout of the modules `adapted` (by name) and the tensors `whole`, all of them in `root`."""
    tree = Tree.of(root)
    modules: dict[str, nn.Module] = dict(tree.every)
    names: dict[int, list[str]] = {id(modules[name]): [name] for name in adapted}
    for name, module in tree.every:
        if id(module) in names and name != names[id(module)][0]:
            names[id(module)].append(name)
    whole = list(whole)
    names |= {id(tensor): [] for tensor in whole}
    for name, tensor in tree.tensors if whole else ():
        if id(tensor) in names:
            names[id(tensor)].append(name)
    aliases = {first: tuple(rest) for first, *rest in names.values() if rest}
    trained = {names[id(tensor)][0]: tuple(tensor.shape) for tensor in whole}
    embeddings = frozenset(name for name in adapted if isinstance(modules[name], nn.Embedding))
    parameters = {
        name: tuple(p for p in modules[name]._parameters if f"_{p}" in module.ranks) for name, module in adapted.items()
    }
    return Layout(dict(adapted), parameters, embeddings, trained, aliases, frozenset(doubled))


def member(module: str, name: str) -> str:
    """The full name of the member `name` of the module called `module`."""
    return f"{module}.{name}" if module else name


def tensor_named(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of `root` called `name`."""
    module, _, last = name.rpartition(".")
    owner = submodule(root, module)
    tensor: Tensor | None = owner._parameters.get(last)
    if tensor is None:
        tensor = owner._buffers[last]
    assert tensor is not None
    return tensor


def names_of_tensors(root: nn.Module) -> dict[int, str]:
    """The first name of every parameter and buffer of `root`, by identity."""
    return {id(tensor): name for name, tensor in reversed(Tree.of(root).tensors)}


# Finds the base inside a model: the module to which an adapter's names are relative.
#
# PEFT's users load an adapter onto the base model itself. Here it was trained inside a LightningModule, whose own name
# for that base ("model.") must not get into the file.

Place = tuple[str, nn.Module]
"""A module, and its name in the model."""


def adapter_root(model: nn.Module) -> Place:
    """The module of `model` to which the names in an adapter folder are relative, and its name in `model`. Wrappers are
    left out of both.

    It is the transformers model that holds the whole adapter; else the child of a LightningModule that holds it (the
    other children may be a teacher or a metric); else `model` itself, with the name "". In a model without adapters it
    is the only transformers model, or the only child of a LightningModule that has parameters; else `model` itself.
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
    """The module of `model` that contains all modules called `wanted`, those that an adapter adapts; None where no
    module does. `module` is its name in the model that was trained, "" where that is not known.

    Raises AdapterFormatError where several modules contain them, and `is_meant` is not true of exactly one.
    """
    tree = Tree.of(model)
    named = tree.by_name.get(module) if module else None
    by_name = (module, named) if named is not None and _named(named, wanted) else None
    if not wanted or (by_name is not None and is_lightning_module(tree.root)):
        return by_name
    # The names may mean the same modules in two places, if a child is also a part of another: the last place is kept.
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
    """True if `model` is a LightningModule, of either package name. Its methods show it, so neither is imported."""
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
    """The children of a LightningModule, without their wrappers; empty for any other module."""
    if not is_lightning_module(tree.root):
        return []
    return [(name, unwrapped(child)) for name, child in tree.root.named_children()]


def _holds(place: Place, whole: Set[int]) -> bool:
    """True if the module at `place` has all tensors in `whole` (by id) and is no adapted layer itself: as the root, the
    layer would have no name."""
    _, root = place
    return whole <= {id(t) for t in (*root.parameters(), *root.buffers())} and "lora_A" not in root._parameters


def _outermost(places: list[Place]) -> list[Place]:
    """The places that lie in none of the others."""
    places = list({id(place[1]): place for place in reversed(places)}.values())[::-1]
    parts = {id(p): {id(m) for m in p.modules()} for _, p in places}
    return [(n, p) for n, p in places if not any(id(p) in parts[id(o)] for _, o in places if o is not p)]


def _named(root: nn.Module, wanted: Set[str]) -> list[int]:
    """The ids of the modules called `wanted` in `root`; empty where some of them are missing."""
    there = dict(Tree.of(root).every)
    return [id(there[name]) for name in sorted(wanted)] if wanted <= there.keys() else []
