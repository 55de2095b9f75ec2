"""Which tensor of a model stands under which key of PEFT's: every name is relative to one root."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.engine.layers import FACTORS
from lightning_lora.hub.peft import tensor_key


@dataclass(frozen=True)
class Layout:
    """The adapted modules and the tensors that are trained whole, of one root, as PEFT sees them."""

    adapted: dict[str, nn.Module]
    """By the first name of each."""
    whole: tuple[str, ...]
    """Parameters and buffers that are trained whole."""
    aliases: dict[str, tuple[str, ...]]
    """Further names of a module or of a tensor that is trained whole."""

    def keys(self) -> dict[str, str]:
        """PEFT's keys -> the engine's names; the first key of each name is the one that must be there."""
        wrapped = {n for module in self.adapted for n in self._every(module)}
        embeddings = {n for m, module in self.adapted.items() if _is_embedding(module) for n in self._every(m)}
        keys: dict[str, str] = {}
        for module in self.adapted:
            for factor in FACTORS:
                for alias in self._every(module):
                    keys[tensor_key(member(alias, factor), wrapped, embeddings)] = member(module, factor)
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

    def _every(self, name: str) -> tuple[str, ...]:
        return (name, *self.aliases.get(name, ()))


def layout_of(root: nn.Module, adapted: Mapping[str, nn.Module], whole: Iterable[Tensor]) -> Layout:
    """The layout of the modules `adapted` (by name) and the tensors `whole`, all of them in `root`."""
    aliases: dict[str, tuple[str, ...]] = {}
    names = {id(module): name for name, module in adapted.items()}
    for alias, module in root.named_modules(remove_duplicate=False):
        name = names.get(id(module), alias)
        if alias != name:
            aliases[name] = (*aliases.get(name, ()), alias)
    tensors: dict[int, list[str]] = {}
    for name, tensor in _tensors(root):
        tensors.setdefault(id(tensor), []).append(name)
    trained = []
    for tensor in whole:
        first, *rest = tensors[id(tensor)]
        trained.append(first)
        aliases[first] = tuple(rest)
    return Layout(dict(adapted), tuple(trained), aliases)


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


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)
