"""What a batch copies out of the slab, where each of its rows has an adapter of its own.

A product over many small matrices reads them in a stretch, at half the time that it takes them where they lie in the
slab. On the CPU fresh pages cost several times what is copied into them, so the memory of one batch is kept for the
next.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from lightning_lora.engine.bank.slab import Slab

MOST_KEPT = 4
"""Memory that is kept: one piece for each thread that serves, up to this many."""


class Copies:
    """The copies of one batch."""

    def __init__(self, room: Tensor | None) -> None:
        self.room = room
        self._used = 0

    def of(self, stacked: Tensor, index: Tensor) -> Tensor:
        """(slots, *shape) -> (len(index), *shape), in a stretch."""
        shape = (len(index), *stacked.shape[1:])
        start, self._used = self._used, self._used + math.prod(shape)
        if self.room is None or self._used > len(self.room):
            return stacked.index_select(0, index)
        # By `data`: to autograd the parts are tensors of their own, of which no other one is written when this one is.
        copy = self.room[start : self._used].view(shape).data
        return torch.index_select(stacked, 0, index, out=copy)


class Rooms:
    """The memory for copies out of `slab`."""

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self._free: list[Tensor] = []
        self.lock = threading.Lock()

    def copies(self, count: int) -> Copies:
        """For `count` adapters; `give_back` what is returned when nobody reads the copies any more."""
        data = self._slab.data
        if data.is_cuda:  # whose allocator keeps memory by itself
            return Copies(None)
        size = count * self._slab.width
        with self.lock:
            fitting = next((i for i, room in enumerate(self._free) if len(room) >= size), None)
            if fitting is not None:
                return Copies(self._free.pop(fitting))
            if self._free:
                self._free.pop(0)  # too small: a larger one takes its place
        # Pages that nobody writes take no memory.
        return Copies(torch.empty(size, dtype=data.dtype))

    def give_back(self, copies: Copies) -> None:
        if copies.room is not None:
            with self.lock:
                if len(self._free) < MOST_KEPT:
                    self._free.append(copies.room)

    @property
    def bytes(self) -> int:
        """Of what is kept for the next batches."""
        with self.lock:
            return sum(room.nbytes for room in self._free)

    def __len__(self) -> int:
        return len(self._free)
