"""Training on a model that Lightning's ModelParallelStrategy shards.

Adapters are small, so a checkpoint holds them whole: it is the file that one process would write, and any number of
processes can resume from it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.engine import adapter_tensors, injections
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.weights import is_sharded, shard_like, whole
from lightning_lora.errors import TrainingError, listed
from lightning_lora.training.calibrate import start_waiting

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    _Host = ModelParallelStrategy
else:
    _Host = ABC  # as of AdapterStrategy


class WholeCheckpoints(_Host):
    """Mixin between AdapterStrategy and a ModelParallelStrategy: the latter would write a folder with a file of each
    process, base weights included."""

    lightning_restore_optimizer = True

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        if module is not None and trainer.state.fn == TrainerFn.FITTING and any(True for _ in injections(module)):
            check_sharded(module, self.world_size)
            start_waiting(module, 0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)
        return checkpoint

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = _whole(Strategy.optimizer_state(self, optimizer))
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(_sharded_as(optimizer, state))


def _whole(value: Any) -> Any:
    """`value` with each sharded tensor in its dicts, lists and tuples made whole."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    return type(value)(map(_whole, value)) if type(value) in (list, tuple) else value


def check_sharded(module: nn.Module, processes: int) -> None:
    """Raise TrainingError where each process would train its own adapters, or where adapters cannot be started."""
    apart = [name for name, t in adapter_tensors(module).items() if t.requires_grad and not is_sharded(t)]
    if apart and processes > 1:
        raise TrainingError(
            f"{listed(apart)} is not sharded, so each process would train its own. Call fully_shard on a module around "
            "it in configure_model; on all that the rest of a model is, where its blocks are sharded by themselves. "
            "Under tensor parallelism, name its layer in the plan of parallelize_module, or in exclude_modules."
        )
    measured = [i.config.init for _, i in injections(module) if i.awaits_start and INITS[i.config.init].measures]
    if measured:
        raise TrainingError(
            f"init={measured[0]!r} is measured on a whole model, and this one is sharded: choose another, or measure "
            "first, with lightning_lora.engine.calibration, and inject(module, config, measured=...) before you fit."
        )


def _sharded_as(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The whole `state` of an optimizer, with the tensors of each parameter sharded as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [i for group in state["param_groups"] for i in group["params"]]
    of = dict(zip(places, parameters))

    def placed(index: int, values: Any) -> Any:
        p = of[index]
        return {k: shard_like(v, p) if torch.is_tensor(v) and v.shape == p.shape else v for k, v in values.items()}

    return {**state, "state": {index: placed(index, values) for index, values in state["state"].items()}}
