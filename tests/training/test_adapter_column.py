"""Trainer.predict, test and validate with an adapter for each row, named by a column."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora import AdapterBank, AdapterColumn, LoRAConfig, inject, save_adapter
from lightning_lora.engine import adapter_tensors
from lightning_lora.errors import BankError, ConfigError, DataError
from lightning_lora.recipes.data.base import SourceData
from tests.recipes.data.rows import Rows
from tests.training.lit import WIDTH, net, trainer

NAMES = ["legal", "code", "", None, "legal"]


class Table(Dataset):
    """Rows with a name; 11 of them, so that the last batch is smaller."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        return {"x": x, "adapter": NAMES[index % 5]}


def batch_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"x": torch.stack([row["x"] for row in rows]), "adapter": [row["adapter"] for row in rows]}


class Lit(pl.LightningModule):
    def configure_model(self) -> None:
        self.net = net().eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch["x"]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert list(batch) == ["x"]
        return self.net(batch["x"])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("total", self.predict_step(batch, batch_idx).sum(), reduce_fx="sum", batch_size=1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_step(batch, batch_idx)


@pytest.fixture
def alone(tmp_path: Path) -> dict[str | None, nn.Module]:
    """The net with each adapter, which are saved into tmp_path/adapters."""
    base = net().eval()
    models: dict[str | None, nn.Module] = {None: base, "": base}
    for seed, name in enumerate(("legal", "code")):
        models[name] = copy.deepcopy(base)
        inject(models[name], LoRAConfig(rank=2 + seed, target_modules=["0", "3"]))
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in adapter_tensors(models[name]).values():
                tensor.normal_(std=0.3)
        save_adapter(models[name], tmp_path / "adapters" / name)
    return models


def exact(alone: dict[str | None, nn.Module]) -> Tensor:
    rows = [Table()[i] for i in range(11)]
    with torch.no_grad():
        return torch.cat([alone[row["adapter"]](row["x"][None]) for row in rows])


def loader() -> DataLoader[Any]:
    return DataLoader(Table(), batch_size=4, collate_fn=batch_of)


def test_each_row_is_predicted_with_the_adapter_that_it_names(alone, tmp_path):
    lit = Lit()
    run = trainer(AdapterColumn(tmp_path / "adapters"))
    found = torch.cat(run.predict(lit, loader()))
    torch.testing.assert_close(found, exact(alone))
    assert type(lit.net[0]) is nn.Linear, "the bank was taken off"


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_each_row_is_evaluated_with_it_too(alone, tmp_path, stage):
    (metrics,) = getattr(trainer(AdapterColumn(tmp_path / "adapters")), stage)(Lit(), loader(), verbose=False)
    torch.testing.assert_close(metrics["total"], exact(alone).sum().item(), rtol=1e-5, atol=1e-5)


def test_a_bank_of_ones_own_stays_on_the_model(alone, tmp_path):
    lit = Lit()
    lit.configure_model()
    lit.configure_model = lambda: None
    bank = AdapterBank.from_folders(lit, tmp_path / "adapters")
    found = torch.cat(trainer(AdapterColumn(bank)).predict(lit, loader()))
    torch.testing.assert_close(found, exact(alone))
    assert isinstance(lit.net[0], nn.Linear)
    assert not bank._slots.busy()
    bank.close()
    with pytest.raises(ConfigError, match="settings of a bank"):
        AdapterColumn(bank, capacity=3)


def test_an_error_in_a_step_leaves_no_adapter_in_use(alone, tmp_path):
    class Failing(Lit):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("in the step")

    lit = Failing()
    with pytest.raises(RuntimeError, match="in the step"):
        trainer(AdapterColumn(tmp_path / "adapters")).predict(lit, loader())
    assert type(lit.net[0]) is nn.Linear


def test_batches_that_name_no_adapters_are_refused(alone, tmp_path):
    def predict(collate: Any, column: str = "adapter") -> None:
        rows = DataLoader(Table(), batch_size=4, collate_fn=collate)
        trainer(AdapterColumn(tmp_path / "adapters", column)).predict(Lit(), rows)

    with pytest.raises(DataError, match=r"the entry 'skill' of a batch, and this one has \['adapter', 'x'\]"):
        predict(batch_of, "skill")
    with pytest.raises(DataError, match="this one has Tensor"):
        predict(lambda rows: batch_of(rows)["x"])
    with pytest.raises(DataError, match="one for each row, not 'legal'"):
        predict(lambda rows: {**batch_of(rows), "adapter": "legal"})
    with pytest.raises(BankError, match=r"no adapter 'legl'\. Did you mean 'legal'"):
        predict(lambda rows: {**batch_of(rows), "adapter": ["legl"] * len(rows)})


def test_training_is_refused(alone, tmp_path):
    with pytest.raises(ConfigError, match="not trained"):
        trainer(AdapterColumn(tmp_path / "adapters"), max_epochs=1).fit(Lit(), loader(), loader())


class Numbers(SourceData):
    """Rows of one number; 0 is left out."""

    def encode(self, rows: Any, split: str) -> Any:
        return rows.select_columns(["x"]).filter(lambda row: row["x"] != 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_module_of_the_package_puts_the_column_into_its_batches(workers):
    data = Numbers(Rows([{"x": i, "skill": name} for i, name in enumerate(["a", None, "b"], 1)]), 2, workers)
    data.adapter_column = "skill"
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [batch["skill"] for batch in batches] == [["a", None], ["b"]]
    assert [batch["x"].tolist() for batch in batches] == [[1, 2], [3]]


def test_a_column_that_cannot_be_told_is_refused():
    for rows, message in (
        ([{"x": 1, "skill": "a"}], r"no column 'adapter'|'adapter'"),
        ([{"x": 0, "adapter": "a"}, {"x": 1, "adapter": "b"}], "1 of 2 rows were left out"),
        ([{"x": 1, "adapter": 3}], "must hold the names of adapters, but there is 3"),
    ):
        data = Numbers(Rows(rows), 2, 0)
        data.adapter_column = "adapter"
        with pytest.raises(DataError, match=message):
            data.setup("predict")
