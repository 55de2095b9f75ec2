"""Which rows of a batch use which adapter, resolved once and read by every layer.

A routing belongs to the thread, or to the asyncio task, that entered `bank.use`: others do not see it. Layers ask for
it when they run, also from inside a compiled graph, so a graph does not depend on it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_lora.errors import AdapterStateError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.cells import Cell, Factors
    from lightning_lora.engine.bank.folding import Folded

InUse: TypeAlias = "tuple[tuple[Routes, Routing | None, Entered], ...]"
_IN_USE: ContextVar[InUse] = ContextVar("lightning_lora_bank", default=())
"""What was entered here and not left, of all banks, the last one first; None is the bare base."""

FEW_POSITIONS = 4
"""Up to so many positions of a row, reading each adapter once is worth gathering the rows that share it."""


class Entered(Protocol):
    """What has entered a routing, and will leave it."""

    is_open: bool


class Routes:
    """The routings of one bank."""

    served: frozenset[int] = frozenset()
    """The ids of its layers."""
    folded: Folded | None = None
    """What is used while an adapter is in the weights of the base: set before they are changed, and unset after they
    are changed back. A layer asks before it reads them, and after."""
    sequence_first: str | None = None
    """A module of the model that takes the sequence before the rows, where there is one."""

    def current(self) -> Routing | None:
        """The one in use where this is called."""
        for routes, routing, use in _IN_USE.get():
            if routes is self:
                if routing is not None and not use.is_open:
                    raise AdapterStateError(
                        "This runs in a copy of a context (an asyncio task's, for example) that was made inside of a "
                        "`with bank.use(...)` which has ended, or where one was entered that another thread has left. "
                        "End such tasks first, or enter bank.use in the task."
                    )
                return routing
        return None

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """`base`, the output of the cell's layer for x, with the updates in use where this is called. May write into
        `base`."""
        routing = self.current()
        if routing is not None:
            return routing.apply(cell, base, x)
        self.check_weights()
        return base

    def check_weights(self) -> None:
        """Raise AdapterStateError where the weights hold an adapter and nothing is in use here."""
        folded = self.folded
        if folded is not None and self.current() is None:
            raise AdapterStateError(
                f"{folded.name!r} was folded into the base by another thread or task, and nothing is in use here: "
                f"enter `with bank.use({folded.name!r}):` here too, which costs nothing meanwhile."
            )

    def updates(self) -> bool:
        """Whether layers that are called here add updates to what their weights give."""
        routing = next((routing for routes, routing, _ in _IN_USE.get() if routes is self), None)
        return routing is not None and routing is not self.folded

    def enter(self, routing: Routing | None, use: Entered) -> None:
        """Use `routing` here from now on, as long as `use` is open, until it leaves."""
        _IN_USE.set(((self, routing, use), *_IN_USE.get()))

    def leave(self, use: Entered) -> bool:
        """Use here what was in use before; returns whether `use` was the last to enter, and here. One that was entered
        after it stays in use."""
        in_use = _IN_USE.get()
        last = next((other for routes, _, other in in_use if routes is self), None)
        _IN_USE.set(tuple(entry for entry in in_use if entry[2] is not use))
        return last is use

    def replace(self, routing: Routing) -> None:
        """Use `routing` in place of the one in use here, as long as that one might be, or until `put_back`."""
        self.enter(routing, next(use for routes, _, use in _IN_USE.get() if routes is self))

    @staticmethod
    def put_back(routing: Routing) -> None:
        """Use what `routing` took the place of."""
        _IN_USE.set(tuple(entry for entry in _IN_USE.get() if entry[1] is not routing))


class Routing:
    """What the rows of a batch use."""

    device_type: str
    """That of the bank, hence of all that its layers compute. Asking a tensor for it takes a tenth of a product."""

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """`base`, the output of the cell's layer for x, with the updates. May write into `base`."""
        raise NotImplementedError

    def close(self) -> None:
        """Nobody will use it any more."""

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """The same, in the precision of `base`, whatever autocast says."""
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
        """Bytes of the factors that are kept here in another precision than that of the slots."""
        parts = (t for factors in list(self._factors.values()) for t in factors)
        return sum(t.nbytes for t in parts if t._base is None)  # else a view of the slab

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if self.is_affine:
            base = cell.affine(base, self.slot)
        factors = self._factors.get(cell.key)
        if factors is None or factors[0].dtype != base.dtype:
            with torch.inference_mode(False):  # kept for others, who may need gradients
                factors = tuple(t.to(base.dtype) for t in cell.one(self.slot, self.rank))
            self._factors[cell.key] = factors
        return cell.add_one(base, x, factors)
