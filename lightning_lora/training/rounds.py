"""Rounds of hooks: Lightning calls a hook of one callback after another, then the module's.

Where one of them saves a checkpoint, the hook of those after it has not been called yet. What it would have done
belongs to the run, so it is called after resuming.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_lora.training.lightning_private import call_hook, hook_calls
from lightning_lora.training.run_state import random_state

# The state of callbacks, the data module and optimizers, saved as it was when a batch began.

_IN_BATCH = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip

Held = dict[str, Any]


class Holders:
    """The parts of a Trainer that have a state. A ModelCheckpoint's is never put back: its files exist already."""

    def __init__(self, trainer: Any, own: Callback) -> None:
        self._trainer = trainer
        others = [c for c in trainer.callbacks if c is not own and not isinstance(c, Checkpoint)]
        self._callbacks = [c for c in others if is_overridden("state_dict", c)]
        self._in_batch = [c for c in self._callbacks if any(is_overridden(hook, c) for hook in _IN_BATCH)]
        data = trainer.datamodule
        self._data = data if data is not None and is_overridden("state_dict", data) else None
        self.unread = [type(x).__name__ for x in (*others, trainer.lightning_module) if _adds_to_checkpoints(x)]
        """The class names of those that write into a checkpoint by on_save_checkpoint: nobody can ask for that at
        another time."""

    def state(self, *, in_batch: bool) -> Held:
        """The present states; with `in_batch`, without those of callbacks that have no hook inside of a batch."""
        callbacks: Iterable[Any] = self._in_batch if in_batch else self._callbacks
        return {
            "callbacks": {c.state_key: copy.deepcopy(c.state_dict()) for c in callbacks},
            "data": copy.deepcopy(self._data.state_dict()) if self._data is not None else None,
            "optimizers": [[_options(group) for group in o.param_groups] for o in self._trainer.optimizers],
        }

    def put(self, held: Held, checkpoint: dict[str, Any]) -> None:
        """Replace the present states in `checkpoint` by those in `held`."""
        states = checkpoint["callbacks"]
        for key, state in held["callbacks"].items():
            states.pop(key, None)
            if state:
                states[key] = state
        if self._data is not None:
            checkpoint.pop(type(self._data).__qualname__, None)
            if held["data"]:
                checkpoint[type(self._data).__qualname__] = held["data"]
        for state, groups in zip(checkpoint["optimizer_states"], held["optimizers"]):
            for group, options in zip(state.get("param_groups", ()), groups):
                group.update({name: options[name] for name in group.keys() & options.keys()})


def _options(group: dict[str, Any]) -> dict[str, Any]:
    kept = ((name, value) for name, value in group.items() if name not in ("params", "param_names"))
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in kept}


def _adds_to_checkpoints(one: Any) -> bool:
    own = ("lightning.", "lightning_lora.")  # they average weights, or note the state before the batch
    return is_overridden("on_save_checkpoint", one) and not one.on_save_checkpoint.__module__.startswith(own)


MODULE = "the LightningModule"
_HOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")
_ABSENT = object()


@dataclass
class Round:
    """A round that is running while a checkpoint is saved, or one in which an exception ended the run."""

    hook: str
    by: Any
    """The callback or module whose hook runs; None where an exception ended it."""
    torn: str
    """The name of the one whose hook the exception ended, if it has a state of its own; else ""."""
    rest: list[str]
    """The names of those whose hook is still to be called."""
    args: tuple[Any, ...]

    @property
    def is_saved_last(self) -> bool:
        """True if a ModelCheckpoint saves, which Lightning calls after all other callbacks."""
        return isinstance(self.by, Checkpoint)


def running_round(trainer: Any) -> Round | None:
    """The round that is running in this thread; None where there is none."""
    for hook, by, later, args, was_raised in hook_calls(trainer):
        if hook not in _HOOKS:
            continue
        if was_raised:  # it did not get to its end
            later = [by, *later]
        rest = [name for name, one in named(trainer) if any(one is x for x in later) and _has(one, hook)]
        has_state = by is trainer.lightning_module or is_overridden("state_dict", by)
        torn = rest[0] if was_raised and rest and has_state and not isinstance(by, Checkpoint) else ""
        return Round(hook, None if was_raised else by, torn, rest, args)
    return None


def named(trainer: Any) -> Iterator[tuple[str, Any]]:
    """All callbacks and the module, in the order of a round, each with a name that is the same in another run."""
    counts: dict[str, int] = {}
    for callback in trainer.callbacks:
        number = counts[callback.state_key] = counts.get(callback.state_key, 0) + 1
        yield f"{callback.state_key} {number}" if number > 1 else callback.state_key, callback
    yield MODULE, trainer.lightning_module


@contextmanager
def only(trainer: Any, hook: str, rest: list[str]) -> Iterator[None]:
    """Inside, `hook` is called only for those that `rest` names."""
    silenced = [one for name, one in named(trainer) if name not in rest]
    own = [(one, vars(one).get(hook, _ABSENT)) for one in silenced]
    for one in silenced:
        setattr(one, hook, None)  # Lightning passes over what cannot be called
    try:
        yield
    finally:
        for one, value in own:
            delattr(one, hook) if value is _ABSENT else setattr(one, hook, value)


def have_round(trainer: Any, hook: str, rest: list[str], *args: Any) -> None:
    """Call `hook` for those that `rest` names, as Lightning does."""
    with only(trainer, hook, rest):
        call_hook(trainer, hook, *args)


def saved_outputs(value: Any) -> tuple[Any, bool]:
    """The outputs of a training_step as values that a checkpoint can hold; and True if nothing is left out."""
    if isinstance(value, Tensor):
        return value.detach().clone(), True
    if isinstance(value, dict):
        parts = {key: saved_outputs(inner) for key, inner in value.items()}
        return {key: part for key, (part, _) in parts.items()}, all(whole for _, whole in parts.values())
    if isinstance(value, (list, tuple)):
        several = [saved_outputs(inner) for inner in value]
        return type(value)(part for part, _ in several), all(whole for _, whole in several)
    return (value, True) if isinstance(value, (int, float, str, bool, type(None))) else (None, False)


def _has(one: Any, hook: str) -> bool:
    return callable(getattr(one, hook)) and is_overridden(hook, one, Callback if isinstance(one, Callback) else None)


def rest_of(running: Round) -> dict[str, Any] | None:
    """The note on this round in a checkpoint saved in it: whose hook is still to be called, and its arguments."""
    if not running.rest and running.hook != "on_train_epoch_end":
        return None
    rest: dict[str, Any] = {"hook": running.hook, "of": running.rest, "torn": running.torn, "random": random_state()}
    if running.hook == "on_train_batch_end":
        rest["outputs"], rest["is_whole"] = saved_outputs(running.args[0])
    return rest
