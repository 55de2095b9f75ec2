"""Computes the memory that a bank will take, and its device, before anything is allocated."""

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
