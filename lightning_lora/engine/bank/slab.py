"""One tensor, the slab, holds all adapters of a bank: one row for each slot, with a place for every layer.

A layer's stacked factors are strided views of the slab. So to load, move out or clear an adapter is to copy one
contiguous row, however many layers there are, and a forward reads the factors in place. In a row, parts of one shape
lie side by side as a block, so that an adapter is written block by block.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[tuple[int, ...], ...]]
"""Layer name -> the shapes of A, B, gain and shift of one adapter in the slab."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a bank takes; `str()` says it in words."""

    slots: int
    layers: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    bytes_per_adapter: int
    copies: int = 0
    """Bytes that are kept beside the slots at the moment: factors converted to the dtype in which layers compute, and
    the memory into which batches with several adapters copy their factors."""

    @property
    def bytes(self) -> int:
        """Bytes of the slab: a row for each slot, and one that stays zero, for the bare base."""
        return (self.slots + 1) * self.bytes_per_adapter

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        copies = f", and {_in_units(self.copies)} of copies" if self.copies else ""
        return (
            f"{self.slots} slots of {_in_units(self.bytes_per_adapter)} ({self.layers} layers, rank up to "
            f"{self.max_rank}, {dtype}): {_in_units(self.bytes)}{copies} on {self.device}"
        )


class Block(NamedTuple):
    """The layers that have the same shape of one part (A, B, gain or shift), side by side in each row of the slab."""

    part: int
    """0 for A, 1 for B, 2 for gain, 3 for shift."""
    layers: tuple[str, ...]
    stacked: Tensor
    """(rows, layers, *shape)"""


class Slab:
    """The memory of `rows` adapters. `views[layer]` are the layer's A, B, gain and shift, each (rows, *shape)."""

    def __init__(self, shapes: Shapes, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width = width_of(shapes)
        with torch.inference_mode(False):  # a tensor made in inference mode can be written only in inference mode
            self.data = _zeros(rows * self.width, dtype, device).view(rows, self.width)
        layers: dict[tuple[int, tuple[int, ...]], list[str]] = defaultdict(list)
        for name, parts in shapes.items():
            for part, shape in enumerate(parts):
                layers[part, shape].append(name)
        self.blocks: list[Block] = []
        views: dict[str, dict[int, Tensor]] = defaultdict(dict)
        start = 0
        for (part, shape), names in layers.items():
            size = len(names) * math.prod(shape)
            stacked = self.data[:, start : start + size].unflatten(1, (len(names), *shape))
            start += size
            self.blocks.append(Block(part, tuple(names), stacked))
            for at, name in enumerate(names):
                views[name][part] = stacked[:, at]
        self.views = {name: tuple(views[name][part] for part in range(len(parts))) for name, parts in shapes.items()}


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    # A page takes no memory until it is written, so an empty slot is free. Private, or a forked process would write to
    # the same pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, **private), dtype=dtype)


def width_of(shapes: Shapes) -> int:
    """The number of elements in one row."""
    return sum(math.prod(shape) for parts in shapes.values() for shape in parts)


def free_bytes(device: torch.device) -> int | None:
    """The bytes that can still be allocated on `device`; None if that is not known."""
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
