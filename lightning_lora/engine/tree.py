"""Lists the modules and tensors of a model in one walk; torch's generators pass each name up through all levels.

All names are those of the model without wrappers (see wrappers.py), so they are the same before and after a module is
compiled, put into DDP, or set up by Fabric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lightning_lora.engine.wrappers import around, unwrapped


@dataclass(frozen=True)
class Tree:
    """The modules of a model, in its own order."""

    every: list[tuple[str, nn.Module]]
    """As `model.named_modules(remove_duplicate=False)`: under every name. The first is the model without wrappers."""
    wrappers: list[tuple[str, nn.Module]]
    """The wrappers in the model, each under the name of the module inside it."""

    @staticmethod
    def of(model: nn.Module) -> Tree:
        root = unwrapped(model)
        every = [("", root)]
        wrappers = [("", wrapper) for wrapper in around(model)]
        _descend(root, "", every, wrappers)
        return Tree(every, wrappers)

    @property
    def root(self) -> nn.Module:
        """The model, without wrappers around it."""
        return self.every[0][1]

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """As `model.named_modules()`: each module under its first name."""
        if len({id(module) for _, module in self.every}) == len(self.every):
            return self.every
        first: dict[int, tuple[str, nn.Module]] = {}
        for entry in self.every:
            first.setdefault(id(entry[1]), entry)
        return list(first.values())

    @cached_property
    def aliases(self) -> dict[int, tuple[str, ...]]:
        """id(module) -> its further names, for modules that are registered under several."""
        if self.modules is self.every:
            return {}
        names: dict[int, list[str]] = {}
        for name, module in self.every:
            names.setdefault(id(module), []).append(name)
        return {key: tuple(own[1:]) for key, own in names.items() if len(own) > 1}

    @cached_property
    def by_name(self) -> dict[str, nn.Module]:
        """First name -> module. (TorchScript's modules have no get_submodule.)"""
        return dict(self.modules)

    @cached_property
    def classes(self) -> set[type[nn.Module]]:
        """The classes of the modules: a model has few classes and many modules."""
        return {type(module) for _, module in self.modules}

    def of_classes(self, wanted: Callable[[type[nn.Module]], bool]) -> list[tuple[str, nn.Module]]:
        """The modules whose class is `wanted`, with their names."""
        classes = {cls for cls in self.classes if wanted(cls)}
        return [entry for entry in self.modules if type(entry[1]) in classes] if classes else []

    @cached_property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """As `model.named_parameters(remove_duplicate=False)`: under every name."""
        return [
            (f"{name}.{own}" if name else own, p)
            for name, module in self.every
            if module._parameters
            for own, p in module._parameters.items()
            if p is not None
        ]

    @cached_property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """The parameters and the buffers, each under every name."""
        buffers = (
            (f"{name}.{own}" if name else own, t)
            for name, module in self.every
            if module._buffers
            for own, t in module._buffers.items()
            if t is not None
        )
        return [*self.parameters, *buffers]

    @cached_property
    def classes_of_parameters(self) -> set[type[nn.Parameter]]:
        """The types of the parameters: nn.Parameter, and others if some are quantized, sharded or lazy."""
        return {type(p) for _, p in self.parameters}


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of `model` called `name`, without wrappers. Raises AttributeError where there is none."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        child: Any = getattr(module, part)
        module = unwrapped(child)
    return module


def _descend(
    module: nn.Module, prefix: str, every: list[tuple[str, nn.Module]], wrappers: list[tuple[str, nn.Module]]
) -> None:
    for own, child in module._modules.items():
        if child is not None:
            name = prefix + own
            if child._modules:
                inner = unwrapped(child)
                if inner is not child:
                    wrappers += [(name, wrapper) for wrapper in around(child)]
                every.append((name, inner))
                _descend(inner, f"{name}.", every, wrappers)
            else:
                every.append((name, child))
