"""`with bank.use(...)`: what is in use, from where it is entered to where it is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from lightning_lora.engine.bank.layout import Said
from lightning_lora.errors import BankError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.bank import Bank

Names: TypeAlias = str | Sequence[str | None] | None


class Use:
    """What `bank.use` returns, for `with`; one at a time."""

    __slots__ = ("_bank", "_entries", "_names", "_routing", "_said", "_token", "is_open")

    def __init__(self, bank: Bank, names: Names, said: Said) -> None:
        self._bank, self._names, self._said, self.is_open = bank, names, said, False

    def __enter__(self) -> None:
        if self.is_open:
            raise BankError("This is in use already: call bank.use(...) again for another `with`.")
        self._routing, self._entries = self._bank._enter(self._names, self._said)
        self.is_open = True
        self._token = self._bank._routes.enter(self._routing, self)

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        self._bank._routes.leave(self._token)
        if self._routing is not None:
            self._routing.close()
        self._bank._slots.leave(self._entries, bare=self._routing is None)
