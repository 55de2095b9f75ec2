"""bitsandbytes' 4-bit Linear. Its 8-bit one and torchao's weights need no geometry of their own: see engine/storage.py.

Where a CPU has AVX512-BF16, such a layer rearranges its weight in its first forward in eval mode: it rounds the scales
to bfloat16, which cannot be undone, and passes no gradient on from then on. In an adapted model that must not happen: a
validation would change the base, and adapters below the layer would no longer train. What was rearranged before, the
model's output depends on: it stays as it is.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.layers.straight_through import straight_through
from lightning_lora.engine.storage import is_rearranged, is_wrapper, unpacked
from lightning_lora.engine.swap import swapped_class

if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object


class Steady4bit(_Host):
    """Mixin in front of Linear4bit: its weight stays as it is, and a gradient passes it."""

    base_class: type[nn.Module]

    support_avx512bf16_for_cpu = property(lambda self: False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = _own(self, "weight"), _own(self, "bias")
        values = None if bias is None or bias.requires_grad else bias.data
        forward = super().forward

        def without_gradients() -> Tensor:
            with torch.no_grad():  # since it writes in place
                y: Tensor = forward(x, *args, **kwargs)
                return y

        is_changed = is_rearranged(weight)
        output = straight_through(self, x, without_gradients) if is_changed else forward(x, *args, **kwargs)
        if bias is not None and values is not None and bias.dtype != values.dtype:
            bias.data = values  # rounded for good otherwise, to the dtype in which the layer computes
        return output

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # bitsandbytes puts the weight back for it, in place, with its scales in the wrong order.
        own: Any = _own(self, "weight")
        if is_rearranged(own):
            self._parameters["weight"] = _put_back(copy.copy(own))
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["weight"] = own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = _own(self, "weight")
        if is_rearranged(weight) and fn(torch.empty(0)).device.type != "cpu":  # it is an order for CPUs alone
            _put_back(weight)
        return super()._apply(fn, recurse)


class PassesGradient(_Host):
    """Mixin in front of a Linear whose weight, one of torchao's, may pass no gradient to the input."""

    base_class: type[nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return straight_through(self, x, functools.partial(super().forward, x, *args, **kwargs))


class Linear4bitLoRA(LinearLoRA, Steady4bit):  # type: ignore[misc]
    """The mixin comes after the adapter: it is what the adapter takes for the base's own forward."""

    replaces = ("support_avx512bf16_for_cpu",)


def register_bitsandbytes() -> None:
    """Register Linear4bit if bitsandbytes was imported: a model can only hold one if it was."""
    module = sys.modules.get("bitsandbytes.nn")
    if module is not None:
        Adapter.geometries.setdefault(module.Linear4bit, Linear4bitLoRA)


_KEPT = (Steady4bit, PassesGradient)


def may_be_kept(cls: type[nn.Module]) -> bool:
    """Whether a module of that class can be one for `keep_in_place`."""
    return issubclass(cls, nn.Linear) and not issubclass(cls, _KEPT)


def is_kept(module: nn.Module) -> bool:
    """Whether `module`, a Linear without an adapter, would rearrange its weight, or pass no gradient through it."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes.nn")
    weight = module._parameters.get("weight")
    if bitsandbytes is not None and isinstance(module, bitsandbytes.Linear4bit):
        return bool(module.__dict__.get("support_avx512bf16_for_cpu", False)) or is_rearranged(weight)
    return weight is not None and is_wrapper(weight)


def keep_in_place(module: Any) -> None:
    """Keep the weight of a Linear without an adapter as it is, and pass gradients through it."""
    base_class: Any = type(module)
    mixin = PassesGradient if is_wrapper(module._parameters["weight"]) else Steady4bit
    module.__class__ = swapped_class("Steady", mixin, base_class)


def let_go(module: Any) -> None:
    """Undo `keep_in_place`; nothing is done to a module that took the place of the one that was kept."""
    cls: Any = type(module)
    if issubclass(cls, _KEPT) and "base_class" in vars(cls):
        module.__class__ = cls.base_class


def _own(module: nn.Module, name: str) -> Tensor | None:
    """The layer's own parameter; a replica that nn.DataParallel makes has it as a plain attribute."""
    p = module._parameters.get(name)
    return module.__dict__.get(name) if p is None else p


def _put_back(weight: Any) -> Any:
    weight.data, weight.quant_state = unpacked(weight)
    return weight
