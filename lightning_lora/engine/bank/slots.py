"""Which adapter lies in which slot: who comes, who makes room, who is in use and stays.

Bookkeeping is done with the lock held; the copies between a slot and a store are not, so whoever uses other adapters
does not wait for them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_lora.engine.bank.routing import One
from lightning_lora.engine.bank.slab import Slab
from lightning_lora.engine.bank.tiers import HostStore
from lightning_lora.errors import BankError, closest, listed

if TYPE_CHECKING:
    from lightning_lora.engine.bank.use import Use


@dataclass(eq=False)
class Entry:
    """An adapter in the bank."""

    name: str
    rank: int
    is_affine: bool
    slot: int | None = None
    """Where it lies in the slab; None while it is in a store."""
    users: int = 0
    """How many `use` are open."""
    pinned: bool = False
    moving: bool = False
    """On its way between a slot and a store: who needs it waits."""
    gone: bool = False
    """Removed or replaced while it was in use: its slot is free when the last one leaves."""
    one: One | None = field(default=None, repr=False)
    """The routing of a batch that uses it alone, made once."""


class Slots:
    """The rows of `slab` but the last, which stays zero, and the entries that lie in them or in `store`."""

    def __init__(self, slab: Slab, capacity: int, store: HostStore) -> None:
        self.slab = slab
        self.capacity = capacity
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        """The longest unused first."""
        self.lock = threading.RLock()
        self.change = threading.Condition(self.lock)
        """The same lock; who waits is told when an entry has moved."""
        self.uses: set[Use] = set()
        """Those that are open."""
        self.taken: dict[int, int] = {}
        """Slots that are being filled or emptied, and the thread that does it."""
        self.store = store
        self._free = list(range(capacity))[::-1]
        self._written: set[int] = set()

    def entry(self, name: str) -> Entry:
        """Raises BankError where there is none."""
        entry = self.entries.get(name)
        if entry is None:
            near = closest(str(name), self.entries)
            hint = f" Did you mean {listed(map(repr, near))}?" if near else f" It has {len(self.entries)} others."
            raise BankError(f"The bank has no adapter {name!r}.{hint}")
        return entry

    def settled(self, name: str) -> Entry:
        """The entry, once nobody moves it."""
        while True:
            entry = self.entries.get(name) or self.entry(name)
            if not entry.moving:
                return entry
            self.change.wait()

    def resident(self, name: str) -> Entry:
        """The entry in a slot, from now on the last one used; brings it there."""
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
        """A slot that is free, or that of the longest unused adapter, which is to leave it first, by `move_out`.

        `makes_room` says that the one who asks, `name`, comes out of the store. Raises BankError where there is none.
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
            f"No room for {name!r}: adapters that are not in use would have to leave their slots, and host_capacity is "
            "too small and no disk is given. Raise one of them, or remove an adapter."
            if could_leave
            else f"No room for {name!r}: all of the {self.capacity} slots are in use, pinned or being filled. Raise "
            "capacity."
        )

    def move_out(self, leaving: Entry | None, slot: int, *, swaps: bool = False) -> None:
        """Copy what lies in `slot` to the store; it `swaps` places with one that comes out. Without the lock."""
        if leaving is None:
            return
        try:
            self.store.put(leaving.name, self.slab.data[slot], swaps=swaps)
        except BaseException:
            leaving.slot = slot  # it stays, and the slot is not the asker's
            raise
        finally:
            with self.change:
                leaving.moving = False
                self.change.notify_all()

    def clear(self, slot: int) -> None:
        """Make it zeros, as a fresh one is."""
        if slot in self._written:
            self.slab.data[slot].zero_()
        self._written.add(slot)

    def give_back(self, slot: int) -> None:
        """The slot is free, unless somebody stayed in it."""
        if all(entry.slot != slot for entry in self.entries.values()):
            self._free.append(slot)
        self._settle(slot)

    def _settle(self, slot: int) -> None:
        self.taken.pop(slot, None)
        self.change.notify_all()

    def add(self, entry: Entry, slot: int) -> None:
        """The entry lies in `slot`, and is the last one used."""
        entry.slot, entry.moving = slot, False
        self.entries[entry.name] = entry
        self._settle(slot)

    def remove(self, entry: Entry) -> None:
        """Take it out; its slot is free now, or when the last user leaves."""
        del self.entries[entry.name]
        entry.gone, entry.one = True, None
        self.store.drop(entry.name)
        if entry.slot is not None and not entry.users:
            self._free.append(entry.slot)
        self.change.notify_all()

    def leave(self, use: Use) -> None:
        """It is not open any more."""
        with self.lock:
            self.uses.discard(use)
            self.release(use.entries)

    def release(self, entries: Sequence[Entry]) -> None:
        """One user less of each."""
        for entry in entries:
            entry.users -= 1
            if entry.gone and not entry.users and entry.slot is not None:
                self._free.append(entry.slot)

    def busy(self) -> list[str]:
        """The names of those in use."""
        return [entry.name for entry in self.entries.values() if entry.users or entry.moving]
