"""Bake adapters into the base weights, for good or for a while.

Unmerging puts the untouched base weights back; it never subtracts, since subtraction drifts in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.engine.inject import injections, release, weight_users
from lightning_lora.engine.layers.base import Adapter, adapters, check_removable, swap_back
from lightning_lora.errors import AdapterStateError, listed


def merge(model: nn.Module) -> None:
    """Bake the adapters into the base weights of `model`; they are gone afterwards, and what was frozen is trainable
    as it was before `inject`.

    A tied weight is untied first, with a warning, since only one of its users was adapted. Raises AdapterStateError
    where there are no adapters or a layer cannot be merged; nothing is changed then.
    """
    mergeable = _mergeable(model)
    records = [(model.get_submodule(name), injection) for name, injection in injections(model)][::-1]
    if not records:
        raise AdapterStateError(
            f"inject was called on a module around this {type(model).__name__}: merge that one, all at once."
        )
    users = weight_users(model)
    tied = {id(p): [name for name, user in users[id(p)] if user is not module] for module, p in mergeable}
    if any(tied.values()):  # said before anything is changed, since a warning can be made an error
        warnings.warn(
            f"Merging unties a weight that is shared with {listed(n for names in tied.values() for n in names)}: only "
            "one of its users was adapted. Save the model with its weights untied (in transformers: "
            "config.tie_word_embeddings=False).",
            stacklevel=2,
        )
    for module, parameter in mergeable:
        weight = _merged_weight(module)
        if tied[id(parameter)]:  # the others keep the weight that they share
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        else:
            with torch.no_grad():
                parameter.copy_(weight)
        swap_back(module)
    for owner, injection in records:
        release(owner, injection)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters of `model` are baked into weights of their own, and its layers are the base's own, at their
    speed; outside, all is as it was, bit for bit. Raises AdapterStateError as `merge` does."""
    undo = []
    try:
        for module, parameter in _mergeable(model):
            weight = nn.Parameter(_merged_weight(module), requires_grad=False)
            undo.append((module, parameter, swap_back(module)))
            module._parameters["weight"] = weight
        yield
    finally:
        for module, parameter, swap_again in undo:
            module._parameters["weight"] = parameter
            swap_again()


def _mergeable(model: nn.Module) -> list[tuple[Adapter, nn.Parameter]]:
    """The adapted layers, each with the weight that its adapter goes into. Raises before anything is changed."""
    check_removable(model)
    found = []
    for name, module in adapters(model):
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise AdapterStateError(
                f"{name!r} ({type(module).base_class.__name__}) cannot be merged: its weight is quantized or computed "
                "from other parameters. Use the adapter unmerged, or load the base in full precision."
            )
        try:
            module.check_mergeable()
        except AdapterStateError as error:
            raise AdapterStateError(f"{name!r}: {error}") from None
        found.append((module, weight))
    if not found:
        raise AdapterStateError(f"{type(model).__name__} has no adapters to merge.")
    return found


def _merged_weight(module: Adapter) -> Tensor:
    """W + scale * B A, computed in float32 or wider, whatever autocast says, and rounded once."""
    weight = module._parameters["weight"]
    assert weight is not None
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return (weight + module.delta_weight()).to(weight.dtype)
