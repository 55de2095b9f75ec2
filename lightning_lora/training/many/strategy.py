"""Has a Trainer's strategy train, save and load all adapters of a pack, in front of `AdapterStrategy`."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.engine import adapter_state_dict
from lightning_lora.engine.state import load_adapter_state_dict
from lightning_lora.engine.swap import swap
from lightning_lora.errors import CheckpointError, TrainingError, listed
from lightning_lora.hub import adapter_root
from lightning_lora.hub.adapters import save_tensors
from lightning_lora.training.calibrate import start_waiting
from lightning_lora.training.checkpoint import METADATA, SEVERAL, check_metadata, checkpoint_metadata
from lightning_lora.training.checkpoint_address import local_path
from lightning_lora.training.many.optimizing import KnownLoss, Owned, check_divisible, rate_factors, stepping
from lightning_lora.training.many.pack import Pack
from lightning_lora.training.many.steps import Steps
from lightning_lora.training.run_state import changed_buffers, restore_buffers

if TYPE_CHECKING:
    from lightning_lora.training.strategy import AdapterStrategy as _Host
else:
    _Host = ABC


class ManyStrategy(_Host):
    """Mixin in front of a strategy that has an `AdapterStrategy`."""

    pack: Pack
    steps: Steps

    # Training.

    def _setup_model(self, model: nn.Module) -> nn.Module:
        module: Any = self.lightning_module
        if has_pack(self):
            for name in self.pack.members:  # the Trainer has moved and converted only the adapter that the model has
                with self.pack.several.using(name):
                    self.precision_plugin.convert_module(module)
                    module.to(self.root_device)
                    if module.trainer.state.fn == TrainerFn.FITTING:
                        start_waiting(module, self.lora.init_batches, self.pack.seeded(name))
        return super()._setup_model(model)

    def setup_optimizers(self, trainer: Any) -> None:
        if not has_pack(self):
            super().setup_optimizers(trainer)
            return
        with self.pack.several.all_shown():
            super().setup_optimizers(trainer)
        check_divisible(self.optimizers)
        self.pack.factors = rate_factors(self.optimizers, self.pack.members)
        self.pack.owners = self.pack.several.owners
        own = {id(p): p for one in self.optimizers for group in one.param_groups for p in group["params"]}
        self.pack.parameters = {
            n: [p for k, p in own.items() if self.pack.owners.get(k) == n] for n in self.pack.members
        }

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not has_pack(self):
            return super().training_step(*args, **kwargs)
        return self.steps.run(super().training_step, args, kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self.lightning_module
        if not has_pack(self) or not module.automatic_optimization:
            loss: Tensor = super().backward(closure_loss, optimizer, *args, **kwargs)
            return loss
        self.pre_backward(closure_loss)
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        loss.backward()  # not the module's own, which each adapter has gone through
        for name in list(self.pack.active):
            with self.pack.several.using(name):  # on_after_backward sees, and may change, the gradients of each
                closure_loss = self.precision_plugin.post_backward(loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if not has_pack(self):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        pack, loss = self.pack, closure()
        owned = Owned([optimizer], pack.owners)
        for name in [pack.turn] if pack.turn is not None else list(pack.active):
            known = KnownLoss(loss, optimizer)
            with pack.several.using(name), stepping(name, owned, pack.factors[name]):
                super().optimizer_step(optimizer, known, model, **kwargs)
        self.steps.weights.note()
        return loss

    def teardown(self) -> None:
        super().teardown()
        if has_pack(self):
            for name in self.pack.members:
                with self.pack.several.using(name):
                    self.lightning_module.cpu()  # type: ignore[union-attr]

    # Checkpoints: all adapters in one, each under its name, and a folder for each beside it.

    _FILE = "*/adapter_config.json"

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not has_pack(self):
            return super().lightning_module_state_dict()
        module: Any = self.lightning_module
        found: dict[str, Any] = {}
        for name in self.pack.members:
            with self.pack.several.using(name):
                own = adapter_state_dict(module)
            found |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not has_pack(self):
            super().load_model_state_dict(checkpoint, strict)
            return
        self._check_describes(checkpoint)
        module: Any = self.lightning_module
        of = described(checkpoint)
        parts = {
            name: {"state_dict": part(checkpoint["state_dict"], name), METADATA: {**checkpoint[METADATA], **of[name]}}
            for name in self.pack.members
        }
        for load in (False, True):  # nothing is loaded before all was checked
            for name, own in parts.items():
                with self.pack.several.using(name):
                    if not load:
                        own[METADATA].pop(SEVERAL)
                        check_metadata(own, module, check_base=self.lora.check_base)
                    else:
                        load_adapter_state_dict(module, own["state_dict"])
        restore_buffers(module, checkpoint[METADATA].get("buffers", {}))
        self.lora.resume.last_saves = checkpoint[METADATA].get("last_saves", {})

    def _check_describes(self, checkpoint: Mapping[str, Any]) -> None:
        there = described(checkpoint)
        if list(there) != list(self.pack.members):
            raise CheckpointError(
                f"The checkpoint holds the adapters {listed(there)}, and this run trains {listed(self.pack.members)}: "
                "resume with those that it was saved with, in their order."
            )

    def _metadata(self, module: nn.Module) -> dict[str, Any]:
        of = {}
        for name in self.pack.members:
            with self.pack.several.using(name):
                of[name] = checkpoint_metadata(module, self._base(module, "", module))
        metadata: dict[str, Any] = {"format": next(iter(of.values()))["format"], SEVERAL: of}
        if buffers := changed_buffers(module):
            metadata["buffers"] = buffers
        return metadata

    def _base(self, module: nn.Module, name: str, root: nn.Module) -> dict[str, Any]:
        # What belongs to the base depends on what the adapter trains whole.
        found: dict[str, Any] = super()._base(module, f"{self.pack.several.current}/{name}", root)
        return found

    def _folder_of(self, checkpoint_path: str) -> Path:
        return Path(local_path(checkpoint_path).removesuffix(".ckpt") + "-adapters")

    def _bases(self, module: nn.Module) -> dict[str, Any]:
        bases = {}
        for name in self.pack.members:
            with self.pack.several.using(name):
                bases[name] = self._base(module, *adapter_root(module))
        return bases

    def _write(self, module: nn.Module, folder: Path, tensors: Any, known: Any, metadata: dict[str, str]) -> None:
        for name in self.pack.members:
            with self.pack.several.using(name):
                save_tensors(module, folder / name, part(tensors, name), known[name], metadata=metadata)

    def write_adapters(self, folder: Path, metadata: dict[str, str]) -> None:
        """Write each adapter as it is now to a folder in `folder`, in PEFT's format."""
        module: Any = self.lightning_module
        self._write(module, folder, self.lightning_module_state_dict(), self._bases(module), metadata)


def described(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The descriptions of the adapters in a checkpoint, by name. Raises CheckpointError where it holds not several."""
    metadata = checkpoint.get(METADATA)
    if not isinstance(metadata, Mapping) or SEVERAL not in metadata or "state_dict" not in checkpoint:
        raise CheckpointError(
            "The checkpoint does not hold several adapters: it was not saved with MultiLoRACallback. Resume with the "
            "callback that it was saved with."
        )
    of: dict[str, Any] = metadata[SEVERAL]
    return of


def part(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tensors of one adapter, by their own names."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def has_pack(strategy: Any) -> bool:
    """True if the strategy's module is the one that has the adapters of its pack, from its setup on."""
    pack = getattr(strategy, "pack", None)
    return pack is not None and pack.several.model is strategy.lightning_module


def check_strategy(strategy: Strategy) -> None:
    """Raise TrainingError for a strategy under which several adapters cannot train."""
    if not isinstance(strategy, SingleDeviceStrategy):
        raise TrainingError(
            f"MultiLoRACallback trains on one device, not under {type(strategy).__name__}: use devices=1, or train "
            "each adapter in a run of its own with LoRACallback."
        )
    if getattr(strategy.precision_plugin, "scaler", None) is not None:
        raise TrainingError(
            "MultiLoRACallback does not train with precision='16-mixed', whose one loss scale would have all adapters "
            "skip a step where one overflows: use 'bf16-mixed' or '32-true'."
        )


def attach_pack(strategy: Any, pack: Pack, steps: Steps) -> None:
    """Make `strategy` train, save and load all adapters of `pack`, in place."""
    strategy.pack, strategy.steps = pack, steps
    if not isinstance(strategy, ManyStrategy):
        swap(strategy, "Many", ManyStrategy)
