"""What is trained whole (modules_to_save, biases), read as it was before training where adapters are switched off.

A module that holds such a parameter or buffer gets a class that reads it by the switch, when a model is first switched
off. What is written to its buffers meanwhile, such as a norm's statistics, is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.swap import swapped_class

if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object

_ORIGINALS = "lora_originals"
"""The attribute under which a module has the originals of what it holds, by name."""


@dataclass(eq=False)
class _Original:
    value: Tensor
    there: Tensor | None = None
    """The same where the model is by now, in its precision."""

    def like(self, own: Tensor) -> Tensor:
        if not isinstance(own, nn.Parameter):
            return self.value.to(own.device, own.dtype, copy=True)  # a forward may write to it
        there = self.there
        if there is None or there.device != own.device or there.dtype != own.dtype:
            with torch.inference_mode(False):
                there = nn.Parameter(self.value.to(own.device, own.dtype), requires_grad=False)
            self.there = there
        return there


def original(module: nn.Module, name: str, own: Tensor | None) -> Tensor | None:
    """`own`, the tensor that `module` holds under that name, as it was before it was trained whole, if it is."""
    held = module.__dict__.get(_ORIGINALS, {}).get(name)
    return own if held is None or own is None else held.like(own)


class TrainedWhole(_Host):
    """Mixin in front of a module's own class."""

    base_class: type[nn.Module]
    reads: tuple[str, ...]

    def read_attribute(self, name: str) -> Any:
        """What `self.<name>` gives, for a parameter or a buffer that is trained whole."""
        own: Tensor | None = self._parameters.get(name)
        own = self._buffers.get(name) if own is None else own
        return original(self, name, own) if switch.used and switch.is_off(self) else own


class FlatWeights(_Host):
    """Mixin for recurrent layers, whose kernels take the list `_flat_weights`: what reading each weight gives."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        base: Any = self
        return [getattr(self, name, None) for name in base._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        # torch writes here what it read from us; what the class finds without us are the base's own.
        lay_flat(self)

    def _update_flat_weights(self) -> None:
        """What is read is never out of date."""

    def flatten_parameters(self) -> None:
        """What is read changes, so there is nothing to lay out in advance."""


def lay_flat(module: Any) -> None:
    """Let the class of a recurrent layer itself find the parameters that it holds now."""
    vars(module)["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]


def read_by_switch(module: Any, originals: Mapping[str, Tensor]) -> None:
    """Let what `module` holds under these names be its original where the module is off; again, it does nothing."""
    held: dict[str, _Original] = module.__dict__.setdefault(_ORIGINALS, {})
    for name, value in originals.items():
        if name not in held or held[name].value is not value:
            held[name] = _Original(value)
    cls: Any = type(module)
    reads = tuple(dict.fromkeys((*getattr(cls, "reads", ()), *originals)))
    if hasattr(cls, "read_attribute"):  # an adapted layer, or one that was here before
        if reads != cls.reads:
            prefix = cls.__name__.removesuffix(cls.base_class.__name__)
            module.__class__ = swapped_class(prefix, cls.mixin, cls.base_class, reads)
        return
    mixin = (TrainedWhole, FlatWeights) if isinstance(module, nn.RNNBase) else TrainedWhole
    module.__class__ = swapped_class("Trained", mixin, cls, reads)


def read_as_held(module: Any) -> None:
    """Undo `read_by_switch`, for a module without an adapter."""
    module.__dict__.pop(_ORIGINALS, None)
    cls: Any = type(module)
    if issubclass(cls, TrainedWhole) and "base_class" in vars(cls):
        module.__class__ = cls.base_class
        if isinstance(module, nn.RNNBase):
            lay_flat(module)
