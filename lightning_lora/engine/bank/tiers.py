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
    """Keeps rows by name."""

    def put(self, name: str, row: Tensor) -> None: ...

    def take(self, name: str) -> Tensor:
        """The row, on the CPU; it is not kept any longer than the tensor lives."""
        ...

    def drop(self, name: str) -> None: ...


class HostStore:
    """In memory, pinned where that speeds up the way to a GPU; the longest unused go on to `beyond`."""

    def __init__(self, most: int | None, beyond: Store | None) -> None:
        self._most, self._beyond = most, beyond
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def has_room(self) -> bool:
        return self._beyond is not None or self._most is None or len(self._rows) < self._most

    def put(self, name: str, row: Tensor) -> None:
        if self._most == 0 and self._beyond is not None:
            self._beyond.put(name, row.cpu())
            return
        copy = torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda).copy_(row)
        with self._lock:
            self._rows[name] = copy
            while self._beyond is not None and self._most is not None and len(self._rows) > self._most:
                oldest = next(iter(self._rows))
                self._beyond.put(oldest, self._rows[oldest])
                del self._rows[oldest]

    def take(self, name: str) -> Tensor:
        with self._lock:
            if name in self._rows:
                return self._rows.pop(name)
        assert self._beyond is not None
        return self._beyond.take(name)

    def drop(self, name: str) -> None:
        with self._lock:
            if self._rows.pop(name, None) is None and self._beyond is not None:
                self._beyond.drop(name)

    def __len__(self) -> int:
        return len(self._rows)
