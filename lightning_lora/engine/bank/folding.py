"""Puts an adapter into the base's own weights for a while, and lets no other thread compute with changing weights.

All threads share the weights. So `routes.folded` is set before they are changed and reset after they are changed back,
and a layer checks it before and after it has read them: a thread that has not entered `bank.use` of that adapter gets
an error. A thread that enters it while they are being changed waits for the bank's lock. A thread that is still inside
when they are changed back gets an error, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.engine.bank.cells import Cell
from lightning_lora.engine.bank.evidence import runs_elsewhere
from lightning_lora.engine.bank.routing import Routes, Routing
from lightning_lora.engine.bank.slots import Entry
from lightning_lora.errors import AdapterStateError, BankError


class Folded(Routing):
    """The routing for an adapter that is in the base's weights, from `begin` to `end`. Both are called with the bank's
    lock held."""

    def __init__(self, entry: Entry, routes: Routes) -> None:
        self.entry, self.name, self.thread = entry, entry.name, threading.get_ident()
        self._routes, self.is_open = routes, False
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self, cells: Sequence[Cell]) -> None:
        """Put the adapter into the weights, and use it in this thread. If it raises, nothing is changed."""
        slot = self.entry.slot
        assert slot is not None
        self._routes.folded = self  # from now on, a forward outside bank.use raises at its first layer
        try:
            if runs_elsewhere(self._routes.served):
                raise BankError(
                    f"The model runs in another thread, which would go on with {self.name!r} in its weights: fold an "
                    "adapter when no other thread uses the model."
                )
            with torch.no_grad():
                folded = [cell.folded(slot) for cell in cells]
        except BaseException:
            self._routes.folded = None
            raise
        for cell, parameters in zip(cells, folded):
            self._before.append((cell.module._parameters, dict(cell.module._parameters)))
            cell.module._parameters.update(parameters)
        self.is_open = True
        self._routes.enter(self, self)

    def end(self) -> None:
        """Put the weights back as they were."""
        self.is_open = False
        for parameters, before in self._before:
            parameters.update(before)
        self._routes.folded = None
        self._routes.leave(self)

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if not self.is_open:
            raise AdapterStateError(
                f"{self.name!r} was folded into the base when this thread entered bank.use, and is not folded any "
                "more: leave `with bank.folded(...)` after all threads that use it, or enter bank.use again."
            )
        return base
