"""What a training step changes besides weights, put back so that each adapter begins where the first one began."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lora.engine import torch_private
from lightning_lora.errors import TrainingError
from lightning_lora.training.many.optimizing import LISTS, OWN
from lightning_lora.training.run_state import RandomState, random_state, set_random_state

if TYPE_CHECKING:
    from lightning_lora.training.many.pack import Pack


class StateOfStep:
    """What a step changes besides weights: random state, buffers, and numbers in which the module counts."""

    def __init__(self, pack: Pack, module: Any) -> None:
        self._module, self._is_first = module, True
        self._random, self._numbers = random_state(), _numbers(module)
        self._buffers = [
            (name, holder._buffers, key, b, torch_private.version(b), b.detach().clone())
            for name, holder, key in pack.several.common_buffers()
            if (b := holder._buffers[key]) is not None
        ]
        self._after: dict[str, Tensor] = {}
        self._random_after: RandomState = {}

    def put_back(self) -> None:
        """Before each adapter: let its step begin where the first one's began."""
        if self._is_first:
            self._is_first = False
            return
        set_random_state(self._random)
        vars(self._module).update(self._numbers)
        for _, held, key, buffer, version, value in self._buffers:
            held[key] = buffer
            if torch_private.version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)

    def note(self, adapter: str, *, is_alone: bool = False) -> None:
        """After each adapter. Raises TrainingError where the step left other buffers than with the first, unless it
        is the only one, or has data of its own."""
        self._random_after = self._random_after or random_state()
        if is_alone:
            return
        for name, held, key, buffer, version, _ in self._buffers:
            now: Any = held[key]
            if now is buffer and torch_private.version(buffer) == version:
                continue
            first = self._after.setdefault(name, now.detach().clone())
            if not torch.equal(now, first):
                raise TrainingError(
                    f"The training step writes to the buffer {name!r}, and writes other values with the adapter "
                    f"{adapter!r} than with the first: each adapter would need a {name!r} of its own. Train each in a "
                    "run of its own with LoRACallback, or name its module in modules_to_save."
                )

    def end(self) -> None:
        """After the last adapter: the run goes on with the random numbers of the first one. Others may have drawn more,
        or fewer, for a dropout of their own."""
        set_random_state(self._random_after)


_NUMBERS = (int, float, bool, str, type(None))


def _numbers(module: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in _NUMBERS and key != "training"}


class Counters:
    """Lightning's count of the steps that a manual training_step takes, the schedules, and the groups' settings: each
    adapter begins with the same, and they count once."""

    def __init__(self, trainer: Any) -> None:
        self._loop = trainer.fit_loop.epoch_loop.manual_optimization
        self._schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
        self._optimizers = trainer.strategy.optimizers
        self._progress = copy.deepcopy(self._loop.optim_step_progress)
        self._states = [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
        self._groups = [[self._settings(group) for group in one.param_groups] for one in self._optimizers]
        self._is_first = True

    @staticmethod
    def _settings(group: dict[str, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(v) for key, v in group.items() if key not in (*LISTS, OWN)}

    def put_back(self) -> None:
        if not self._is_first:
            self._loop.optim_step_progress = copy.deepcopy(self._progress)
            for scheduler, state in zip(self._schedulers, self._states):
                scheduler.load_state_dict(copy.deepcopy(state))
            for one, groups in zip(self._optimizers, self._groups):
                for group, settings in zip(one.param_groups, groups):
                    group.update(copy.deepcopy(settings))
        self._is_first = False
