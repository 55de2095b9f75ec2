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


def witness_of(tensors: Iterable[tuple[str, Tensor]]) -> tuple[Any, ...] | None:
    """A key that changes when any of the tensors changes; it is made of their `marks_of`.

    None if a change could not be noticed: on the meta device, for another tensor subclass (a DTensor), for tensors made
    in inference mode (they have no versions), or in memory that other processes may write to.
    """
    tensors = list(tensors)
    return None if any(map(_is_unseen, (t for _, t in tensors))) else tuple(marks_of(tensors).items())


def _is_unseen(t: Tensor) -> bool:
    if type(t) is not nn.Parameter:
        return not is_quantized(t)
    is_shared = t.device.type == "cpu" and t.untyped_storage().is_shared()
    return t.layout is not torch.strided or t.is_meta or t.is_inference() or is_shared


@torch.no_grad()
def marks_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Name -> a key that changes when that tensor is replaced or written to: id, address, version, and a digest of a
    sample of values, the last. For a quantized tensor it contains only the type."""
    marks: dict[str, Any] = {}
    samples: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, t in tensors:
        marks[name] = type(t)
        if type(t) is not nn.Parameter or t.layout is not torch.strided or t.is_meta:
            continue
        counted = None if t.is_inference() else version(t)
        marks[name] = ((id(t), t.data_ptr()), counted, t.shape, t.stride(), t.dtype, t.device)
        if t.numel():
            sample = torch.as_strided(t, *_spread(t.shape, t.stride()))
            sample = sample.view(torch.uint8) if t.dtype.itemsize == 1 else sample  # float8 is compared as bytes
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
