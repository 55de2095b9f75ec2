"""Copies of factors out of the slab, for a batch in which each row has an adapter of its own.

A product over many small matrices takes half the time if they lie side by side and not apart, as in the slab. On a CPU
a fresh page of memory costs several times as much as the copy into it, so one batch's memory is kept for the next.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from lightning_lora.engine.bank.slab import Slab

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
