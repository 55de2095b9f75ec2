"""Keeps what a module logs in its training step apart by adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Logs:
    """What training_step logs in each wave. The mean over all adapters goes by the module's own name."""

    def __init__(self, module: Any) -> None:
        self._module, self._own_log = module, module.log
        self._calls: dict[tuple[str, ...], list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]] = {}
        self._losses: dict[tuple[str, ...], Tensor] = {}

    @contextmanager
    def caught(self, wave: tuple[str, ...]) -> Iterator[None]:
        """Inside, what the module logs is kept for the adapters of that wave."""
        calls = self._calls[wave] = []
        attributes: dict[str, Any] = vars(self._module)
        before = attributes.get("log", _ABSENT)

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            calls.append((name, value.detach() if isinstance(value, Tensor) else value, args, kwargs))

        attributes["log"] = log
        try:
            yield
        finally:
            if before is _ABSENT:
                del attributes["log"]
            else:
                attributes["log"] = before

    def loss(self, wave: tuple[str, ...], loss: Tensor, *, of: Tensor) -> None:
        """Note the loss of each adapter of a wave, where training_step has returned `of`, which may be their sum."""
        self._losses[wave] = loss
        if loss is not of:
            self._calls[wave] = [
                (name, loss if isinstance(v, Tensor) and v.numel() == 1 and bool(v == of) else v, args, kwargs)
                for name, v, args, kwargs in self._calls[wave]
            ]

    def forget(self, wave: tuple[str, ...]) -> None:
        """Forget what was logged for that wave."""
        del self._calls[wave]

    def give_means(self) -> None:
        """Log the mean of each value, as the module would."""
        last = next(reversed(self._calls.values()), [])
        for i, (name, value, args, kwargs) in enumerate(last):
            if _is_number(value):
                same = [
                    (len(w), calls[i][1])
                    for w, calls in self._calls.items()
                    if calls[i : i + 1] and calls[i][0] == name
                ]
                total = sum(size * torch.as_tensor(v, dtype=torch.float32).squeeze() for size, v in same)
                value = total / sum(size for size, _ in same)
            self._own_log(name, value, *args, **kwargs)

    def by_adapter(self) -> dict[str, float]:
        """ "name/adapter" -> value, for each number that was logged for the step; the loss, where none was. What is
        logged for the epoch alone (on_step=False) is left out: its mean over the epoch is not known by adapter."""
        named = {
            f"{name}/{wave[0]}": float(value)
            for wave, calls in self._calls.items()
            for name, value, _, how in calls
            if _is_number(value) and how.get("on_step") is not False
        }
        return named or {f"train_loss/{wave[0]}": float(loss) for wave, loss in self._losses.items()}


_ABSENT: Any = object()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
