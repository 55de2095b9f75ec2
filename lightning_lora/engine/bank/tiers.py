"""Where the adapters are that have no slot: in the processor's memory, and beyond that wherever a store keeps them.

What is kept is an adapter's row of the slab, so coming back is one copy.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """Keeps rows by name. What it raises leaves it as it was."""

    def put(self, name: str, row: Tensor) -> None: ...

    def take(self, name: str) -> Tensor:
        """The row, on the CPU. It stays in the store until it is dropped."""
        ...

    def drop(self, name: str) -> None: ...


class HostStore:
    """In memory, pinned where that speeds up the way to a GPU; the longest unused go on to `beyond`.

    What was once written beyond stays there, so that it need not be written when it leaves its slot again.
    """

    def __init__(self, most: int | None, beyond: Store | None) -> None:
        self._most, self._beyond = most, beyond
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._written: set[str] = set()
        self.lock = threading.Lock()

    def has_room(self) -> bool:
        return self._beyond is not None or self._most is None or len(self._rows) < self._most

    def put(self, name: str, row: Tensor, *, swaps: bool = False) -> None:
        """Keep the row. Where it `swaps` places with one that comes out of here, a store beyond that is full is no
        error: the row waits in memory then, beyond what was to be kept there. That is bounded, since no adapter is new,
        and it is tried again with each one that comes."""
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
        """Write beyond what memory is not for; whether that was the row itself."""
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
        """The row, which is kept here no longer than the tensor lives."""
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
