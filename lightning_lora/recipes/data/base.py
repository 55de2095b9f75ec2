"""A LightningDataModule over a source: each split is read and encoded once, when a stage first needs it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data.adapter_column import NamedBatch, NamedRows
from lightning_lora.recipes.data.source import Source, Splits, require_columns

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
