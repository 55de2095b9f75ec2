"""Checks what the user says about how the rows of a batch lie in the first dimension of a layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

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
