"""A LightningDataModule over a source: each split is read and encoded once, when a stage first needs it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data.source import Source, Splits, require_columns
from lightning_lora.recipes.tasks.base import IGNORED, lengths_for_flash

NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}


class SourceData(pl.LightningDataModule):
    """Makes batches of `batch_size` rows from the splits of `source`. Only the training rows are shuffled, by the
    global random state, which `seed_everything` sets.

    Subclasses implement `encode`, and set `collate` (and `collate_prompts`, for predicting). Both must be picklable,
    since worker processes get them.
    """

    collate: Callable[[list[Any]], Any] | None = None
    collate_prompts: Callable[[list[Any]], Any] | None = None

    def __init__(self, source: Source, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"batch_size {batch_size} must be at least 1, num_workers {num_workers} at least 0.")
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.adapter_column: str | None = None
        """The column that names each row's adapter, read when predicting: see AdapterColumn."""
        self._encoded: dict[str, Dataset] = {}

    @abstractmethod
    def encode(self, rows: Any, split: str) -> Dataset:
        """Turn the rows of "train", "validation", "test" or "predict" into what the model takes, one item per row."""

    @cached_property
    def splits(self) -> Splits:
        """The rows of the source, read at the first access."""
        return self.source.load()

    def prepare_data(self) -> None:
        """Read and encode on one process of each machine, so that the others find it in the cache of `datasets`."""
        self.setup(self.trainer.state.fn if self.trainer is not None else None)

    def setup(self, stage: str | None = None) -> None:
        """Read and encode the splits that `stage` needs; None means training and validation. Raises DataError if one is
        missing."""
        needed = NEEDED[str(getattr(stage, "value", stage))] if stage is not None else ("train", "validation")
        for split in needed:
            if split not in self._encoded:
                rows = self._rows(split)
                self._encoded[split] = self.encode(rows, split)
                if split == "predict" and self.adapter_column is not None:
                    require_columns(rows, [self.adapter_column], split)
                    names = rows.with_format(None)[self.adapter_column]
                    self._encoded[split] = NamedRows(self._encoded[split], list(names), self.adapter_column)

    def _rows(self, split: str) -> Any:
        rows = getattr(self.splits, split)
        if rows is None:
            raise DataError(
                "This data has no test split. Validate instead, or give the source a test split (test_path, "
                "test_split) or a test_fraction."
            )
        return rows

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("predict")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        collate = self.collate_prompts if split == "predict" and self.collate_prompts is not None else self.collate
        if isinstance(self._encoded[split], NamedRows):
            assert self.adapter_column is not None
            collate = NamedBatch(collate or default_collate, self.adapter_column)
        return DataLoader(
            self._encoded[split],
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


# Collates rows of unequal length into one batch.

FILL = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORED}
"""Input -> its value in padding. `input_ids` get the tokenizer's padding token. Position 0 starts a new example."""


@dataclass(frozen=True)
class PadRows:
    """Pads each 1-d input to the longest row of the batch, and stacks numbers. It is a class so that it can be
    pickled."""

    pad_token_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: self._stack(name, [torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def _stack(self, name: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim == 0:
            return torch.stack(values)
        longest = max(map(len, values))
        fill = self.pad_token_id if name == "input_ids" else FILL[name]
        return torch.stack(
            [
                pad(value, (0, longest - len(value)) if self.side == "right" else (longest - len(value), 0), value=fill)
                for value in values
            ]
        )


class PadPacked(PadRows):
    """PadRows for rows that hold several examples each. It adds the examples' lengths, for flash attention."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, **lengths_for_flash(batch["position_ids"])}


# A column that names each row's adapter. It is left out when rows are encoded, and put back into the batches.


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
