"""A process that is forked from one with banks has one thread: what others held, used or moved is settled for it.

A lock that another thread holds when a process is forked is never released in the child, and an adapter that it moves
never arrives. So who forks waits until nothing moves, and takes the locks over; the child lets go of what others use.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_lock = threading.RLock()
_banks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []


def survive_forks(bank: Any) -> None:
    """Let a process that is forked from now on use `bank`."""
    with _lock:
        _banks.add(bank)


def _before() -> None:
    _lock.acquire()
    here = threading.get_ident()
    for bank in list(_banks):
        bank._slots.lock.acquire()
        _held.append(bank)
        while any(thread != here for thread in bank._slots.taken.values()):
            bank._slots.change.wait()


def _in_parent() -> None:
    while _held:
        _held.pop()._slots.lock.release()
    _lock.release()


def _in_child() -> None:
    here = threading.get_ident()
    for bank in _held:
        bank._rooms.lock, bank._slots.store.lock = threading.Lock(), threading.Lock()
        for use in [use for use in bank._uses if use.thread != here]:
            use.end()
        if bank._folded is not None and bank._folded.thread != here:
            bank._unfold(bank._folded)
    _in_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
