"""Adapter-only checkpoints and optimizers, at the one place that all of them pass: the Trainer's strategy.

As a layer is adapted by swapping its class, so is the strategy: `AdapterStrategy` goes in front of the class that the
user chose. It stays after the run, so that a later `trainer.save_checkpoint` writes adapters only as well.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.engine import adapter_state_dict, adapter_tensors, adapters, injections
from lightning_lora.engine.layers.frozen import freeze_statistics, has_running_statistics
from lightning_lora.engine.optim import fit_optimizers, lora_plus
from lightning_lora.engine.product_decay import product_decay
from lightning_lora.engine.sharded import whole
from lightning_lora.engine.state import describe_base, load_adapter_state_dict, names_in_state_dict
from lightning_lora.engine.swap import swapped_class
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.errors import CheckpointError, TrainingError, listed
from lightning_lora.hub import adapter_root, save_adapter
from lightning_lora.hub.resume import local_checkpoint
from lightning_lora.training.base_watch import BaseWatch
from lightning_lora.training.buffers import changed_buffers, restore_buffers
from lightning_lora.training.calibrate import start_waiting
from lightning_lora.training.checkpoint import (
    METADATA,
    check_metadata,
    check_no_adapter_folder,
    checkpoint_adapter,
    checkpoint_metadata,
    leave_out_modules,
    reading,
)
from lightning_lora.training.sharding import WholeCheckpoints

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lora.training.pushing import Pushing

    _Host = Strategy
    _IOHost = TorchCheckpointIO
else:
    _Host = _IOHost = ABC  # their own base: only then do the layouts agree, and Python allows the swap


@dataclass
class AdapterPolicy:
    """What the callback asks of the strategy."""

    lora_plus_ratio: float | None = None
    save_adapter: bool = True
    check_base: bool = True
    push: Pushing | None = None
    init_batches: int = 16
    product_decay: float | None = None
    watch: BaseWatch | None = None
    """What the base was when training started."""
    folder: Path | None = None
    """The adapter folder that was written last."""
    adapt_as_in: Callable[[Mapping[str, Any], LightningModule], None] | None = None
    """Adapts the module as a checkpoint says that is about to be loaded, where a run began with a saved adapter."""
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What tells the base from others, once it was needed; frozen weights do not change. By the name of the module to
    which the names of its weights are relative."""


class AdapterStrategy(_Host):
    """Mixin in front of a strategy's own class."""

    lora: AdapterPolicy

    def _setup_model(self, model: nn.Module) -> nn.Module:
        # What a checkpoint holds has been loaded, the model is in its precision and on its device, and DDP does not
        # wrap it yet.
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            start_waiting(module, self.lora.init_batches)
        wrapped: nn.Module = super()._setup_model(model)
        return wrapped

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        if module is None or not has_adapters(module):
            return
        check_all_is_saved(module)
        freeze_new_norms(module)
        report = fit_optimizers(self.optimizers, module)
        rank_zero_info(f"LoRA optimizer: {report}.")
        if self.lora.product_decay is not None:  # before LoRA+, whose rates for a step are then still there
            for optimizer in self.optimizers:
                product_decay(optimizer, module, self.lora.product_decay)
        if self.lora.lora_plus_ratio is not None:
            for optimizer in self.optimizers:
                lora_plus(optimizer, module, self.lora.lora_plus_ratio)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            return super().lightning_module_state_dict()
        return {name: whole(tensor) for name, tensor in adapter_state_dict(module).items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        check_metadata(checkpoint, module, check_base=self.lora.check_base)
        if isinstance(self.precision_plugin, DoublePrecision):  # Lightning widens the module after this, too late for
            self.precision_plugin.convert_module(module)  # values that float32 would round
        load_adapter_state_dict(module, checkpoint["state_dict"])
        restore_buffers(module, checkpoint[METADATA].get("buffers", {}))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        check_no_adapter_folder(checkpoint_path)
        with local_checkpoint(checkpoint_path) as path, reading(checkpoint_path):
            checkpoint = super().load_checkpoint(path, weights_only=weights_only)
        if self.lora.adapt_as_in is not None and self.lightning_module is not None:
            self.lora.adapt_as_in(checkpoint, self.lightning_module)
        if self.lightning_module is not None and has_adapters(self.lightning_module):
            checkpoint_adapter(checkpoint)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self.lora.watch is not None:
            self.lora.watch.check(module)
        # Other callbacks put whole models in: WeightAveraging its average, and the current one beside it.
        own = {name: name for name in adapter_tensors(module)}
        in_state_dict = {name: plain for name, plain in names_in_state_dict(module).items() if plain in own}
        as_theirs = {name: name for name in own if name not in in_state_dict.values()} | in_state_dict
        for names in (own, as_theirs) if in_state_dict else (own,):
            checkpoint.update({key: without_base(value, names) for key, value in checkpoint.items()})
        checkpoint[METADATA] = self._metadata(module)
        leave_out_modules(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        path = str(filepath)
        # Hidden files are the learning-rate and batch-size finders' own.
        if Path(path).name.startswith("."):
            return
        folder = adapter_folder(path) if self.lora.save_adapter and is_local(path) else None
        # In every process: of a sharded base each has a part.
        known = None if folder is None else self._base(module, *adapter_root(module))
        self.lora.folder = folder or self.lora.folder
        if not self.is_global_zero:
            return
        if folder is not None:
            save_adapter(module, folder, tensors=checkpoint["state_dict"], known_base=known)
        elif self.lora.save_adapter:
            rank_zero_warn(f"No adapter folder was written beside {path}: it is not a local file.")
        if self.lora.push is not None:
            self.lora.push.on_checkpoint_saved(module, path, folder, checkpoint["state_dict"])

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # Here, since every callback's on_exception has been: ModelCheckpoint may save in its own.
        if self.lora.push is not None:
            self.lora.push.abort()

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.lora.save_adapter and self.is_global_zero and is_local(str(filepath)):
            folder = adapter_folder(str(filepath))
            if (folder / "adapter_config.json").exists():
                shutil.rmtree(folder)

    def _base(self, module: nn.Module, name: str, root: nn.Module) -> dict[str, Any]:
        if name not in self.lora.bases or not self.lora.check_base:  # which lets a base go on that changes
            self.lora.bases[name] = describe_base(module, root)
        return self.lora.bases[name]

    def _metadata(self, module: nn.Module) -> dict[str, Any]:
        metadata = checkpoint_metadata(module, self._base(module, "", module))
        if buffers := changed_buffers(module):
            metadata["buffers"] = buffers
        return metadata

    @property
    def checkpoint_io(self) -> CheckpointIO:
        io = super().checkpoint_io
        # The one that writes the file: a wrapper, such as AsyncCheckpointIO, may get another with each call.
        writer: Any = io
        while isinstance(writer, _WrappingCheckpointIO):
            writer = writer.checkpoint_io
        if type(writer) is TorchCheckpointIO:
            writer.__class__ = swapped_class("Whole", WholeFileIO, TorchCheckpointIO)
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io


class WholeFileIO(_IOHost):
    """Mixin in front of Lightning's plain CheckpointIO: a file is there whole, or not at all.

    Lightning writes it to the folder for temporary files first and moves it, which is a copy where that is on another
    file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not is_local(str(path)):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with _written_beside(str(path)) as beside:
            super().save_checkpoint(checkpoint, beside, storage_options)


def attach(strategy: Strategy, policy: AdapterPolicy) -> None:
    """Make `strategy` save, load and optimize adapters alone, in place; again, it only takes the new policy.

    Raises TrainingError for a strategy that shards or moves weights in a way that adapters are not made for yet.
    """
    # DeepSpeed's strategy derives from DDP's, but partitions weights and writes checkpoints of its own.
    known = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    if not isinstance(strategy, known) or isinstance(strategy, DeepSpeedStrategy):
        raise TrainingError(
            f"LoRACallback does not support {type(strategy).__name__} yet: on sharded weights adapters could diverge "
            "silently between processes. Use a single device, Trainer(strategy='ddp'), or a ModelParallelStrategy "
            "(fully_shard)."
        )
    strategy.lora = policy  # type: ignore[union-attr]
    if not isinstance(strategy, AdapterStrategy):
        mixins = (AdapterStrategy, WholeCheckpoints) if shards(strategy) else AdapterStrategy
        strategy.__class__ = swapped_class("LoRA", mixins, type(strategy))


def shards(strategy: Strategy) -> bool:
    """Whether the module is sharded in its configure_model, as `strategy` asks."""
    return isinstance(strategy, ModelParallelStrategy)


def has_adapters(module: nn.Module) -> bool:
    return next(adapters(module), None) is not None


def adapter_folder(checkpoint_path: str) -> Path:
    """The adapter folder that belongs to a checkpoint file: `best.ckpt` has `best-adapter`."""
    return Path(checkpoint_path.removesuffix(".ckpt") + "-adapter")


def without_base(value: Any, own: Mapping[str, str]) -> Any:
    """`value` with every state dict of the adapted model in it, however deep, reduced to the adapter's, whose names
    there are the keys of `own`, and here its values."""
    if not isinstance(value, dict):
        return value
    if own.keys() <= value.keys():
        return {own[name]: tensor for name, tensor in value.items() if name in own}
    inside = {key: without_base(inner, own) for key, inner in value.items()}
    return value if all(inside[key] is inner for key, inner in value.items()) else inside


def check_all_is_saved(module: nn.Module) -> None:
    """Raise TrainingError for a parameter that would be trained but is no part of the adapter: it would be lost."""
    lost = unfrozen(module)
    if lost:
        raise TrainingError(
            f"{listed(lost)} would be trained, but not saved with the adapter: made or unfrozen after the model was "
            "adapted. To train it too, name its module in modules_to_save; under ddp_spawn, ddp_fork and ddp_notebook, "
            "layers must be built in __init__ or configure_model, not in setup."
        )


def check_only_adapters(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Raise TrainingError for a parameter of `module` that an optimizer got after `setup_optimizers` made it right."""
    names = {id(p): name for name, p in Tree.of(module).parameters}
    saved = {id(t) for t in adapter_tensors(module).values()}
    held = (id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    lost = [names[key] for key in held if key in names and key not in saved]
    if lost:
        raise TrainingError(
            f"{listed(lost)} came into an optimizer while training went on, but not into the adapter: it would be "
            "trained, and not saved. Take out what unfreezes it (a BackboneFinetuning callback, for example), or name "
            "its module in modules_to_save."
        )


def unfrozen(module: nn.Module) -> list[str]:
    """The names of parameters of the base that require grad."""
    saved = {id(t) for t in adapter_tensors(module).values()}
    return [name for name, p in Tree.of(module).parameters if p.requires_grad and id(p) not in saved]


def freeze_new_norms(module: nn.Module) -> None:
    """Freeze the statistics of norms that came in the place of frozen ones: Trainer(sync_batchnorm=True) makes new."""
    for root, injection in injections(module):
        for name in injection.frozen_norms:
            norm = submodule(submodule(module, root), name)
            if has_running_statistics(norm):
                freeze_statistics(norm)


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


@contextmanager
def _written_beside(path: str) -> Iterator[str]:
    """A path beside `path` to write to; it takes the place of `path` once it is whole, and is gone if it never is."""
    beside = f"{path}.partial"
    try:
        yield beside
        _flush_to_disk(beside)
        os.replace(beside, path)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error.strerror or error}). "
            "Earlier checkpoints are as they were. Free some space, or check the folder's permissions."
        ) from error
    finally:
        with suppress(OSError):
            os.remove(beside)


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
