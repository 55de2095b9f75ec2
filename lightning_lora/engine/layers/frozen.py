"""A frozen batch norm stays in eval mode: else its running statistics would drift, and no adapter file holds them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.swap import Host, is_swapped, read_also, swap, swap_back
from lightning_lora.engine.torch_private import NORMS, flat_weights


class FrozenNorm(Host):
    """Mixin in front of a norm's own class: `train()` leaves it in eval mode, so its buffers never change."""

    base_class: type[nn.Module]

    wanted_mode: bool
    """The mode that `train()` last asked for; the norm takes it when it is released."""

    def train(self, mode: bool = True) -> Any:
        self.__dict__["wanted_mode"] = mode
        return super().train(False)


def has_running_statistics(module: nn.Module) -> bool:
    """True if a forward in training mode would change buffers of `module`; False if they are frozen already."""
    return isinstance(module, NORMS) and not isinstance(module, FrozenNorm) and bool(module.track_running_stats)


def freeze_statistics(module: Any) -> None:
    """Keep the running statistics of a norm as they are, whatever `train()` says."""
    swap(module, "Frozen", FrozenNorm)
    module.train(module.training)


def freeze_norms(modules: Iterable[tuple[str, nn.Module]], trained: Container[int]) -> tuple[str, ...]:
    """`freeze_statistics` of all norms among `modules` but those with an id in `trained`. Returns their names."""
    norms = {name: m for name, m in modules if has_running_statistics(m) and id(m) not in trained}
    for norm in norms.values():
        freeze_statistics(norm)
    return tuple(norms)


def release_statistics(module: Any) -> None:
    """Undo `freeze_statistics`."""
    swap_back(module)
    module.train(module.__dict__.pop("wanted_mode"))


# Inside `with disabled(model)`, tensors that are trained whole (modules_to_save, biases) read as before training.
#
# When a model is first switched off, each module that holds such a tensor gets a class that asks the switch on every
# read. Writes to its buffers inside the block, such as a norm's statistics, are not kept.

_ORIGINALS = "lora_originals"
"""The attribute of a module with the values before training of its tensors, by name."""


@dataclass(eq=False)
class _Original:
    """The value of a tensor before training."""

    value: Tensor
    there: Tensor | None = None
    """A copy of it on the model's present device, in the model's present dtype."""

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
    """The value before training of `own`, the tensor `name` of `module`; `own` itself if it is not trained whole."""
    held = module.__dict__.get(_ORIGINALS, {}).get(name)
    return own if held is None or own is None else held.like(own)


class TrainedWhole(Host):
    """Mixin in front of the class of a module that holds tensors which are trained whole."""

    base_class: type[nn.Module]
    reads: tuple[str, ...]

    def read_attribute(self, name: str) -> Any:
        """The value of `self.<name>`, a parameter or a buffer that is trained whole."""
        own: Tensor | None = self._parameters.get(name)
        own = self._buffers.get(name) if own is None else own
        return original(self, name, own) if switch.used and switch.is_off(self) else own


class FlatWeights(Host):
    """Mixin for recurrent layers, whose kernels take the list `_flat_weights`: here it is made by reading each weight
    by its name, so it holds adapted values."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in flat_weights(self)]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        # torch writes back the adapted values that it read. Keep the base's parameters instead, for the base class.
        lay_flat(self)

    def _update_flat_weights(self) -> None:
        """No-op: weights are computed anew on every read."""

    def flatten_parameters(self) -> None:
        """No-op: the values change from read to read, so they cannot be laid out in memory in advance."""


def lay_flat(module: Any) -> None:
    """Set the base class's list of weights to the parameters that the recurrent layer `module` holds now."""
    vars(module)["_flat_weights"] = [module._parameters.get(name) for name in flat_weights(module)]


def read_by_switch(module: Any, originals: Mapping[str, Tensor]) -> None:
    """Make the tensors of `module` named in `originals` read as those values where the module is off. A second call
    changes nothing."""
    held: dict[str, _Original] = module.__dict__.setdefault(_ORIGINALS, {})
    for name, value in originals.items():
        if name not in held or held[name].value is not value:
            held[name] = _Original(value)
    cls: Any = type(module)
    if hasattr(cls, "read_attribute"):  # its class answers reads already: an adapted layer, or a second call
        if new := tuple(name for name in originals if name not in cls.reads):
            read_also(module, new)
        return
    mixin = (TrainedWhole, FlatWeights) if isinstance(module, nn.RNNBase) else TrainedWhole
    swap(module, "Trained", mixin, tuple(originals))


def read_as_held(module: Any) -> None:
    """Undo `read_by_switch`, for a module without an adapter."""
    module.__dict__.pop(_ORIGINALS, None)
    cls: Any = type(module)
    if issubclass(cls, TrainedWhole) and is_swapped(cls):
        swap_back(module)
        if isinstance(module, nn.RNNBase):
            lay_flat(module)
