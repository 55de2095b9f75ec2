"""A callback that runs each row of a batch with its own adapter, which a column of the data names."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import Unpack

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.hub.bank import AdapterBank, BankSettings


class FolderSettings(BankSettings, total=False):
    """The keyword arguments of `AdapterBank.from_folders`."""

    capacity: int
    check_base: bool
    ignore_fields: Collection[str]


class AdapterColumn(pl.Callback):
    """`Trainer(callbacks=[AdapterColumn("adapters")]).predict(model, data)` runs each row with its own adapter;
    `validate` and `test` do so too.

    A batch is a dict. Its entry `column` is a list with the name of an adapter for each row, None or "" for the bare
    base; it is taken out before the steps of the model see the batch. The data modules of this package make it from a
    column of the rows: set their `adapter_column`.

    `adapters` is an AdapterBank of the model, or the folders that `AdapterBank.from_folders` takes, with its
    `settings`. From folders, a bank is made when the loop starts, once the model is complete, and closed when the loop
    ends.
    """

    def __init__(
        self,
        adapters: AdapterBank | Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
        column: str = "adapter",
        **settings: Unpack[FolderSettings],
    ) -> None:
        if isinstance(adapters, AdapterBank) and settings:
            raise ConfigError(f"{sorted(settings)} are settings of a bank, and AdapterColumn was given a bank.")
        self.adapters, self.column, self.settings = adapters, column, settings
        self.bank = adapters if isinstance(adapters, AdapterBank) else None
        self._use: Any = None

    def __repr__(self) -> str:
        return f"AdapterColumn({self.adapters!r:.200}, column={self.column!r})"

    def _start(self, module: LightningModule) -> None:
        if not isinstance(self.adapters, AdapterBank):
            self.bank = AdapterBank.from_folders(module, self.adapters, **self.settings)

    def _enter(self, batch: Any) -> None:
        assert self.bank is not None
        if not isinstance(batch, dict) or self.column not in batch:
            there = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
            raise DataError(
                f"AdapterColumn takes each row's adapter from the entry {self.column!r} of a batch, and this one has "
                f"{there}. Let the collate function put a list of names there."
            )
        names = batch.pop(self.column)
        if isinstance(names, str) or not all(name is None or isinstance(name, str) for name in names):
            raise DataError(
                f"The entry {self.column!r} of a batch is a list of names, one for each row, not {names!r:.80}"
            )
        use = self.bank.use([name or None for name in names])
        use.__enter__()
        self._use = use

    def _leave(self) -> None:
        use, self._use = self._use, None
        if use is not None:
            use.__exit__(None, None, None)

    def _end(self) -> None:
        self._leave()
        if not isinstance(self.adapters, AdapterBank) and self.bank is not None:
            self.bank.close()
            self.bank = None

    # Lightning's hooks: the loops of validate, test and predict have the same ones under three names.

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._enter(batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._leave()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ConfigError("AdapterColumn is for validating, testing and predicting; a bank's adapters are not trained.")

    on_validation_start = on_test_start = on_predict_start
    on_validation_batch_start = on_test_batch_start = on_predict_batch_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end
    on_validation_end = on_test_end = on_predict_end
