"""The forward of an adapted model that runs here: what it reads several times is computed once."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

SCOPE: ContextVar[tuple[Any, dict[Any, tuple[Tensor, int, Any]], int] | None] = ContextVar("forward", default=None)
"""The forward of an adapted model that runs here: the one around it, the weights that were shown in it so far, and
which model it is, by identity."""


def forward_begins(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of an adapted model: what its forward reads several times is computed once."""
    if torch.compiler.is_compiling():
        return
    around = scope = SCOPE.get()
    while scope is not None:
        outer, _, of = scope
        if of == id(module):  # left open by an interrupt (Ctrl-C), after which torch calls no hook
            around = outer
        scope = outer
    SCOPE.set((around, {}, id(module)))


def forward_ends(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook to it, which is called where the forward raised as well."""
    if not torch.compiler.is_compiling():
        scope = SCOPE.get()
        SCOPE.set(None if scope is None else scope[0])


def listen_for_forwards(model: nn.Module) -> None:
    """Compute once what a forward of `model` reads several times."""
    # Under a key that is the same each time: torch.compile's guards look at the keys.
    model._forward_pre_hooks[_HOOK] = forward_begins
    model._forward_hooks[_HOOK] = forward_ends
    model._forward_hooks_always_called[_HOOK] = True


def unlisten_for_forwards(model: nn.Module) -> None:
    """Undo `listen_for_forwards`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
        hooks.pop(_HOOK, None)


_HOOK: Any = "lightning_lora"
