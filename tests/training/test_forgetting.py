"""ForgettingMonitor says what a dense SVD and a direct forward say, and changes nothing of a training."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_lora import (
    ForgettingMonitor,
    LoRACallback,
    MultiLoRACallback,
    adapter_state_dict,
    disabled,
    pairs,
)
from lightning_lora.analysis.bits_per_byte import ScoredTexts
from lightning_lora.errors import AdapterStateError, ConfigError, DataError

from .ddp_run import Shared
from .lit import Lit, data, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python's, of forking with threads
TEXTS = ["The tide was out.", "A boat lay on its side."]


class Tokenizer:
    bos_token_id = 256

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.drop = nn.Embedding(257, 16), nn.Linear(16, 16), nn.Dropout(0.1)
        self.head = nn.Linear(16, 257)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.drop(F.relu(self.mix(x))))


class Talks(pl.LightningModule):
    """A causal language model with dropout, a metric of torchmetrics, and outputs that it gathers by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net, self.tokenizer = Network(), Tokenizer()
        self.mean, self.seen, self.outputs = MeanMetric(), MeanMetric(), []
        self.steps: list[Tensor] = []
        self.calls = 0

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.net(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(ids)
        self.seen.update(loss.detach())
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.steps.append(loss.detach())
        return loss

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        loss = self.loss(ids)
        self.mean.update(loss)
        self.outputs.append(loss)
        self.calls += 1
        self.log_dict({"val_loss": loss, "val_mean": self.mean})

    def on_validation_epoch_end(self) -> None:
        self.log("val_last", torch.stack(self.outputs).mean() + self.calls)
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def words(shuffle: bool = False, rows: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(list(torch.randint(97, 123, (rows, 9), generator=generator)), batch_size=4, shuffle=shuffle)


def run(
    folder: Path, *callbacks: pl.Callback, module: Any = None, ckpt_path: Path | None = None, **settings: Any
) -> Any:
    """The module and the Trainer of a run with two epochs of three steps, each validated."""
    torch.manual_seed(0)
    module = module or Talks()
    logger = CSVLogger(folder, name="", version="")
    settings = {"max_epochs": 2, "log_every_n_steps": 1, **settings}
    one = trainer(LoRACallback(rank=2, target_modules=["mix", "head"]), *callbacks, logger=logger, **settings)
    one.fit(module, words(shuffle=True), words(), ckpt_path=ckpt_path)
    return module, one


def logged(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_what_is_logged_is_what_a_forward_and_a_dense_svd_say(tmp_path):
    module, one = run(tmp_path, ForgettingMonitor(TEXTS))
    scored = ScoredTexts(module, Tokenizer(), TEXTS)
    values = logged(tmp_path, "general/bits_per_byte")
    # What is logged becomes float32.
    assert values == [pytest.approx(values[0]), pytest.approx(scored.bits_per_byte(), rel=1e-6)]
    with disabled(module):
        base = scored.bits_per_byte()
    assert logged(tmp_path, "general/bits_per_byte_base") == [pytest.approx(base, rel=1e-6)]
    assert float(one.callback_metrics["general/bits_per_byte"]) == pytest.approx(values[-1], rel=1e-6)

    count = 0
    for pair in pairs(module.requires_grad_(False)):
        W, changed = pair.module.dense_weight().double(), pair.module.adapted_weight().double()
        U, new = (torch.linalg.svd(M, full_matrices=False).U for M in (W, changed))
        count += int(((U.mT @ new[:, :10]).abs().amax(0) < 0.5).sum())
    counts = logged(tmp_path, "lora/intruders")
    assert len(counts) == 2
    assert counts[-1] == count > 0


def loads() -> ForgettingMonitor:
    return ForgettingMonitor(words(shuffle=True, rows=20), metric="val_mean")


SETTINGS = {
    "plain": {},
    "amid": {"accumulate_grad_batches": 2, "val_check_interval": 1},
    "bf16": {"precision": "bf16-true"},
    "no-grad": {"inference_mode": False},
}


@pytest.mark.parametrize("made", [lambda: ForgettingMonitor(TEXTS), loads], ids=["texts", "dataloader"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 1},
        {"precision": "bf16-true"},
        {"inference_mode": False},
    ],
    ids=["plain", "amid", "bf16", "no-grad"],
)
def test_a_run_with_a_monitor_is_the_run_without_one(made, settings, tmp_path):
    ends = {}
    for name, callbacks in {"with": [made()], "without": []}.items():
        module, one = run(tmp_path / name, *callbacks, **settings)
        metrics = {key: float(v) for key, v in one.callback_metrics.items() if "/" not in key}
        curves = {key: logged(tmp_path / name, key) for key in ("val_loss", "val_mean", "val_last", "seen")}
        ends[name] = adapter_state_dict(module), module.steps, torch.get_rng_state(), metrics, curves
        assert all(module.training for module in module.modules())
    (theirs, steps, random, metrics, curves), (own, own_steps, own_random, own_metrics, own_curves) = ends.values()
    assert all(torch.equal(value, own[key]) for key, value in theirs.items())
    assert all(torch.equal(a, b) for a, b in zip(steps, own_steps, strict=True))
    assert torch.equal(random, own_random)
    assert metrics == own_metrics
    assert curves == own_curves
    assert len(curves["val_loss"]) >= 2


def test_a_dataloader_is_measured_by_the_module_s_own_step_in_its_own_metric(tmp_path):
    general = words(rows=20)
    for metric in ("val_loss", "val_mean"):
        module, _ = run(tmp_path / metric, ForgettingMonitor(general, metric=metric, intruder_limit=0))
        with torch.no_grad():
            module.eval()
            expected = float(torch.stack([module.loss(batch) for batch in general]).mean())
            with disabled(module):
                base = float(torch.stack([module.loss(batch) for batch in general]).mean())
        assert logged(tmp_path / metric, f"general/{metric}")[-1] == pytest.approx(expected, rel=1e-5)
        assert logged(tmp_path / metric, f"general/{metric}_base") == [pytest.approx(base, rel=1e-5)]
        assert logged(tmp_path / metric, "lora/intruders") == []


def test_rows_of_batches_of_several_sizes_count_the_same(tmp_path):
    general = loader(16)  # 16, 16 and 8 rows
    module = Lit()
    one = trainer(LoRACallback(rank=2), ForgettingMonitor(general), max_epochs=1)
    one.fit(module)
    module.eval()
    with torch.no_grad():
        x, y = data().tensors
        expected = float(F.cross_entropy(module(x), y))
    assert float(one.callback_metrics["general/val_loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # the saver is left out
def test_a_resumed_run_has_the_base_s_value_from_the_checkpoint(tmp_path, monkeypatch):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_epochs=1, save_top_k=-1)
    run(tmp_path / "whole", ForgettingMonitor(TEXTS), saver)
    path = tmp_path / "saved/step=3.ckpt"
    monitor = ForgettingMonitor(TEXTS)
    run(tmp_path / "rest", monitor, ckpt_path=path)
    assert logged(tmp_path / "rest", "general/bits_per_byte") == logged(tmp_path / "whole", "general/bits_per_byte")[1:]
    assert logged(tmp_path / "rest", "general/bits_per_byte_base") == []
    (base,) = logged(tmp_path / "whole", "general/bits_per_byte_base")
    assert monitor.state_dict()["base"] == pytest.approx(base, rel=1e-6)
    # Other texts have another value, which is measured; so have those of another fit.
    run(tmp_path / "other", ForgettingMonitor(["Else."]), ckpt_path=path)
    (other,) = logged(tmp_path / "other", "general/bits_per_byte_base")
    assert other != pytest.approx(base, rel=1e-3)
    run(tmp_path / "again", monitor)
    assert logged(tmp_path / "again", "general/bits_per_byte_base") == [base]


def test_early_stopping_can_stop_a_run_that_forgets(tmp_path):
    stop = EarlyStopping("general/bits_per_byte", patience=1, min_delta=10.0)
    _, one = run(tmp_path, ForgettingMonitor(TEXTS), stop, max_epochs=9)
    assert one.current_epoch == 2


def test_each_adapter_of_several_is_measured(tmp_path):
    several = MultiLoRACallback(
        {name: {"rank": rank, "target_modules": ["mix", "head"]} for name, rank in {"r1": 1, "r2": 2}.items()},
        save_adapter=False,
    )
    torch.manual_seed(0)
    logger = CSVLogger(tmp_path, name="", version="")
    one = trainer(several, ForgettingMonitor(TEXTS), max_epochs=2, logger=logger)
    one.fit(Plain(), words(), words())
    found = [logged(tmp_path, f"general/bits_per_byte/{name}") for name in ("r1", "r2")]
    assert [len(values) for values in found] == [2, 2]
    assert found[0][-1] != found[1][-1]
    base = logged(tmp_path, "general/bits_per_byte_base/r1")
    assert logged(tmp_path, "general/bits_per_byte_base/r2") == base
    assert len(base) == 1


class Plain(Talks):
    """Without what a run of several adapters keeps for one alone."""

    def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
        return self.loss(ids)

    def validation_step(self, ids: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(ids))

    def on_validation_epoch_end(self) -> None: ...


def test_two_processes_log_once_what_one_process_logs(tmp_path):
    general = loader(20)
    for name, settings in {"one": {}, "two": {"strategy": "ddp_fork", "devices": 2}}.items():
        pl.seed_everything(3, verbose=False)
        logger = CSVLogger(tmp_path / name, name="", version="")
        one = trainer(
            LoRACallback(rank=2), ForgettingMonitor(general), logger=logger, max_epochs=2,
            use_distributed_sampler=False, **settings,
        )  # fmt: skip
        one.fit(Quiet())
    for metric in ("general/val_loss", "general/val_loss_base", "lora/intruders"):
        one, two = (logged(tmp_path / name, metric) for name in ("one", "two"))
        # Gradients are summed over two processes in another order: a few units in the last place of float32.
        assert two == pytest.approx(one, rel=1e-3)
        assert len(one) == (1 if metric.endswith("base") else 2)


class Quiet(Shared):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


@pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor")  # torchmetrics, of the loss
def test_a_run_that_diverged_is_shown_and_goes_on(tmp_path):
    class Diverges(Talks):
        def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(ids, batch_idx) * float("nan")

    run(tmp_path, ForgettingMonitor(TEXTS), module=Diverges(), max_epochs=1)
    assert math.isnan(logged(tmp_path, "lora/intruders")[0])
    assert math.isnan(logged(tmp_path, "general/bits_per_byte")[0])


def test_layers_that_are_not_looked_at_are_said_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, ForgettingMonitor(TEXTS, intruder_limit=15))
        run(tmp_path / "not", ForgettingMonitor(TEXTS), limit_val_batches=0, max_epochs=1)
    said = [str(w.message) for w in caught if "ForgettingMonitor" in str(w.message)]
    assert len(said) == 2
    assert "the intruder dimensions of 0 of 2 layers" in said[0]
    assert "there was none: nothing was measured" in said[1]


def test_what_is_wrong_is_an_error_before_training(tmp_path):
    for given in ("one text", [], 3, iter([1, 2])):
        with pytest.raises(ConfigError, match="takes a list of texts, or a dataloader"):
            ForgettingMonitor(given)
    with pytest.raises(ConfigError, match="max_tokens is a whole number from 2 on"):
        ForgettingMonitor(max_tokens=1)
    with pytest.raises(AdapterStateError, match="Lit has no adapters"):
        trainer(ForgettingMonitor(), max_steps=1).fit(Lit(), loader(8))
    module = Lit()
    with pytest.raises(ConfigError, match=r"needs a tokenizer, and Lit has none.* Or give it a dataloader"):
        trainer(LoRACallback(rank=2), ForgettingMonitor(), max_epochs=1).fit(module)
    with pytest.raises(ConfigError, match="no part of Lit has a forward with `input_ids`"):
        trainer(LoRACallback(rank=2), ForgettingMonitor(tokenizer=Tokenizer()), max_epochs=1).fit(Lit())
    with pytest.raises(ConfigError, match=r"logs no such metric\. It logs val_loss\. Did you mean 'val_loss'"):
        trainer(LoRACallback(rank=2), ForgettingMonitor(loader(8), metric="val_los"), max_epochs=1).fit(Lit())
    with pytest.raises(DataError, match="has no batch"):
        trainer(LoRACallback(rank=2), ForgettingMonitor(DataLoader([])), max_epochs=1).fit(Lit())
