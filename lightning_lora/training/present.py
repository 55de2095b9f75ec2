"""Adapters that a module has before a run: of a run before (a cell that is run again), of inject or load_adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from torch import nn

from lightning_lora.engine import Injection, InjectionReport, LoRAConfig, adapters, injections
from lightning_lora.engine.as_injected import check_as_injected
from lightning_lora.engine.layers.swapping import swap_back
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.storage import shape_of
from lightning_lora.engine.targets import Selection, select
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.vocabulary import vocabulary
from lightning_lora.errors import AdapterStateError, TargetError, listed


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
    differing = _differences(owner, injection, with_plain_names(config, Tree.of(owner)))
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


_WHERE = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
_NUMBERS = ("rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def _differences(owner: nn.Module, injection: Injection, ours: LoRAConfig) -> list[str]:
    """What `ours` says otherwise than the config by which `owner` was adapted, if it does not mean the same there."""
    theirs = injection.config
    both = {f.name: (getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(LoRAConfig)}
    differing = {name for name, (a, b) in both.items() if a != b}
    if differing.intersection((*_WHERE, *_NUMBERS, "modules_to_save", "trainable_token_indices")):
        differing -= _same_in_effect(owner, injection, ours)
    return [f"{name} is {_shown(a)} there and {_shown(b)} here" for name, (a, b) in both.items() if name in differing]


def _same_in_effect(owner: nn.Module, injection: Injection, ours: LoRAConfig) -> set[str]:
    """The fields by which both configs mean the same on `owner`, however they put it."""
    theirs = injection.config
    try:
        with _bare(owner, injection):
            # Patterns are no part of where, and have to match what the config itself adapts.
            of_theirs, of_ours = (select(owner, replace(c, rank_pattern={}, alpha_pattern={})) for c in (theirs, ours))
            rows_of_both = [_rows(owner, c, s) for c, s in ((theirs, of_theirs), (ours, of_ours))]
    except (TargetError, AdapterStateError):
        return set()  # it means nothing here
    same: set[str] = set()
    names = [t.names_of(p) for t in of_theirs.targets for p in t.parameters or (None,)]
    if names == [t.names_of(p) for t in of_ours.targets for p in t.parameters or (None,)]:
        same.update(_WHERE)
    if all(theirs.rank_of(*n) == ours.rank_of(*n) and theirs.alpha_of(*n) == ours.alpha_of(*n) for n in names):
        same.update(n for n in _NUMBERS if n != "use_rslora")
    if of_theirs.saved.keys() == of_ours.saved.keys():
        same.add("modules_to_save")
    if rows_of_both[0] == rows_of_both[1]:
        same.add("trainable_token_indices")
    return same


def _rows(owner: nn.Module, config: LoRAConfig, selection: Selection) -> dict[str, tuple[int, ...]]:
    return {name: spec.tokens for name, _, _, spec in vocabulary(owner, config, selection)}


@contextmanager
def _bare(owner: nn.Module, injection: Injection) -> Iterator[None]:
    """Inside, `owner` looks as before the injection: its layers are the base's own, and what was trainable is so."""
    tensors = Tree.of(owner).parameters
    now = [(p, p.requires_grad) for _, p in tensors]
    undo = [swap_back(module) for _, module in adapters(owner)]
    try:
        for name, p in tensors:
            p.requires_grad_(name in injection.was_trainable)
        yield
    finally:
        for swap_again in undo:
            swap_again()
        for p, requires_grad in now:
            p.requires_grad_(requires_grad)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
