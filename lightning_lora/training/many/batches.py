"""Repeats a batch along its rows, once for each adapter of a wave."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows_of(batch: Any) -> int | None:
    """The number of rows: the first dimension that most tensors share, at the shallowest level of `batch` that has any.
    None where it has no tensors with dimensions."""
    level = [batch]
    while level:
        sizes = [t.shape[0] for t in level if _has_dimensions(t)]
        if sizes:
            return max(sizes, key=lambda size: (sizes.count(size), -sizes.index(size)))
        level = [child for one in level for child in _children(one)]
    return None


def repeated(batch: Any, times: int, rows: int) -> Any:
    """`batch`, with all that has `rows` rows repeated, and copies of the rest."""
    if isinstance(batch, (Tensor, np.ndarray)):
        if not (_has_dimensions(batch) and batch.shape[0] == rows):
            return own_copy(batch)
        size = (times, *[1] * (batch.ndim - 1))
        return np.tile(batch, size) if isinstance(batch, np.ndarray) else batch.repeat(size)
    is_list = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    if is_list and len(batch) == rows and not any(_has_dimensions(v) and v.shape[0] == rows for v in batch):
        return type(batch)([own_copy(v) for _ in range(times) for v in batch])  # one entry a row: texts, boxes
    return _rebuilt(batch, lambda value: repeated(value, times, rows))


def own_copy(batch: Any) -> Any:
    """A copy of `batch`, so that a step that changes its batch (which takes the labels out, or normalises in place)
    changes it for itself alone. What is no collection of tensors is copied where it has a method `clone`."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad)
    if isinstance(batch, np.ndarray):
        return batch.copy()
    rebuilt = _rebuilt(batch, own_copy)
    return batch.clone() if rebuilt is batch and callable(getattr(batch, "clone", None)) else rebuilt


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A collection like `batch`, of what `change` makes of its entries; any other object as it is."""
    if isinstance(batch, Mapping):
        values = {key: change(value) for key, value in batch.items()}
        if type(batch) is dict:
            return values
        new: Any = copy.copy(batch)
        if isinstance(getattr(new, "data", None), dict):  # UserDict, and transformers' BatchEncoding
            new.data = values
        else:
            new.update(values)
        return new
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = copy.copy(batch)
        for field in dataclasses.fields(batch):  # also of a frozen one
            object.__setattr__(new, field.name, change(getattr(batch, field.name)))
        return new
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    return type(batch)(map(change, batch)) if isinstance(batch, (list, tuple)) else batch


def amount_of(batch: Any) -> int:
    """How much is in the batch: the numbers in its largest tensor."""
    own = batch.numel() if isinstance(batch, Tensor) else 0
    return max([own, *(amount_of(child) for child in _children(batch))])


def _has_dimensions(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0


def _children(one: Any) -> Iterable[Any]:
    if isinstance(one, Mapping):
        return list(one.values())
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return [getattr(one, field.name) for field in dataclasses.fields(one)]
    return one if isinstance(one, (list, tuple)) else ()
