"""A routing says which row of a batch uses which adapter. `bank.use` makes it once, and every layer reads it.

A routing belongs to the thread, or to the asyncio task, that entered `bank.use`: others do not see it. Layers ask for
it when they run, also from inside a compiled graph, so a graph does not depend on it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_lora.engine.torch_private import is_view
from lightning_lora.errors import AdapterStateError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.cells import Cell, Factors
    from lightning_lora.engine.bank.layers import Folded

InUse: TypeAlias = "tuple[tuple[Routes, Routing | None, Entered], ...]"
_IN_USE: ContextVar[InUse] = ContextVar("lightning_lora_bank", default=())
"""What was entered in this thread or task and not left, for all banks, the last one first. A routing of None is the
bare base."""

FEW_POSITIONS = 4
"""Rows are grouped by adapter for at most so many positions (tokens) a row, as in decoding. With more positions the
gather costs more than it saves."""


class Entered(Protocol):
    """The `with` block that owns a routing: it enters the routing and leaves it."""

    is_open: bool


class Routes:
    """The routings of one bank."""

    served: frozenset[int] = frozenset()
    """The ids of its layers."""
    folded: Folded | None = None
    """The routing of an adapter that is folded into the base's weights. It is set before the weights are changed, and
    reset after they are changed back. A layer checks it before it reads them, and after."""
    sequence_first: str | None = None
    """A module of the model that takes the sequence before the rows, where there is one."""

    def current(self) -> Routing | None:
        """The routing in use in this thread or task."""
        for routes, routing, use in _IN_USE.get():
            if routes is self:
                if routing is not None and not use.is_open:
                    raise AdapterStateError(
                        "This code runs in a copied context (an asyncio task's, for example) that was made inside a "
                        "`with bank.use(...)` block which has ended, or that another thread has left. End such tasks "
                        "first, or enter bank.use in the task."
                    )
                return routing
        return None

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """Add the updates in use here to `base`, the output of the cell's layer for x. May write into `base`."""
        routing = self.current()
        if routing is not None:
            return routing.apply(cell, base, x)
        self.check_weights()
        return base

    def check_weights(self) -> None:
        """Raise AdapterStateError if an adapter is folded into the weights and no adapter is in use here."""
        folded = self.folded
        if folded is not None and self.current() is None:
            raise AdapterStateError(
                f"{folded.name!r} was folded into the base by another thread or task, and nothing is in use here: "
                f"enter `with bank.use({folded.name!r}):` here too, which takes no time while it is folded."
            )

    def updates(self) -> bool:
        """True if layers that are called here add updates to their outputs."""
        routing = next((routing for routes, routing, _ in _IN_USE.get() if routes is self), None)
        return routing is not None and routing is not self.folded

    def enter(self, routing: Routing | None, use: Entered) -> None:
        """Use `routing` in this thread or task until `use` leaves."""
        _IN_USE.set(((self, routing, use), *_IN_USE.get()))

    def leave(self, use: Entered) -> bool:
        """Use again, in this thread or task, what was in use before `use` was entered. Returns whether nothing was
        entered after it; such a block stays in use."""
        in_use = _IN_USE.get()
        last = next((other for routes, _, other in in_use if routes is self), None)
        _IN_USE.set(tuple(entry for entry in in_use if entry[2] is not use))
        return last is use

    def replace(self, routing: Routing) -> None:
        """Use `routing` in place of the one in use here, until `put_back` or until its block ends."""
        self.enter(routing, next(use for routes, _, use in _IN_USE.get() if routes is self))

    @staticmethod
    def put_back(routing: Routing) -> None:
        """Use again what `routing` replaced."""
        _IN_USE.set(tuple(entry for entry in _IN_USE.get() if entry[1] is not routing))


class Routing:
    """Says which adapters the rows of a batch use, and adds their updates."""

    device_type: str
    """The device type of the bank and of its layers. It is kept here, since asking a tensor takes a tenth of the time
    of a small product."""

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """Add the updates to `base`, the output of the cell's layer for x. May write into `base`."""
        raise NotImplementedError

    def close(self) -> None:
        """Called when the `with` block ends: gives memory back."""

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """`add`, in the precision of `base`, also under autocast."""
        if x.dtype != base.dtype and x.is_floating_point():
            x = x.to(base.dtype)
        if torch.is_autocast_enabled(self.device_type):
            with torch.autocast(self.device_type, enabled=False):
                return self.add(cell, base, x)
        return self.add(cell, base, x)


class One(Routing):
    """All rows use the adapter in `slot`."""

    def __init__(self, slot: int, rank: int, is_affine: bool, device: torch.device) -> None:
        self.slot, self.rank, self.is_affine, self.device_type = slot, rank, is_affine, device.type
        self._factors: dict[int, Factors] = {}

    @property
    def copies(self) -> int:
        """Bytes of the factors that are kept here in another dtype than that of the slots."""
        parts = (t for factors in list(self._factors.values()) for t in factors)
        return sum(t.nbytes for t in parts if not is_view(t))  # the others lie in the slab

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if self.is_affine:
            base = cell.affine(base, self.slot)
        factors = self._factors.get(cell.key)
        if factors is None or factors[0].dtype != base.dtype:
            with torch.inference_mode(False):  # a later forward that needs gradients may use the same factors
                factors = tuple(t.to(base.dtype) for t in cell.one(self.slot, self.rank))
            self._factors[cell.key] = factors
        return cell.add_one(base, x, factors)
