"""An adapter in the base's own weights, for a while: nobody computes with weights that change under the computation.

The weights belong to all threads. So `routes.folded` is set before they are changed, and unset before they are changed
back, and a layer looks at it after it has read them: who is not in a `bank.use` of that adapter gets an error then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lora.engine.bank.cells import Cell
from lightning_lora.engine.bank.evidence import runs_elsewhere
from lightning_lora.engine.bank.routing import Routes, Routing
from lightning_lora.errors import AdapterStateError, BankError


class Folded(Routing):
    """The adapter `name` is in the base's own weights."""

    def __init__(self, name: str, routes: Routes) -> None:
        self.name, self._routes = name, routes
        self.is_open = True

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if self._routes.folded is not self:
            raise AdapterStateError(
                f"{self.name!r} was folded into the base when this entered bank.use, and is no more: leave "
                "`with bank.folded(...)` after those that use it, or enter bank.use again."
            )
        return base


def begin_to_fold(name: str, routes: Routes) -> Folded:
    """From here on a forward that uses nothing is refused. Raises BankError where one runs already."""
    use = routes.folded = Folded(name, routes)
    if runs_elsewhere(routes.served):
        routes.folded = None
        raise BankError(
            f"The model runs in another thread, which would go on with {name!r} in its weights: fold an adapter when "
            "it serves alone."
        )
    return use


@contextmanager
def weights_folded(cells: Sequence[Cell], slot: int, use: Folded, routes: Routes) -> Iterator[None]:
    """Inside, the weights of the layers hold the adapter in `slot`, which is in use here."""
    before: list[dict[str, Any]] = [dict(cell.module._parameters) for cell in cells]
    token = routes.enter(use, use)
    try:
        with torch.no_grad():
            weights = [cell.folded(slot) for cell in cells]
        for cell, parameters in zip(cells, weights):
            cell.module._parameters.update(parameters)
        yield
    finally:
        routes.folded, use.is_open = None, False
        routes.leave(token)
        for cell, originals in zip(cells, before):
            cell.module._parameters.update(originals)
