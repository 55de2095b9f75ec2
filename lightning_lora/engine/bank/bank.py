"""Many adapters on one running base: a slot for each, and for each batch, or each row of it, the one that it uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.bank.cells import LayerFactors
from lightning_lora.engine.bank.copies import Rooms
from lightning_lora.engine.bank.folding import Folded
from lightning_lora.engine.bank.forking import survive_forks
from lightning_lora.engine.bank.inside import Inside
from lightning_lora.engine.bank.layers import attach, check_detachable, check_one_device, detach, new_cells
from lightning_lora.engine.bank.layout import Index, Layout, Said, said
from lightning_lora.engine.bank.planning import check_counts, plan_of, watched
from lightning_lora.engine.bank.routing import One, Routes, Routing
from lightning_lora.engine.bank.rows import Rows
from lightning_lora.engine.bank.slab import MemoryPlan, Slab, free_bytes
from lightning_lora.engine.bank.slots import Entry, Slots
from lightning_lora.engine.bank.tiers import HostStore, Store
from lightning_lora.engine.bank.use import Names, Use
from lightning_lora.engine.bank.writing import problem_written, write
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BankError, ConfigError, TargetError, listed


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
            check_counts(0, host_capacity=host_capacity)
        self.model, self.capacity, self.max_rank = model, capacity, max_rank
        self._routes = Routes()
        self._cells = new_cells(model, self._routes, target_modules, exclude_modules)
        self._plan = plan_of(self._cells, capacity, max_rank, dtype)
        # The bank lives on this weight's device and follows it.
        self._watched = watched(self._cells)
        self._device = self._plan.device
        free = free_bytes(self._device)
        if free is not None and self._plan.bytes > free:
            raise BankError(
                f"The bank does not fit: {self._plan}, of which {free / 2**30:.3g} GiB are free. Lower max_rank, or "
                "capacity: other adapters wait in the memory of the processor, or on disk."
            )
        self._slots = Slots(self._allocated(self._device), capacity, HostStore(host_capacity, store))
        self._insides: list[Inside] = []
        self._folded: Folded | None = None
        self._is_open = True
        self._fetcher: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        for cell in self._cells.values():
            attach(cell.module, cell)
        survive_forks(self)

    @property
    def plan(self) -> MemoryPlan:
        """What the slots take, and the copies that are kept beside them just now."""
        with self._slots.change:
            of_entries = sum(e.one.copies for e in self._slots.entries.values() if e.one is not None)
        return replace(self._plan, copies=of_entries + self._rooms.bytes)

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
        return plan_of(new_cells(model, Routes(), target_modules, exclude_modules), capacity, max_rank, dtype)

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} adapters in {self.plan})"

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
                if old is not None and (not replace or self._is_folded(old)):
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
            if self._is_folded(entry):
                raise BankError(f"{name!r} is folded into the base: leave `with bank.folded(...)` first.")
            self._slots.remove(entry)

    def _is_folded(self, entry: Entry) -> bool:
        return self._folded is not None and self._folded.entry is entry

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep the adapter in its slot, whatever else comes; `pinned=False` undoes it."""
        with self._slots.change:
            self._slots.resident(name).pinned = pinned

    def prefetch(self, *names: str) -> Future[None]:
        """Bring adapters into slots in the background, before they are used. The result may be waited for."""
        with self._slots.change:
            for name in names:
                self._slots.entry(name)
            if self._fetcher is None or self._process != os.getpid():  # a fork has no thread of the other process
                self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="lightning_lora bank")
                self._process = os.getpid()
            return self._fetcher.submit(self._fetch, names)

    def _fetch(self, names: Sequence[str]) -> None:
        for name in names:
            with self._slots.change:
                self._slots.resident(name)

    # What is used.

    def use(self, names: Names, *, layout: Layout | None = None, rows: Index | None = None) -> Use:
        """`with bank.use("legal"):` every row uses that adapter; `with bank.use(["legal", "code", None]):` row by row,
        None being the bare base; `use(None)` is the bare base.

        It holds for this thread, or asyncio task, alone: enter it in the thread that calls the model.

        Row by row, the first dimension of what a layer is called with is that of the rows. Any other one is an error
        that names the layer, but for the beams and returned sequences of transformers' `generate`, unless you say
        how the rows lie in it:

            with bank.use(["legal", "code"], layout="tiled"):  # a b a b, as classifier-free guidance has them
                unet(torch.cat([x, x]), ...)
            with bank.use(["legal", "code"], layout="repeated"):  # a a b b, as frames of videos, or choices
                model(videos.flatten(0, 1))
            with bank.use(["legal", "code"], rows=[0, 0, 0, 1]):  # layers with 4 positions; others have 2 rows
                model(patches, texts)

        `rows_inside` says it for a part of the model. What no shape shows stays yours to see to: that the first
        dimension, where it has the size of the rows, is that of the rows. It is not where two images of one text stand
        beside two texts (`rows_inside` for the module that takes the images), and where code of your own puts the
        sequence first, or picks tokens without a name that says so, and there are as many as rows: use one adapter for
        a batch there. What is known is refused: torch's and transformers' modules that take the sequence first, experts
        and what lies beside a router, towers that pack, and learned tables of positions.

        Raises BankError for a name that is not there, and where more adapters are in use than there are slots,
        ConfigError for rows that cannot be.
        """
        if not (names is None or isinstance(names, str)):
            names = list(names)
        return Use(self, names, said(len(names) if isinstance(names, list) else 1, layout, rows))

    def rows_inside(self, module: nn.Module, rows: Callable[..., Index]) -> Inside:
        """In each call of `module`, a part of the model, `rows` says to which row each position belongs.

        It is called with what the module is called with, and returns a number for each position in the first dimension
        of the layers inside: the place of its row among the names that are in use. For towers whose images, unequally
        many a row, lie one after the other:

            inside = bank.rows_inside(model.vision, lambda patches, row_of_patch: row_of_patch)
            with bank.use(["legal", "code"]):
                model(...)
            inside.remove()  # or when the bank is closed

        A part of the part that sees another number of positions (patches that are merged) takes a `rows_inside` of its
        own. Not asked where one adapter is used for all rows; before the model is compiled. Raises TargetError for a
        module of another model.
        """
        name = next((name for name, other in self.model.named_modules() if other is module), None)
        if name is None or not callable(rows):
            raise TargetError(
                f"bank.rows_inside takes a module of the model that the bank serves, and a function; it was given a "
                f"{type(module).__name__} and {rows!r:.80}."
            )
        inside = Inside(module, name, rows, self._routes)
        self._insides.append(inside)
        return inside

    def _enter(self, use: Use) -> None:
        with self._slots.lock:
            self._check_open()
            use.routing, use.entries = self._routed(use.names, use.said)
            use.is_open = True
            self._slots.uses.add(use)

    def _routed(self, names: Names, said: Said) -> tuple[Routing | None, Sequence[Entry]]:
        if isinstance(names, str):
            if self._folded is not None:
                return self._enter_folded([names])
            entry = self._slots.resident(names)
            entry.users += 1
            return self._one(entry), (entry,)
        return self._enter_rows([None] if names is None else list(names), said)

    def _one(self, entry: Entry) -> One:
        if entry.one is None:
            assert entry.slot is not None
            entry.one = One(entry.slot, entry.rank, entry.is_affine, self._device)
        return entry.one

    def _enter_rows(self, names: list[str | None], said: Said) -> tuple[Routing | None, Sequence[Entry]]:
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
            self._slots.release(entries)
            raise
        ones = {entry.name: self._one(entry) for entry in entries}
        of_rows = [None if name is None else ones[name] for name in names]
        return Rows(of_rows, self.capacity, self._device, self._rooms, said), entries

    def _enter_folded(self, names: Sequence[str | None]) -> tuple[Routing | None, Sequence[Entry]]:
        assert self._folded is not None
        if list(names) != [self._folded.name]:
            raise BankError(
                f"{self._folded.name!r} is folded into the base, so nothing else can be used: "
                f"{listed(map(str, names))}."
            )
        return self._folded, ()

    @contextmanager
    def folded(self, name: str) -> Iterator[None]:
        """Inside, the base's own weights hold the adapter, so that it costs nothing; outside, they are as they were,
        bit for bit.

        The weights are those of all threads: another one, or a task that was begun before, calls the model inside of
        `with bank.use(name)`, which costs nothing either, and gets an AdapterStateError where it does not. Takes memory
        for a second copy of the adapted weights. Raises BankError while anything is in use, the bare base too, or the
        model runs in another thread; AdapterStateError for a layer whose weight cannot hold an adapter.
        """
        with self._slots.change:
            self._check_open()
            entry = self._slots.resident(name)
            is_bare = any(use.routing is None for use in self._slots.uses)
            busy = listed(map(repr, self._slots.busy())) or "The bare base" * is_bare
            if busy or self._folded is not None:
                what = busy or repr(self._folded and self._folded.name)
                raise BankError(f"{what} is in use: fold an adapter when it serves alone.")
            fold = Folded(entry, self._routes)
            fold.begin(list(self._cells.values()))
            entry.users += 1
            self._folded = fold
        try:
            yield
        finally:
            self._unfold(fold)

    def _unfold(self, fold: Folded) -> None:
        with self._slots.change:
            if self._folded is fold:
                fold.end()
                self._folded = None
                self._slots.release([fold.entry])

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
            for inside in self._insides:
                inside.remove()
            self._is_open = False
        if self._fetcher is not None:
            self._fetcher.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if not self._is_open:
            raise BankError("The bank was closed.")
        parameters, name = self._watched
        device = parameters[name].device
        if device != self._device:
            check_one_device((name, cell.module) for name, cell in self._cells.items())
            self._follow(device)

    def _follow(self, device: torch.device) -> None:
        """The model was moved: so is the slab."""
        if self._slots.busy():
            raise BankError(f"The model was moved to {device} while adapters were in use.")
        before = self._slots.slab
        self._slots.slab = self._allocated(device)
        self._slots.slab.data.copy_(before.data)
        self._device = device
        self._plan = replace(self._plan, device=device)
        for entry in self._slots.entries.values():
            entry.one = None

    def _allocated(self, device: torch.device) -> Slab:
        shapes = {name: cell.shapes(self.max_rank) for name, cell in self._cells.items()}
        slab = Slab(shapes, self.capacity + 1, self._plan.dtype, device)
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
