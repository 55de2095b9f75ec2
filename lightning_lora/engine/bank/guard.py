"""The weight of a layer for modules that read it in their forward while adapters are in use: it holds none of them.

Which adapter, if any, belongs to what a reader computes cannot be known. So a reader gets the shape, the precision and
the place of the weight, which many models ask for in every forward, and an error for all else. Code outside of a
forward gets the base's weight: a bank never changes it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.shown import METADATA
from lightning_lora.errors import AdapterStateError

_VALUES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))


class GuardedWeight(nn.Parameter):
    """The weight of the layer `bank_layer`; what would compute with it, or change it, is refused."""

    bank_layer: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (name == "__get__" and func.__self__.__name__ not in _VALUES) or name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        layers = {v.bank_layer for v in (*args, *(kwargs or {}).values()) if isinstance(v, GuardedWeight)}
        raise AdapterStateError(
            f"The weight of {' and '.join(sorted(map(repr, layers))) or 'a layer'} was read ({name}) while adapters of "
            "a bank are in use: it is the base's and holds none of them. Call the layer, or leave it out of the bank "
            "with exclude_modules; one adapter alone can be used by load_adapter, or by bank.folded."
        )


def in_a_forward() -> bool:
    """Whether the code that reads an attribute runs in the forward of a module."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_CALL = nn.Module._call_impl.__code__


def guarded(own: nn.Parameter, name: str) -> GuardedWeight:
    """`own`, the weight of the layer `name`, for readers from outside of it."""
    with torch._C.DisableTorchFunctionSubclass():
        weight: Any = torch.Tensor._make_subclass(GuardedWeight, own.data, own.requires_grad)
    weight.bank_layer = name
    return weight
