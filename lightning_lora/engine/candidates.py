"""Finds the modules of a model that a config names; a `Target` is made only for those that are asked for."""

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
        named, aliases = self.tree.by_name, self.tree.aliases
        return [
            Target(name, module, named[name.rpartition(".")[0]], aliases.get(id(module), ()) if aliases else ())
            for name, module in self.modules
            if type(module) in classes
        ]

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


def entry_matches(entry: str, name: str) -> bool:
    """PEFT's rule for an entry of a list: it equals the whole name, or the end of the name after a dot."""
    return name == entry or name.endswith(f".{entry}")


def last_part(name: str) -> str:
    """The part of a name after the last dot: the parent's name for the module."""
    return name.rpartition(".")[2]


def name_in(module: str, parameter: str) -> str:
    """The name of a parameter of the module called `module`."""
    return f"{module}.{parameter}" if module else parameter
