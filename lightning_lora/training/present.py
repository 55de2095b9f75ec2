"""Adapters that a module has before a run: of a run before (a cell that is run again), of inject or load_adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.engine import Injection, InjectionReport, LoRAConfig, injections
from lightning_lora.engine.as_injected import check_as_injected
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.same_config import differences
from lightning_lora.engine.storage import shape_of
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.errors import AdapterStateError, listed


def adapters_present(
    module: nn.Module, config: LoRAConfig | None, some: Mapping[str, Any] | None = None, *, adapter: str | None = None
) -> tuple[str, InjectionReport]:
    """How to name, in code, what `inject` was called on, and its report, by names in `module`.

    Raises AdapterStateError where the adapters of `module` are not those of `config`, or of `some` of its fields,
    naming what differs; one that means the same is the same. `adapter` is where they were loaded from just now.
    """
    check_as_injected(module)
    kind = type(module).__name__
    records = list(injections(module))
    if not records:
        raise AdapterStateError(
            f"{kind} has adapters already, of an inject on a module around it: call lightning_lora.remove on that one "
            "first, or fit that one."
        )
    if len(records) > 1:
        parts = listed(repr(name) for name, _ in records)
        raise AdapterStateError(
            f"{kind} has adapters already, of several calls of inject (on {parts}), "
            "and a callback trains those of one. Call lightning_lora.remove on the others first."
        )
    ((root, injection),) = records
    code = f"module.{root}" if root else "module"
    config = replace(injection.config, **some or {}) if config is None else config
    owner = submodule(module, root)
    differing = _differing(owner, injection, with_plain_names(config, Tree.of(owner)))
    if differing and adapter is not None:
        raise AdapterStateError(
            f"The adapter {adapter} is of another config than the one that was given beside it: {listed(differing)}. "
            "Leave these settings out, to go on as it was trained, or start a new adapter without adapter=."
        )
    if differing:
        raise AdapterStateError(
            f"{kind} has adapters already, of another config than this callback's: {listed(differing)}. To start anew, "
            f"call lightning_lora.remove({code}) first (or merge, to keep what they learnt in the base); to go on from "
            f"them, give the callback their config: LoRACallback(injection_of({code}).config), with injection_of from "
            "lightning_lora.engine."
        )
    assert injection.report is not None, "inject leaves it"
    inside = {id(p) for p in submodule(module, root).parameters()}
    others = sum(math.prod(shape_of(p)) for p in module.parameters() if id(p) not in inside)
    return code, injection.report.within(root, others)


def _differing(model: nn.Module, injection: Injection, config: LoRAConfig) -> list[str]:
    differing = differences(model, injection, config)
    return [f"{name} is {_shown(a)} there and {_shown(b)} here" for name, (a, b) in differing.items()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
