"""Tells whether tensors have changed, without reading all of their numbers.

A write through torch raises a tensor's version, and a tensor that replaces another has another address. A write past
torch's versions (through `.data`, or numpy's or another library's view of the memory) shows only in the numbers. A
sample of these is read: at least one of each row, and one of each column if there are as many rows as columns. So a
write past torch that changes no number of the sample, such as one to a single number, is not noticed.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.torch_private import version
from lightning_lora.engine.weights import is_quantized

_FEWEST = 64


@torch.no_grad()
def witness_of(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...] | None:
    """A key that changes when any of the tensors changes: ids, addresses, versions, and a sample of values. For a
    quantized tensor it contains only the type.

    None if a change could not be noticed: on the meta device, for another tensor subclass (a DTensor), for tensors made
    in inference mode (they have no versions), or in memory that other processes may write to.
    """
    marks: list[Any] = []
    samples: dict[Any, list[Tensor]] = {}
    for name, t in tensors:
        if type(t) is not nn.Parameter:
            if not is_quantized(t):
                return None
            marks.append((name, type(t)))
            continue
        if t.layout is not torch.strided or t.is_meta or t.is_inference() or _is_shared(t):
            return None
        shape, strides = t.shape, t.stride()
        marks.append((name, id(t), t.data_ptr(), version(t), shape, strides, t.dtype, t.device))
        if t.numel():
            sample = torch.as_strided(t, *_spread(shape, strides))
            sample = sample.view(torch.uint8) if t.dtype.itemsize == 1 else sample  # float8 is compared as bytes
            samples.setdefault((t.device, sample.dtype), []).append(sample)
    digest = hashlib.sha256()
    for group in samples.values():
        digest.update(torch.cat(group).cpu().view(torch.uint8).numpy().data)
    return (*marks, digest.digest())


@torch.no_grad()
def marks_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Name -> a key that changes when that tensor is written to, also in memory that other processes may write to: to
    tell which tensor changed. For a quantized tensor it contains only the type."""
    marks: dict[str, Any] = {}
    samples: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, t in tensors:
        marks[name] = type(t)
        if type(t) is not nn.Parameter or t.layout is not torch.strided or t.is_meta:
            continue
        marks[name] = (t.data_ptr(), None if t.is_inference() else version(t), t.shape, t.dtype)
        if t.numel():
            sample = torch.as_strided(t, *_spread(t.shape, t.stride()))
            sample = sample.view(torch.uint8) if t.dtype.itemsize == 1 else sample
            samples.setdefault((t.device, sample.dtype), []).append((name, sample))
    for group in samples.values():  # one copy to the CPU for each device, since each copy is a wait
        read = torch.cat([sample for _, sample in group]).cpu()
        for (name, _), part in zip(group, read.split([len(sample) for _, sample in group])):
            marks[name] = (*marks[name], hashlib.sha256(part.contiguous().view(torch.uint8).numpy().data).digest())
    return marks


@functools.lru_cache(maxsize=256)  # thousands of layers have the same shapes
def _spread(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int], tuple[int]]:
    """The size and the stride of an evenly spaced sample of a tensor's memory, from its first to its last number."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    # One less than a row's length: from row to row the sample moves by one column, so it covers the columns, too.
    step = max(1, min(math.prod(shape[1:]) - 1, extent // _FEWEST))
    return (1 + (extent - 1) // step,), (step,)


def _is_shared(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.untyped_storage().is_shared()
