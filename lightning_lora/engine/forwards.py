"""Notes which forward of an adapted model runs here, so that a weight that it reads several times is computed once."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

SCOPE: ContextVar[tuple[Any, dict[Any, tuple[Tensor, int, Any]], int] | None] = ContextVar("forward", default=None)
"""The running forward of an adapted model: the forward around it (or None), the adapted weights computed in it so far,
and the id of the model."""


def forward_begins(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of an adapted model: opens the scope of its forward."""
    if torch.compiler.is_compiling():
        return
    around = scope = SCOPE.get()
    while scope is not None:
        outer, _, of = scope
        if of == id(module):  # an interrupt (Ctrl-C) left it open: torch calls no hook then
            around = outer
        scope = outer
    SCOPE.set((around, {}, id(module)))


def forward_ends(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook, called also if the forward raised: closes the scope."""
    if not torch.compiler.is_compiling():
        scope = SCOPE.get()
        SCOPE.set(None if scope is None else scope[0])


def listen_for_forwards(model: nn.Module) -> None:
    """Put both hooks on `model`."""
    # Always under the same key, since torch.compile's guards look at the keys.
    model._forward_pre_hooks[_HOOK] = forward_begins
    model._forward_hooks[_HOOK] = forward_ends
    model._forward_hooks_always_called[_HOOK] = True


def unlisten_for_forwards(model: nn.Module) -> None:
    """Undo `listen_for_forwards`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
        hooks.pop(_HOOK, None)


_HOOK: Any = "lightning_lora"
