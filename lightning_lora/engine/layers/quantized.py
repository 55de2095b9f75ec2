"""bitsandbytes' 4-bit Linear. Its 8-bit one and torchao's weights need no class of their own: see engine/storage.py."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.storage import unpacked


class Linear4bitLoRA(LinearLoRA):
    """A Linear4bit must not rearrange its weight for the CPU.

    Where a CPU has AVX512-BF16 it does so in its first forward in eval mode, rounds its scales, and passes no gradient
    on from then on: after a validation, the adapters below it would no longer train. The same goes for those that are
    not adapted, which are kept from it while others are.
    """

    replaces = ("support_avx512bf16_for_cpu",)
    support_avx512bf16_for_cpu = property(lambda self: False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        _put_back(self)
        return super().forward(*args, **kwargs)


def register_bitsandbytes() -> None:
    """Register Linear4bit if bitsandbytes was imported: a model can only hold one if it was."""
    module = sys.modules.get("bitsandbytes.nn")
    if module is not None:
        Adapter.geometries.setdefault(module.Linear4bit, Linear4bitLoRA)


def may_rearrange(cls: type[nn.Module]) -> bool:
    """Whether a module of that class can be a Linear4bit that would, and is not adapted."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes.nn")
    return bitsandbytes is not None and issubclass(cls, bitsandbytes.Linear4bit) and not issubclass(cls, Adapter)


def rearranges(module: nn.Module) -> bool:
    """Whether `module` is a Linear4bit that would, and is not adapted."""
    return bool(module.__dict__.get("support_avx512bf16_for_cpu", False)) and not isinstance(module, Adapter)


def keep_in_place(module: Any) -> None:
    """Keep a Linear4bit from rearranging its weight; what it has rearranged is put back."""
    module.support_avx512bf16_for_cpu = False
    _put_back(module)


def let_rearrange(module: Any) -> None:
    """Undo `keep_in_place`."""
    module.support_avx512bf16_for_cpu = True


def _put_back(module: Any) -> None:
    weight = module._parameters["weight"]
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = unpacked(weight)
