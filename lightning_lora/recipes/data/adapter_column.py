"""A column that names each row's adapter. It is left out when rows are encoded, and put back into the batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from lightning_lora.errors import DataError


class NamedRows(Dataset):
    """`rows`, each with the name of its adapter in the entry `column`."""

    def __init__(self, rows: Any, names: Sequence[Any], column: str) -> None:
        if len(rows) != len(names):
            raise DataError(
                f"{len(names) - len(rows)} of {len(names)} rows were left out of the data (empty texts, for example), "
                f"so the names in column {column!r} cannot be told apart: leave such rows out of the data itself."
            )
        wrong = [name for name in names if name is not None and not isinstance(name, str)]
        if wrong:
            raise DataError(f"Column {column!r} must hold the names of adapters, but there is {wrong[0]!r:.80}")
        self.rows, self.names, self.column = rows, names, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], self.column: self.names[index]}


@dataclass(frozen=True)
class NamedBatch:
    """Calls `collate` on the rows without their names, and adds the list of names to the batch."""

    collate: Callable[[list[Any]], Any]
    column: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = [row[self.column] for row in rows]
        others = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        return {**self.collate(others), self.column: names}
