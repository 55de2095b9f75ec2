"""bitsandbytes' 4-bit Linear. Its 8-bit one and torchao's weights need no geometry of their own: see engine/weights.py.

Where a CPU has AVX512-BF16, such a layer rearranges its weight in its first forward in eval mode: it rounds the scales
to bfloat16, which cannot be undone, and passes no gradient on from then on. In an adapted model that must not happen: a
validation would change the base, and adapters below the layer would no longer train. A weight that was rearranged
before the injection stays so, since the model's output depends on it.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.linear import LinearLoRA, straight_through
from lightning_lora.engine.swap import Host, is_swapped, swap, swap_back
from lightning_lora.engine.weights import is_rearranged, is_wrapper, unpacked


class Steady4bit(Host):
    """Mixin in front of Linear4bit: its weight is not rearranged, and a gradient passes through it."""

    base_class: type[nn.Module]

    support_avx512bf16_for_cpu = property(lambda self: False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = _own(self, "weight"), _own(self, "bias")
        values = None if bias is None or bias.requires_grad else bias.data
        forward = super().forward

        def without_gradients() -> Tensor:
            with torch.no_grad():  # the kernel writes in place
                y: Tensor = forward(x, *args, **kwargs)
                return y

        is_changed = is_rearranged(weight)
        output = straight_through(self, x, without_gradients) if is_changed else forward(x, *args, **kwargs)
        if bias is not None and values is not None and bias.dtype != values.dtype:
            bias.data = values  # the layer has rounded it to the dtype in which it computes
        return output

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # To save it, bitsandbytes undoes the rearrangement in place, and gets the scales in the wrong order.
        own: Any = _own(self, "weight")
        if is_rearranged(own):
            self._parameters["weight"] = _put_back(copy.copy(own))
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._parameters["weight"] = own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        weight: Any = _own(self, "weight")
        if is_rearranged(weight) and fn(torch.empty(0)).device.type != "cpu":  # only CPUs read the rearranged order
            _put_back(weight)
        return super()._apply(fn, recurse)


class PassesGradient(Host):
    """Mixin in front of a Linear with a weight of torchao's, which may pass no gradient to the input by itself."""

    base_class: type[nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return straight_through(self, x, functools.partial(super().forward, x, *args, **kwargs))


class Linear4bitLoRA(LinearLoRA, Steady4bit):  # type: ignore[misc]
    """Steady4bit comes after the adapter, so that the adapter calls its forward as the base's."""

    replaces = ("support_avx512bf16_for_cpu",)


def register_bitsandbytes() -> None:
    """Register Linear4bit if bitsandbytes was imported: else no model can contain a Linear4bit."""
    module = sys.modules.get("bitsandbytes.nn")
    if module is not None:
        Adapter.geometries.setdefault(module.Linear4bit, Linear4bitLoRA)


_KEPT = (Steady4bit, PassesGradient)


def keep_in_place(modules: Iterable[tuple[str, nn.Module]]) -> tuple[str, ...]:
    """Keep the weights of those Linears without an adapter that would rearrange them, or pass no gradient through them,
    as they are, and pass gradients on. Returns the names of these Linears."""
    kept = {name: m for name, m in modules if isinstance(m, nn.Linear) and not isinstance(m, (*_KEPT, Adapter))}
    kept = {name: m for name, m in kept.items() if _would_change(m)}
    for module in kept.values():
        swap(module, "Steady", PassesGradient if is_wrapper(module.weight) else Steady4bit)
    return tuple(kept)


def _would_change(module: nn.Linear) -> bool:
    bitsandbytes: Any = sys.modules.get("bitsandbytes.nn")
    weight = module._parameters.get("weight")
    if bitsandbytes is not None and isinstance(module, bitsandbytes.Linear4bit):
        return bool(module.__dict__.get("support_avx512bf16_for_cpu", False)) or is_rearranged(weight)
    return weight is not None and is_wrapper(weight)


def let_go(module: Any) -> None:
    """Undo `keep_in_place`. A module that has replaced the kept one is left as it is."""
    if isinstance(module, _KEPT) and is_swapped(type(module)):
        swap_back(module)


def _own(module: nn.Module, name: str) -> Tensor | None:
    """The layer's parameter; in a replica that nn.DataParallel makes it is a plain attribute."""
    p = module._parameters.get(name)
    return module.__dict__.get(name) if p is None else p


def _put_back(weight: Any) -> Any:
    weight.data, weight.quant_state = unpacked(weight)
    return weight
