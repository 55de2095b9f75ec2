"""Serves many adapters on one running base: each adapter has a slot, each row of a batch uses one adapter or none."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_lora.checked import whole
from lightning_lora.engine.bank.layers import attach, check_detachable, check_one_device, detach, new_cells
from lightning_lora.engine.bank.routing import Folded, Index, Layout, Names, One, Routes, Routing, Said, Use, said
from lightning_lora.engine.bank.rows import Inside, Rows
from lightning_lora.engine.bank.slab import MemoryPlan, Slab, check_fits, check_memory, plan_of, watched, write
from lightning_lora.engine.bank.slots import USUAL_RANK, Entry, HostStore, Rooms, Slots, Store, survive_forks
from lightning_lora.engine.layers.cell import LayerFactors
from lightning_lora.errors import AdapterStateError, BankError, ConfigError, TargetError, listed


class Bank:
    """The part of AdapterBank that needs no files: `put` adds an adapter that is given as tensors.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 64,
        *,
        max_rank: int = USUAL_RANK,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        dtype: torch.dtype | None = None,
        host_capacity: int | None = None,
        disk: str | os.PathLike[str] | Store | None = None,
    ) -> None:
        """
        Args:
            model: The base, or what holds it, such as a LightningModule.
            capacity: Adapters that have a slot at the same time.
            max_rank: The largest rank that fits. Memory grows with it; smaller ranks take no more time for it.
            target_modules: All layers that any of the adapters adapts, by the rules of LoRAConfig.
            exclude_modules: Layers that none of them adapts.
            dtype: Of the slots; None is the base's. An adapter in a wider one is rounded.
            host_capacity: Adapters that wait in the processor's memory; None sets no limit.
            disk: A folder for those beyond that, or a Store; None keeps none there.

        Raises ConfigError for a number that cannot be, TargetError for a layer that cannot be served,
        AdapterStateError where `model` has adapters or a bank, BankError where the slots do not fit into memory.
        """
        if host_capacity is not None:
            whole("host_capacity", host_capacity, least=0)
        store = self._store(disk)
        self.model, self.capacity, self.max_rank = model, capacity, max_rank
        self._routes = Routes()
        self._cells = new_cells(model, target_modules, exclude_modules)
        self._plan = plan_of(self._cells, capacity, max_rank, dtype)
        # The bank lives on this weight's device and follows it.
        self._watched = watched(self._cells)
        check_memory(self._plan)
        self._slots = Slots(self._allocated(self._plan.device), capacity, HostStore(host_capacity, store))
        self._uses: dict[Use, Sequence[Entry]] = {}
        """The open `with bank.use(...)` blocks, and the adapters that each uses."""
        self._insides: list[Inside] = []
        self._folded: Folded | None = None
        self._is_open = True
        self._fetcher: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        for cell in self._cells.values():
            attach(cell, self._routes)
        survive_forks(self)

    def _store(self, disk: str | os.PathLike[str] | Store | None) -> Store | None:
        """The store that the argument `disk` means."""
        if isinstance(disk, str | os.PathLike):
            raise ConfigError(f"disk={disk!r} is a folder, which AdapterBank takes; Bank takes a Store.")
        return disk

    @property
    def plan(self) -> MemoryPlan:
        """The memory that the slots take, and the copies that are kept beside them at the moment."""
        with self._slots.change:
            of_entries = sum(e.one.copies for e in self._slots.entries.values() if e.one is not None)
        return replace(self._plan, copies=of_entries + self._rooms.bytes)

    @classmethod
    def plan_for(cls, *args: Any, **settings: Any) -> MemoryPlan:
        """The memory that the slots of a bank with the same arguments would take. Nothing is allocated, and the model
        is not changed."""
        bound = inspect.signature(cls).bind(*args, **settings)
        bound.apply_defaults()
        given = bound.arguments
        cells = new_cells(given["model"], given["target_modules"], given["exclude_modules"])
        return plan_of(cells, given["capacity"], given["max_rank"], given["dtype"])

    @property
    def names(self) -> list[str]:
        """The names of all adapters, the longest unused first."""
        with self._slots.change:
            return list(self._slots.entries)

    @property
    def resident(self) -> list[str]:
        """The names of the adapters that have a slot, the longest unused first."""
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

    # Adapters come and go.

    def put(self, name: str, factors: Mapping[str, LayerFactors], *, replace: bool = False) -> None:
        """Add the adapter `name`, given as layer -> its factors; layers that `factors` leaves out get no update.

        With `replace=True` it takes the place of an adapter of that name; a batch that is using the old one goes on
        with it. Raises AdapterFormatError for layers that the bank does not serve, and for tensors of another shape or
        not finite; BankError if there is no room, or if the name is taken and `replace` is False. The bank is then as
        it was.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"The name of an adapter must be a text that is not empty, not {name!r}.")
        rank = check_fits(self._cells, name, factors, self.max_rank)
        is_affine = any(values.is_affine for values in factors.values())
        with self._slots.change:
            self._check_open()
            if not replace:
                self.check_new(name)
            slot, leaving = self._slots.take_slot(name, makes_room=False)
        try:
            self._slots.move_out(leaving, slot)
            self._slots.clear(slot)
            write(self._slots.slab, self._cells, slot, name, factors)
            with self._slots.change:
                old = self._slots.settled(name) if name in self else None
                if old is not None and (not replace or self._is_folded(name)):
                    raise BankError(
                        f"{name!r} was added by another thread at the same time, or is folded into the base: remove "
                        "it, or leave `with bank.folded(...)`, and add it again."
                    )
                if old is not None:
                    self._slots.remove(old)
                self._slots.add(Entry(name, rank, is_affine, pinned=old is not None and old.pinned), slot)
        except BaseException:
            with self._slots.change:
                self._slots.give_back(slot)
            raise

    def check_new(self, name: str) -> None:
        """Raise BankError if the name is taken."""
        if name in self:
            raise BankError(f"The bank has an adapter {name!r} already: remove it, or pass replace=True.")

    def remove(self, name: str) -> None:
        """Remove the adapter. A batch that is using it goes on with it."""
        with self._slots.change:
            entry = self._slots.settled(name)
            if self._is_folded(name):
                raise BankError(f"{name!r} is folded into the base: leave `with bank.folded(...)` first.")
            self._slots.remove(entry)

    def _is_folded(self, name: str) -> bool:
        return self._folded is not None and self._folded.name == name

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep the adapter in its slot when others need room; `pinned=False` undoes it."""
        with self._slots.change:
            self._slots.resident(name).pinned = pinned

    def prefetch(self, *names: str) -> Future[None]:
        """Bring adapters into slots in the background, before they are used; the future ends when they are there."""
        with self._slots.change:
            for name in names:
                self._slots.entry(name)
            if self._fetcher is None or self._process != os.getpid():  # a forked process lacks its parent's thread
                self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="lightning_lora bank")
                self._process = os.getpid()
            return self._fetcher.submit(self._fetch, names)

    def _fetch(self, names: Sequence[str]) -> None:
        for name in names:
            with self._slots.change:
                self._slots.resident(name)

    # Adapters are used.

    def use(self, names: Names, *, layout: Layout | None = None, rows: Index | None = None) -> Use:
        """Choose the adapters for the calls of the model inside a `with` block.

        `with bank.use("legal"):` uses one adapter for every row of a batch. `with bank.use(["legal", "code", None]):`
        uses one for each row, where None means the bare base. `use(None)` is the bare base for all rows.

        The choice holds for this thread, or asyncio task, alone: enter the block in the thread that calls the model.

        With one adapter for each row, the first dimension of a layer's input must count the rows. An input of another
        size is an error that names the layer, except for the beams and returned sequences of transformers' `generate`.
        For other inputs, say how the rows lie in the first dimension:

            with bank.use(["legal", "code"], layout="tiled"):  # a b a b, as classifier-free guidance has them
                unet(torch.cat([x, x]), ...)
            with bank.use(["legal", "code"], layout="repeated"):  # a a b b, as frames of videos, or choices
                model(videos.flatten(0, 1))
            with bank.use(["legal", "code"], rows=[0, 0, 0, 1]):  # layers with 4 positions; others have 2 rows
                model(patches, texts)

        `rows_inside` says it for a part of the model.

        One thing no shape shows, and you have to see to it: a first dimension that has the size of the rows must be
        that of the rows. Two cases break this. If two images of one text stand beside two texts, call `rows_inside` for
        the module that takes the images. If your own code puts the sequence first, or selects as many tokens as there
        are rows, use one adapter for the batch. Known cases raise an error: torch's and transformers' modules that take
        the sequence first, experts and layers beside a router, towers that pack images, and learned position tables.

        Raises BankError for an unknown name, and if more adapters are in use than there are slots; ConfigError for a
        `layout` or `rows` that is not valid.
        """
        if not (names is None or isinstance(names, str)):
            names = list(names)
        how = said(len(names) if isinstance(names, list) else 1, layout, rows)
        return Use(self._routes, names, how, self._begin, self._end)

    def rows_inside(self, module: nn.Module, rows: Callable[..., Index]) -> Inside:
        """Let the function `rows` say, in each call of `module`, to which row each position belongs.

        `module` is a part of the model. `rows` is called with the arguments of the module. It returns a number for each
        position in the first dimension of the layers inside: the index of its row in the list given to `use`. This is
        for towers that take the images of all rows one after the other, where rows differ in their number of images:

            inside = bank.rows_inside(model.vision, lambda patches, row_of_patch: row_of_patch)
            with bank.use(["legal", "code"]):
                model(...)
            inside.remove()  # or when the bank is closed

        A module inside `module` that sees another number of positions (merged patches) needs a `rows_inside` of its
        own. Call it before the model is compiled. `rows` is not called while one adapter is used for all rows. Raises
        TargetError for a module of another model.
        """
        name = next((name for name, other in self.model.named_modules() if other is module), None)
        if name is None or not callable(rows):
            raise TargetError(
                f"bank.rows_inside takes a module of the model that the bank serves, and a function; it was given a "
                f"{type(module).__name__} and {rows!r:.80}. Pass a submodule of the bank's model."
            )
        inside = Inside(module, name, rows, self._routes)
        self._insides.append(inside)
        return inside

    def _begin(self, use: Use) -> None:
        with self._slots.lock:
            self._check_open()
            use.routing, self._uses[use] = self._routed(use.names, use.said)
            use.is_open = True

    def _end(self, use: Use) -> None:
        with self._slots.lock:
            self._slots.release(self._uses.pop(use, ()))

    def _routed(self, names: Names, said: Said) -> tuple[Routing | None, Sequence[Entry]]:
        """The routing for `names`, and the adapters that it uses, each in a slot and with one user more."""
        if isinstance(names, str) and self._folded is None:  # the usual case, without the lists below
            entry = self._slots.resident(names)
            entry.users += 1
            return self._one(entry), (entry,)
        of_rows: Sequence[str | None] = [names] if isinstance(names, str) or names is None else names
        if not of_rows:
            raise BankError("bank.use was given an empty list: name an adapter, or None, for each row.")
        distinct = list(dict.fromkeys(of_rows))
        if self._folded is not None:
            if distinct != [self._folded.name]:
                raise BankError(
                    f"{self._folded.name!r} is folded into the base, so nothing else can be used: "
                    f"{listed(map(str, distinct))}."
                )
            return self._folded, ()
        named = [name for name in distinct if name is not None]
        for name in named:  # before any is brought into a slot
            self._slots.entry(name)
        ones: dict[str | None, One] = {}
        entries: list[Entry] = []
        try:
            for name in named:
                entry = self._slots.resident(name)
                entry.users += 1  # an entry with users stays in its slot
                entries.append(entry)
                ones[name] = self._one(entry)
        except BaseException:
            self._slots.release(entries)
            raise
        if not named:
            return None, ()
        return Rows([ones.get(name) for name in of_rows], self.capacity, self._plan.device, self._rooms, said), entries

    def _one(self, entry: Entry) -> One:
        if entry.one is None:
            assert entry.slot is not None
            entry.one = One(entry.slot, entry.rank, entry.is_affine, self._plan.device)
        return entry.one

    @contextmanager
    def folded(self, name: str) -> Iterator[None]:
        """Put the adapter into the base's weights inside a `with` block, where it costs no time; after the block they
        are as they were, bit for bit.

        All threads share the weights. Another thread, or a task that was begun before, has to call the model inside
        `with bank.use(name)`, which costs no time either; otherwise it gets an AdapterStateError. The block takes
        memory for a second copy of the adapted weights. Raises BankError while any adapter or the bare base is in use,
        or the model runs in another thread; AdapterStateError for a layer whose weight cannot hold an adapter.
        """
        with self._slots.change:
            self._check_open()
            entry = self._slots.resident(name)
            is_bare = any(use.routing is None for use in self._uses)
            busy = listed(map(repr, self._slots.busy())) or "The bare base" * is_bare
            if busy or self._folded is not None:
                what = busy or repr(self._folded and self._folded.name)
                raise BankError(f"{what} is in use: fold an adapter when nothing else is in use.")
            assert entry.slot is not None
            fold = Folded(name, self._routes)
            fold.begin(entry.slot, list(self._cells.values()))
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
                self._slots.release([self._slots.entry(fold.name)])

    def close(self) -> None:
        """Take the bank off the model, which is then as before. Raises BankError while an adapter is in use."""
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
        if device != self._plan.device:
            check_one_device((name, cell.module) for name, cell in self._cells.items())
            self._follow(device)

    def _follow(self, device: torch.device) -> None:
        """Move the slab to `device`, to which the model was moved."""
        if self._slots.busy():
            raise BankError(
                f"The model was moved to {device} while adapters were in use: leave `with bank.use(...)` before you "
                "move it."
            )
        before = self._slots.slab
        self._slots.slab = self._allocated(device)
        self._slots.slab.data.copy_(before.data)
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
