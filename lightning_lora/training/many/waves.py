"""Chooses how many adapters share a forward, by timing the first steps; each of these steps counts like any other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.engine.memory import free_bytes

FEW = 4
"""One of the sizes that are tried, beside one adapter and all."""
TIMES = 3
"""How often each size is tried. The first time warms up, and the fastest of the others counts."""
_CHANCE = 0.02
"""Of two sizes that differ by less than this share of their time, the smaller one is chosen: it needs less memory."""
_SHARE = 0.5
"""The share of the free memory that what a wave keeps for its backward pass may take."""


class Waves:
    """The sizes that are tried, and the one that was chosen."""

    def __init__(self, count: int, most: int) -> None:
        self.chosen: int | None = None
        self._plan = [size for size in sorted({1, FEW, count}) if size <= min(count, most)] * TIMES
        self._taken: dict[int, list[float]] = {}
        self._is_first = set(self._plan)
        if self._plan.count(1) == len(self._plan):
            self.chosen = 1

    @contextmanager
    def step(self, device: torch.device, amount: int) -> Iterator[int]:
        """Give the size of the waves of this step; `amount` is the size of its batch."""
        if self.chosen is not None:
            yield self.chosen
            return
        size = self._plan.pop(0)
        _wait(device)
        began = time.perf_counter()
        yield size
        _wait(device)
        taken = (time.perf_counter() - began) / max(1, amount)
        if size in self._is_first:
            self._is_first.discard(size)
        else:
            self._taken.setdefault(size, []).append(taken)
        if not self._plan:
            fastest = min(map(min, self._taken.values()))
            self.chosen = next(one for one in sorted(self._taken) if min(self._taken[one]) <= fastest * (1 + _CHANCE))

    def __str__(self) -> str:
        fastest = min(self._taken[1])
        return ", ".join(f"{min(taken) / fastest:.2f} in waves of {size}" for size, taken in self._taken.items())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def that_fit(kept: int, device: torch.device) -> int:
    """The number of adapters that fit into one forward, where one keeps `kept` bytes for its backward pass."""
    free = free_bytes(device)
    return 10**9 if free is None else max(1, int(min(_SHARE * free / max(1, kept), 1e9)))


@contextmanager
def kept_bytes(module: nn.Module) -> Iterator[list[int]]:
    """Counts what autograd keeps for the backward pass inside, without weights. The count is the list's one entry."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters() if type(p) is nn.Parameter}
    seen: dict[int, int] = {}
    count = [0]

    def keep(t: Tensor) -> Tensor:
        if t.layout is torch.strided and type(t) in (Tensor, nn.Parameter):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
                count[0] = sum(seen.values())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield count
