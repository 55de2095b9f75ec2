"""The switch that `disabled` sets and that each adapted layer asks: is my adapter off, here and now?

The switch belongs to a thread or a task (a ContextVar). A backward pass that computes a forward again (activation
checkpointing) may run after the `with` block, or inside another one, and on a GPU in a thread of its own. It must
repeat the forward as it was. Each node of autograd's graph has a sequence number, which its thread counts up: so the
numbers that were given out inside a block show which nodes were made there.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_lora.engine import torch_private as private
from lightning_lora.errors import AdapterStateError

used = False
"""True while a block is open in any thread, or a backward pass may compute again what was computed in one. While it is
False layers do not ask the switch, and compiled code contains no check but torch.compile's guard on this flag."""


@dataclass(eq=False)
class _Block:
    """An open `with disabled(model)`."""

    modules: frozenset[int]
    """All modules of the model, by identity."""
    task: int
    """The id of the backward pass in which it was opened; -1 outside of any."""
    thread: int
    first: int
    """The number of the first node that may be made inside."""
    outer: _Block | None
    is_open: bool = True
    may_come_again: bool = False
    """True if a layer ran inside that activation checkpointing may compute again."""


@dataclass
class _Past:
    """The closed blocks of one model that made nodes."""

    modules: frozenset[int]
    numbers: dict[int, tuple[array[int], array[int]]] = field(default_factory=dict)
    """Thread -> the first node number of each of its blocks, and the number after the last."""

    def threads(self, number: int) -> Iterator[int]:
        """The threads that made a node of that number inside a block."""
        for thread, (begins, ends) in self.numbers.items():
            place = bisect_right(begins, number) - 1
            if place >= 0 and number < ends[place]:
                yield thread


_OFF: ContextVar[_Block | None] = ContextVar("lora_off", default=None)
_open: list[_Block] = []
_past: dict[int, _Past] = {}
"""id(model) -> its closed blocks, while the model lives."""
_lock = threading.RLock()  # re-entrant: the garbage collector may call `_forget` at any time
_local = threading.local()
_threads = itertools.count()


def _this_thread() -> int:
    """A number that no other thread ever has. (Python gives the ident of a thread that has ended to a new one.)"""
    number: int | None = getattr(_local, "number", None)
    if number is None:
        number = _local.number = next(_threads)
    return number


def _is_off(module: nn.Module) -> bool:
    """True if the adapter of `module` is off here. Ask only while `used` is true."""
    block, task = _innermost(), private.backward_task()
    node: Any = private.node_now()
    if node is not None and task != (-1 if block is None else block.task):
        return _comes_again(id(module), private.number_of(node), task)
    _local.again = None
    while block is not None and not (block.is_open and id(module) in block.modules):
        block = block.outer if block.outer is not None and block.outer.task == block.task else None
    if block is None:
        return False
    # Checkpointing may be around this layer: a non-reentrant checkpoint sets hooks on saved tensors; a reentrant one
    # has made its node and turned gradients off. If gradients were off from the start, nothing is computed again.
    is_inside = (
        private.saved_tensors_hooks(True) is not None if torch.is_grad_enabled() else private.next_node() > block.first
    )
    block.may_come_again |= is_inside
    return True


is_off = _is_off


def _innermost() -> _Block | None:
    """The open block that was entered last in this thread or task. A block around it may have ended, by a generator
    for example."""
    block = _OFF.get()
    while block is not None and not block.is_open:
        block = block.outer
    return block


def _comes_again(module: int, number: int, task: int) -> bool:
    """True if the adapter of `module` is off in a backward pass that has reached the node of that number.

    A reentrant checkpoint runs a backward pass of its own, over nodes that it made while it computed again: a layer
    that is off around them is off in them."""
    around: tuple[int, int] | None = getattr(_local, "again", None)
    if _was_off(module, number):
        if around is None or around[1] != task:  # with gradients off, the checkpoint's own node was made just before
            _local.again = private.next_node() - (not torch.is_grad_enabled()), task
        return True
    if around is not None and around[1] != task:
        if isinstance(threading.current_thread(), threading._DummyThread):
            raise AdapterStateError(
                "A reentrant checkpoint lies in another one, around layers that were differentiated inside `with "
                "disabled(model)`, and it is not known whether their adapters were off: use use_reentrant=False."
            )
        if number >= around[0]:
            return True
    _local.again = None
    return False


def _was_off(module: int, number: int) -> bool:
    """True if the node of that number was made while the module was off."""
    with _lock:
        past = [p for p in _past.values() if module in p.modules]
        made = {thread for p in past for thread in p.threads(number)}
        blocks = [b for b in _open if module in b.modules and b.may_come_again]
        # For an open block of another thread, the numbers it has given out are not known: all from `first` on count.
        made |= {b.thread for b in blocks if b.first <= number}
        others = {thread for p in past for thread in p.numbers} | {b.thread for b in blocks}
    here = _this_thread()
    if not made or here in made:
        return bool(made)
    # On a GPU the backward pass runs in a thread of torch's, which has made no nodes itself.
    if isinstance(threading.current_thread(), threading._DummyThread) and len(others) == 1:
        return True
    raise AdapterStateError(
        "Activations are computed again in a backward pass, while another thread differentiates what it computed "
        "inside `with disabled(model)`: it cannot be told whether the adapters acted here. Run the passes that are "
        "differentiated in one thread, or compute the others without gradients (torch.no_grad)."
    )


@contextmanager
def off(model: nn.Module, modules: frozenset[int]) -> Iterator[None]:
    """Switch the adapters of `modules`, the ids of all modules of `model`, off in this thread or task."""
    block = _Block(modules, private.backward_task(), _this_thread(), private.next_node(), _innermost())
    raised: BaseException | None = None
    _opens(block)
    _OFF.set(block)
    try:
        yield
    except BaseException as error:
        raised = error
        raise
    finally:
        inside = _OFF.get()
        while inside is not None and inside is not block:
            inside = inside.outer
        block.is_open = False
        _OFF.set(_innermost())
        _closes(block, model, modules)
        if inside is None and (raised is None or isinstance(raised, GeneratorExit)):
            raise AdapterStateError(
                "`with disabled(model)` was left in another thread or task than it was entered in: adapters acted on "
                "what was computed elsewhere meanwhile. Enter and leave it where the model is called."
            )


def is_open(modules: frozenset[int]) -> bool:
    """True if any thread or task is inside a block of any of these modules."""
    with _lock:
        return any(not block.modules.isdisjoint(modules) for block in _open)


def _opens(block: _Block) -> None:
    global used, is_off
    with _lock:
        if is_off is _is_off:  # compiled code breaks its graph to ask, or is refused (fullgraph=True)
            is_off = torch.compiler.disable(_is_off)
        _open.append(block)
        used = True


def _closes(block: _Block, model: nn.Module, modules: frozenset[int]) -> None:
    global used
    with _lock:
        _open.remove(block)
        if block.may_come_again and block.thread == _this_thread() and (last := private.next_node()) > block.first:
            if id(model) not in _past:
                _past[id(model)] = _Past(modules)
                weakref.finalize(model, _forget, id(model)).atexit = False
            past = _past[id(model)]
            past.modules |= modules  # the model may have got new modules
            begins, ends = past.numbers.setdefault(block.thread, (array("Q"), array("Q")))
            if not ends or block.first > ends[-1]:
                begins.append(block.first)
                ends.append(last)
            else:  # the block follows right after the last one, or contains it
                begins[-1], ends[-1] = min(begins[-1], block.first), last
        used = bool(_open) or bool(_past)


def _after_fork() -> None:
    """The child has this thread alone; what the others switched off is on in it."""
    global used
    _open[:] = [block for block in _open if block.thread == _this_thread()]
    used = bool(_open) or bool(_past)
    _lock.release()


if hasattr(os, "register_at_fork"):  # a lock that another thread holds would never be released in the child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


def _forget(model: int) -> None:
    global used
    with _lock:
        del _past[model]
        used = bool(_open) or bool(_past)
