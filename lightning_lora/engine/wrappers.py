"""Knows wrappers: modules that torch, Lightning and others put around a module (DDP, torch.compile, FSDP).

Our names never mention wrappers, since a file that is written with them is read where they are not. Wrappers are known
by their classes, not by names: a user's own child may be called "module".
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_INSIDE = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
}
"""Class of a wrapper -> the name of the child that it wraps."""

_AVERAGES = (
    "torch.optim.swa_utils.AveragedModel",
    "timm.utils.model_ema.ModelEmaV2",
    "timm.utils.model_ema.ModelEmaV3",
)

NAMES = frozenset((*_INSIDE.values(), "_forward_module"))
"""The parts that wrappers put into the names of parameters."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, if `module` is a wrapper; else `module` itself."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def around(module: nn.Module) -> list[nn.Module]:
    """`module` and the wrappers inside it, the outermost first; empty if `module` is no wrapper."""
    found: list[nn.Module] = []
    while (inner := _inside(module)) is not None:
        found.append(module)
        forward = module._modules.get("_forward_module")  # a second wrapper of Fabric's around the same module
        if forward is not None:
            found += around(forward)
        module = inner
    return found


def is_average(module: nn.Module) -> bool:
    """True if `module` is a wrapper whose inner module holds an average of another module's weights."""
    return any(f"{cls.__module__}.{cls.__qualname__}" in _AVERAGES for cls in type(module).__mro__)


def _inside(module: nn.Module) -> nn.Module | None:
    cls: Any = type(module)
    name = _held_as(cls)
    return None if name is None else module._modules.get(name)


def _held_as(cls: Any) -> str | None:
    if cls not in _KNOWN:
        names = (f"{parent.__module__}.{parent.__qualname__}" for parent in cls.__mro__)
        _KNOWN[cls] = next((_INSIDE[name] for name in names if name in _INSIDE), None)
    return _KNOWN[cls]


_KNOWN: WeakKeyDictionary[type, str | None] = WeakKeyDictionary()
