"""Adapters that were left at zero, started in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.engine.inject import injections
from lightning_lora.engine.layers import adapters
from lightning_lora.engine.layers.fresh import Measured, check_measured, fresh_tensors


def start_adapters(model: nn.Module, measured: Measured | None = None) -> None:
    """Start those adapters of `model` that `inject(..., start=False)` left at zero, if nothing was loaded into them.

    `measured` is as for `inject`, by names in `model`. Raises ConfigError where something of it is missing; nothing is
    changed then.
    """
    waiting = [(root, injection) for root, injection in injections(model) if injection.awaits_start]
    values: list[tuple[Tensor, Tensor]] = []
    for root, injection in waiting:
        prefix = f"{root}." if root else ""
        found = {prefix + n: module for n, module in adapters(model.get_submodule(root)) if module.lora_pairs(n)}
        layers = {name: m for name, m in found.items() if not any(p.A.any() or p.B.any() for p in m.lora_pairs(name))}
        check_measured(injection.config, layers, measured or {})
        for name, module in layers.items():
            of = (measured or {}).get(name)
            started = fresh_tensors(module, type(module), module.lora, injection.config, of)
            values += [(getattr(module, own), value) for own, value in started.items()]
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
    for _, injection in waiting:
        injection.awaits_start = False
