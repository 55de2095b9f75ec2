"""An adapter in the base's own weights, for a while: nobody computes with weights that change under the computation.

The weights belong to all threads. So `routes.folded` is set before they are changed and unset after they are changed
back, and a layer looks at it before and after it has read them: who is in no `bank.use` of that adapter gets an error.
Who enters one waits while they are changed, for the lock of the bank; who is in one when they are changed back gets an
error, too.
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
    """The adapter is in the base's own weights, from `begin` to `end`, which are called with the bank's lock."""

    def __init__(self, entry: Entry, routes: Routes) -> None:
        self.entry, self.name, self.thread = entry, entry.name, threading.get_ident()
        self._routes, self.is_open = routes, False
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self, cells: Sequence[Cell]) -> None:
        """Take the adapter into the weights, and use it here. What this raises changes nothing."""
        slot = self.entry.slot
        assert slot is not None
        self._routes.folded = self  # from here on, a forward that uses nothing is refused at its first layer
        try:
            if runs_elsewhere(self._routes.served):
                raise BankError(
                    f"The model runs in another thread, which would go on with {self.name!r} in its weights: fold an "
                    "adapter when it serves alone."
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
        """Give the weights back as they were."""
        self.is_open = False
        for parameters, before in self._before:
            parameters.update(before)
        self._routes.folded = None
        self._routes.leave(self)

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if not self.is_open:
            raise AdapterStateError(
                f"{self.name!r} was folded into the base when this entered bank.use, and is no more: leave "
                "`with bank.folded(...)` after those that use it, or enter bank.use again."
            )
        return base
