"""Guards a layer's weight from other modules that read it in their forward while adapters of a bank are in use.

The weight holds no adapter, and it cannot be known which adapter the reader's result would need. So such a reader gets
the weight's shape, dtype and device, which many models ask for in every forward, and an error for anything else. Code
outside a forward gets the base's weight, which a bank never changes.
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
    """The weight of the layer `bank_layer`. An operation that computes with it or changes it raises an error."""

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
            "a bank are in use: it is the base's weight and holds none of them. Call the layer, or leave it out of the "
            "bank with exclude_modules; one adapter alone can be used with load_adapter, or with bank.folded."
        )


def in_a_forward() -> bool:
    """True if the code that reads an attribute (two frames up) runs in the forward of a module."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_CALL = nn.Module._call_impl.__code__


def guarded(own: nn.Parameter, name: str) -> GuardedWeight:
    """A guarded stand-in for `own`, the weight of the layer `name`."""
    with torch._C.DisableTorchFunctionSubclass():
        weight: Any = torch.Tensor._make_subclass(GuardedWeight, own.data, own.requires_grad)
    weight.bank_layer = name
    return weight
