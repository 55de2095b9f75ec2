"""Where adapters lie: in slots, in stores beyond them, and in copies for a batch.

`Slots` keeps account of which adapter lies where, which makes room for another, which stays since it is in use. The
account is kept with the lock held. Copies between a slot and a store are made without it, so threads that use other
adapters do not wait for them.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_lora.checked import did_you_mean
from lightning_lora.engine.bank.routing import One
from lightning_lora.engine.bank.slab import Slab
from lightning_lora.errors import BankError

USUAL_RANK = 16
"""The rank that fits into a slot where nobody says another."""


# Keeps the adapters that have no slot: in the processor's memory, and beyond that in a store (on disk).
#
# An adapter is kept as its row of the slab, so one copy brings it back into a slot.


class Store(Protocol):
    """Keeps rows of the slab by name. A call that raises leaves the store as it was."""

    def put(self, name: str, row: Tensor) -> None: ...

    def take(self, name: str) -> Tensor:
        """The row, on the CPU. It stays in the store until `drop`."""
        ...

    def drop(self, name: str) -> None: ...


class HostStore:
    """Keeps up to `most` rows in memory (pinned if they come from a GPU) and moves the longest unused to `beyond`.

    A row that was once written to `beyond` stays there, so it is not written again when it leaves its slot again.
    """

    def __init__(self, most: int | None, beyond: Store | None) -> None:
        self._most, self._beyond = most, beyond
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._written: set[str] = set()
        self.lock = threading.Lock()

    def has_room(self) -> bool:
        return self._beyond is not None or self._most is None or len(self._rows) < self._most

    def put(self, name: str, row: Tensor, *, swaps: bool = False) -> None:
        """Keep the row. `swaps`: another row comes out of here in exchange. Then a full `beyond` is no error: the row
        stays in memory above `most`, and is moved at a later `put`. The excess is bounded, since no adapter is new."""
        with self.lock:
            if name in self._written:
                return
            try:
                if self._made_room(name, row):
                    return
            except Exception:
                if not swaps:
                    raise
            self._rows[name] = torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda).copy_(row)

    def _made_room(self, name: str, row: Tensor) -> bool:
        """Move rows from memory to `beyond` until there is room for one more. If memory keeps none (`most` is 0), write
        the given row itself, and return True."""
        if self._beyond is None or self._most is None:
            return False
        if self._most == 0:
            self._write(name, row.cpu())
        while self._rows and len(self._rows) >= self._most:
            oldest = next(iter(self._rows))
            self._write(oldest, self._rows[oldest])
            del self._rows[oldest]
        return self._most == 0

    def _write(self, name: str, row: Tensor) -> None:
        assert self._beyond is not None
        self._beyond.put(name, row)
        self._written.add(name)

    def take(self, name: str) -> Tensor:
        """Removes and returns the row; a row in `beyond` stays there until `drop`."""
        with self.lock:
            if name in self._rows:
                return self._rows.pop(name)
        assert self._beyond is not None
        return self._beyond.take(name)

    def drop(self, name: str) -> None:
        with self.lock:
            self._rows.pop(name, None)
            if name in self._written:
                assert self._beyond is not None
                self._beyond.drop(name)
                self._written.remove(name)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(eq=False)
class Entry:
    """An adapter in the bank."""

    name: str
    rank: int
    is_affine: bool
    slot: int | None = None
    """Its slot; None while it lies in a store."""
    users: int = 0
    """The number of open `with bank.use(...)` blocks that use it."""
    pinned: bool = False
    moving: bool = False
    """True while it is copied between a slot and a store: a thread that needs it waits."""
    gone: bool = False
    """True if it was removed or replaced while in use: its slot becomes free when the last user leaves."""
    one: One | None = field(default=None, repr=False)
    """The routing of a batch that uses this adapter for all rows, made once."""


class Slots:
    """The slots of `slab` (all its rows but the last, which stays zero), and the adapters in them or in `store`."""

    def __init__(self, slab: Slab, capacity: int, store: HostStore) -> None:
        self.slab = slab
        self.capacity = capacity
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        """All adapters by name, the longest unused first."""
        self.lock = threading.RLock()
        self.change = threading.Condition(self.lock)
        """A condition on the same lock, notified when an entry has moved."""
        self.taken: dict[int, int] = {}
        """Slots that are being filled or emptied, each with the id of the thread that does it."""
        self.store = store
        self._free = list(range(capacity))[::-1]
        self._written: set[int] = set()

    def entry(self, name: str) -> Entry:
        """The adapter called `name`. Raises BankError if there is none."""
        entry = self.entries.get(name)
        if entry is None:
            hint = did_you_mean(str(name), self.entries, f" It has {len(self.entries)} others.")
            raise BankError(f"The bank has no adapter {name!r}.{hint}")
        return entry

    def settled(self, name: str) -> Entry:
        """The adapter called `name`, after waiting until no thread moves it."""
        while True:
            entry = self.entries.get(name) or self.entry(name)
            if not entry.moving:
                return entry
            self.change.wait()

    def resident(self, name: str) -> Entry:
        """The adapter called `name`, brought into a slot if it is not in one, and marked as the last one used."""
        entry = self.settled(name)
        if entry.slot is None:
            slot, leaving = self.take_slot(name, makes_room=True)
            entry.moving = True
            self.change.release()
            try:
                self.move_out(leaving, slot, swaps=True)
                self.slab.data[slot].copy_(self.store.take(name))
                entry.slot = slot
            finally:
                self.change.acquire()
                entry.moving = False
                if entry.slot is None:
                    self.give_back(slot)
                self._written.add(slot)
                self._settle(slot)
        self.entries.move_to_end(name)
        return entry

    def take_slot(self, name: str, *, makes_room: bool) -> tuple[int, Entry | None]:
        """A slot for `name`: a free one and None, or that of the longest unused adapter and its entry, which the caller
        passes to `move_out` first.

        `makes_room`: `name` comes out of the store and so makes room in it. Raises BankError if no slot can be freed.
        """
        if self._free:
            slot = self._free.pop()
            self.taken[slot] = threading.get_ident()
            return slot, None
        could_leave = False
        for other in self.entries.values():
            if other.slot is not None and not (other.users or other.pinned or other.moving):
                could_leave = not makes_room and not self.store.has_room()
                if could_leave:
                    break
                slot, other.slot, other.one, other.moving = other.slot, None, None, True
                self.taken[slot] = threading.get_ident()
                return slot, other
        raise BankError(
            f"No room for {name!r}: an adapter that is not in use would have to move out of its slot, host_capacity is "
            "too small and no disk is given. Raise capacity or host_capacity, or remove an adapter."
            if could_leave
            else f"No room for {name!r}: all of the {self.capacity} slots are in use, pinned or being filled. Raise "
            "capacity."
        )

    def move_out(self, leaving: Entry | None, slot: int, *, swaps: bool = False) -> None:
        """Copy the adapter `leaving` from `slot` to the store. `swaps`: another adapter comes out of the store in
        exchange. Called without the lock."""
        if leaving is None:
            return
        try:
            self.store.put(leaving.name, self.slab.data[slot], swaps=swaps)
        except BaseException:
            leaving.slot = slot  # it could not be stored, so it keeps its slot
            raise
        finally:
            with self.change:
                leaving.moving = False
                self.change.notify_all()

    def clear(self, slot: int) -> None:
        """Fill the slot with zeros."""
        if slot in self._written:
            self.slab.data[slot].zero_()
        self._written.add(slot)

    def give_back(self, slot: int) -> None:
        """Mark the slot as free, unless an adapter lies in it."""
        if all(entry.slot != slot for entry in self.entries.values()):
            self._free.append(slot)
        self._settle(slot)

    def _settle(self, slot: int) -> None:
        self.taken.pop(slot, None)
        self.change.notify_all()

    def add(self, entry: Entry, slot: int) -> None:
        """Add the entry, which lies in `slot`, as the last one used."""
        entry.slot, entry.moving = slot, False
        self.entries[entry.name] = entry
        self._settle(slot)

    def remove(self, entry: Entry) -> None:
        """Remove the entry; its slot becomes free now, or when the last user leaves."""
        del self.entries[entry.name]
        entry.gone, entry.one = True, None
        self.store.drop(entry.name)
        if entry.slot is not None and not entry.users:
            self._free.append(entry.slot)
        self.change.notify_all()

    def release(self, entries: Sequence[Entry]) -> None:
        """Count one user less for each of `entries`."""
        for entry in entries:
            entry.users -= 1
            if entry.gone and not entry.users and entry.slot is not None:
                self._free.append(entry.slot)

    def busy(self) -> list[str]:
        """The names of the adapters that are in use or being moved."""
        return [entry.name for entry in self.entries.values() if entry.users or entry.moving]


# Copies of factors out of the slab, for a batch in which each row has an adapter of its own.
#
# A product over many small matrices takes half the time if they lie side by side and not apart, as in the slab. On a
# CPU a fresh page of memory costs several times as much as the copy into it, so a batch's memory is kept for the next.

MOST_KEPT = 4
"""The most pieces of memory that are kept; each thread that serves uses one."""


class Copies:
    """The copies of one batch."""

    def __init__(self, room: Tensor | None) -> None:
        self.room = room
        self._used = 0

    def of(self, stacked: Tensor, index: Tensor) -> Tensor:
        """(slots, *shape) -> (len(index), *shape), contiguous: the slots named in `index`."""
        shape = (len(index), *stacked.shape[1:])
        start, self._used = self._used, self._used + math.prod(shape)
        if self.room is None or self._used > len(self.room):
            return stacked.index_select(0, index)
        # `.data` makes the parts separate tensors for autograd: a write to one is no write to the others.
        copy = self.room[start : self._used].view(shape).data
        return torch.index_select(stacked, 0, index, out=copy)


class Rooms:
    """Hands out memory for copies out of `slab`, and takes it back."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._free: list[Tensor] = []
        self.lock = threading.Lock()

    def copies(self, count: int) -> Copies:
        """Memory for the copies of `count` adapters. Pass it to `give_back` when nothing reads the copies any more."""
        data = self._slab.data
        if data.is_cuda:  # CUDA's allocator keeps memory by itself
            return Copies(None)
        size = count * self._slab.width
        with self.lock:
            fitting = next((i for i, room in enumerate(self._free) if len(room) >= size), None)
            if fitting is not None:
                return Copies(self._free.pop(fitting))
            if self._free:
                self._free.pop(0)  # too small: a larger one takes its place
        # A page takes no memory until it is written.
        return Copies(torch.empty(size, dtype=data.dtype))

    def give_back(self, copies: Copies) -> None:
        if copies.room is not None:
            with self.lock:
                if len(self._free) < MOST_KEPT:
                    self._free.append(copies.room)

    @property
    def bytes(self) -> int:
        """The bytes that are kept for the next batches."""
        with self.lock:
            return sum(room.nbytes for room in self._free)

    def __len__(self) -> int:
        return len(self._free)


# A process that is forked from one with banks has one thread: what others held, used or moved is settled for it.
#
# A lock that another thread holds when a process is forked is never released in the child, and an adapter that it moves
# never arrives. So who forks waits until nothing moves, and takes the locks over; the child lets go of what others use.

_forks = threading.RLock()
_banks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Any] = []


def survive_forks(bank: Any) -> None:
    """Let a process that is forked from now on use `bank`."""
    with _forks:
        _banks.add(bank)


def _before() -> None:
    _forks.acquire()
    here = threading.get_ident()
    for bank in list(_banks):
        bank._slots.lock.acquire()
        _held.append(bank)
        while any(thread != here for thread in bank._slots.taken.values()):
            bank._slots.change.wait()


def _in_parent() -> None:
    while _held:
        _held.pop()._slots.lock.release()
    _forks.release()


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
