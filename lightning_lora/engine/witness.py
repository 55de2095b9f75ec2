"""Whether tensors are still what they were, without reading all of them.

A write through torch raises a tensor's version, and one that takes the place of another lies elsewhere. A write past
torch's versions (through `.data`, through numpy's or another library's view of the memory) shows in the numbers alone,
of which some are read: at least one of each row, and of each column where there are as many rows. So what is unseen
is a write past torch that leaves these as they are, such as one to a single number.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.storage import is_quantized

_FEWEST = 64


@torch.no_grad()
def witness_of(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...] | None:
    """What is equal for as long as these tensors are what they are now, those that are quantized by their kind alone.

    None where that cannot be told: on the meta device, for a tensor of a kind with a storage of its own (a DTensor, for
    one), made in inference mode (which counts no versions), or in memory that other processes may write to.
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
        marks.append((name, id(t), t.data_ptr(), t._version, shape, strides, t.dtype, t.device))
        if t.numel():
            sample = torch.as_strided(t, *_spread(shape, strides))
            sample = sample.view(torch.uint8) if t.dtype.itemsize == 1 else sample  # eight bits need not be numbers
            samples.setdefault((t.device, sample.dtype), []).append(sample)
    digest = hashlib.sha256()
    for group in samples.values():
        digest.update(torch.cat(group).cpu().view(torch.uint8).numpy().data)
    return (*marks, digest.digest())


@torch.no_grad()
def marks_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """For each tensor, by its name, what is equal for as long as nothing is written to it: to tell which one changed,
    in memory that other processes may write to as well. Those that are quantized are marked by their kind alone."""
    marks: dict[str, Any] = {}
    samples: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, t in tensors:
        marks[name] = type(t)
        if type(t) is not nn.Parameter or t.layout is not torch.strided or t.is_meta:
            continue
        marks[name] = (t.data_ptr(), None if t.is_inference() else t._version, t.shape, t.dtype)
        if t.numel():
            sample = torch.as_strided(t, *_spread(t.shape, t.stride()))
            sample = sample.view(torch.uint8) if t.dtype.itemsize == 1 else sample
            samples.setdefault((t.device, sample.dtype), []).append((name, sample))
    for group in samples.values():  # one copy for each device, since each waits for it
        read = torch.cat([sample for _, sample in group]).cpu()
        for (name, _), part in zip(group, read.split([len(sample) for _, sample in group])):
            marks[name] = (*marks[name], hashlib.sha256(part.contiguous().view(torch.uint8).numpy().data).digest())
    return marks


@functools.lru_cache(maxsize=256)  # thousands of layers have the same shapes
def _spread(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int], tuple[int]]:
    """The size and the stride of a sample of the memory between the first and the last number of a tensor."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    # One less than a row: each sample lies a column before the last one, so that all columns are seen as well.
    step = max(1, min(math.prod(shape[1:]) - 1, extent // _FEWEST))
    return (1 + (extent - 1) // step,), (step,)


def _is_shared(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.untyped_storage().is_shared()
