"""bitsandbytes' 4-bit Linear. Its 8-bit one and torchao's weights need no class of their own: see engine/storage.py."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.storage import unpacked


class Linear4bitLoRA(LinearLoRA):
    """A Linear4bit must not rearrange its weight for the CPU.

    Where a CPU has AVX512-BF16 it does so in its first forward in eval mode, rounds its scales, and passes no gradient
    on from then on: after a validation, the adapters below it would no longer train.
    """

    replaces = ("support_avx512bf16_for_cpu",)
    support_avx512bf16_for_cpu = property(lambda self: False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Any = self._parameters["weight"]
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # by a forward before it was adapted
            weight.data, weight.quant_state = unpacked(weight)
        return super().forward(x, *args, **kwargs)


def register_bitsandbytes() -> None:
    """Register Linear4bit if bitsandbytes was imported: a model can only hold one if it was."""
    module = sys.modules.get("bitsandbytes.nn")
    if module is not None:
        Adapter.geometries.setdefault(module.Linear4bit, Linear4bitLoRA)
