"""Starts, in place, adapters that `inject(..., start=False)` left at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.engine.inject import injections
from lightning_lora.engine.layers import Adapter, adapters
from lightning_lora.engine.layers.fresh import Measured, check_measured, device_of, drawing_on, fresh_tensors, recipes
from lightning_lora.engine.layers.tokens import TokenRows
from lightning_lora.engine.sharded import fill
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.vocabulary import token_tensors
from lightning_lora.errors import AdapterStateError, listed


def start_adapters(model: nn.Module, measured: Measured | None = None) -> None:
    """Start the adapters of `model` that `inject(..., start=False)` left at zero or on the meta device, unless they
    were loaded. A and B are made on the present device of their layer's weight.

    `measured` is as for `inject`, with layer names as in `model`. Raises ConfigError if a matrix is missing in it, and
    AdapterStateError if weights are still on the meta device; nothing is changed then.

    >>> import torch
    >>> from lightning_lora.engine import LoRAConfig, inject, start_adapters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["0"]), start=False)
    >>> bool(model[0].lora_A.any())
    False
    >>> start_adapters(model)
    >>> bool(model[0].lora_A.any())
    True
    """
    waiting = [(root, injection) for root, injection in injections(model) if injection.awaits_start]
    ours = {id(getattr(m, own)) for _, m in adapters(model) for own in m.lora_names}
    absent = [name for name, p in Tree.of(model).parameters if p.is_meta and id(p) not in ours]
    if waiting and absent:
        raise AdapterStateError(f"{listed(absent)} is still on the meta device: load the weights of the model first.")
    values: list[tuple[Adapter, str, Tensor]] = []
    for root, injection in waiting:
        prefix = f"{root}." if root else ""
        found = {prefix + n: module for n, module in adapters(submodule(model, root)) if _is_unstarted(module)}
        check_measured(injection.config, [n for n, m in found.items() if not isinstance(m, TokenRows)], measured or {})
        for name, module in found.items():
            if isinstance(module, TokenRows):
                started = token_tensors(module, module.lora, injection.config)
            else:
                of = (measured or {}).get(name)
                with drawing_on(device_of(module, module.lora)):
                    how = recipes(module, type(module), module.lora, injection.config)
                    started = fresh_tensors(name, module, how, of)
            values += [(module, own, value) for own, value in started.items()]
    with torch.no_grad():
        for module, own, value in values:
            tensor: Tensor = getattr(module, own)
            if tensor.is_meta:
                setattr(module, own, value)
            else:
                fill(tensor, value, drawn=True)
    for root, injection in waiting:
        owner = submodule(model, root)
        there = dict(Tree.of(owner).tensors)
        for name in [name for name, original in injection.originals.items() if original.is_meta]:
            injection.originals[name] = there[name].detach().clone()
        for _, module in adapters(owner):
            if isinstance(module, TokenRows) and module.lora_rows.is_meta:
                module.swapped_in()
        injection.awaits_start = False


def _is_unstarted(module: Adapter) -> bool:
    """True if all of the layer's adapter tensors are zero or on the meta device."""
    pairs = module.lora_pairs("")
    own = [t for pair in pairs for t in (pair.A, pair.B)] or [getattr(module, name) for name in module.lora_names]
    return bool(own) and all(t.is_meta or not bool(t.any()) for t in own)
