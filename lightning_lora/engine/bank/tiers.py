"""Keeps the adapters that have no slot: in the processor's memory, and beyond that in a store (on disk).

An adapter is kept as its row of the slab, so one copy brings it back into a slot.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor


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
