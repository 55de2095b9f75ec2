"""Weights that are stored in fewer bits: the numbers that they stand for, and how others are stored the same way.

It is asked of the weight each time: bitsandbytes quantizes where a module is moved, so a layer may be adapted before.
Nothing is imported here: a model can hold such a weight only if its library was imported.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor


def is_plain(W: Tensor) -> bool:
    """Whether a weight holds its own numbers, in 16 bits or more."""
    return W.is_floating_point() and W.dtype.itemsize > 1 and not is_torchao(W)


def is_quantized(W: Tensor) -> bool:
    """Whether it stands for other numbers, in a way that is known here."""
    return _is_4bit(W) or _is_8bit(W) or is_torchao(W)


def can_be_dense(W: Tensor | None) -> bool:
    """Whether it is known which numbers a weight stands for."""
    return W is not None and (is_plain(W) or is_quantized(W))


def dense(module: Any, W: Tensor) -> Tensor:
    """The numbers that `W`, a parameter of `module`, stands for, in 16 bits or more."""
    if is_plain(W):
        return W
    with torch.no_grad():
        if is_torchao(W):
            return W.dequantize()
        functional = sys.modules["bitsandbytes.functional"]
        if _is_4bit(W):
            data, state = unpacked(W)
            return functional.dequantize_4bit(data, state)
        assert _is_8bit(W), "can_be_dense was asked before"
        return functional.int8_vectorwise_dequant(W.data, _scales(module, W))


def shape_of(W: Any) -> tuple[int, ...]:
    """The shape of the numbers that `W` stands for."""
    return tuple(W.quant_state.shape if _is_4bit(W) else W.shape)


def stored(module: Any, W: Tensor, like: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """`W` in the way in which `like`, a parameter of `module`, is stored; with the attributes of `module` that go with
    it. A weight of torchao's, which does not say how it was made, becomes a plain one."""
    if is_plain(like):
        return W.to(like.dtype), {}
    W = W.to(dense(module, like).dtype)
    kind: Any = type(like)
    if _is_4bit(like):
        made = {name: getattr(like, name) for name in _CHOICES_4BIT}
        parameter = kind(W.contiguous(), **made).to(like.device)
        return parameter, {"quant_state": parameter.quant_state}
    if _is_8bit(like):
        state = copy.copy(module.state)  # the layer takes over the new numbers in its next forward
        state.CB = state.SCB = None
        return kind(W.contiguous().cpu(), requires_grad=False).to(like.device), {"state": state}
    return W, {}


_CHOICES_4BIT = ("blocksize", "compress_statistics", "quant_type", "quant_storage")


def unpacked(W: Any) -> tuple[Tensor, Any]:
    """The data and the state of a 4-bit weight, as they were before bitsandbytes rearranged them for a CPU."""
    if not getattr(W.quant_state, "packing_format_for_cpu", False):
        return W.data, W.quant_state
    # It changes the state that it is given.
    restored: tuple[Tensor, Any] = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(
        W.data, copy.copy(W.quant_state)
    )
    return restored


def _is_a(W: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(W, kind)


def _is_4bit(W: Any) -> bool:
    return _is_a(W, "bitsandbytes.nn", "Params4bit") and W.quant_state is not None


def _is_8bit(W: Tensor) -> bool:
    return _is_a(W, "bitsandbytes.nn", "Int8Params") and W.dtype == torch.int8


def is_torchao(W: Tensor) -> bool:
    """Whether it is one of torchao's, which torch's functions compute with."""
    return _is_a(W, "torchao.utils", "TorchAOBaseTensor")


def _scales(module: Any, W: Any) -> Tensor:
    scales: Tensor = W.SCB if W.SCB is not None else module.state.SCB
    return scales
