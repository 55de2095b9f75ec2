"""Writes an adapter into its slot: a whole block of layers at once where the adapter has all of them and they are
alike, else layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_lora.engine.bank.cells import Cell, LayerFactors, copy_scaled
from lightning_lora.engine.bank.kinds import LinearCell
from lightning_lora.engine.bank.slab import Slab
from lightning_lora.engine.overflow import largest, largest_in, too_large
from lightning_lora.engine.storage import dtype_of
from lightning_lora.errors import listed


def write(slab: Slab, cells: Mapping[str, Cell], slot: int, factors: Mapping[str, LayerFactors]) -> None:
    """Write `factors`, which fit `cells`, into the slot `slot`, which holds zeros."""
    plain = {name for name, values in factors.items() if type(cells[name]) is LinearCell and not values.is_affine}
    written: dict[int, set[str]] = {0: set(), 1: set()}
    for part, layers, stacked in slab.blocks:
        if part in written and plain.issuperset(layers):
            of_block = [factors[name] for name in layers]
            if (_write_A if part == 0 else _write_B)(stacked[slot], of_block):
                written[part].update(layers)
    for name, values in factors.items():
        if not (name in written[0] and name in written[1]):
            cells[name].write(slot, values)


def problem_written(
    slab: Slab, cells: Mapping[str, Cell], slot: int, factors: Mapping[str, LayerFactors]
) -> str | None:
    """Check `factors`, which `write` has written: the numbers that are not finite in the slab or would overflow in
    their layer, in words; or None."""
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
