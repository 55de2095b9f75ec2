"""What a bank will take, and where, before it takes anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_lora.checked import whole
from lightning_lora.engine.bank.cells import Cell
from lightning_lora.engine.bank.slab import MemoryPlan, width_of
from lightning_lora.engine.storage import is_plain
from lightning_lora.errors import BankError


def watched(cells: Mapping[str, Cell]) -> tuple[dict[str, Any], str]:
    """A parameter of a layer, by the dict that holds it: the first one, which may be what a weight is computed of."""
    for cell in cells.values():
        for part in cell.module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    return part._parameters, name
    raise BankError("None of the layers has a parameter, whose device and precision would be those of the bank.")


def plan_of(cells: Mapping[str, Cell], capacity: int, max_rank: int, dtype: torch.dtype | None) -> MemoryPlan:
    """What the slots of a bank with these cells take; in the precision of the base where `dtype` is None."""
    whole("capacity", capacity)
    whole("max_rank", max_rank)
    parameters, name = watched(cells)
    weight = parameters[name]
    dtype = dtype or (weight.dtype if is_plain(weight) else torch.float32)
    width = width_of({name: cell.shapes(max_rank) for name, cell in cells.items()})
    return MemoryPlan(capacity, len(cells), max_rank, dtype, weight.device, width * dtype.itemsize)
