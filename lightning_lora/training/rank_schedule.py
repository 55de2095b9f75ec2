"""Changes the rank of the adapters while a run goes on, at global steps that are known before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.checked import whole
from lightning_lora.engine import InjectionReport, LoRAConfig, injections
from lightning_lora.engine.cut import in_each_block
from lightning_lora.engine.layers import pairs
from lightning_lora.engine.optim import with_inner
from lightning_lora.engine.resize import moments, resize
from lightning_lora.errors import ConfigError, TrainingError
from lightning_lora.training.starting import adapters_present
from lightning_lora.training.watches import averaging

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RankSchedule:
    """Global step -> the rank of every pair from the first batch on that begins at that step or later.

    A checkpoint holds the config with the rank of its step, and the callback adapts the module by that config before it
    loads one. New rows of A are drawn by a seed of their own, so a run that is resumed draws the same, and the random
    numbers of the run are not touched.
    """

    def __init__(self, ranks: Mapping[int, int] | None) -> None:
        """Raises ConfigError where `ranks` is no mapping from steps to ranks. None stands for no changes."""
        if ranks is not None and (not isinstance(ranks, Mapping) or not ranks):
            raise ConfigError(f"rank_schedule maps global steps to ranks, such as {{500: 16, 1000: 8}}, not {ranks!r}.")
        self.ranks = {
            whole("a step of rank_schedule", step): whole(f"rank_schedule[{step}]", rank)
            for step, rank in (ranks or {}).items()
        }
        self._rank: int | None = None
        """The rank that was last found due in this run."""
        self._is_checked = True

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise TrainingError where ranks cannot change while `trainer` trains `module`, ConfigError for a rank that a
        layer cannot have. Called when the module has been adapted."""
        self._rank, self._is_checked = None, not self.ranks
        if self._is_checked:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise TrainingError(
                f"rank_schedule cannot be used under {type(trainer.strategy).__name__}, whose buckets or shards have "
                "the shapes of the first rank: train on one device, or in several runs, each from the adapter of the "
                "one before (resize_adapter, adapter=)."
            )
        for callback in averaging(trainer):
            what = type(callback).__name__
            raise TrainingError(f"rank_schedule cannot be used with {what}: weights of two ranks have no average.")
        for pair in pairs(module):
            for rank in self.ranks.values():
                in_each_block(rank, pair.name, pair.A, pair.B, pair.spec.rank)

    def before_batch(self, trainer: Any, module: LightningModule) -> tuple[LoRAConfig, InjectionReport] | None:
        """Resize where that is due; returns the new config and report if something was resized."""
        due = [step for step in self.ranks if step <= trainer.global_step]
        rank = self.ranks[max(due)] if due else None
        if rank is None or rank == self._rank:
            return None
        self._rank = rank
        own = list(pairs(module))
        if all(pair.spec.rank == rank for pair in own):
            return None
        device = own[0].A.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(max(due))
            report = resize(module, rank=rank, optimizer=trainer.optimizers)
        rank_zero_info(f"At step {trainer.global_step}: {report}")
        ((_, injection),) = injections(module)
        return injection.config, adapters_present(module, injection.config)[1]

    def after_batch(self, trainer: Any, module: LightningModule) -> None:
        """After the first step, raise TrainingError where an optimizer keeps state that cannot follow: not only when
        the first change of rank is due."""
        if self._is_checked or not any(optimizer.state for optimizer in trainer.optimizers):
            return
        self._is_checked = True
        names = {p: pair.name for pair in pairs(module) for p in (pair.A, pair.B)}
        for optimizer in trainer.optimizers:
            for one in with_inner(optimizer):
                list(moments(one, names))
