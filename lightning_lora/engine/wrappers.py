"""Modules that torch, Lightning and others put around a module, which a name never mentions.

A layer has one name, with or without them, since a file is read where they are not. They are known by their classes: a
user's own child may be called "module".
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
"""Each class, and under which name it holds what it wraps."""

_AVERAGES = (
    "torch.optim.swa_utils.AveragedModel",
    "timm.utils.model_ema.ModelEmaV2",
    "timm.utils.model_ema.ModelEmaV3",
)

NAMES = frozenset((*_INSIDE.values(), "_forward_module"))
"""The names that wrappers put into those of parameters."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers around it: `module` itself where there is none."""
    while (inner := _inside(module)) is not None:
        module = inner
    return module


def around(module: nn.Module) -> list[nn.Module]:
    """The wrappers around it, the outermost first."""
    found: list[nn.Module] = []
    while (inner := _inside(module)) is not None:
        found.append(module)
        forward = module._modules.get("_forward_module")  # Fabric's, around the same module
        if forward is not None:
            found += around(forward)
        module = inner
    return found


def is_average(module: nn.Module) -> bool:
    """Whether it is a wrapper that averages the weights of another module into those of the one inside."""
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
