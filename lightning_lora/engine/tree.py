"""What a model consists of, walked once: torch's own generators pass each name up through every level above it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn


@dataclass(frozen=True)
class Tree:
    """The modules of a model, in its own order."""

    every: list[tuple[str, nn.Module]]
    """As `model.named_modules(remove_duplicate=False)`: under every name."""
    modules: list[tuple[str, nn.Module]]
    """As `model.named_modules()`: each under its first name."""

    @staticmethod
    def of(model: nn.Module) -> Tree:
        every, waiting = [], [("", model)]
        while waiting:
            name, module = waiting.pop()
            every.append((name, module))
            prefix = f"{name}." if name else ""
            children = [(prefix + own, child) for own, child in module._modules.items() if child is not None]
            waiting += reversed(children)
        first: dict[int, tuple[str, nn.Module]] = {}
        for entry in every:
            first.setdefault(id(entry[1]), entry)
        return Tree(every, list(first.values()))

    @cached_property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """As `model.named_parameters(remove_duplicate=False)`: under every name."""
        return [
            (f"{name}.{own}" if name else own, p)
            for name, module in self.every
            for own, p in module._parameters.items()
            if p is not None
        ]
