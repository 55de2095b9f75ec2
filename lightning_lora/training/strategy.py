"""Adapter-only checkpoints and optimizers, at the one place that all of them pass: the Trainer's strategy.

As a layer is adapted by swapping its class, so is the strategy: `AdapterStrategy` goes in front of the class that the
user chose. It stays after the run, so that a later `trainer.save_checkpoint` writes adapters only as well.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_lora.engine import adapter_state_dict, adapter_tensors, adapters, injections
from lightning_lora.engine.optim import fit_optimizers, lora_plus
from lightning_lora.engine.state import load_adapter_state_dict
from lightning_lora.engine.swap import swapped_class
from lightning_lora.errors import CheckpointError, TrainingError
from lightning_lora.hub import save_adapter
from lightning_lora.training.checkpoint import METADATA, check_metadata, checkpoint_metadata

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    _Host = Strategy
else:
    _Host = ABC  # Strategy's own base: only then do the layouts agree, and Python allows the swap


@dataclass
class AdapterPolicy:
    """What the callback asks of the strategy."""

    lora_plus_ratio: float | None = None
    save_adapter: bool = True
    check_base: bool = True
    fingerprint: str | None = None
    """Of the base, once it was needed; frozen weights do not change."""


class AdapterStrategy(_Host):
    """Mixin in front of a strategy's own class."""

    lora: AdapterPolicy

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        if module is None or not has_adapters(module):
            return
        report = fit_optimizers(self.optimizers, module)
        rank_zero_info(f"LoRA optimizer: {report}.")
        if self.lora.lora_plus_ratio is not None:
            for optimizer in self.optimizers:
                lora_plus(optimizer, module, self.lora.lora_plus_ratio)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            return super().lightning_module_state_dict()
        return adapter_state_dict(module)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        check_metadata(checkpoint, module, check_base=self.lora.check_base)
        load_adapter_state_dict(module, checkpoint["state_dict"])

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        except (EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(checkpoint_path) from error
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error) and "zip archive" not in str(error):
                raise
            raise _unreadable(checkpoint_path) from error
        except pickle.UnpicklingError as error:
            if "Weights only" in str(error):  # torch's own message says what to do
                raise
            raise _unreadable(checkpoint_path) from error

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        own = adapter_tensors(module)
        # Other callbacks put whole models into a checkpoint: WeightAveraging its average, and the current one beside it.
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name in own}
        checkpoint[METADATA] = self._metadata(module)
        path = str(filepath)
        # A plain file is written beside its name and renamed; other kinds of storage have their own ways.
        if not _is_local(path) or type(self.checkpoint_io) is not TorchCheckpointIO:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            if self.lora.save_adapter and self.is_global_zero and not _is_local(path):
                rank_zero_warn(f"No adapter folder was written beside {path}: it is not a local file.")
                return
        else:
            with _written_beside(path, self.is_global_zero) as beside:
                super().save_checkpoint(checkpoint, beside, storage_options)
        # Hidden files are the learning-rate and batch-size finders' own.
        if self.lora.save_adapter and self.is_global_zero and not Path(path).name.startswith("."):
            save_adapter(module, adapter_folder(path), tensors=checkpoint["state_dict"])

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and _is_local(str(filepath)):
            folder = adapter_folder(str(filepath))
            if (folder / "adapter_config.json").exists():
                shutil.rmtree(folder)

    def _metadata(self, module: nn.Module) -> dict[str, Any]:
        metadata = checkpoint_metadata(module, self.lora.fingerprint)
        self.lora.fingerprint = metadata["base_fingerprint"]
        return metadata


def attach(strategy: Strategy, policy: AdapterPolicy) -> None:
    """Make `strategy` save, load and optimize adapters alone, in place; again, it only takes the new policy.

    Raises TrainingError for a strategy that shards or moves weights in a way that adapters are not made for yet.
    """
    # DeepSpeed's strategy derives from DDP's, but partitions weights and writes checkpoints of its own.
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise TrainingError(
            f"LoRACallback does not support {type(strategy).__name__} yet: on sharded weights adapters could diverge "
            "silently between processes. Use a single device, or Trainer(strategy='ddp')."
        )
    strategy.lora = policy  # type: ignore[union-attr]
    if not isinstance(strategy, AdapterStrategy):
        strategy.__class__ = swapped_class("LoRA", AdapterStrategy, type(strategy))


def has_adapters(module: nn.Module) -> bool:
    return next(adapters(module), None) is not None


def adapter_folder(checkpoint_path: str) -> Path:
    """The adapter folder that belongs to a checkpoint file: `best.ckpt` has `best-adapter`."""
    return Path(checkpoint_path.removesuffix(".ckpt") + "-adapter")



def _is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


@contextmanager
def _written_beside(path: str, is_writer: bool) -> Iterator[str]:
    """A path beside `path` to write to; it takes the place of `path` once it is whole, and is gone if it never is."""
    beside = f"{path}.partial"
    try:
        yield beside
        if is_writer:
            _flush_to_disk(beside)
            os.replace(beside, path)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error.strerror or error}). "
            "Earlier checkpoints are as they were. Free some space, or check the folder's permissions."
        ) from error
    finally:
        if is_writer:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                os.remove(beside)


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole checkpoint: it is truncated, or was not written by Lightning. "
        "Resume from an earlier one in the same folder."
    )


