"""Copies the module tree of a model, and shares its tensors: to look at a model, or to try a part, without a change.

A twin of a module is a new object of the same class, with new dicts that hold the same parameters and buffers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.bank.layers import Banked, detach
from lightning_lora.engine.layers.base import is_adapter, unadapt
from lightning_lora.engine.layers.frozen import FrozenNorm, read_as_held, release_statistics
from lightning_lora.engine.layers.quantized import let_go
from lightning_lora.engine.present import RECORD, library_of
from lightning_lora.engine.swap import is_swapped
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import is_plain

_COPIED = (dict, OrderedDict, list, set)


@dataclass(frozen=True, eq=False)
class Bare:
    """The base inside a model that may have adapters."""

    root: nn.Module
    """A twin of the model without its adapters: ours, a bank's, and PEFT's."""
    live: dict[int, nn.Module]
    """id(module of `root`) -> the module of the model that is called in its place."""

    @property
    def can_switch(self) -> bool:
        """True if the model has a layer that is an adapted one, so that its base can be told from it."""
        return any(is_adapted(module) for module in self.live.values())


def bare(model: nn.Module) -> Bare:
    """The base inside `model`, as a twin that shares its tensors. The model is not changed.

    A layer that PEFT has merged, and one whose weight this package has merged, has the merged weight there."""
    live: dict[int, nn.Module] = {}
    root = _bare(Tree.of(model).root, {}, live)
    root.__dict__.pop(RECORD, None)
    return Bare(root, live)


def _bare(module: Any, seen: dict[int, nn.Module], live: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    inner = _inside(module)
    if inner is not module:
        own = seen[id(module)] = _bare(inner, seen, live)
        live[id(own)] = module
        for name, trained in _trained_copy(module):
            live[id(own.get_submodule(name))] = trained
        return own
    own = seen[id(module)] = _twin(module)
    live[id(own)] = module
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        own.__dict__[hooks] = OrderedDict()
    own._modules.update({n: None if m is None else _bare(m, seen, live) for n, m in own._modules.items()})
    cls: Any = type(own)
    if isinstance(own, Banked):
        detach(own)
    elif is_adapter(cls) and is_swapped(cls):
        unadapt(own)
    elif isinstance(own, FrozenNorm):
        release_statistics(own)
    read_as_held(own)
    let_go(own)
    for name in (RECORD, "forward", "lora_invocation"):
        own.__dict__.pop(name, None)
    return own


def twin(module: nn.Module, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """A twin of `module` and of all modules inside it, in evaluation mode. `change` gives the tensor that a twin holds
    in place of the module's own."""
    seen: dict[int, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        own: Any = _twin(module)
        seen[id(module)] = own
        own._modules.update({name: None if m is None else of(m) for name, m in own._modules.items()})
        for held in (own._parameters, own._buffers):
            held.update({name: t if t is None else change(t) for name, t in held.items()})
        own.__dict__["training"] = False
        own.__dict__.pop("forward", None)  # bound to `module`: accelerate's hooks
        return own

    return of(module)


def widened(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function for `twin`: it casts plain numbers of fewer bits to `dtype`, each tensor once. Quantized weights stay
    as they are."""
    known: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor itself, so that its id is not given out again

    def wide(t: Tensor) -> Tensor:
        if not is_plain(t) or t.dtype.itemsize >= dtype.itemsize:
            return t
        if id(t) not in known:
            value = t.detach().to(dtype)
            known[id(t)] = t, nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value
        return known[id(t)][1]

    return wide


def is_adapted(module: nn.Module) -> bool:
    """True if `module` is a layer that adapts a base's: ours, a bank's or PEFT's."""
    return is_adapter(type(module)) or isinstance(module, Banked) or is_of_peft(module)


def is_of_peft(module: Any) -> bool:
    """True if `module` is one of PEFT's around a layer of the base."""
    return library_of(type(module)) == "PEFT" and _inside(module) is not module


def has_active_adapter(module: Any) -> bool:
    """True if `module` is a layer of ours or of PEFT's, and one of its adapters acts."""
    if not is_of_peft(module):
        return is_adapter(type(module))
    if getattr(module, "disable_adapters", True):
        return False
    return not {*module.active_adapters}.isdisjoint(getattr(module, "scaling", ()))


def holds_merged(module: Any) -> bool:
    """True if `module` is a layer of PEFT that has merged its adapter into the base's weight."""
    return is_of_peft(module) and bool(getattr(module, "merged", False))


def _twin(module: nn.Module) -> Any:
    own = object.__new__(type(module))
    own.__dict__.update({k: v.copy() if type(v) in _COPIED else v for k, v in module.__dict__.items()})
    return own


def _inside(module: Any) -> Any:
    """The part of the base that a module of PEFT's was put around; `module` itself if it is none of those."""
    if library_of(type(module)) != "PEFT":
        return module
    if hasattr(module, "get_base_model"):  # PeftModel
        return module.get_base_model()
    if hasattr(module, "get_base_layer"):  # layers
        return module.get_base_layer()
    held = getattr(module, "original_module", None)  # modules_to_save, trainable tokens
    return module if held is None else held


def _trained_copy(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the copy that a module of PEFT's trains in place of the base's (modules_to_save), if it is on."""
    copies = module._modules.get("modules_to_save")
    if copies is None or getattr(module, "disable_adapters", False):
        return
    for name in getattr(module, "active_adapters", ()):
        if name in copies:
            yield from copies[name].named_modules()
