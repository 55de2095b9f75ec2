"""How the rows of a batch lie in the first dimension of a layer's input: what the user says, and what the model's
structure shows."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor, nn

from lightning_lora.engine.layers.cell import NOT_HIDDEN, Hidden
from lightning_lora.errors import ConfigError

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


# Finds layers of which the model's structure shows that the first dimension of their input does not count the rows.

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
