"""The `with bank.use(...)` block: it puts adapters in use when it is entered, and takes them out when it is left."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from lightning_lora.engine.bank.layout import Said
from lightning_lora.engine.bank.routing import Routing
from lightning_lora.engine.bank.slots import Entry
from lightning_lora.errors import BankError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.bank import Bank

Names: TypeAlias = str | Sequence[str | None] | None


class Use:
    """The context manager that `bank.use` returns. It can be entered again after it was left, not while it is open."""

    __slots__ = ("bank", "entries", "is_open", "names", "routing", "said", "thread")

    routing: Routing | None
    entries: Sequence[Entry]

    def __init__(self, bank: Bank, names: Names, said: Said) -> None:
        self.bank, self.names, self.said, self.is_open = bank, names, said, False

    def __enter__(self) -> None:
        if self.is_open:
            raise BankError("This bank.use(...) is entered already: call bank.use(...) again for another `with` block.")
        self.thread = threading.get_ident()
        self.bank._enter(self)
        self.bank._routes.enter(self.routing, self)

    def __exit__(self, raised: type[BaseException] | None = None, *_: object) -> None:
        was_last = self.bank._routes.leave(self)
        self.end()
        if not was_last and raised in (None, GeneratorExit):
            raise BankError(
                f"`with bank.use({self.names!r:.80})` was left in another thread or task than it was entered in, or "
                "while one that was entered after it is open: what the model computed meanwhile may have used what "
                "that one names, or nothing. Leave first what was entered last, where it was entered; of generators "
                "that yield inside of it, each runs in a thread, a task or a contextvars.Context of its own."
            )

    def end(self) -> None:
        """End the use, in whichever thread this is called."""
        self.is_open = False
        if self.routing is not None:
            self.routing.close()
        self.bank._slots.leave(self)
