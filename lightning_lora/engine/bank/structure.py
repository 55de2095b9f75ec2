"""Finds layers of which the model's structure shows that the first dimension of their input does not count the rows."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.engine.bank.layout import Index, checked_index
from lightning_lora.engine.bank.routing import Routes
from lightning_lora.engine.bank.rows import Rows, Within

_SEQUENCE_FIRST = {
    "fsmt.modeling_fsmt.DecoderLayer",
    "fsmt.modeling_fsmt.EncoderLayer",
    "led.modeling_led.LEDEncoderSelfAttention",
    "longformer.modeling_longformer.LongformerSelfAttention",
    "xlnet.modeling_xlnet.XLNetLayer",
}
"""Classes of transformers whose layers are called with the sequence first; by name, so nothing is imported."""

_EXPERT = re.compile(r"(?!.*shared)(?!mixture).*experts?\d*(mlp|layer|ffn|_\w*)?", re.IGNORECASE)
_ROUTER = re.compile(r"(\w+_)?(gate|gating|router|routing|switch)(_\w+)?")


class Hidden(NamedTuple):
    """Why the rows cannot be found in a layer's input, in words that follow the layer's name."""

    always: str | None = None
    where_flat: str | None = None
    """A reason that holds only for inputs with no dimensions but positions and features."""


NOT_HIDDEN = Hidden()


def hidden(modules: Mapping[str, nn.Module], name: str) -> Hidden:
    """Why the rows cannot be found in the input of the layer `name`, if so; `modules` are the model's, by name."""
    parts = name.split(".")
    ancestors = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
    if any(map(_is_sequence_first, ancestors)):
        return Hidden("is called with the sequence first (build the layer with batch_first=True)")
    if any(map(_EXPERT.fullmatch, parts)) or any(_EXPERT.fullmatch(type(m).__name__) for m in ancestors[1:]):
        return Hidden("is one of several experts, each of which is called with the tokens that are sent to it")
    for outer, inner in itertools.pairwise(ancestors):
        if isinstance(inner, nn.ModuleList | nn.ModuleDict) and any(
            _ROUTER.fullmatch(child) for child in outer._modules
        ):
            return Hidden(where_flat="lies beside a router, which may call it with some of the tokens of the batch")
    for ancestor in ancestors:
        cls: Any = type(ancestor)
        if packing := _packs(cls):
            return Hidden(
                where_flat=f"lies in a {cls.__name__}, which packs the positions of all rows into one "
                f"dimension (it takes {packing}); bank.rows_inside says to which row each belongs"
            )
    return NOT_HIDDEN


def sequence_first(modules: Mapping[str, nn.Module]) -> str | None:
    """The name of a module that takes the sequence before the rows; None if there is none."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    for name, module in modules.items():
        if (isinstance(module, kinds) and not module.batch_first) or _is_sequence_first(module):
            return name
    return None


def _is_sequence_first(module: nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
        return True
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return any(name.removeprefix("transformers.models.") in _SEQUENCE_FIRST for name in names)


def _packs(cls: type[nn.Module]) -> str | None:
    """The argument of the class's forward that shows that it takes rows of unequal length without padding; or None."""
    try:
        arguments = inspect.signature(cls.forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in ("cu_seqlens", "grid_thw") if name in arguments), None)


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
