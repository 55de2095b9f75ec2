"""What a checkpoint says of its adapter, and loading it without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, adapters, base_fingerprint, inject, injections
from lightning_lora.engine.state import load_adapter_state_dict
from lightning_lora.errors import BaseMismatchError, CheckpointError, listed

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

METADATA = "lightning_lora"
"""The key under which a checkpoint describes its adapter; plain values only, so torch loads it with weights_only."""

_FORMAT = 1
Module = TypeVar("Module", bound="LightningModule")


def checkpoint_metadata(module: nn.Module, fingerprint: str | None = None) -> dict[str, Any]:
    """The description of the adapter of `module`; `fingerprint` saves the hashing where it is known."""
    return {
        "format": _FORMAT,
        "base_fingerprint": fingerprint or base_fingerprint(module),
        "configs": {name: injection.config.to_dict() for name, injection in injections(module)},
        "scales": {name: adapter.lora.scale for name, adapter in adapters(module)},
    }


def check_metadata(checkpoint: Mapping[str, Any], module: nn.Module, *, check_base: bool = True) -> None:
    """Raise unless `checkpoint` holds an adapter of the base and of the scales that `module` has.

    CheckpointError for a checkpoint without adapters or with other scales, BaseMismatchError for another base.
    """
    metadata = checkpoint_adapter(checkpoint)
    scales: dict[str, float] = metadata["scales"]
    for name, adapter in adapters(module):
        if name in scales and scales[name] != adapter.lora.scale:
            raise CheckpointError(
                f"The checkpoint's adapter multiplies its update of {name!r} by {scales[name]:g}, this run's by "
                f"{adapter.lora.scale:g}: rank, alpha or use_rslora differ. Set them as they were when it was saved."
            )
    if not check_base:
        return
    mine, theirs = base_fingerprint(module), metadata["base_fingerprint"]
    # What is frozen depends on what is adapted: where that differs, the tensors tell it better than the fingerprint.
    if mine != theirs and set(checkpoint["state_dict"]) == set(adapter_tensors(module)):
        raise BaseMismatchError(
            f"The checkpoint's adapter was trained on another base: its fingerprint is {theirs}, that of this "
            f"{type(module).__name__} is {mine}. Load the base that it was trained on; to go on nevertheless, pass "
            "check_base=False."
        )


def checkpoint_adapter(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the adapter in `checkpoint`; raises CheckpointError where there is none."""
    metadata = checkpoint.get(METADATA)
    if metadata is None:
        keys = checkpoint.get("state_dict", {})
        raise CheckpointError(
            f"The checkpoint holds no adapter (its weights are {listed(keys, 3)}). To start from its weights, load them "
            "into the model before fitting; ckpt_path is for checkpoints that were saved with LoRACallback."
        )
    if metadata["format"] > _FORMAT:
        raise CheckpointError(
            f"The checkpoint was saved by a newer version of lightning_lora (format {metadata['format']}, this version "
            f"reads up to {_FORMAT}). Upgrade lightning-lora to load it."
        )
    return metadata


def load_from_checkpoint(
    cls: type[Module], checkpoint_path: Any, *, check_base: bool = True, weights_only: bool | None = None, **kwargs: Any
) -> Module:
    """`cls.load_from_checkpoint` for a checkpoint that was saved with LoRACallback: base weights come from where `cls`
    takes them when it is constructed, adapters from the checkpoint.

    `kwargs` are passed on (map_location, hparams_file, and the constructor's arguments). Returns the adapted module.
    Raises CheckpointError for a checkpoint without adapters, BaseMismatchError where the base is not the one that they
    were trained on, AdapterFormatError where tensors do not fit.
    """
    with warnings.catch_warnings():
        # Lightning's strict loading cannot know that base weights are left out on purpose: ours checks each tensor.
        warnings.filterwarnings("ignore", message="Found keys that are (in the model state dict|not in the model)")
        module = cls.load_from_checkpoint(checkpoint_path, strict=False, weights_only=weights_only, **kwargs)
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only is not False)
    metadata = checkpoint_adapter(checkpoint)
    for name, config in metadata["configs"].items():
        inject(module.get_submodule(name), LoRAConfig(**config))
    check_metadata(checkpoint, module, check_base=check_base)
    load_adapter_state_dict(module, checkpoint["state_dict"])
    return module


def fill_in_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook: an adapter's state dict loads strictly, as if it held the base weights as well.

    Lightning calls `load_state_dict(strict=True)` from places of its own (WeightAveraging). Only where no base weight
    at all is there is it an adapter's; a whole state dict is left to torch's own checks.
    """
    if next(adapters(module), None) is None:
        return
    own = {prefix + name for name in adapter_tensors(module)}
    given = {key for key in state_dict if key.startswith(prefix)}
    if given and given <= own:
        for name, tensor in module.state_dict(keep_vars=False).items():
            if prefix + name not in own:
                state_dict.setdefault(prefix + name, tensor)
