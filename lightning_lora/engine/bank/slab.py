"""One tensor, the slab, holds all adapters of a bank: one row for each slot, with a place for every layer.

A layer's stacked factors are strided views of the slab. So to load, move out or clear an adapter is to copy one
contiguous row, however many layers there are, and a forward reads the factors in place. In a row, parts of one shape
lie side by side as a block, so that an adapter is written block by block.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.checked import whole
from lightning_lora.engine.layers.cell import Cell, LayerFactors, copy_scaled
from lightning_lora.engine.layers.linear import LinearCell
from lightning_lora.engine.memory import free_bytes, largest, largest_in, too_large
from lightning_lora.engine.weights import dtype_of, is_plain
from lightning_lora.errors import AdapterFormatError, BankError, listed

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


def check_memory(plan: MemoryPlan) -> None:
    """Raise BankError if there is less memory free than `plan` takes."""
    free = free_bytes(plan.device)
    if free is not None and plan.bytes > free:
        raise BankError(
            f"The bank does not fit: {plan}, where {free / 2**30:.3g} GiB are free. Lower max_rank, or capacity: "
            "adapters without a slot wait in the processor's memory, or on disk."
        )


def _in_units(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


# Writes an adapter into its slot: a whole block of layers at once where the adapter has all of them and they are alike,
# else layer by layer.


def check_fits(cells: Mapping[str, Cell], name: str, factors: Mapping[str, LayerFactors], max_rank: int) -> int:
    """The largest rank in `factors`, the adapter `name`. Raises AdapterFormatError if they do not fit the bank."""
    problems = [] if factors else ["it adapts nothing"]
    unknown = [layer for layer in factors if layer not in cells]
    if unknown:
        endings = sorted({layer.rpartition(".")[2] for layer in unknown})
        problems.append(
            f"it adapts {listed(unknown, 3)}, which this bank does not serve (make it with target_modules that name "
            f"{listed(map(repr, endings))} too)"
        )
    for layer, values in factors.items():
        if layer in cells:
            problems += cells[layer].problems(values, max_rank)
    if problems:
        raise AdapterFormatError(f"{name!r} does not fit the bank: {listed(problems)}. Nothing was added.")
    return max(values.A.shape[0] for values in factors.values())


@torch.no_grad()
def write(slab: Slab, cells: Mapping[str, Cell], slot: int, name: str, factors: Mapping[str, LayerFactors]) -> None:
    """Write `factors`, the adapter `name`, which fits `cells`, into the slot `slot`, which holds zeros. Raises
    AdapterFormatError if numbers are not finite in the slab, or would overflow in their layer."""
    plain = {name for name, values in factors.items() if type(cells[name]) is LinearCell and not values.is_affine}
    written: dict[int, set[str]] = {0: set(), 1: set()}
    for part, layers, stacked in slab.blocks:
        if part in written and plain.issuperset(layers):
            of_block = [factors[layer] for layer in layers]
            if (_write_A if part == 0 else _write_B)(stacked[slot], of_block):
                written[part].update(layers)
    for layer, values in factors.items():
        if not (layer in written[0] and layer in written[1]):
            cells[layer].write(slot, values)
    problem = _problem_written(slab, cells, slot, factors)
    if problem:
        raise AdapterFormatError(f"The adapter {name!r} holds {problem}. Nothing was added.")


def _problem_written(
    slab: Slab, cells: Mapping[str, Cell], slot: int, factors: Mapping[str, LayerFactors]
) -> str | None:
    """The numbers that are not finite in the slab or would overflow in their layer, in words; or None."""
    row = slab.data[slot]
    size = largest_in(row)
    if not math.isfinite(size):
        return f"values that are not finite in {row.dtype}"
    if size * size * max(values.A.shape[0] for values in factors.values()) <= largest(torch.float16):
        return None  # the numbers are so small that no product overflows in any dtype
    problems = []
    for name, values in factors.items():
        dtype = dtype_of(cells[name].module._parameters.get("weight"))
        found = too_large(values.A, values.B, values.scale, dtype, values.magnitude, values.bias)
        if found:
            problems.append(f"{name} has {found}")
    return f"numbers that are finite and yet too large for the model: {listed(problems)}" if problems else None


def _write_A(to: Tensor, of_block: Sequence[LayerFactors]) -> bool:  # (layers, max_rank, in)
    """Write the A of a block at once; False, with nothing written, if they differ in shape, dtype or device."""
    As = [values.A for values in of_block]
    if not _are_alike(As):
        return False
    if As[0].shape == to.shape[1:] and As[0].dtype == to.dtype and As[0].device == to.device:
        torch.stack(As, out=to)
    else:
        to[:, : As[0].shape[0]].copy_(torch.stack(As))
    return True


def _write_B(to: Tensor, of_block: Sequence[LayerFactors]) -> bool:  # (layers, max_rank, out)
    """Write the B of a block at once, transposed and scaled; False if they, or their scales, differ."""
    Bs, scale = [values.B for values in of_block], of_block[0].scale
    if not _are_alike(Bs) or any(values.scale != scale for values in of_block):
        return False
    copy_scaled(to[:, : Bs[0].shape[1]], torch.stack(Bs).mT, scale)
    return True


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """True if they can be stacked: one shape, dtype and device."""
    shape, dtype, device = tensors[0].shape, tensors[0].dtype, tensors[0].device
    return all(t.shape == shape and t.dtype == dtype and t.device == device for t in tensors)


# Computes the memory that a bank will take, and its device, before anything is allocated.


def watched(cells: Mapping[str, Cell]) -> tuple[dict[str, Any], str]:
    """The first parameter of the bank's layers, as the dict that holds it and its name in there. The bank follows it:
    its device, and by default its dtype, are the bank's."""
    for cell in cells.values():
        for part in cell.module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    return part._parameters, name
    raise BankError(
        "None of the layers has a parameter, from which the bank would take its device and dtype. Name other layers in "
        "target_modules."
    )


def plan_of(cells: Mapping[str, Cell], capacity: int, max_rank: int, dtype: torch.dtype | None) -> MemoryPlan:
    """The memory that the slots of a bank with these cells take. If `dtype` is None it is the base's."""
    whole("capacity", capacity)
    whole("max_rank", max_rank)
    parameters, name = watched(cells)
    weight = parameters[name]
    dtype = dtype or (weight.dtype if is_plain(weight) else torch.float32)
    width = width_of({name: cell.shapes(max_rank) for name, cell in cells.items()})
    return MemoryPlan(capacity, len(cells), max_rank, dtype, weight.device, width * dtype.itemsize)
