"""Evaluates each adapter of a pack by itself: Lightning's evaluation loop runs once for each, and EarlyStopping judges
each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_lora.engine.swap import swap
from lightning_lora.training.lightning_private import live_callback_metrics
from lightning_lora.training.many.rounds_private import (
    EvaluationLoop,
    evaluation_ends,
    metrics_held_back,
    print_results,
)
from lightning_lora.training.run_state import random_state, set_random_state

if TYPE_CHECKING:
    from lightning_lora.training.many.pack import Pack

    _StoppingHost = EarlyStopping
else:
    _StoppingHost = Callback


class EachAdapter(EvaluationLoop):
    """Mixin in front of Lightning's loop over the batches of a validation or a test."""

    lora_pack: Pack

    def run(self) -> Any:
        trainer: Any = self.trainer
        pack = self.lora_pack
        if trainer.sanity_checking or pack.several.model is not trainer.lightning_module:
            return super().run()
        is_fit = trainer.state.fn == TrainerFn.FITTING
        callbacks, verbose = trainer.callbacks, self.verbose
        names, random, live = (
            list(pack.active if is_fit else pack.members),
            random_state(),
            live_callback_metrics(trainer),
        )
        if is_fit:
            _drop_gradients(pack)
        outputs: list[dict[str, Any]] = []
        found: dict[str, dict[str, Tensor]] = {}
        logged: dict[str, Any] = {}
        pack.kept.begin(with_metrics=True)
        try:
            # Those that judge a run get the means of all adapters, once.
            trainer.callbacks = [c for c in callbacks if not isinstance(c, (EarlyStopping, Checkpoint))]
            self.verbose = False
            for i, name in enumerate(names):
                self.lora_goes_on = i > 0
                if i:
                    set_random_state(random)
                pack.kept.put(name)
                before = dict(live)
                with pack.several.using(name), metrics_held_back(trainer) as held:
                    output = super().run()
                pack.kept.note(name)
                logged |= {f"{key}/{name}": value for key, value in held.items()}
                found[name] = {key: value for key, value in live.items() if value is not before.get(key)}
                for number, of_loader in enumerate(output or ()):
                    outputs += [{}] * (number >= len(outputs))
                    outputs[number] = {**outputs[number], **{f"{key}/{name}": v for key, v in of_loader.items()}}
        finally:
            trainer.callbacks, self.verbose, self.lora_goes_on = callbacks, verbose, False
        pack.kept.end()
        metrics = {name: {key: float(v) for key, v in own.items()} for name, own in found.items()}
        pack.metrics |= metrics
        if is_fit:
            pack.history.append((trainer.global_step, metrics))
        means = {
            key: torch.stack([own[key].float() for own in found.values() if key in own]).mean()
            for key in dict.fromkeys(key for own in found.values() for key in own)
        }
        live.update({f"{key}/{name}": value for name, own in found.items() for key, value in own.items()} | means)
        if found:
            evaluation_ends(
                trainer, {**logged, **{k: v for k, v in means.items() if f"{k}/{names[0]}" in logged}}, is_fit=is_fit
            )
        if verbose and outputs:
            print_results(self, outputs, trainer.state.stage.value)
        return outputs


def _drop_gradients(pack: Pack) -> None:
    """Lightning drops gradients before a validation, outside of an open accumulation window: those of the adapter that
    the model has. Drop those of the others with them."""
    first = pack.several.current
    if first is not None and all(p.grad is None for p in pack.parameters[first]):
        for p in (p for own in pack.parameters.values() for p in own):
            p.grad = None


def evaluate_each(loop: Any, pack: Pack) -> None:
    """Have `loop` run once for each adapter of `pack`."""
    if not isinstance(loop, EachAdapter):
        swap(loop, "Each", EachAdapter)
    loop.lora_pack = pack


class StopsEach(_StoppingHost):
    """Mixin in front of EarlyStopping: judges each adapter by its own metrics, and stops that one alone. The run ends
    when no adapter is left."""

    lora_pack: Pack
    lora_states: dict[str, dict[str, Any]]
    lora_fresh: dict[str, Any]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        for _ in self.each(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for _ in self.each(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def each(self, trainer: Any) -> Iterator[None]:
        pack = self.lora_pack
        for name in list(pack.active):
            super().load_state_dict(self.lora_states.get(name, self.lora_fresh))
            before, trainer.should_stop = trainer.should_stop, False
            with _metrics_of(pack, name, trainer):
                yield
            stops, trainer.should_stop = trainer.should_stop, before
            self.lora_states[name] = super().state_dict()
            if stops:
                pack.active.remove(name)
        if not pack.active:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "each": dict(self.lora_states)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = dict(state_dict)
        self.lora_states = own.pop("each", {})
        super().load_state_dict(own)


@contextmanager
def _metrics_of(pack: Pack, name: str, trainer: Any) -> Iterator[None]:
    """Inside, the metrics that callbacks see are those of one adapter."""
    live = live_callback_metrics(trainer)
    before = dict(live)
    live.update({key: torch.tensor(value) for key, value in pack.metrics.get(name, {}).items()})
    try:
        yield
    finally:
        live.clear()
        live.update(before)


def stop_each(callback: EarlyStopping, pack: Pack) -> None:
    """Have `callback` judge each adapter of `pack` by itself."""
    if not isinstance(callback, StopsEach):
        fresh = callback.state_dict()
        swap(callback, "Each", StopsEach)
        callback.lora_fresh, callback.lora_states = fresh, {}  # type: ignore[attr-defined]
    callback.lora_pack = pack  # type: ignore[attr-defined]
