"""Which tensor of a model stands under which key of PEFT's: every name is relative to one root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.engine.layers.base import START
from lightning_lora.hub.peft import shape_in_file, tensor_key

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of one module's adapter, by the engine's names."""


@dataclass(frozen=True)
class Layout:
    """The adapted modules and the tensors that are trained whole, of one root, as PEFT sees them."""

    adapted: dict[str, Shapes]
    """By the first name of each module."""
    embeddings: frozenset[str]
    """Those of them that are embeddings."""
    whole: dict[str, tuple[int, ...]]
    """Parameters and buffers that are trained whole, with their shapes."""
    aliases: dict[str, tuple[str, ...]]
    """Further names of a module or of a tensor that is trained whole."""

    def keys(self) -> dict[str, str]:
        """PEFT's keys -> the engine's names; the first key of each name is the one that must be there."""
        wrapped = {n for module in self.adapted for n in self._every(module)}
        embeddings = {n for module in self.embeddings for n in self._every(module)}
        keys: dict[str, str] = {}
        for module, shapes in self.adapted.items():
            for own in shapes:
                for alias in self._every(module) if own not in START else ():
                    keys[tensor_key(member(alias, own), wrapped, embeddings)] = member(module, own)
        for name in self.whole:
            for alias in self._every(name):
                keys[tensor_key(alias, wrapped, embeddings)] = name
        return keys

    def written_keys(self) -> dict[str, str]:
        """Those of `keys()` that PEFT writes: a module that is adapted, by its first name alone; one that is trained
        whole, by every name, since PEFT has a copy under each."""
        adapted: set[str] = set()
        written: dict[str, str] = {}
        for key, name in self.keys().items():
            if name in self.whole or name not in adapted:
                written[key] = name
                adapted.add(name)
        return written

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the tensor called `name` in the engine."""
        module, _, last = name.rpartition(".")
        return self.whole[name] if name in self.whole else self.adapted[module][last]

    def shape_in_file(self, name: str) -> tuple[int, ...]:
        """That of the same tensor in a file, but for a frozen start."""
        if name in self.whole:
            return self.whole[name]
        return shape_in_file(name, self.shape(name), self.adapted[name.rpartition(".")[0]]["lora_A"])

    def value_in_file(self, name: str, value: Callable[[str], Tensor]) -> Tensor:
        """What a file holds for `name`; `value` gives the engine's tensors.

        A frozen start becomes further ranks, B A - B0 A0 = [B - B0, B0] [A; A - A0], so that the file is for the base
        as it is (as PEFT converts its PiSSA and OLoRA)."""
        module, _, last = name.rpartition(".")
        tensor = value(name)
        A0, B0 = START
        if name not in self.whole and A0 in self.adapted[module]:
            if last == "lora_A":
                return torch.cat([tensor, tensor - value(member(module, A0)).to(tensor)])
            if last == "lora_B":
                start = value(member(module, B0)).to(tensor)
                return torch.cat([tensor - start, start], dim=1)
        return tensor.reshape(self.shape_in_file(name))

    def _every(self, name: str) -> tuple[str, ...]:
        return (name, *self.aliases.get(name, ()))


def layout_of(root: nn.Module, adapted: Mapping[str, Shapes], whole: Iterable[Tensor]) -> Layout:
    """The layout of the modules `adapted` (by name) and the tensors `whole`, all of them in `root`."""
    aliases: dict[str, tuple[str, ...]] = {}
    modules = dict(root.named_modules())
    names = {id(modules[name]): name for name in adapted}
    for alias, module in root.named_modules(remove_duplicate=False):
        name = names.get(id(module), alias)
        if alias != name:
            aliases[name] = (*aliases.get(name, ()), alias)
    tensors: dict[int, list[str]] = {}
    for name, tensor in _tensors(root):
        tensors.setdefault(id(tensor), []).append(name)
    trained = {}
    for tensor in whole:
        first, *rest = tensors[id(tensor)]
        trained[first] = tuple(tensor.shape)
        aliases[first] = tuple(rest)
    embeddings = frozenset(name for name in adapted if isinstance(modules[name], nn.Embedding))
    return Layout(dict(adapted), embeddings, trained, aliases)


def member(module: str, name: str) -> str:
    """The full name of what the module called `module` holds as `name`."""
    return f"{module}.{name}" if module else name


def tensor_named(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of `root` called `name`."""
    module, _, last = name.rpartition(".")
    owner = root.get_submodule(module)
    tensor: Tensor | None = owner._parameters.get(last)
    if tensor is None:
        tensor = owner._buffers[last]
    assert tensor is not None
    return tensor


def names_of_tensors(root: nn.Module) -> dict[int, str]:
    """The first name of every parameter and buffer of `root`, by identity."""
    names: dict[int, str] = {}
    for name, tensor in _tensors(root):
        names.setdefault(id(tensor), name)
    return names


def _tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)
