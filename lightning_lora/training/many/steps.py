"""A training step of a pack: the module's own training_step, once for each adapter, from the same state.

Each adapter sees what it would see alone: the same batch, random numbers, buffers and counters. The gradients of all
are computed inside of Lightning's training_step, one adapter after the other, so that the graph of one is alive at a
time. Lightning gets one loss, the mean, whose backward pass hands these gradients out: clearing them, accumulating them
and all hooks are Lightning's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lora.engine import torch_private
from lightning_lora.errors import TrainingError
from lightning_lora.training.lightning_private import batches_that_stepped, live_callback_metrics
from lightning_lora.training.many.optimizing import only
from lightning_lora.training.run_state import RandomState, random_state, set_random_state

if TYPE_CHECKING:
    from lightning_lora.training.many.pack import Pack

Step = Callable[..., Any]


class Steps:
    """Runs the training steps of a pack."""

    def __init__(self, pack: Pack, trainer: Any, *, log_every_n_steps: int) -> None:
        self.pack, self.trainer, self.every = pack, trainer, log_every_n_steps

    @property
    def module(self) -> Any:
        return self.trainer.lightning_module

    def run(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What Lightning gets from training_step; `step` calls the module's."""
        if not self.module.automatic_optimization:
            return self._manual(step, args, kwargs)
        logs, losses, outputs = Logs(self.module), [], []
        parameters: list[Tensor] = []
        gradients: list[Tensor | None] = []
        state = StateOfStep(self.pack, self.module)
        for name in self.pack.active:
            state.put_back()
            with self.pack.several.using(name), logs.caught(name):
                output = step(*args, **kwargs)
                outputs.append(output)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if loss is not None:
                    losses.append(loss.detach())
                    own = self.pack.parameters[name]
                    gradients += self._gradients(loss, own)
                    parameters += own
                    logs.loss(name, losses[-1])
            state.note(name)
        state.end()
        self._log(logs)
        if not losses:
            return outputs[-1]
        mean = torch.stack([loss.float() for loss in losses]).mean().to(losses[0].dtype)
        total = _Known.apply(mean, gradients, *parameters)
        return {**outputs[-1], "loss": total} if isinstance(outputs[-1], Mapping) else total

    def _gradients(self, loss: Tensor, own: list[Tensor]) -> list[Tensor | None]:
        """The gradients of an adapter's own loss, by the module's own backward; its `.grad` stays as it is."""
        held = [p.grad for p in own]
        for p in own:
            p.grad = None
        try:
            self.trainer.precision_plugin.backward(loss, self.module, None)
            return [p.grad for p in own]
        finally:
            for p, grad in zip(own, held):
                p.grad = grad

    def _manual(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module takes its steps by itself: once for each adapter, with optimizers that hold that one alone."""
        pack, strategy, logs = self.pack, self.trainer.strategy, Logs(self.module)
        state, counters = StateOfStep(self.pack, self.module), _Counters(self.trainer)
        output = None
        for name in pack.active:
            state.put_back()
            counters.put_back()
            with pack.several.using(name), only(strategy.optimizers, name, pack.owners), logs.caught(name):
                pack.turn = name
                try:
                    output = step(*args, **kwargs)
                finally:
                    pack.turn = None
            state.note(name)
        state.end()
        self._log(logs)
        return output

    def _log(self, logs: Logs) -> None:
        logs.give_means()
        count = batches_that_stepped(self.trainer)
        if (
            count % self.every == 0
            and self.trainer.fit_loop.epoch_loop.batch_idx % self.trainer.accumulate_grad_batches == 0
        ):
            named = logs.by_adapter()
            live_callback_metrics(self.trainer).update({k: torch.tensor(v) for k, v in named.items()})
            for logger in self.trainer.loggers:
                logger.log_metrics(named, step=count)


class _Known(torch.autograd.Function):
    """A loss whose gradients are known already: its backward pass hands them out, times what comes in."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None if own is None else own * g for own in ctx.gradients))


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

    def note(self, adapter: str) -> None:
        """After each adapter. Raises TrainingError where the step left other buffers than with the first."""
        self._random_after = self._random_after or random_state()
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


class _Counters:
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
        return {key: copy.deepcopy(v) for key, v in group.items() if key not in ("params", "param_names", "lora_many")}

    def put_back(self) -> None:
        if not self._is_first:
            self._loop.optim_step_progress = copy.deepcopy(self._progress)
            for scheduler, state in zip(self._schedulers, self._states):
                scheduler.load_state_dict(copy.deepcopy(state))
            for one, groups in zip(self._optimizers, self._groups):
                for group, settings in zip(one.param_groups, groups):
                    group.update(copy.deepcopy(settings))
        self._is_first = False


class Logs:
    """What training_step logs with each adapter. The mean goes by the module's own name."""

    def __init__(self, module: Any) -> None:
        self._module, self._own_log = module, module.log
        self._calls: dict[str, list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]] = {}
        self._losses: dict[str, Tensor] = {}

    @contextmanager
    def caught(self, adapter: str) -> Iterator[None]:
        """Inside, what the module logs is kept for that adapter."""
        calls = self._calls[adapter] = []
        attributes: dict[str, Any] = vars(self._module)
        before = attributes.get("log", _ABSENT)

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            value = value.detach() if isinstance(value, Tensor) else value
            calls.append((name, value, args, kwargs))

        attributes["log"] = log
        try:
            yield
        finally:
            if before is _ABSENT:
                del attributes["log"]
            else:
                attributes["log"] = before

    def loss(self, adapter: str, loss: Tensor) -> None:
        self._losses[adapter] = loss

    def give_means(self) -> None:
        """Log the mean of each value, as the module would."""
        several = list(self._calls.values())
        for i, (name, value, args, kwargs) in enumerate(several[-1] if several else ()):
            same = [calls[i][1] for calls in several if i < len(calls) and calls[i][0] == name]
            if _is_number(value):
                value = torch.stack([torch.as_tensor(v, dtype=torch.float32).squeeze() for v in same]).mean()
            self._own_log(name, value, *args, **kwargs)

    def by_adapter(self) -> dict[str, float]:
        """ "name/adapter" -> value, for each number that was logged; the loss, where nothing was."""
        named = {
            f"{name}/{adapter}": float(value)
            for adapter, calls in self._calls.items()
            for name, value, _, _ in calls
            if _is_number(value)
        }
        return named or {f"train_loss/{adapter}": float(loss) for adapter, loss in self._losses.items()}


_ABSENT: Any = object()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
