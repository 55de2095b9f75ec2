"""The `with bank.use(...)` block: it puts adapters in use when it is entered, and takes them out when it is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from lightning_lora.engine.bank.layout import Said
from lightning_lora.errors import BankError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.bank import Bank

Names: TypeAlias = str | Sequence[str | None] | None


class Use:
    """The context manager that `bank.use` returns. It can be entered again after it was left, not while it is open."""

    __slots__ = ("_bank", "_entries", "_names", "_routing", "_said", "_token", "is_open")

    def __init__(self, bank: Bank, names: Names, said: Said) -> None:
        self._bank, self._names, self._said, self.is_open = bank, names, said, False

    def __enter__(self) -> None:
        if self.is_open:
            raise BankError("This bank.use(...) is entered already: call bank.use(...) again for another `with` block.")
        self._routing, self._entries = self._bank._enter(self._names, self._said)
        self.is_open = True
        self._token = self._bank._routes.enter(self._routing, self)

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self._bank._routes.leave(self._token)
        if self._routing is not None:
            self._routing.close()
        self._bank._slots.leave(self._entries, bare=self._routing is None)
