"""Lists the modules and tensors of a model in one walk; torch's generators pass each name up through all levels.

All names are those of the model without wrappers (see `unwrapped`), so they are the same before and after a module is
compiled, put into DDP, or set up by Fabric.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# Knows wrappers: modules that torch, Lightning and others put around a module (DDP, torch.compile, FSDP).
#
# Our names never mention wrappers, since a file that is written with them is read where they are not. Wrappers are
# known by their classes, not by names: a user's own child may be called "module".

_INSIDE = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
"""Class of a wrapper -> the name of the child that it wraps."""

_AVERAGES = (
    "torch.optim.swa_utils.AveragedModel",
    "timm.utils.model_ema.ModelEmaV2",
    "timm.utils.model_ema.ModelEmaV3",
)

NAMES = frozenset((*_INSIDE.values(), "_forward_module"))
"""The parts that wrappers put into the names of parameters."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, if `module` is a wrapper; else `module` itself."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def around(module: nn.Module) -> list[nn.Module]:
    """`module` and the wrappers inside it, the outermost first; empty if `module` is no wrapper."""
    found: list[nn.Module] = []
    while (inner := _inside(module)) is not None:
        found.append(module)
        forward = module._modules.get("_forward_module")  # a second wrapper of Fabric's around the same module
        if forward is not None:
            found += around(forward)
        module = inner
    return found


def is_average(module: nn.Module) -> bool:
    """True if `module` is a wrapper whose inner module holds an average of another module's weights."""
    return any(f"{cls.__module__}.{cls.__qualname__}" in _AVERAGES for cls in type(module).__mro__)


def _inside(module: nn.Module) -> nn.Module | None:
    cls: Any = type(module)
    name = _held_as(cls)
    return None if name is None else module._modules.get(name)


def _held_as(cls: Any) -> str | None:
    if cls not in _KNOWN:
        names = (f"{parent.__module__}.{parent.__qualname__}" for parent in cls.__mro__)
        _KNOWN[cls] = next((_INSIDE[name] for name in names if name in _INSIDE), None)
    return _KNOWN[cls]


_KNOWN: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()


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

    @property
    def kind(self) -> str:
        """The name of the model's class, for messages."""
        return type(self.root).__name__

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
            (f"{name}.{own}" if name else own, p)  # not `name_in`: this runs for every parameter of large models
            for name, module in self.every
            if module._parameters
            for own, p in module._parameters.items()
            if p is not None
        ]

    @cached_property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """The parameters and the buffers, each under every name."""
        buffers = (
            (name_in(name, own), t)
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


# Finds the modules of a model that a config names; a `Target` is made only for those that are asked for.


class Target(NamedTuple):
    """A module to adapt."""

    name: str
    module: nn.Module
    parent: nn.Module
    aliases: tuple[str, ...] = ()
    """Further names under which the same module is registered."""
    parameters: tuple[str, ...] = ()
    """Names of its parameters that are adapted one by one; empty if its output is adapted."""
    within: str | None = None
    """The name of the target whose companion it is, if it is one."""

    def names_of(self, parameter: str | None = None) -> tuple[str, ...]:
        """The names by which patterns match the module, or one of its parameters; its own name comes first."""
        own = (self.name,) if self.within is None else (self.name, self.within)
        return (name_in(self.name, parameter), *own) if parameter else own


@dataclass(frozen=True)
class Candidates:
    """The modules that can be targets, in the model's order: all except those that are trained whole."""

    tree: Tree
    trained_whole: Set[int] = frozenset()
    """The ids of the modules that are trained whole."""

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        if not self.trained_whole:
            return self.tree.modules
        return [entry for entry in self.tree.modules if id(entry[1]) not in self.trained_whole]

    @cached_property
    def all(self) -> list[Target]:
        """All candidates as targets. It costs time, since there are far more of them than are adapted."""
        return [self.target(name, module) for name, module in self.modules]

    def target(self, name: str, module: nn.Module) -> Target:
        parent = self.tree.by_name[name.rpartition(".")[0]]
        return Target(name, module, parent, self.tree.aliases.get(id(module), ()))

    def of_classes(self, wanted: Callable[[type[nn.Module]], bool]) -> list[Target]:
        """The candidates whose class is `wanted`, as targets."""
        classes = {cls for cls in self.tree.classes if wanted(cls)}
        return [self.target(name, module) for name, module in self.modules if type(module) in classes]

    def matching(self, pattern: str, *, is_regex: bool) -> list[int]:
        """The indices in `modules` of those that the entry `pattern` matches, under any of their names."""
        if not is_regex:
            return sorted({at for at, name in self._ending_in[last_part(pattern)] if entry_matches(pattern, name)})
        matches = re.compile(pattern).fullmatch
        aliases = self.tree.aliases
        return [
            at
            for at, (name, module) in enumerate(self.modules)
            if matches(name) or (aliases and any(map(matches, aliases.get(id(module), ()))))
        ]

    @cached_property
    def _ending_in(self) -> Mapping[str, list[tuple[int, str]]]:
        """Last part of a name -> the names that end in it, each with its module's index in `modules`."""
        names: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for at, (name, module) in enumerate(self.modules):
            for known in (name, *self.tree.aliases.get(id(module), ())):
                names[last_part(known)].append((at, known))
        return names


def weight_users(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[tuple[str, nn.Module]]]:
    """id(parameter) -> the `modules` that hold it directly: more than one if weights are tied."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        for p in {id(p) for p in module._parameters.values() if p is not None}:
            users.setdefault(p, []).append((name, module))
    return users


@contextmanager
def flags_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """After the block, each of `parameters` requires grad as before it."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        yield
    finally:
        for p, required in before:
            if p.requires_grad is not required:
                p.requires_grad_(required)


def _renew_locks() -> None:
    """In a process that is forked: before Python 3.12 a cached_property has one lock for all instances, which nobody
    there would release if another thread held it."""
    for owner in (Tree, Candidates):
        for value in vars(owner).values():
            if isinstance(value, cached_property) and hasattr(value, "lock"):
                value.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def entry_matches(entry: str, name: str) -> bool:
    """PEFT's rule for an entry of a list: it equals the whole name, or the end of the name after a dot."""
    return name == entry or name.endswith(f".{entry}")


def last_part(name: str) -> str:
    """The part of a name after the last dot: the parent's name for the module."""
    return name.rpartition(".")[2]


def name_in(module: str, own: str) -> str:
    """The name in the model of what the module called `module` calls `own`."""
    return f"{module}.{own}" if module else own
