"""The description of the adapter in a checkpoint, and loading a checkpoint without a Trainer."""

from __future__ import annotations

import functools
import inspect
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, adapters, inject, injections
from lightning_lora.engine.layers import pairs
from lightning_lora.engine.state import (
    check_same_base,
    describe_base,
    load_adapter_state_dict,
    names_in_state_dict,
)
from lightning_lora.engine.tree import submodule
from lightning_lora.errors import AdapterFormatError, CheckpointError, TargetError, listed
from lightning_lora.format.folder import CONFIG, TENSORS
from lightning_lora.training.checkpoint_file import read_checkpoint
from lightning_lora.training.lightning_private import last_save
from lightning_lora.training.run_state import restore_buffers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SEVERAL = "adapters"
"""The key, in a checkpoint's description, of the descriptions of several adapters, by name."""
METADATA = "lightning_lora"
"""The key under which a checkpoint describes its adapter; plain values only, so torch loads it with weights_only."""

_FORMAT = 1
LEFT_OUT = "arguments_left_out"
"""The key, in that description, of the paths of hyperparameters that held the base and were left out."""
Module = TypeVar("Module", bound="LightningModule")


def checkpoint_metadata(module: nn.Module, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The description of the adapter of `module`. Give `base`, from `describe_base`, to save hashing the base again.

    Its names, like all names in a checkpoint, leave out the prefixes of compiled and wrapped modules.
    """
    return {
        "format": _FORMAT,
        **(base or describe_base(module)),
        "configs": {name: injection.config.to_dict() for name, injection in injections(module)},
        "scales": {pair.name: pair.spec.scale for pair in pairs(module)},
    }


def check_metadata(checkpoint: Mapping[str, Any], module: nn.Module, *, check_base: bool = True) -> None:
    """Raise unless the adapter in `checkpoint` has the base and the scales of `module`.

    CheckpointError for a checkpoint without adapters or with other scales, BaseMismatchError for another base.
    """
    metadata = checkpoint_adapter(checkpoint)
    scales: dict[str, float] = metadata["scales"]
    for pair in pairs(module):
        saved = scales.get(pair.name)
        if saved is not None and saved != pair.spec.scale:
            raise CheckpointError(
                f"The checkpoint's adapter multiplies its update of {pair.name!r} by {saved:g}, this run's "
                f"by {pair.spec.scale:g}: rank, alpha or use_rslora differ. Set them as they were when it was saved."
            )
    # What is frozen depends on what is adapted. Where that differs, an error about the tensors says more than one about
    # the fingerprint.
    if check_base and checkpoint["state_dict"].keys() == adapter_tensors(module).keys():
        check_same_base(module, metadata, what="The checkpoint's adapter")


def checkpoint_adapter(checkpoint: Any) -> dict[str, Any]:
    """The description of the adapter in `checkpoint`; raises CheckpointError where there is none."""
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"The file holds a {type(checkpoint).__name__}, not a checkpoint of Lightning's.")
    metadata = checkpoint.get(METADATA)
    if metadata is None or "state_dict" not in checkpoint:
        keys = checkpoint.get("state_dict", checkpoint)
        raise CheckpointError(
            f"The checkpoint holds no adapter (its weights are {listed(map(str, keys), 3)}). To start from its "
            "weights, load them into the model before fitting; ckpt_path is for checkpoints that were saved with "
            "LoRACallback."
        )
    if metadata["format"] > _FORMAT:
        raise CheckpointError(
            f"The checkpoint was saved by a newer version of lightning_lora (format {metadata['format']}, this version "
            f"reads up to {_FORMAT}). Upgrade lightning-lora to load it."
        )
    if SEVERAL in metadata:
        raise CheckpointError(
            f"The checkpoint holds several adapters ({listed(metadata[SEVERAL])}), of MultiLoRACallback: resume with "
            "that, or load one of the folders beside it with load_adapter, or with LoRACallback(adapter=...)."
        )
    return metadata


def load_from_checkpoint(
    cls: type[Module],
    checkpoint_path: str | Path,
    *,
    check_base: bool = True,
    map_location: Any = "cpu",
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Module:
    """`cls.load_from_checkpoint` for a checkpoint that was saved with LoRACallback. `cls` gets its base weights where
    it is constructed (or in `configure_model`); the adapters come from the checkpoint.

    `kwargs` are passed on: hparams_file, and the constructor's arguments. An argument that is a module must be given,
    because the checkpoint leaves it out. Returns the adapted module, on the device that `map_location` names; `remove`
    gives back its base. Raises CheckpointError for a file that is no whole checkpoint or holds no adapter,
    BaseMismatchError where the base is not the one that the adapters were trained on, AdapterFormatError where the
    adapters do not fit.
    """
    check_no_adapter_folder(checkpoint_path)
    load = functools.partial(TorchCheckpointIO().load_checkpoint, map_location=map_location)
    checkpoint = read_checkpoint(checkpoint_path, load, weights_only)
    metadata = checkpoint_adapter(checkpoint)
    check_given(cls, checkpoint, kwargs, checkpoint_path)
    # Lightning gets the checkpoint without tensors: it would load some past our checks, and into the base.
    bare = io.BytesIO()
    torch.save({k: v for k, v in checkpoint.items() if k != "optimizer_states"} | {"state_dict": {}}, bare)
    bare.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
        # `bare` holds only what was read above with the user's own weights_only.
        module = cls.load_from_checkpoint(bare, strict=False, weights_only=False, **kwargs)
    for name, config in metadata["configs"].items():
        try:
            inject(submodule(module, name), LoRAConfig(**config), start=False)
        except (TargetError, AttributeError) as error:
            why = f"it has no module {name!r}." if isinstance(error, AttributeError) else str(error)
            raise AdapterFormatError(
                f"{checkpoint_path} does not fit {cls.__name__}: {why} If its layers are built in setup(), which "
                "only a Trainer calls, pass the checkpoint to the Trainer as ckpt_path, or build them in "
                "configure_model()."
            ) from error
    check_metadata(checkpoint, module, check_base=check_base)
    load_adapter_state_dict(module, checkpoint["state_dict"])
    restore_buffers(module, metadata.get("buffers", {}))
    accept_adapters(module)
    return module.to(next(iter(checkpoint["state_dict"].values())).device)


def check_given(cls: type[LightningModule], checkpoint: Mapping[str, Any], given: Mapping[str, Any], path: Any) -> None:
    """Raise CheckpointError where an argument of the constructor of `cls` held the base and is not given now.

    If the argument has a default, that may be another base than the one that the adapter was trained on.
    """
    if "hparams_file" in given:
        return
    parameters = inspect.signature(cls.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    whole = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)  # the one argument that holds them all
    absent: dict[str, str] = {}
    for place in checkpoint[METADATA].get(LEFT_OUT, ()):
        argument = str(whole) if whole in parameters else place.partition(".")[0]
        if argument not in given and (takes_any or argument in parameters):
            absent[place] = argument
    if absent:
        arguments = ", ".join(f"{name}=..." for name in dict.fromkeys(absent.values()))
        raise CheckpointError(
            f"{path} holds no base weights, so not what {cls.__name__} was given as {listed(map(repr, absent))}. Pass "
            f"it: load_from_checkpoint({cls.__name__}, path, {arguments})."
        )


def check_no_adapter_folder(path: Any) -> None:
    """Raise CheckpointError where `path`, given as a checkpoint to resume from, is an adapter folder, or a folder of
    checkpoints."""
    if path is None:
        return
    folder = Path(str(path))
    for pattern in ("*.ckpt", "checkpoints/*.ckpt"):  # the second in the folder of a run
        if folder.is_dir() and (inside := sorted(map(str, folder.glob(pattern)))):
            raise CheckpointError(f"ckpt_path={folder} is a folder of checkpoints. Give one of them: {listed(inside)}.")
    if folder.name in (CONFIG, TENSORS):
        folder = folder.parent
    if not (folder / CONFIG).is_file():
        return
    beside = folder.with_name(f"{folder.name.removesuffix('-adapter')}.ckpt")
    resume = (
        f" To resume the run that it comes from, optimizer and all: ckpt_path={beside}." if beside.is_file() else ""
    )
    raise CheckpointError(
        f"ckpt_path={folder} is an adapter folder, not a checkpoint: it holds no optimizer and no place in the data. "
        f"To start a new run from it, give it as adapter={folder} (in Python: LoRACallback(adapter=...)).{resume}"
    )


def accept_adapters(module: nn.Module) -> None:
    """Let `module.load_state_dict` take an adapter's state dict."""
    if not vars(module).get(_ACCEPTS):
        module.register_load_state_dict_pre_hook(fill_in_base)
        vars(module)[_ACCEPTS] = True


_ACCEPTS = "lora_accepts_adapters"


def fill_in_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook: an adapter's state dict loads strictly, as if it held the base weights as well.

    Lightning calls `load_state_dict(strict=True)` from places of its own (WeightAveraging). A state dict counts as an
    adapter's only if it holds no base weight at all; any other is left to torch's own checks.
    """
    if next(adapters(module), None) is None:
        return
    plain = names_in_state_dict(module)
    own = {prefix + name for name in adapter_tensors(module)}
    given = {key: prefix + plain.get(key.removeprefix(prefix), key.removeprefix(prefix)) for key in state_dict}
    given = {key: name for key, name in given.items() if key.startswith(prefix)}
    if given and own.issuperset(given.values()):
        values = {name: state_dict.pop(key) for key, name in given.items()}
        for name, tensor in module.state_dict(keep_vars=False).items():
            ours = prefix + plain.get(name, name)
            if ours in values:
                state_dict[prefix + name] = values[ours]
            elif ours not in own:
                state_dict[prefix + name] = tensor


def last_saves(trainer: Trainer | None, path: str) -> dict[str, tuple[int, str]]:
    """The step at which each ModelCheckpoint last saved, and where, with the save to `path` counted as done.

    A ModelCheckpoint notes both only after the save, and its state has neither. From its state alone, a resumed run
    would save again after one batch, and at its end make last.ckpt of what it is then.
    """
    last = {}
    for callback in trainer.checkpoint_callbacks if trainer is not None else ():
        if trainer is not None and isinstance(callback, ModelCheckpoint):
            last[callback.state_key] = last_save(callback)
            if path in (callback.best_model_path, callback.last_model_path, *callback.best_k_models):
                # last.ckpt is saved after the others: without a path, it is made up for when training ends.
                is_all = callback.save_last is not True or path == callback.last_model_path
                last[callback.state_key] = (trainer.global_step, path if is_all else "")
    return last
