"""A routing says which row of a batch uses which adapter. `bank.use` makes it once, and every layer reads it.

A routing belongs to the thread, or to the asyncio task, that entered `bank.use`: others do not see it. Layers ask for
it when they run, also from inside a compiled graph, so a graph does not depend on it.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_lora.engine.forwards import is_running, runs_elsewhere
from lightning_lora.engine.layers.cell import Cell, Factors
from lightning_lora.engine.torch_private import is_view
from lightning_lora.errors import AdapterStateError, BankError, ConfigError

# How the rows of a batch lie in the first dimension of a layer's input, as the user says it.

Layout: TypeAlias = Literal["repeated", "tiled"]
Index: TypeAlias = Sequence[int] | Tensor


class Said(NamedTuple):
    """The layout that the user has given; both fields are None if each position is a row, in order."""

    layout: Layout | None = None
    positions: tuple[int, ...] | None = None
    """The row of each position."""


AS_THEY_ARE = Said()


def said(count: int, layout: Layout | None, rows: Index | None) -> Said:
    """Check `layout` and `rows`, given to `bank.use` with `count` names. Raises ConfigError."""
    if layout is not None and layout not in get_args(Layout):
        raise ConfigError(
            f"layout={layout!r}: layout is 'repeated' (rows lie as a a b b) or 'tiled' (rows lie as a b a b)."
        )
    if rows is None:
        return Said(layout) if layout else AS_THEY_ARE
    if layout is not None:
        raise ConfigError("Give layout= or rows=, not both: rows= already says to which row each position belongs.")
    index = checked_index(rows, count)
    if len(index) == count and index != tuple(range(count)):
        raise ConfigError(
            f"rows={list(index)} has as many positions as there are names, so for a layer with {count} positions it is "
            "not known whether they are the rows in order or follow rows=. Put the names in that order, or use "
            "bank.rows_inside for the module whose positions follow rows=."
        )
    return Said(positions=index)


def checked_index(rows: Index, count: int) -> tuple[int, ...]:
    """Check `rows`, which gives for each position its row, a number below `count`. Raises ConfigError."""
    is_index = not isinstance(rows, Tensor) or (rows.dim() == 1 and not rows.dtype.is_floating_point)
    values = rows.tolist() if isinstance(rows, Tensor) else list(rows) if isinstance(rows, Sequence) else None
    if not is_index or not values or any(type(value) is not int for value in values):
        seen = f"a {rows.dtype} tensor of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"{rows!r:.80}"
        raise ConfigError(f"rows= takes a whole number for each position, the number of its row; it was given {seen}.")
    wrong = next((place for place, row in enumerate(values) if not 0 <= row < count), None)
    if wrong is not None:
        raise ConfigError(
            f"rows= says that position {wrong} belongs to row {values[wrong]}, and bank.use was given {count} names: "
            f"rows are counted from 0 to {count - 1}."
        )
    return tuple(values)


Names: TypeAlias = str | Sequence[str | None] | None
InUse: TypeAlias = "tuple[tuple[Routes, Routing | None, Use | Folded], ...]"
_IN_USE: ContextVar[InUse] = ContextVar("lightning_lora_bank", default=())
"""What was entered in this thread or task and not left, for all banks, the last one first. A routing of None is the
bare base."""


class Routes:
    """The routings of one bank."""

    folded: Folded | None = None
    """The routing of an adapter that is folded into the base's weights. It is set before the weights are changed, and
    reset after they are changed back. A layer checks it before it reads them, and after."""

    def current(self) -> Routing | None:
        """The routing in use in this thread or task."""
        for routes, routing, use in _IN_USE.get():
            if routes is self:
                if use.suspended:
                    _check_alone(use)
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
        if base.is_cuda and torch.cuda.is_current_stream_capturing():
            raise AdapterStateError(
                f"A CUDA graph is recorded, with {cell.name!r} of a bank in it. It would replay the adapters that are "
                "in use now, whatever is in use then: use torch.compile(mode='reduce-overhead'), which leaves the "
                "updates out of its graphs (torch 2.9 on), or call bank.close() first."
            )
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
        routing, use = next((entry[1:] for entry in _IN_USE.get() if entry[0] is self), (None, None))
        if use is not None and use.suspended:
            _check_alone(use)
        return routing is not None and routing is not self.folded

    def enter(self, routing: Routing | None, use: Use | Folded) -> None:
        """Use `routing` in this thread or task until `use` leaves."""
        _IN_USE.set(((self, routing, use), *_IN_USE.get()))

    def suspended(self) -> tuple[FrameType, ...]:
        """The generators and coroutines that are suspended inside of what is in use here."""
        if not (in_use := _IN_USE.get()):
            return ()
        outer = (_resumable(use.frame) for routes, _, use in in_use if routes is self)
        return tuple(frame for frame in outer if frame is not None and not is_running(frame))

    def leave(self, use: Use | Folded) -> bool:
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


class Use:
    """The context manager that `bank.use` returns. It can be entered again after it was left, not while it is open."""

    __slots__ = ("_begin", "_end", "_routes", "frame", "is_open", "names", "routing", "said", "suspended", "thread")

    routing: Routing | None
    frame: FrameType | None
    """The call that entered it, while it is open."""
    suspended: tuple[FrameType, ...]
    """The generators that were suspended inside of `bank.use` when it was entered. They share what is in use with it:
    as long as it is open, none of them may run the model."""

    def __init__(
        self, routes: Routes, names: Names, said: Said, begin: Callable[[Use], None], end: Callable[[Use], None]
    ) -> None:
        self.names, self.said, self.is_open = names, said, False
        self.frame, self.suspended = None, ()
        self._routes, self._begin, self._end = routes, begin, end

    def __enter__(self) -> None:
        if self.is_open:
            raise BankError("This bank.use(...) is entered already: call bank.use(...) again for another `with` block.")
        self.thread = threading.get_ident()
        self._begin(self)
        self.frame, self.suspended = sys._getframe(1), self._routes.suspended()
        self._routes.enter(self.routing, self)

    def __exit__(self, raised: type[BaseException] | None = None, *_: object) -> None:
        was_last = self._routes.leave(self)
        self.end()
        if not was_last and raised in (None, GeneratorExit):
            raise BankError(
                f"`with bank.use({self.names!r:.80})` was left in another thread or task than it was entered in, or "
                "while one that was entered after it is open: what the model computed meanwhile may have used what "
                f"that one names, or nothing. {_APART}"
            )

    def end(self) -> None:
        """End the use, in whichever thread this is called."""
        self.is_open = False
        self.frame, self.suspended = None, ()
        if self.routing is not None:
            self.routing.close()
        self._end(self)


_APART = (
    "Leave first what was entered last, where it was entered; of generators that yield inside of it, each runs in a "
    "thread, a task or a contextvars.Context of its own."
)
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _check_alone(use: Any) -> None:
    """Raise AdapterStateError in a generator that was suspended inside of `bank.use` when `use` was entered."""
    inside = next(filter(is_running, use.suspended), None)
    if inside is not None:
        raise AdapterStateError(
            f"The model runs in {inside.f_code.co_name!r}, inside of its `with bank.use(...)`, while `with bank.use("
            f"{use.names!r:.80})` is open, which was entered elsewhere after this one had yielded: a thread has one "
            f"choice at a time. {_APART}"
        )


def _resumable(frame: FrameType | None) -> FrameType | None:
    """The innermost generator or coroutine among the callers that `frame` begins with."""
    while frame is not None and not frame.f_code.co_flags & _RESUMABLE:
        frame = frame.f_back
    return frame


# Puts an adapter into the base's own weights for a while, and lets no other thread compute with changing weights.
#
# All threads share the weights. So `routes.folded` is set before they are changed and reset after they are changed
# back, and a layer checks it before and after it has read them: a thread that has not entered `bank.use` of that
# adapter gets an error. A thread that enters it while they are being changed waits for the bank's lock. A thread that
# is still inside when they are changed back gets an error, too.


class Folded(Routing):
    """The routing for an adapter that is in the base's weights, from `begin` to `end`. Both are called with the bank's
    lock held."""

    frame, suspended = None, ()

    def __init__(self, name: str, routes: Routes) -> None:
        self.name, self.thread = name, threading.get_ident()
        self._routes, self.is_open = routes, False
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def begin(self, slot: int, cells: Sequence[Cell]) -> None:
        """Put the adapter, which lies in `slot`, into the weights, and use it in this thread. If it raises, nothing is
        changed."""
        self._routes.folded = self  # from now on, a forward outside bank.use raises at its first layer
        try:
            if runs_elsewhere({id(cell.module) for cell in cells}):
                raise BankError(
                    f"The model runs in another thread, which would go on with {self.name!r} in its weights: fold an "
                    "adapter when no other thread uses the model."
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
        """Put the weights back as they were."""
        self.is_open = False
        for parameters, before in self._before:
            parameters.update(before)
        self._routes.folded = None
        self._routes.leave(self)

    def apply(self, cell: Cell, base: Tensor, x: Tensor) -> Tensor:
        if not self.is_open:
            raise AdapterStateError(
                f"{self.name!r} was folded into the base when this thread entered bank.use, and is not folded any "
                "more: leave `with bank.folded(...)` after all threads that use it, or enter bank.use again."
            )
        return base
