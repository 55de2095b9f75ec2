"""A training step of a pack: the module's own training_step, once for each adapter, from the same state.

Each adapter sees what it would see alone: the same batch, random numbers, buffers and counters. The gradients of all
are computed inside of Lightning's training_step, one adapter after the other, so that the graph of one is alive at a
time. Lightning gets one loss, the mean, whose backward pass hands these gradients out: clearing them, accumulating them
and all hooks are Lightning's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.engine.packed import Rows
from lightning_lora.engine.several import PACK
from lightning_lora.errors import TrainingError
from lightning_lora.training.calibrate import silent
from lightning_lora.training.lightning_private import batches_that_stepped, is_accumulating, live_callback_metrics
from lightning_lora.training.many.batches import amount_of, own_copy, repeated, rows_of
from lightning_lora.training.many.draws import common_draws
from lightning_lora.training.many.guard import judged, still_apart
from lightning_lora.training.many.logs import Logs
from lightning_lora.training.many.optimizing import Owned, only
from lightning_lora.training.many.state import Counters, StateOfStep, Weights
from lightning_lora.training.many.waves import Waves, kept_bytes, that_fit
from lightning_lora.training.torchmetrics_private import metric_state, put_metric_state

if TYPE_CHECKING:
    from lightning_lora.training.many.pack import Pack

Step = Callable[..., Any]


class NoLossError(Exception):
    """A step that is looked at has left out its batch."""


class Steps:
    """Runs the training steps of a pack."""

    def __init__(self, pack: Pack, trainer: Any, *, log_every_n_steps: int, wave: int | None = None) -> None:
        self.pack, self.trainer, self.every, self.asked = pack, trainer, log_every_n_steps, wave
        self.reason: str | None = None
        """Why the adapters train in one forward each, where that was not asked for."""
        self.waves: Waves | None = None
        """The sizes of waves; None before the first step."""
        self.known: int | None = None
        """The size that the run which this one goes on from has chosen."""
        self.weights = Weights(pack)
        self._is_mean = True
        self._rows = Rows()
        self._since, self._checks, self._epoch = 0, 0, -1
        """The number of packed steps since it was found out last that rows do not meet, and how often it was."""
        self._checked = 0
        """The number of rows of the batch on which it was found out that adapters may share a forward."""
        self._are_of_rows: list[bool] = []
        """Of each draw of random numbers in that step, whether it was for the rows."""

    @property
    def module(self) -> Any:
        return self.trainer.lightning_module

    def run(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What Lightning gets from training_step; `step` calls the module's."""
        pack, batch = self.pack, args[0] if args else None
        if not pack.active:
            return None
        self.weights.check()
        if not self.module.automatic_optimization:
            self._one_each("the module takes its steps by itself (manual optimization)")
            return self._manual(step, args, kwargs)
        if len(pack.members) > 1 and isinstance(batch, Mapping) and set(batch) == set(pack.members):
            self._one_each("each adapter has data of its own")
            return self._train([(name,) for name in pack.active], step, args, kwargs, own_data=True)
        rows = rows_of(batch)
        if self.waves is None:
            self._choose(step, args, kwargs, rows)
        # With another number of rows, what is a row and what is a shared table may look different: not checked.
        if (
            self.waves is None
            or rows is None
            or rows != self._checked
            or self.waves.chosen == 1
            or len(pack.active) == 1
        ):
            return self._train([(name,) for name in pack.active], step, args, kwargs)
        if self._is_check_due() and (reason := self._still_apart(step, args, kwargs)) is not None:
            self._one_each(reason)
            return self._train([(name,) for name in pack.active], step, args, kwargs)
        self._since += 1
        was_chosen = self.waves.chosen
        with self.waves.step(self.module.device, amount_of(batch)) as size:
            # Adapters of one rank side by side: their products are one.
            order = sorted(pack.active, key=lambda name: pack.members[name].config.rank)
            waves = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
            output = self._train(waves, step, args, kwargs)
        if was_chosen is None and self.waves.chosen is not None:
            rank_zero_info(
                f"{len(order)} adapters train in waves of {self.waves.chosen}. Time of a step, beside one forward for "
                f"each: {self.waves}."
            )
        return output

    def _one_each(self, reason: str) -> None:
        """Train in one forward for each adapter, and say why, once. Raises TrainingError where waves were asked for."""
        if self.waves is None or self.waves.chosen != 1:
            self.waves = Waves(1, 1)
            if self.asked == 1 or len(self.pack.members) == 1:
                return
            if self.asked is not None:
                raise TrainingError(
                    f"wave={self.asked} is not possible, since {reason}. Leave wave out, or set wave=1."
                )
            self.reason = f"The adapters train in one forward each, since {reason}."
            rank_zero_info(self.reason)

    def _choose(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int | None) -> None:
        """On the first batch, of so many `rows`, find out whether adapters may share a forward, and how many fit."""
        pack, names = self.pack, list(self.pack.members)
        if self.asked == 1 or len(names) == 1:
            self.waves = Waves(1, 1)
            return
        if rows is None:
            self._one_each("the batch has no tensors with rows")
            return
        if (reason := pack.several.pack(self._rows)) is not None:
            self._one_each(reason)
            return
        self._checked = rows
        two, kept = (names[0], names[1]), 0
        state = StateOfStep(pack)

        def alone(name: str) -> list[Tensor]:
            nonlocal kept
            with kept_bytes(self.module) as count:
                found = gradients((name,))[name]
            kept = max(kept, count[0])
            return found

        def gradients(wave: tuple[str, ...]) -> dict[str, list[Tensor]]:
            return self._gradients(state, wave, step, args, kwargs)

        with silent(self.module):
            try:
                self._is_mean, reason = judged(
                    pack.several, two, alone, lambda: list(gradients(two).values()), is_narrow=self._is_narrow()
                )
            except NoLossError:  # look at the next batch
                self._checked = 0
                return
            finally:
                state.put_back("")
        reason = reason or state.why_not_packed()
        if reason is not None:
            self._one_each(reason)
            return
        most = that_fit(kept, self.module.device)
        if self.asked is not None and min(self.asked, len(names)) > most:
            raise TrainingError(
                f"wave={self.asked} needs about {self.asked * kept / 2**30:.1f} GiB for the backward pass of one "
                f"forward, and {most} adapters fit into half of the memory that is free: set wave={most}, or leave it "
                "out."
            )
        self.waves = Waves(len(names), most)
        if self.asked is not None or self.known is not None:
            self.waves.chosen = min(self.asked or self.known or 1, len(names))

    def _gradients(
        self, state: StateOfStep, wave: tuple[str, ...], step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        state.put_back(wave[0])
        _, loss, found = self._wave(wave, step, args, kwargs, factor=1)
        if loss is None:
            raise NoLossError("training_step returns no loss")
        state.note(wave[0])
        own = self.pack.parameters
        return {n: [torch.zeros_like(p) if g is None else g for p, g in zip(own[n], found[n])] for n in wave}

    def _is_check_due(self) -> bool:
        """True if it is to be found out again that rows do not meet: a loss may have a part that begins later. After 1,
        2, 4 ... steps, at most `every`, and where an epoch begins."""
        epoch, self._epoch = self._epoch, self.trainer.current_epoch
        begins = epoch not in (-1, self._epoch) and self._since >= 10
        return begins or self._since >= min(self.every, 2**self._checks)

    def _still_apart(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why adapters cannot share a forward from now on, if so. Raises TrainingError where they have done so in steps
        since the last time."""
        at = self._checks % len(self.pack.active)
        first, second = (self.pack.active * 2)[at : at + 2]
        state = StateOfStep(self.pack)
        try:
            with silent(self.module):
                apart = [self._gradients(state, (name,), step, args, kwargs)[name] for name in (first, second)]
                met = still_apart(
                    self.pack.several,
                    second,
                    apart,
                    lambda: list(self._gradients(state, (first, second), step, args, kwargs).values()),
                    is_narrow=self._is_narrow(),
                )
        except NoLossError:
            return None
        finally:
            state.put_back("")
        since, self._since, self._checks = self._since, 0, self._checks + 1
        if met is not None and since > 1:
            raise TrainingError(
                f"In step {self.trainer.global_step}, {met}, and at the last look {since} steps ago they did not: the "
                "loss has a part that began since. Set wave=1: one forward for each adapter."
            )
        return met

    def _is_narrow(self) -> bool:
        return "16" in str(self.trainer.precision) or any(p.dtype.itemsize < 4 for p in self.module.parameters())

    def _train(
        self,
        waves: list[tuple[str, ...]],
        step: Step,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        own_data: bool = False,
    ) -> Any:
        """The step of all adapters, one wave after the other."""
        logs, state, output = Logs(self.module), StateOfStep(self.pack), None
        losses: list[Tensor] = []
        parameters: list[Tensor] = []
        gradients: list[Tensor | None] = []
        todo = list(waves)
        while todo:
            wave = todo.pop(0)
            state.put_back(wave[0])
            given = (args[0][wave[0]], *args[1:]) if own_data else args
            with logs.caught(wave):
                output, loss, found = self._wave(wave, step, given, kwargs, factor=len(wave) if self._is_mean else 1)
            if loss is None and len(wave) > 1:  # it may have left out the batch because of what one adapter makes of it
                logs.forget(wave)
                todo[:0] = [(name,) for name in wave]
                continue
            if loss is not None:
                own_loss = loss if self._is_mean else loss / len(wave)
                logs.loss(wave, own_loss, of=loss)
                losses += [own_loss] * len(wave)
            for name, own in found.items():
                parameters += self.pack.parameters[name]
                gradients += own
            state.note(wave[0], is_alone=len(waves) == 1 or own_data)
        if any(len(wave) > 1 for wave in waves) and (reason := state.why_not_packed()) is not None:
            raise TrainingError(f"Adapters cannot share a forward any more, since {reason}. Set wave=1.")
        state.end()
        if self._logs_now():
            if any(len(wave) > 1 for wave in waves):
                self._log(self._each_alone(step, args, kwargs, state))
            else:
                self._log(logs)
        logs.give_means()
        if not losses:
            return output
        mean = torch.stack([loss.float() for loss in losses]).mean().to(losses[0].dtype)
        total = _HandsOut.apply(mean, torch.ones((), requires_grad=True), gradients, parameters)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _wave(
        self, wave: tuple[str, ...], step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], factor: float
    ) -> tuple[Any, Tensor | None, dict[str, list[Tensor | None]]]:
        """One forward and backward pass for the adapters of `wave`: what training_step returns, its loss, and the
        gradients of each adapter, of `factor` times the loss. Gradients that are there already stay as they are."""
        own = {name: self.pack.parameters[name] for name in wave}
        held = [(p, p.grad) for of in own.values() for p in of]
        for p, _ in held:
            p.grad = None
        try:
            with self._using(wave, args) as given:
                output = step(*given, **kwargs)
                loss = _loss_in(output)
                if loss is None:
                    return output, None, {}
                # The loss is scaled, and not the gradients of A and B: in 16 bits that rounds less.
                scaled = loss if factor == 1 else loss * factor
                self.trainer.precision_plugin.backward(scaled, self.module, None)
            return output, loss.detach(), {name: [p.grad for p in of] for name, of in own.items()}
        finally:
            for p, grad in held:
                p.grad = grad

    @contextmanager
    def _using(self, wave: tuple[str, ...], args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """Inside, the model has the adapters of `wave`, also in its backward pass, which may run forwards again. Gives
        the arguments of training_step."""
        if len(wave) == 1:
            with self.pack.several.using(wave[0]):
                yield _copied(args)
            return
        rows = self._checked
        self._rows.names, self._rows.each = wave, rows
        with self.pack.several.using(PACK), common_draws(len(wave), rows, self._are_of_rows) as own:
            self._rows.own_draws = own
            yield (repeated(args[0], len(wave), rows), *args[1:])

    def _each_alone(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: StateOfStep) -> Logs:
        """What training_step logs with each adapter alone, on this batch, from the same state."""
        logs = Logs(self.module)
        metrics = [(m, metric_state(m)) for m in self.module.modules() if isinstance(m, Metric)]
        with torch.no_grad():
            for name in self.pack.active:
                state.put_back(name)
                with logs.caught((name,)), self.pack.several.using(name):
                    output = step(*_copied(args), **kwargs)
                loss = _loss_in(output)
                if loss is not None:
                    logs.loss((name,), loss.detach(), of=loss)
        for metric, values in metrics:
            put_metric_state(metric, *values)
        state.end()
        return logs

    def _manual(self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The module takes its steps by itself: once for each adapter, with optimizers that hold that one alone."""
        pack, strategy, logs = self.pack, self.trainer.strategy, Logs(self.module)
        state, counters = StateOfStep(self.pack), Counters(self.trainer)
        owned, output = Owned(strategy.optimizers, pack.owners), None
        for name in pack.active:
            state.put_back(name)
            counters.put_back()
            with pack.several.using(name), only(name, owned), logs.caught((name,)):
                pack.turn = name
                try:
                    output = step(*_copied(args), **kwargs)
                finally:
                    pack.turn = None
            state.note(name)
        state.end()
        if self._logs_now():
            self._log(logs)
        logs.give_means()
        return output

    def _logs_now(self) -> bool:
        """True in the last batch of every Nth step, in which Lightning's own log_every_n_steps logs."""
        return not is_accumulating(self.trainer) and (batches_that_stepped(self.trainer) + 1) % self.every == 0

    def _log(self, logs: Logs) -> None:
        """Log each adapter's own values."""
        named = logs.by_adapter()
        live_callback_metrics(self.trainer).update({key: torch.tensor(value) for key, value in named.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(named, step=batches_that_stepped(self.trainer))


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of training_step, with a batch of its own."""
    return (own_copy(args[0]), *args[1:]) if args else args


def _loss_in(output: Any) -> Any:
    """The loss in what training_step returns."""
    return output.get("loss") if isinstance(output, Mapping) else output


class _HandsOut(torch.autograd.Function):
    """A loss whose gradients are known already: its backward pass hands them out, times what comes in. They are put
    where they belong, and not through autograd, which would call the parameters' own hooks a second time."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, gradients: list[Tensor | None], parameters: Any) -> Tensor:
        ctx.gradients, ctx.parameters = gradients, parameters
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        for p, own in zip(ctx.parameters, ctx.gradients):
            if own is not None:
                p.grad = own * g if p.grad is None else p.grad + own * g
        return None, None, None, None
