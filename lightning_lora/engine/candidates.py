"""The modules of a model that a config may mean, found by their names without making anything of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from lightning_lora.engine.tree import Tree


class Target(NamedTuple):
    """A module to adapt."""

    name: str
    module: nn.Module
    parent: nn.Module
    aliases: tuple[str, ...] = ()
    """Further names under which the same module is registered."""
    parameters: tuple[str, ...] = ()
    """Those of its parameters that are adapted, where it is not what the module computes."""
    within: str | None = None
    """The target that it is a companion of."""

    def names_of(self, parameter: str | None = None) -> tuple[str, ...]:
        """The names by which patterns know it, or one of its parameters; its own comes first."""
        own = (self.name,) if self.within is None else (self.name, self.within)
        return (name_in(self.name, parameter), *own) if parameter else own


@dataclass(frozen=True)
class Candidates:
    """The modules that can be targets, in the model's order: all but those that are trained whole."""

    tree: Tree
    trained_whole: Set[int] = frozenset()
    """Those, by identity."""

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        if not self.trained_whole:
            return self.tree.modules
        return [entry for entry in self.tree.modules if id(entry[1]) not in self.trained_whole]

    @cached_property
    def all(self) -> list[Target]:
        """As targets: there are far more of them than are adapted, so they are made where they are asked for."""
        return [self.target(name, module) for name, module in self.modules]

    def target(self, name: str, module: nn.Module) -> Target:
        parent = self.tree.by_name[name.rpartition(".")[0]]
        return Target(name, module, parent, self.tree.aliases.get(id(module), ()))

    def of_classes(self, wanted: Callable[[type[nn.Module]], bool]) -> list[Target]:
        """Those whose class is `wanted`."""
        classes = {cls for cls in self.tree.classes if wanted(cls)}
        named, aliases = self.tree.by_name, self.tree.aliases
        return [
            Target(name, module, named[name.rpartition(".")[0]], aliases.get(id(module), ()) if aliases else ())
            for name, module in self.modules
            if type(module) in classes
        ]

    def matching(self, pattern: str, *, is_regex: bool) -> list[int]:
        """The places, among `modules`, of those that an entry of a config matches under any of their names."""
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
        """All names, each with the place of its module, by what follows the last dot."""
        names: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for at, (name, module) in enumerate(self.modules):
            for known in (name, *self.tree.aliases.get(id(module), ())):
                names[last_part(known)].append((at, known))
        return names


def entry_matches(entry: str, name: str) -> bool:
    """PEFT's rule for an entry of a list: it is the whole name, or what follows a dot."""
    return name == entry or name.endswith(f".{entry}")


def last_part(name: str) -> str:
    """What the parent of a module calls it."""
    return name.rpartition(".")[2]


def name_in(module: str, parameter: str) -> str:
    """The name of a parameter of the module called `module`."""
    return f"{module}.{parameter}" if module else parameter
