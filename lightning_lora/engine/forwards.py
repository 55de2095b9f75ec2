"""Which forwards run: of an adapted model, noted as it begins and ends; of any module, found in the call stack."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.torch_private import (
    CALL,
    GENERATE_LOCALS,
    called,
    drop_forward_hooks,
    generation,
    put_forward_hooks,
)
from lightning_lora.errors import AdapterStateError

SCOPE: ContextVar[tuple[Any, dict[Any, tuple[Tensor, int, Any]], int, list[int]] | None] = ContextVar(
    "forward", default=None
)
"""The running forward of an adapted model: the forward around it (or None), the adapted weights computed in it so far,
the id of the model, and the number of the last swap of its layers that it knows of."""

_HOOK: Any = "lightning_lora"
_SWAP = "lora_swap"
"""The attribute of an adapted model with the number of the last swap of its layers; below zero while they change."""
_numbers = itertools.count(1)


def forward_begins(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of an adapted model: opens the scope of its forward."""
    if torch.compiler.is_compiling():
        return
    swap: int = module.__dict__.get(_SWAP, 0)
    if swap < 0:
        raise AdapterStateError(
            f"Another thread is just merging {type(module).__name__}, or removing its adapter, or undoing that: call "
            "the model again after it."
        )
    around = scope = SCOPE.get()
    while scope is not None:
        outer, _, of, _ = scope
        if of == id(module):  # an interrupt (Ctrl-C) left it open: torch calls no hook then
            around = outer
        scope = outer
    SCOPE.set((around, {}, id(module), [swap]))


def forward_ends(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook, called also if the forward raised: closes the scope."""
    if torch.compiler.is_compiling():
        return
    scope = SCOPE.get()
    if scope is None:
        return
    SCOPE.set(scope[0])
    if scope[2] == id(module) and scope[3][0] != module.__dict__.get(_SWAP, scope[3][0]):
        raise AdapterStateError(
            f"Another thread has merged {type(module).__name__}, or has removed its adapter, or has undone that, while "
            "this forward ran: its output may be of neither. Call the model again, and keep threads apart."
        )


def listen_for_forwards(model: nn.Module) -> None:
    """Put both hooks on `model`."""
    put_forward_hooks(model, _HOOK, forward_begins, forward_ends)
    model.__dict__[_SWAP] = 0


def unlisten_for_forwards(model: nn.Module) -> None:
    """Undo `listen_for_forwards`."""
    drop_forward_hooks(model, lambda key, _: key == _HOOK)
    model.__dict__.pop(_SWAP, None)


@contextmanager
def swapping(owners: Iterable[nn.Module], layers: Iterable[nn.Module], *, refuses: bool = True) -> Iterator[bool]:
    """The `layers` of the adapted models `owners` change inside the block, which no forward of another thread may see.

    Gives whether one is running in another thread; with `refuses`, that is an AdapterStateError. A forward of an owner
    that begins inside of the block raises it, and so does at its end one that was running.
    """
    before = {id(owner): (owner, owner.__dict__.get(_SWAP, 0)) for owner in owners}
    for owner, _ in before.values():
        owner.__dict__[_SWAP] = -1  # from now on, a forward raises as it begins
    is_running = runs_elsewhere({id(layer) for layer in layers})
    if is_running and refuses:
        for owner, swap in before.values():
            owner.__dict__[_SWAP] = swap
        raise AdapterStateError(
            "The model runs in another thread, which would find some layers changed and others not: merge, unmerge or "
            "remove when no other thread uses the model. AdapterBank serves threads."
        )
    try:
        yield is_running
    finally:
        number, scope = next(_numbers), SCOPE.get()
        for owner, _ in before.values():
            owner.__dict__[_SWAP] = number
        while scope is not None:  # forwards of this very thread, around the change
            if scope[2] in before and scope[3][0] == before[scope[2]][1]:
                scope[3][0] = number
            scope = scope[0]


# Reads Python's call stack to find out which modules run, and what they were called with.
#
# That is slow: it is asked only where a tensor's shape does not answer.


def beams(layer: nn.Module) -> tuple[int, int] | None:
    """The number of prompts that transformers' `generate` was given, and the number of rows to which it has repeated
    them, with the beams (or returned sequences) of a prompt side by side. None if `layer` does not run in `generate`.
    """
    known = generation()
    if known is None:
        return None
    config, prompts, ids = (known[name] for name in GENERATE_LOCALS[1:])
    if not isinstance(prompts, int) or not isinstance(ids, Tensor) or id(layer) not in _members(known["self"]):
        return None
    times = max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)
    return (prompts, ids.shape[0]) if ids.shape[0] == prompts * times else None


def begins_as_an_input(x: Tensor, layer: nn.Module, served: Set[int]) -> bool | None:
    """True if `x` is a view, with the same first dimension, of a tensor that the model was called with. False if it is
    a view with another first dimension; None if it is no view of such a tensor.

    "The model" is the outermost running module that contains all the layers whose ids are `served`.
    """
    found = None
    for given in _inputs(layer, served):
        if given.dim() and given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            found = given.shape[0] == x.shape[0] and given.stride(0) == x.stride(0)
            if found:
                return True
    return found


def is_running(call: FrameType) -> bool:
    """True if `call` is one of the calls that led here; False for a generator that is suspended."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None


def runs_elsewhere(served: Set[int]) -> bool:
    """True if another thread is calling a module that contains one of the layers whose ids are `served`."""
    here = threading.get_ident()
    return any(
        any(id(module) in served for module in called(call)[0].modules())
        for thread, frame in sys._current_frames().items()
        if thread != here
        for call in _calls(frame)
    )


def _calls(frame: FrameType | None) -> list[FrameType]:
    """The calls of modules that led to `frame`, the innermost first."""
    calls: list[FrameType] = []
    while frame is not None:
        if frame.f_code is CALL:
            calls.append(frame)
        frame = frame.f_back
    return calls


def _inputs(layer: nn.Module, served: Set[int]) -> Iterator[Tensor]:
    for call in reversed(_calls(sys._getframe(1))):
        module, *given = called(call)
        if module is not layer and served <= _members(module):
            return _tensors(given)
    return iter(())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _tensors(getattr(value, part.name, None))


_MEMBERS: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def _members(module: nn.Module) -> frozenset[int]:
    """The ids of `module` and of all modules inside it."""
    members = _MEMBERS.get(module)
    if members is None:
        members = _MEMBERS[module] = frozenset(map(id, module.modules()))
    return members
