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
    """What a step changes besides weights: random state, buffers, and what the module keeps."""

    def __init__(self, pack: Pack) -> None:
        self._is_first = True
        self._random, self._kept = random_state(), pack.kept
        self._kept.begin()
        self._buffers = [
            (name, holder._buffers, key, b, torch_private.version(b), b.detach().clone())
            for name, holder, key in pack.several.common_buffers()
            if (b := holder._buffers[key]) is not None
        ]
        self._after: dict[str, Tensor] = {}
        self._random_after: RandomState = {}

    def put_back(self, adapter: str) -> None:
        """Before each adapter: let its step begin where the first one's began."""
        self._kept.put(adapter)
        if self._is_first:
            self._is_first = False
            return
        set_random_state(self._random)
        for _, held, key, buffer, version, value in self._buffers:
            held[key] = buffer
            if torch_private.version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)

    def note(self, adapter: str, *, is_alone: bool = False) -> None:
        """After each adapter. Raises TrainingError where the step left other buffers than with the first, unless it
        is the only one, or has data of its own."""
        self._kept.note(adapter)
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

    def why_not_packed(self) -> str | None:
        """Why adapters whose steps were noted cannot share a forward, as far as it lies in what the module keeps."""
        numpy, python = ((self._random.get(k), self._random_after.get(k)) for k in ("numpy", "python"))
        if numpy[0] is not numpy[1] or python[0] != python[1]:
            return "the training step draws random numbers from numpy or from Python's random, which may be for rows"
        other = self._kept.differing()
        return other and f"the module keeps {other}, which a step leaves otherwise with another adapter"

    def end(self) -> None:
        """After the last adapter: the run goes on with the random numbers of the first one. Others may have drawn more,
        or fewer, for a dropout of their own."""
        set_random_state(self._random_after)
        self._kept.end()


class Weights:
    """Notices a change of weights by something else than the optimizer's step of each adapter, as by a hook of the
    module, which has the first adapter alone."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        self._noted: list[tuple[Tensor, int]] = []

    def note(self) -> None:
        """After a step."""
        weights = [*self._pack.several.model.parameters(), *(p for own in self._pack.parameters.values() for p in own)]
        self._noted = [(p, torch_private.version(p)) for p in weights]

    def check(self) -> None:
        """Before the next one. Raises TrainingError where weights have been changed since."""
        if any(torch_private.version(p) != version for p, version in self._noted):
            raise TrainingError(
                "After a step, something else has changed weights (a callback, or a hook like on_train_batch_end), "
                "where the module has the first of several adapters alone. Change them in on_before_optimizer_step or "
                "on_after_backward, which are called for each, or train each in a run of its own with LoRACallback."
            )
        self._noted = []


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
