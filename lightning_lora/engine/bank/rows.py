"""The routing of a batch in which each row has an adapter of its own.

If the first dimension of a layer's input has the size of the rows, it holds one row at each place. Any other layout is
known (the beams of `generate`), given by the user, or an error: a guess could use one user's adapter for another user.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence, Set
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.bank.layout import AS_THEY_ARE, Said
from lightning_lora.engine.bank.routing import FEW_POSITIONS, One, Routing
from lightning_lora.engine.torch_private import CALL, GENERATE_LOCALS, called, generation
from lightning_lora.errors import AdapterStateError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.cells import Cell, Factors
    from lightning_lora.engine.bank.copies import Copies, Rooms


# Looks into the running calls to find out how the rows lie in a layer's input, where its shape does not show it.
#
# It reads Python's call stack, which is slow: a layer whose input plainly has the rows first never asks.


def beams(layer: nn.Module) -> tuple[int, int] | None:
    """The number of prompts that transformers' `generate` was given, and the number of rows to which it has repeated
    them, with the beams (or returned sequences) of a prompt side by side. None if `layer` does not run in `generate`.
    """
    known = generation()
    if known is None:
        return None
    config, prompts, ids = (known[name] for name in GENERATE_LOCALS[1:])
    if not isinstance(prompts, int) or not isinstance(ids, Tensor) or id(layer) not in _members(known["self"]):
        return None
    times = max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)
    return (prompts, ids.shape[0]) if ids.shape[0] == prompts * times else None


def begins_as_an_input(x: Tensor, layer: nn.Module, served: Set[int]) -> bool | None:
    """True if `x` is a view, with the same first dimension, of a tensor that the model was called with. False if it is
    a view with another first dimension; None if it is no view of such a tensor.

    "The model" is the outermost running module that contains all the layers whose ids are `served`.
    """
    found = None
    for given in _inputs(layer, served):
        if given.dim() and given.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            found = given.shape[0] == x.shape[0] and given.stride(0) == x.stride(0)
            if found:
                return True
    return found


def runs_elsewhere(served: Set[int]) -> bool:
    """True if another thread is calling a module that contains one of the layers whose ids are `served`."""
    here = threading.get_ident()
    return any(
        not served.isdisjoint(_members(called(call)[0]))
        for thread, frame in sys._current_frames().items()
        if thread != here
        for call in _calls(frame)
    )


def _calls(frame: FrameType | None) -> list[FrameType]:
    """The calls of modules that led to `frame`, the innermost first."""
    calls: list[FrameType] = []
    while frame is not None:
        if frame.f_code is CALL:
            calls.append(frame)
        frame = frame.f_back
    return calls


def _inputs(layer: nn.Module, served: Set[int]) -> Iterator[Tensor]:
    for call in reversed(_calls(sys._getframe(1))):
        module, *given = called(call)
        if module is not layer and served <= _members(module):
            return _tensors(given)
    return iter(())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from _tensors(getattr(value, part.name, None))


_MEMBERS: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


def _members(module: nn.Module) -> frozenset[int]:
    """The ids of `module` and of all modules inside it."""
    members = _MEMBERS.get(module)
    if members is None:
        members = _MEMBERS[module] = frozenset(map(id, module.modules()))
    return members


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
                found = tuple(t.to(dtype) for t in cell.many(index, self._rank, copies))
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


class Groups:
    """Groups rows by adapter; each group is padded to the size of the largest."""

    def __init__(self, index: Tensor, order: Tensor, back: Tensor) -> None:
        self.index = index
        """The slot of each group."""
        self._order, self._back = order, back

    @staticmethod
    def of(slots: list[int], device: torch.device) -> Groups | None:
        """The groups of rows that have these slots. None if each row has an adapter of its own, or if padding would
        cost more than grouping saves."""
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
        """Undo `gathered`: (groups, longest * positions, n) -> (rows, positions, n)"""
        return update.view(len(self._order), -1, update.shape[-1]).index_select(0, self._back)
