"""One flat slab holds every adapter of a bank: a row for each, in which every layer has its place.

A layer's stacked factors are strided views of the slab. So what is loaded, evicted or cleared is one contiguous row,
whatever the number of layers, and a forward reads its factors where they lie.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[tuple[int, ...], ...]]
"""Layer -> the shapes of A, B, gain and shift of one adapter, as they lie in the slab."""
Copied = Mapping[str, tuple[int, ...]]
"""Layer -> which of these a batch copies whose rows have adapters of their own; the others are read where they lie."""

MOST_KEPT = 4
"""Copies that are kept for the next batches: one for each thread that serves, up to this many."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a bank takes; `str` says it."""

    slots: int
    layers: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    bytes_per_adapter: int

    @property
    def bytes(self) -> int:
        """On the device: a row for each slot, and one that stays zero for rows of the bare base."""
        return (self.slots + 1) * self.bytes_per_adapter

    def __str__(self) -> str:
        return (
            f"{self.slots} slots of {_in_units(self.bytes_per_adapter)} ({self.layers} layers, rank up to "
            f"{self.max_rank}, {str(self.dtype).removeprefix('torch.')}): {_in_units(self.bytes)} on {self.device}"
        )


class Slab:
    """`rows` adapters with room for the tensors of `shapes`; `views` are (rows, *shape) each.

    What is `copied` lies together at the end of a row, so that a batch copies one stretch for each adapter.
    """

    def __init__(self, shapes: Shapes, copied: Copied, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width_of(shapes)
        places, self._copied_from = _places(shapes, copied)
        self._copied = {
            name: [(places[name][i] - self._copied_from, shapes[name][i]) for i in copied[name]] for name in shapes
        }
        with torch.inference_mode(False):  # or it could only be written in inference mode
            self.data = _zeros(rows * self.width, dtype, device).view(rows, self.width)
        self.views = {
            name: tuple(_view(self.data, start, shape) for start, shape in zip(places[name], parts))
            for name, parts in shapes.items()
        }
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def copy(self, index: Tensor) -> Tensor:
        """What is copied of the rows `index`. Give it back by `give_back` when nobody reads it any more."""
        count, width = len(index), self.width - self._copied_from
        with torch.inference_mode(False), torch.no_grad():  # kept for others, who may need gradients
            rows = self._taken(count)
            if rows is None:
                rows = torch.empty(count, width, dtype=self.data.dtype, device=self.data.device)
            torch.index_select(self.data[:, self._copied_from :], 0, index, out=rows[:count])
        return rows

    def copies(self, name: str, rows: Tensor, count: int) -> tuple[Tensor, ...]:
        """A layer's part of the first `count` rows of what `copy` returned: (count, *shape) each."""
        return tuple(_view(rows[:count], start, shape) for start, shape in self._copied[name])

    def _taken(self, count: int) -> Tensor | None:
        with self._lock:
            for i, rows in enumerate(self._free):
                if len(rows) >= count:
                    return self._free.pop(i)
            if self._free:
                self._free.pop(0)  # too small: what takes its place will do
        return None

    def give_back(self, rows: Tensor) -> None:
        # A GPU's allocator keeps memory by itself. On the CPU fresh pages cost several times what is copied into them.
        if not rows.is_cuda:
            with self._lock:
                if len(self._free) < MOST_KEPT:
                    self._free.append(rows)


def _places(shapes: Shapes, copied: Copied) -> tuple[dict[str, list[int]], int]:
    """Where in a row each tensor of each layer starts, and where what is copied does."""
    places = {name: [0] * len(parts) for name, parts in shapes.items()}
    start = copied_from = 0
    for is_copied in (False, True):
        copied_from = start
        for name, parts in shapes.items():
            for i, shape in enumerate(parts):
                if (i in copied[name]) is is_copied:
                    places[name][i] = start
                    start += math.prod(shape)
    return places, copied_from


def _view(rows: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    return rows[:, start : start + math.prod(shape)].unflatten(1, shape)


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    # Pages that nobody has written take no memory yet: a slot is paid for when it is filled.
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


def width_of(shapes: Shapes) -> int:
    """Elements of one row."""
    return sum(math.prod(shape) for parts in shapes.values() for shape in parts)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on `device`; None where it cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts: dict[str, Any] = {line.partition(":")[0]: line.split()[1] for line in file}
        return int(facts["MemAvailable"]) * 1024
    except (OSError, LookupError, ValueError):
        return None


def _in_units(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
