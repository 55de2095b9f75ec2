"""What callbacks, the data module and optimizers hold of their own, to be saved as it was when a batch began."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

_IN_BATCH = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip

Held = dict[str, Any]


class Holders:
    """Those of a Trainer that have a state. A ModelCheckpoint's is never put back: its files are there."""

    def __init__(self, trainer: Any, own: Callback) -> None:
        self._trainer = trainer
        others = [c for c in trainer.callbacks if c is not own and not isinstance(c, Checkpoint)]
        self._callbacks = [c for c in others if is_overridden("state_dict", c)]
        self._in_batch = [c for c in self._callbacks if any(is_overridden(hook, c) for hook in _IN_BATCH)]
        data = trainer.datamodule
        self._data = data if data is not None and is_overridden("state_dict", data) else None
        self.unread = [type(x).__name__ for x in (*others, trainer.lightning_module) if _adds_to_checkpoints(x)]
        """Those that write what they want into a checkpoint, which nobody can ask for at another time."""

    def state(self, *, in_batch: bool) -> Held:
        """With `in_batch`, without those that no hook inside of a batch can change."""
        callbacks: Iterable[Any] = self._in_batch if in_batch else self._callbacks
        return {
            "callbacks": {c.state_key: copy.deepcopy(c.state_dict()) for c in callbacks},
            "data": copy.deepcopy(self._data.state_dict()) if self._data is not None else None,
            "optimizers": [[_options(group) for group in o.param_groups] for o in self._trainer.optimizers],
        }

    def put(self, held: Held, checkpoint: dict[str, Any]) -> None:
        """Have `checkpoint` say what was held, in the place of what is."""
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
    own = ("lightning.", "lightning_lora.")  # whose weights are averages, or that note what was before the batch
    return is_overridden("on_save_checkpoint", one) and not one.on_save_checkpoint.__module__.startswith(own)
