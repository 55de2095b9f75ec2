"""Which rows of a batch use which adapter, resolved once and read by every layer.

A routing belongs to the thread, or to the asyncio task, that entered `bank.use`: others do not see it. Layers ask for
it when they run, also from inside a compiled graph, so a graph does not depend on it.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_lora.errors import AdapterStateError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.cells import Cell, Factors
    from lightning_lora.engine.bank.copies import Copies, Rooms

InUse: TypeAlias = "tuple[tuple[Routes, Routing, Entered], ...]"
_IN_USE: ContextVar[InUse] = ContextVar("lightning_lora_bank", default=())
"""The routing of each bank: there is hardly ever more than one."""

FEW_POSITIONS = 4
"""Up to so many positions of a row, reading each adapter once is worth gathering the rows that share it."""


class Entered(Protocol):
    """What has entered a routing, and will leave it."""

    is_open: bool


class Routes:
    """The routings of one bank."""

    def current(self) -> Routing | None:
        """The one in use where this is called."""
        for routes, routing, use in _IN_USE.get():
            if routes is self:
                if not use.is_open:
                    raise AdapterStateError(
                        "This runs in a copy of a context (an asyncio task's, for example) that was made inside of a "
                        "`with bank.use(...)` which has ended. End such tasks first, or enter bank.use in the task."
                    )
                return routing
        return None

    def enter(self, routing: Routing | None, use: Entered) -> Token[InUse]:
        """Use `routing` here from now on, as long as `use` is open; give what this returns to `leave`."""
        others = _IN_USE.get()
        if others:
            others = tuple(entry for entry in others if entry[0] is not self)
        return _IN_USE.set(others if routing is None else ((self, routing, use), *others))

    @staticmethod
    def leave(token: Token[InUse]) -> None:
        _IN_USE.reset(token)


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
        self._slot, self._rank, self._is_affine, self.device_type = slot, rank, is_affine, device.type
        self._factors: dict[int, Factors] = {}

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if self._is_affine:
            base = cell.affine(base, self._slot)
        factors = self._factors.get(cell.key)
        if factors is None or factors[0].dtype != base.dtype:
            with torch.inference_mode(False):  # kept for others, who may need gradients
                factors = tuple(t.to(base.dtype) for t in cell.one(self._slot, self._rank))
            self._factors[cell.key] = factors
        return cell.add_one(base, x, factors)


class Rows(Routing):
    """Row i uses the adapter in `slots[i]`. What it gathers from the slab it keeps, for all steps of a generation."""

    def __init__(self, slots: list[int], rank: int, is_affine: bool, device: torch.device, rooms: Rooms) -> None:
        self.count, self._rank, self._is_affine, self._rooms = len(slots), rank, is_affine, rooms
        self.device_type = device.type
        self.index = torch.tensor(slots, device=device)
        self._copies: dict[bool, Copies] = {}
        self._may_give_back = True
        self._factors: dict[tuple[int, torch.dtype, bool], Factors] = {}
        self._groups = Groups.of(slots, device)

    def groups(self, positions: int) -> Groups | None:
        """How to bring rows with the same adapter together, where that pays."""
        return self._groups if positions <= FEW_POSITIONS else None

    def factors(self, cell: Cell, dtype: torch.dtype, groups: Groups | None = None) -> Factors:
        key = (cell.key, dtype, groups is not None)
        found = self._factors.get(key)
        if found is None:
            index = self.index if groups is None else groups.index
            # What is kept for further forwards may meet gradients there.
            with torch.inference_mode(False), torch.no_grad():
                copies = self._copies.get(groups is not None)
                if copies is None:
                    copies = self._copies[groups is not None] = self._rooms.copies(len(index))
                found = tuple(t.to(dtype) for t in cell.many(index, self._rank, copies))
            self._factors[key] = found
        return found

    def close(self) -> None:
        done, self._copies, self._factors = self._copies, {}, {}
        if self._may_give_back:
            for copies in done.values():
                self._rooms.give_back(copies)

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if not cell.is_batched(x) or x.shape[0] % self.count:
            raise AdapterStateError(
                f"bank.use was given {self.count} rows, and {cell.name!r} got an input of shape {tuple(x.shape)}. "
                "Name one adapter for each row of the batch, or one for all of it."
            )
        if cell.hides_rows is not None:
            raise AdapterStateError(
                f"{cell.name!r} {cell.hides_rows}, so its rows cannot be told apart. Use one adapter for a batch."
            )
        if self._is_affine:
            base = cell.affine(base, self.index)
        if x.requires_grad:  # the backward pass will read the factors, when this is long over
            self._may_give_back = False
        return cell.add_rows(base, x, self)


class Groups:
    """Rows of the same adapter brought together, each group padded to the length of the longest."""

    def __init__(self, index: Tensor, order: Tensor, back: Tensor) -> None:
        self.index = index
        """The slot of each group."""
        self._order, self._back = order, back

    @staticmethod
    def of(slots: list[int], device: torch.device) -> Groups | None:
        """None where each row has an adapter of its own, or padding would take more than it saves."""
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            members.setdefault(slot, []).append(row)
        longest = max(map(len, members.values()))
        if len(members) == len(slots) or len(members) * longest > 2 * len(slots):
            return None
        order: list[int] = []
        back = [0] * len(slots)
        for rows in members.values():
            for place, row in enumerate(rows):
                back[row] = len(order) + place
            order += rows + rows[:1] * (longest - len(rows))
        index, at, where = (torch.tensor(values, device=device) for values in (list(members), order, back))
        return Groups(index, at, where)

    def gathered(self, x: Tensor) -> Tensor:
        """(rows, positions, n) -> (groups, longest * positions, n)"""
        return x.index_select(0, self._order).view(len(self.index), -1, x.shape[-1])

    def scattered(self, update: Tensor) -> Tensor:
        """The way back: (groups, longest * positions, n) -> (rows, positions, n)"""
        return update.view(len(self._order), -1, update.shape[-1]).index_select(0, self._back)
