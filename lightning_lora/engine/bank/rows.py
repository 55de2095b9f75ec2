"""The routing of a batch in which each row has an adapter of its own.

If the first dimension of a layer's input has the size of the rows, it holds one row at each place. Any other layout is
known (the beams of `generate`), given by the user, or an error: a guess could use one user's adapter for another user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.bank.routing import AS_THEY_ARE, Index, One, Routes, Routing, Said, checked_index
from lightning_lora.engine.bank.slots import Copies, Rooms
from lightning_lora.engine.forwards import beams
from lightning_lora.engine.layers.cell import FEW_POSITIONS, Cell, Factors, Groups
from lightning_lora.errors import AdapterStateError


class Rows(Routing):
    """Row i uses the adapter `ones[i]`, or the bare base if that is None: its slot is then `zeros`, which holds zeros.

    Factors that are copied from the slab are kept for all steps of a generation.
    """

    def __init__(
        self, ones: Sequence[One | None], zeros: int, device: torch.device, rooms: Rooms, said: Said = AS_THEY_ARE
    ) -> None:
        self.ones, self.count, self.device, self.device_type = ones, len(ones), device, device.type
        self._zeros, self._rooms, self._said = zeros, rooms, said
        used = [one for one in ones if one is not None]
        slots = [zeros if one is None else one.slot for one in ones]
        self._rank, self._is_affine = max(one.rank for one in used), any(one.is_affine for one in used)
        self.index = torch.tensor(slots, device=device)
        self._copies: dict[bool, Copies] = {}
        self._may_give_back = True
        self._factors: dict[tuple[int, torch.dtype, bool], Factors] = {}
        self._groups = Groups.of(slots, device)
        self._tiled: Rows | None = None
        self._split: Split | None = None

    def groups(self, positions: int) -> Groups | None:
        """The grouping of rows that have the same adapter, if it saves time for so many positions; else None."""
        return self._groups if positions <= FEW_POSITIONS else None

    def factors(self, cell: Cell, dtype: torch.dtype, groups: Groups | None = None) -> Factors:
        key = (cell.key, dtype, groups is not None)
        found = self._factors.get(key)
        if found is None:
            self._check_named_by_prompt(cell)
            index = self.index if groups is None else groups.index
            # A later forward that needs gradients may use the same factors.
            with torch.inference_mode(False), torch.no_grad():
                copies = self._copies.get(groups is not None)
                if copies is None:
                    copies = self._copies[groups is not None] = self._rooms.copies(len(index))
                found = tuple(t.to(dtype) for t in cell.many(index, self._rank, copies.of))
            self._factors[key] = found
        return found

    def _check_named_by_prompt(self, cell: Cell) -> None:
        """Raise AdapterStateError if `generate` runs with beams and an adapter was named for each beam. Checked once
        for each layer, since it takes as long as a small product."""
        prompts, beam_rows = beams(cell.module) or (self.count, self.count)
        if prompts < self.count == beam_rows:
            raise AdapterStateError(
                f"bank.use was given {self.count} rows, and generate was given {prompts} prompts, each of which it "
                f"continues with {beam_rows // prompts} beams: name one adapter for each prompt."
            )

    def close(self) -> None:
        done, self._copies, self._factors = self._copies, {}, {}
        if self._may_give_back:
            for copies in done.values():
                self._rooms.give_back(copies)
        if self._tiled is not None:
            self._tiled.close()

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if cell.has_rows_first(x, self.count):
            return self.add_in_order(cell, base, x)
        return self._add_as_laid(cell, base, x)

    def add_in_order(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """Add the updates where x holds the rows in order, with the positions of each row together."""
        if self._is_affine:
            base = cell.affine(base, self.index)
        if x.requires_grad:  # the backward pass, after this block, will read the copied factors
            self._may_give_back = False
        return cell.add_rows(base, x, self)

    def _add_as_laid(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """Add the updates where the shape of x does not show that it holds one row at each place."""
        if not x.numel():
            return base  # x is empty
        layout, index = self._said
        is_indexed = index is not None and x.shape[:1] == (len(index),)
        check_has_rows(cell, x, self.count, is_indexed)
        if is_indexed:
            if self._split is None:
                assert index is not None
                self._split = Split([self.ones[row] for row in index], self.device)
            return self._split.add(cell, base, x)
        size, seen = x.shape[0], f"bank.use was given {self.count} rows, and {cell.name!r} got an input of shape "
        doubt = cell.doubt(x)
        if doubt is not None:
            raise AdapterStateError(f"{seen}{tuple(x.shape)}: {doubt}")
        if size == self.count:
            return self.add_in_order(cell, base, x)
        if size % self.count == 0:
            if layout == "repeated":
                return self.add_in_order(cell, base, x)
            if layout == "tiled":
                return self._of_times(size // self.count, cell).add_in_order(cell, base, x)
            if beams(cell.module) == (self.count, size):
                return self.add_in_order(cell, base, x)
        raise AdapterStateError(f"{seen}{tuple(x.shape)}: it is not known how the rows lie in it. {_WAYS}")

    def _of_times(self, times: int, cell: Cell) -> Rows:
        """The routing of all rows, repeated `times` times: a b a b."""
        if self._tiled is None:
            self._tiled = Rows(list(self.ones) * times, self._zeros, self.device, self._rooms)
        if self._tiled.count != times * self.count:
            raise AdapterStateError(
                f"{cell.name!r} got the {self.count} rows {times} times, and other layers got them "
                f"{self._tiled.count // self.count} times: layout='tiled' cannot mean both. Enter bank.use for each "
                "number of times, or give rows=, or bank.rows_inside for a part of the model."
            )
        return self._tiled


_WAYS = (
    "Name one adapter for each row of the batch, or one, as a text, for the whole batch. If each row comes several "
    "times, give layout='repeated' (a a b b) or 'tiled' (a b a b, as torch.cat([x, x])). If one dimension holds the "
    "positions of several rows, give rows=[the row of each position], or bank.rows_inside for a part of the model."
)


def check_has_rows(cell: Cell, x: Tensor, count: int, is_indexed: bool) -> None:
    """Raise AdapterStateError if the first dimension of x is known not to count the rows."""
    if not cell.is_batched(x):
        raise AdapterStateError(
            f"bank.use was given {count} rows, and {cell.name!r} got an input of shape {tuple(x.shape)}, which has no "
            f"dimension for them. {_WAYS}"
        )
    hidden = cell.hides(x, is_indexed)
    if hidden is not None:
        raise AdapterStateError(
            f"{cell.name!r} {hidden}, so its rows cannot be told apart. Use one adapter for a batch."
        )


class Within(Routing):
    """The routing inside the module `where` (see `rows_inside`): position i belongs to the row `index[i]` of `outside`,
    the routing around it."""

    ones: Sequence[One | None]
    count: int
    device: torch.device
    scope: Any
    """The `Inside` that made this routing."""

    def __init__(self, outside: Rows | Within, index: tuple[int, ...], where: str) -> None:
        self.ones, self.count, self.device = outside.ones, outside.count, outside.device
        self.device_type, self._size, self._where = self.device.type, len(index), where
        self._split = Split([self.ones[row] for row in index], self.device)

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if not x.numel():
            return base
        check_has_rows(cell, x, self.count, is_indexed=True)
        if x.shape[0] != self._size:
            raise AdapterStateError(
                f"{cell.name!r} got an input of shape {tuple(x.shape)}, and bank.rows_inside({self._where!r}) gave the "
                f"rows of {self._size} positions. If a module inside has another number of positions, call "
                "bank.rows_inside for that module too."
            )
        return self._split.add(cell, base, x)


class Split:
    """Sorts the positions of a layer's first dimension by adapter, adds each adapter's update, and sorts them back."""

    def __init__(self, ones: Sequence[One | None], device: torch.device) -> None:
        places: dict[One | None, list[int]] = {}
        for place, one in enumerate(ones):
            places.setdefault(one, []).append(place)
        order = torch.tensor([place for of_one in places.values() for place in of_one], device=device)
        self._ones, self._sizes = list(places), [len(of_one) for of_one in places.values()]
        self._order, self._back = order, order.argsort()

    def add(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        """Add the updates to `base`, the output of the cell's layer for x."""
        bases, xs = (t.index_select(0, self._order).split(self._sizes) for t in (base, x))
        parts = [b if one is None else one.add(cell, b, part) for one, b, part in zip(self._ones, bases, xs)]
        return torch.cat(parts).index_select(0, self._back)


# Gives a part of a model its own layout of rows: an image tower, for example, may see several images for each row.


class Inside:
    """The handle that `bank.rows_inside` returns: the rows lie in one module as the user says, until `remove`."""

    def __init__(self, module: nn.Module, name: str, rows: Callable[..., Index], routes: Routes) -> None:
        self._name, self._rows, self._routes = name, rows, routes
        self._handles = (
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            # Also if the module raises, so that modules called after it have the outer routing again.
            module.register_forward_hook(self._end, always_call=True),
        )

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = self._routes.current()
        if isinstance(routing, Rows | Within):  # with one adapter for all rows the layout does not matter
            within = Within(routing, checked_index(self._rows(*args, **kwargs), routing.count), self._name)
            within.scope = self
            self._routes.replace(within)

    def _end(self, *_: Any) -> None:
        routing = self._routes.current()
        if isinstance(routing, Within) and routing.scope is self:
            self._routes.put_back(routing)

    def remove(self) -> None:
        """Take the hooks off: the rows lie in the module as in the rest of the model again."""
        for handle in self._handles:
            handle.remove()
