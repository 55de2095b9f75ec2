"""Notes which forward of an adapted model runs here, so that a weight that it reads several times is computed once."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.torch_private import drop_forward_hooks, put_forward_hooks

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
    put_forward_hooks(model, _HOOK, forward_begins, forward_ends)


def unlisten_for_forwards(model: nn.Module) -> None:
    """Undo `listen_for_forwards`."""
    drop_forward_hooks(model, lambda key, _: key == _HOOK)


_HOOK: Any = "lightning_lora"
