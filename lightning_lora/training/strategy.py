"""Makes checkpoints and optimizers hold only adapters, at the one place that all of them pass: the Trainer's strategy.

The strategy is adapted like a layer, by swapping its class: `AdapterStrategy` goes in front of the class that the user
chose. It stays after the run, so that a later `trainer.save_checkpoint` writes only adapters, too.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_lora.engine import adapter_state_dict, adapter_tensors, adapters, injections
from lightning_lora.engine.layers.frozen import freeze_statistics, has_running_statistics
from lightning_lora.engine.optim import LoRAPlus, fit_optimizers, lora_plus
from lightning_lora.engine.product_decay import product_decay
from lightning_lora.engine.state import describe_base, load_adapter_state_dict, names_in_state_dict
from lightning_lora.engine.swap import swap
from lightning_lora.engine.tree import submodule
from lightning_lora.engine.weights import whole
from lightning_lora.errors import TrainingError, listed
from lightning_lora.files import remove_folder
from lightning_lora.hub import adapter_root
from lightning_lora.hub.adapters import save_tensors
from lightning_lora.training.calibrate import start_waiting
from lightning_lora.training.checkpoint import (
    LEFT_OUT,
    METADATA,
    check_metadata,
    check_no_adapter_folder,
    checkpoint_adapter,
    checkpoint_metadata,
    last_saves,
)
from lightning_lora.training.checkpoint_address import is_local, local_path
from lightning_lora.training.checkpoint_file import leave_out_base, read_checkpoint, write_whole_files
from lightning_lora.training.lightning_private import checkpoint_of
from lightning_lora.training.resume import ExactResume
from lightning_lora.training.run_state import changed_buffers, restore_buffers
from lightning_lora.training.sharding import WholeCheckpoints
from lightning_lora.training.signals import SigtermLater
from lightning_lora.training.watches import BaseWatch, unfrozen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lora.training.pushing import Pushing

    _Host = Strategy
else:
    _Host = ABC  # the base of Lightning's strategies: Python swaps classes only if their layouts agree


@dataclass
class AdapterPolicy:
    """The settings of the callback that the strategy obeys, and the state that both share."""

    lora_plus_ratio: float | None = None
    save_adapter: bool = True
    check_base: bool = True
    push: Pushing | None = None
    init_batches: int = 16
    product_decay: float | None = None
    watch: BaseWatch | None = None
    """Checks that the base stays as it was when training started."""
    resume: ExactResume = field(default_factory=ExactResume)
    sigterm: SigtermLater = field(default_factory=SigtermLater)
    only_launched: bool = False
    """True if training ran, and failed, in processes that this one launched: in this one it never began."""
    rates: list[LoRAPlus] = field(default_factory=list)
    """The learning rates of LoRA+, one entry for each optimizer."""
    folder: Path | None = None
    """The adapter folder that was written last."""
    adapt_as_in: Callable[[Mapping[str, Any], LightningModule], None] | None = None
    """Adapts the module as the checkpoint says that will be loaded next; set where a run began with a saved adapter."""
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The results of `describe_base`, kept since frozen weights do not change; by the name of the module to which the
    names of the weights are relative."""


class AdapterStrategy(_Host):
    """Mixin in front of a strategy's own class."""

    lora: AdapterPolicy

    def _setup_model(self, model: nn.Module) -> nn.Module:
        # By now the checkpoint has been loaded, the model has its precision and device, and DDP does not wrap it yet.
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            start_waiting(module, self.lora.init_batches)
        wrapped: nn.Module = super()._setup_model(model)
        return wrapped

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._may_be_alone() else super().broadcast(obj, src)  # type: ignore[safe-super]

    def _may_be_alone(self) -> bool:
        """True if this process saves on an exception. Others may have had none: waiting for them would never end."""
        try:
            trainer: Any = self.lightning_module.trainer if self.lightning_module is not None else None
        except RuntimeError:  # the module has no Trainer
            return False
        return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED

    def barrier(self, name: str | None = None) -> None:
        if self._may_be_alone():
            return
        super().barrier(name)  # type: ignore[safe-super]
        module = self.lightning_module
        if name == "run-stage" and module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            self.lora.resume.before_run(module.trainer.global_rank)

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
        ratio = self.lora.lora_plus_ratio
        self.lora.rates = [] if ratio is None else [lora_plus(one, module, ratio) for one in self.optimizers]

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
        self.lora.resume.last_saves = checkpoint[METADATA].get("last_saves", {})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        check_no_adapter_folder(checkpoint_path)
        load = super().load_checkpoint
        checkpoint: dict[str, Any] = read_checkpoint(checkpoint_path, load, weights_only, io=self.checkpoint_io)
        if self.lora.adapt_as_in is not None and self.lightning_module is not None:
            self.lora.adapt_as_in(checkpoint, self.lightning_module)
        if self.lightning_module is not None and has_adapters(self.lightning_module):
            self._check_describes(checkpoint)
            # Saved before the first batch: the run starts anew, with the sanity check that Lightning leaves out of a
            # run that restarts.
            loops = checkpoint.get("loops", {}).get("fit_loop", {})
            if loops.get("epoch_loop.batch_progress", {}).get("total", {}).get("ready") == 0:
                del checkpoint["loops"]
            self.lora.resume.loader_states = loops.get("state_dict", {}).get("combined_loader", [])
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        module = self.lightning_module
        if module is None or not has_adapters(module):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if self.lora.only_launched:
            rank_zero_warn(
                f"{filepath} was not written by this process, whose model is the one from before training. The process "
                "that failed has saved its own, if it was the first one."
            )
            return
        if self.lora.watch is not None:
            self.lora.watch.check(module)
        leave_out_base_weights(checkpoint, module)
        checkpoint[METADATA] = self._metadata(module)
        before = self.lora.resume.values_before_batch()
        for values in (checkpoint["state_dict"], checkpoint[METADATA].get("buffers", {})):
            values.update({name: before[name] for name in values.keys() & before.keys()})
        checkpoint[METADATA]["last_saves"] = last_saves(self.lora.resume.trainer, str(filepath))
        if left_out := leave_out_base(checkpoint, module):
            checkpoint[METADATA][LEFT_OUT] = left_out
        super().save_checkpoint(checkpoint, filepath, storage_options)
        path = str(filepath)
        # Hidden files are the learning-rate and batch-size finders' own.
        if Path(path).name.startswith("."):
            return
        folder = self._folder_of(path) if self.lora.save_adapter and is_local(path) else None
        # In every process: each has a part of a sharded base.
        known = None if folder is None else self._bases(module)
        self.lora.folder = folder or self.lora.folder
        if not self.is_global_zero:
            return
        if folder is not None:
            # A run that is killed between the two leaves the folder of an earlier step beside this checkpoint.
            of = {"step": str(checkpoint["global_step"]), "epoch": str(checkpoint["epoch"])}
            self._write(module, folder, checkpoint["state_dict"], known, of)
        elif self.lora.save_adapter:
            rank_zero_warn(f"No adapter folder was written beside {path}: it is not a local file.")
        if self.lora.push is not None:
            self.lora.push.on_checkpoint_saved(module, path, folder, checkpoint["state_dict"])

    def final_adapter(self) -> dict[str, Any]:
        """The arguments `tensors` and `known_base` with which `save_tensors` writes the adapter that
        `trainer.save_checkpoint` would save now. Called in every process: each has a part of sharded weights."""
        module = self.lightning_module
        assert module is not None
        checkpoint = checkpoint_of(module.trainer)
        leave_out_base_weights(checkpoint, module)
        return {"tensors": checkpoint["state_dict"], "known_base": self._base(module, *adapter_root(module))}

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        # Every callback's on_exception has run before this: ModelCheckpoint may save in its own.
        if self.lora.push is not None:
            self.lora.push.abort()
        self.lora.sigterm.end()

    def remove_checkpoint(self, filepath: Any) -> None:
        if not is_local(str(filepath)) and not self._may_remove(str(filepath)):
            rank_zero_info(f"{filepath} is kept: it belongs to the run that this one went on from.")
            return
        super().remove_checkpoint(filepath)
        if self.lora.save_adapter and self.is_global_zero and is_local(str(filepath)):
            folder = self._folder_of(str(filepath))
            if any(folder.glob(self._FILE)):
                remove_folder(folder)

    def _may_remove(self, remote: str) -> bool:
        """True for a checkpoint in this run's own folders that is not the one that the run went on from. Lightning
        checks this only for local files (Lightning's issue 21813)."""
        trainer = self.lora.resume.trainer
        if trainer is None:
            return True
        folders = [folder for c in trainer.checkpoint_callbacks if (folder := getattr(c, "dirpath", None)) is not None]
        same = trainer.ckpt_path is not None and _place(remote) == _place(trainer.ckpt_path)
        return not same and any(_place(remote).startswith(f"{_place(folder)}/") for folder in folders)

    # The adapter of a checkpoint, and its folder: `ManyStrategy` overrides these for several adapters.

    _FILE = "adapter_config.json"
    """A file that is in the folder beside a checkpoint; a pattern."""

    def _check_describes(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint_adapter(checkpoint)

    def _folder_of(self, checkpoint_path: str) -> Path:
        return adapter_folder(checkpoint_path)

    def _bases(self, module: nn.Module) -> dict[str, Any]:
        return self._base(module, *adapter_root(module))

    def _write(self, module: nn.Module, folder: Path, tensors: Any, known: Any, metadata: dict[str, str]) -> None:
        save_tensors(module, folder, tensors, known, metadata=metadata)

    def _base(self, module: nn.Module, name: str, root: nn.Module) -> dict[str, Any]:
        if name not in self.lora.bases or not self.lora.check_base:  # without the check, the base may change
            self.lora.bases[name] = describe_base(module, root)
        return self.lora.bases[name]

    def _metadata(self, module: nn.Module) -> dict[str, Any]:
        metadata = checkpoint_metadata(module, self._base(module, "", module))
        if buffers := changed_buffers(module):
            metadata["buffers"] = buffers
        return metadata

    @property
    def checkpoint_io(self) -> CheckpointIO:
        return write_whole_files(super().checkpoint_io)

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io


def attach(strategy: Strategy, policy: AdapterPolicy) -> None:
    """Make `strategy` save, load and optimize only adapters, in place. A second call only sets the new policy.

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
        swap(strategy, "LoRA", mixins)


def shards(strategy: Strategy) -> bool:
    """True if `strategy` has the module sharded in its configure_model."""
    return isinstance(strategy, ModelParallelStrategy)


def has_adapters(module: nn.Module) -> bool:
    return next(adapters(module), None) is not None


def adapter_folder(checkpoint_path: str) -> Path:
    """The adapter folder that belongs to a checkpoint file: `best.ckpt` has `best-adapter`."""
    return Path(local_path(checkpoint_path).removesuffix(".ckpt") + "-adapter")


def leave_out_base_weights(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Reduce every state dict of `module` in `checkpoint` to the adapter's. Other callbacks put whole models in:
    WeightAveraging puts its average there, and the current model beside it."""
    own = {name: name for name in adapter_tensors(module)}
    in_state_dict = {name: plain for name, plain in names_in_state_dict(module).items() if plain in own}
    as_theirs = {name: name for name in own if name not in in_state_dict.values()} | in_state_dict
    for names in (own, as_theirs) if in_state_dict else (own,):
        checkpoint.update({key: without_base(value, names) for key, value in checkpoint.items()})


def without_base(value: Any, own: Mapping[str, str]) -> Any:
    """`value` with every state dict of the adapted model, at any depth, reduced to the adapter's. `own` maps the names
    in `value` to the names in the result."""
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


def freeze_new_norms(module: nn.Module) -> None:
    """Freeze the statistics of norms that replaced frozen ones: Trainer(sync_batchnorm=True) makes new ones."""
    for root, injection in injections(module):
        for name in injection.frozen_norms:
            norm = submodule(submodule(module, root), name)
            if has_running_statistics(norm):
                freeze_statistics(norm)


def _place(url: Any) -> str:
    """One spelling for each place: "memory://run", "memory:///run/" and the file system's own name for it are the
    same."""
    filesystem, path = url_to_fs(str(url))
    return f"{type(filesystem).__name__}:{path.rstrip('/')}"
