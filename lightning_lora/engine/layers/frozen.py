"""A frozen batch norm stays in eval mode: else its running statistics would drift, and no adapter file holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.engine.swap import swapped_class

if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object


class FrozenNorm(_Host):
    """Mixin in front of a norm's own class: `train()` leaves it in eval mode, so its buffers never change."""

    base_class: type[nn.Module]

    wanted_mode: bool
    """The mode that `train()` last asked for; the norm takes it when it is released."""

    def train(self, mode: bool = True) -> Any:
        self.__dict__["wanted_mode"] = mode
        return super().train(False)


def may_have_running_statistics(cls: type[nn.Module]) -> bool:
    """True if a module of that class can have running statistics that are not frozen yet."""
    return issubclass(cls, _NormBase) and not issubclass(cls, FrozenNorm)


def has_running_statistics(module: nn.Module) -> bool:
    """True if a forward in training mode would change buffers of `module`; False if they are frozen already."""
    return may_have_running_statistics(type(module)) and bool(module.track_running_stats)


def freeze_statistics(module: Any) -> None:
    """Keep the running statistics of a norm as they are, whatever `train()` says."""
    base_class: Any = type(module)
    module.__class__ = swapped_class("Frozen", FrozenNorm, base_class)
    module.train(module.training)


def release_statistics(module: Any) -> None:
    """Undo `freeze_statistics`."""
    module.__class__ = type(module).base_class
    module.train(module.__dict__.pop("wanted_mode"))
