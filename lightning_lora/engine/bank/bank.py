"""Many adapters on one running base: a slot for each, and for each batch, or each row of it, the one that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.bank.cells import Cell, LayerFactors
from lightning_lora.engine.bank.copies import Rooms
from lightning_lora.engine.bank.layers import attach, check_bankable, check_detachable, detach, new_cell
from lightning_lora.engine.bank.routing import One, Routes, Routing, Rows
from lightning_lora.engine.bank.slab import MemoryPlan, Slab, free_bytes, width_of
from lightning_lora.engine.bank.slots import Entry, Slots
from lightning_lora.engine.bank.tiers import HostStore, Store
from lightning_lora.engine.bank.writing import problem_written, write
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.present import check_none_of_ours
from lightning_lora.engine.targets import select
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BankError, ConfigError, listed

Names = str | Sequence[str | None] | None


class Bank:
    """Serves many adapters on `model`, which stays where it is: its targeted layers are swapped in place.

    Adapters enter by `put`, as tensors; the hub's AdapterBank reads them from files. All methods may be called from any
    thread.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 64,
        max_rank: int = 16,
        *,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        dtype: torch.dtype | None = None,
        host_capacity: int | None = None,
        store: Store | None = None,
    ) -> None:
        if host_capacity is not None:
            _check_counts(0, host_capacity=host_capacity)
        self.model, self.capacity, self.max_rank = model, capacity, max_rank
        self._routes = Routes()
        self._cells = _cells(model, self._routes, target_modules, exclude_modules)
        self.plan = _plan(self._cells, capacity, max_rank, dtype)
        """What the slots take. Batches of several adapters copy theirs besides, into memory that is kept for others."""
        # Where the model is, one of its weights tells.
        self._watched = next(iter(self._cells.values())).module._parameters
        self._device = self.plan.device
        free = free_bytes(self._device)
        if free is not None and self.plan.bytes > free:
            raise BankError(
                f"The bank does not fit: {self.plan}, of which {free / 2**30:.3g} GiB are free. Lower max_rank, or "
                "capacity: other adapters wait in the memory of the processor, or on disk."
            )
        self._slots = Slots(self._allocated(self._device), capacity, HostStore(host_capacity, store))
        self._folded: str | None = None
        self._is_open = True
        self._fetcher: ThreadPoolExecutor | None = None
        for cell in self._cells.values():
            attach(cell.module, cell)

    @classmethod
    def plan_for(
        cls,
        model: nn.Module,
        capacity: int = 64,
        max_rank: int = 16,
        *,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryPlan:
        """What the slots of such a bank would take; nothing is taken, and `model` is not changed."""
        return _plan(_cells(model, Routes(), target_modules, exclude_modules), capacity, max_rank, dtype)

    @property
    def names(self) -> list[str]:
        """Of all adapters, the longest unused first."""
        with self._slots.change:
            return list(self._slots.entries)

    @property
    def resident(self) -> list[str]:
        """Of those that have a slot."""
        with self._slots.change:
            return [name for name, entry in self._slots.entries.items() if entry.slot is not None]

    def __len__(self) -> int:
        return len(self._slots.entries)

    def __contains__(self, name: object) -> bool:
        return name in self._slots.entries

    def __reduce__(self) -> Any:
        raise AdapterStateError("A bank cannot be copied or pickled, since its slots belong to this process.")

    # What is in it.

    def put(self, name: str, factors: Mapping[str, LayerFactors], *, replace: bool = False) -> None:
        """Add the adapter `name`; layers of the bank that `factors` leaves out stay as the base has them.

        A batch that runs meanwhile keeps what it entered with. Raises AdapterFormatError for layers that the bank does
        not serve, and for tensors of another shape or not finite, BankError where there is no room, or the name is
        taken and not `replace`; nothing is changed then.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"The name of an adapter is a text, not {name!r}.")
        rank = self._checked(name, factors)
        is_affine = any(values.is_affine for values in factors.values())
        with self._slots.change:
            self._check_open()
            if not replace:
                self.check_new(name)
            slot, leaving = self._slots.take_slot(name, makes_room=False)
        try:
            self._slots.move_out(leaving, slot)
            self._write(name, slot, factors)
            with self._slots.change:
                old = self._slots.settled(name) if name in self else None
                if old is not None and (not replace or self._folded == name):
                    raise BankError(f"{name!r} was added by another thread at the same time, or is folded just now.")
                if old is not None:
                    self._slots.remove(old)
                self._slots.add(Entry(name, rank, is_affine, pinned=old is not None and old.pinned), slot)
        except BaseException:
            with self._slots.change:
                self._slots.give_back(slot)
            raise

    def _write(self, name: str, slot: int, factors: Mapping[str, LayerFactors]) -> None:
        self._slots.clear(slot)
        with torch.no_grad():
            write(self._slots.slab, self._cells, slot, factors)
            problem = problem_written(self._slots.slab, self._cells, slot, factors)
        if problem:
            raise AdapterFormatError(f"The adapter {name!r} holds {problem}. Nothing was added.")

    def check_new(self, name: str) -> None:
        """Raise BankError where the name is taken."""
        if name in self:
            raise BankError(f"The bank has an adapter {name!r} already: remove it, or pass replace=True.")

    def remove(self, name: str) -> None:
        """Take the adapter out. A batch that runs with it ends as it began."""
        with self._slots.change:
            entry = self._slots.settled(name)
            if self._folded == name:
                raise BankError(f"{name!r} is folded into the base: leave `with bank.folded(...)` first.")
            self._slots.remove(entry)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep the adapter in its slot, whatever else comes; `pinned=False` undoes it."""
        with self._slots.change:
            self._slots.resident(name).pinned = pinned

    def prefetch(self, *names: str) -> Future[None]:
        """Bring adapters into slots in the background, before they are used. The result may be waited for."""
        with self._slots.change:
            for name in names:
                self._slots.entry(name)
            if self._fetcher is None:
                self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="lightning_lora bank")
            return self._fetcher.submit(self._fetch, names)

    def _fetch(self, names: Sequence[str]) -> None:
        for name in names:
            with self._slots.change:
                self._slots.resident(name)

    # What is used.

    def use(self, names: Names) -> Use:
        """`with bank.use("legal"):` every row uses that adapter; `with bank.use(["legal", "code", None]):` row by row,
        None being the bare base; `use(None)` is the bare base.

        It holds for this thread, or asyncio task, alone: enter it in the thread that calls the model. Rows may come
        several times over, beam by beam. They are told apart by the first dimension of what a layer is called with: row
        by row is refused where that is known to be another one (the sequence, or tokens sorted by expert). Raises
        BankError for a name that is not there, and where more adapters are in use than there are slots.
        """
        return Use(self, names)

    def _enter(self, names: Names) -> tuple[Routing | None, Sequence[Entry]]:
        with self._slots.lock:
            self._check_open()
            if isinstance(names, str):
                if self._folded is not None:
                    return self._enter_folded([names])
                entry = self._slots.resident(names)
                entry.users += 1
                if entry.one is None:
                    assert entry.slot is not None
                    entry.one = One(entry.slot, entry.rank, entry.is_affine, self._device)
                return entry.one, (entry,)
            return (None, ()) if names is None else self._enter_rows(list(names))

    def _enter_rows(self, names: list[str | None]) -> tuple[Routing | None, Sequence[Entry]]:
        if not names:
            raise BankError("bank.use was given an empty list: name an adapter, or None, for each row.")
        distinct = [name for name in dict.fromkeys(names) if name is not None]
        if self._folded is not None:
            return self._enter_folded(distinct if None not in names else [*distinct, None])
        for name in distinct:
            self._slots.entry(name)
        if not distinct:
            return None, ()
        entries: list[Entry] = []
        try:
            for name in distinct:
                entry = self._slots.resident(name)
                entry.users += 1  # from here on it stays in its slot
                entries.append(entry)
        except BaseException:
            self._slots.leave(entries)
            raise
        slots: dict[str | None, int | None] = {entry.name: entry.slot for entry in entries}
        slots[None] = self.capacity  # the row of zeros
        routing = Rows(
            [slot for slot in map(slots.get, names) if slot is not None],
            max(entry.rank for entry in entries),
            any(entry.is_affine for entry in entries),
            self._device,
            self._rooms,
        )
        return routing, entries

    def _enter_folded(self, names: Sequence[str | None]) -> tuple[Routing | None, Sequence[Entry]]:
        if list(names) != [self._folded]:
            raise BankError(
                f"{self._folded!r} is folded into the base, so nothing else can be used: {listed(map(str, names))}."
            )
        return None, ()

    @contextmanager
    def folded(self, name: str) -> Iterator[None]:
        """Inside, the base's own weights hold the adapter, for all threads, so that it costs nothing; outside, they are
        as they were, bit for bit.

        Takes memory for a second copy of the adapted weights. Nothing else can be used meanwhile. Raises BankError
        while any adapter is in use, AdapterStateError for a layer whose weight cannot hold an adapter.
        """
        with self._slots.change:
            self._check_open()
            entry = self._slots.resident(name)
            busy = self._slots.busy()
            if busy or self._folded is not None:
                raise BankError(f"{listed(busy) or self._folded!r} is in use: fold an adapter when it serves alone.")
            entry.users += 1
            self._folded = name
        cells = list(self._cells.values())
        before: list[dict[str, Any]] = [dict(cell.module._parameters) for cell in cells]
        try:
            assert entry.slot is not None
            with torch.no_grad():
                folded = [cell.folded(entry.slot) for cell in cells]
            for cell, parameters in zip(cells, folded):
                cell.module._parameters.update(parameters)
            yield
        finally:
            for cell, originals in zip(cells, before):
                cell.module._parameters.update(originals)
            self._folded = None
            self._slots.leave([entry])

    def close(self) -> None:
        """Take the bank off the model, which is then as it was. Raises BankError while an adapter is in use."""
        with self._slots.change:
            if not self._is_open:
                return
            busy = self._slots.busy()
            if busy:
                raise BankError(f"{listed(busy)} is in use: leave `with bank.use(...)` before the bank is closed.")
            for cell in self._cells.values():
                check_detachable(cell.module)
            for cell in self._cells.values():
                detach(cell.module)
            self._is_open = False
        if self._fetcher is not None:
            self._fetcher.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if not self._is_open:
            raise BankError("The bank was closed.")
        device = self._watched["weight"].device  # type: ignore[union-attr]
        if device != self._device:
            self._follow(device)

    def _follow(self, device: torch.device) -> None:
        """The model was moved: so is the slab."""
        if self._slots.busy():
            raise BankError(f"The model was moved to {device} while adapters were in use.")
        before = self._slots.slab
        self._slots.slab = self._allocated(device)
        self._slots.slab.data.copy_(before.data)
        self._device = device
        self.plan = replace(self.plan, device=device)
        for entry in self._slots.entries.values():
            entry.one = None

    def _allocated(self, device: torch.device) -> Slab:
        shapes = {name: cell.shapes(self.max_rank) for name, cell in self._cells.items()}
        slab = Slab(shapes, self.capacity + 1, self.plan.dtype, device)
        self._rooms = Rooms(slab)
        for name, cell in self._cells.items():
            cell.A, cell.B, cell.gain, cell.shift = slab.views[name]
        return slab

    def _checked(self, name: str, factors: Mapping[str, LayerFactors]) -> int:
        """The largest rank of an adapter that fits. Raises AdapterFormatError for one that does not."""
        problems = [] if factors else ["it adapts nothing"]
        unknown = [layer for layer in factors if layer not in self._cells]
        if unknown:
            endings = sorted({layer.rpartition(".")[2] for layer in unknown})
            problems.append(
                f"it adapts {listed(unknown, 3)}, which this bank does not serve (make it with target_modules "
                f"that name {listed(map(repr, endings))} too)"
            )
        for layer, values in factors.items():
            if layer in self._cells:
                problems += self._cells[layer].problems(values, self.max_rank)
        if problems:
            raise AdapterFormatError(f"{name!r} does not fit the bank: {listed(problems)}. Nothing was added.")
        return max(values.A.shape[0] for values in factors.values())


class Use:
    """What `bank.use` returns, for `with`; one at a time."""

    __slots__ = ("_bank", "_entries", "_names", "_routing", "_token", "is_open")

    def __init__(self, bank: Bank, names: Names) -> None:
        self._bank, self._names, self.is_open = bank, names, False

    def __enter__(self) -> None:
        if self.is_open:
            raise BankError("This is in use already: call bank.use(...) again for another `with`.")
        self._routing, self._entries = self._bank._enter(self._names)
        self.is_open = True
        self._token = self._bank._routes.enter(self._routing, self)

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self._bank._routes.leave(self._token)
        if self._routing is not None:
            self._routing.close()
        self._bank._slots.leave(self._entries)


def _cells(
    model: nn.Module, routes: Routes, target_modules: str | list[str], exclude_modules: str | list[str] | None
) -> dict[str, Cell]:
    """A cell for each layer that the bank is to serve. Raises before anything is changed."""
    check_none_of_ours(model, Tree.of(model))
    config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    selection = select(model, with_plain_names(config, Tree.of(model)))
    for target in selection.targets:
        check_bankable(target)
    return {target.name: new_cell(target, routes) for target in selection.targets}


def _plan(cells: Mapping[str, Cell], capacity: int, max_rank: int, dtype: torch.dtype | None) -> MemoryPlan:
    _check_counts(1, capacity=capacity, max_rank=max_rank)
    weight: Any = next(iter(cells.values())).module._parameters["weight"]
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    dtype = dtype or (weight.dtype if is_plain else torch.float32)
    width = width_of({name: cell.shapes(max_rank) for name, cell in cells.items()})
    return MemoryPlan(capacity, len(cells), max_rank, dtype, weight.device, width * dtype.itemsize)


def _check_counts(least: int, **counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ConfigError(f"{name} is {count!r}; give a whole number, {least} or more.")
