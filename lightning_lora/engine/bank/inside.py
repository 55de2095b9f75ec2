"""Gives a part of a model its own layout of rows: an image tower, for example, may see several images for each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.engine.bank.layout import Index, checked_index
from lightning_lora.engine.bank.routing import Routes
from lightning_lora.engine.bank.rows import Rows, Within


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
