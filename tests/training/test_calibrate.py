"""Adapters that start from weights or data, in a run: measured on its own data, without a trace, and once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.engine import LoRAConfig, adapter_state_dict, adapters, inject
from lightning_lora.engine.calibration import calibrate
from lightning_lora.engine.weights import dense
from lightning_lora.errors import ConfigError, DataError, TrainingError
from lightning_lora.recipes.models import ModelSource

from .ddp_run import Shared
from .lit import STYLES, Lit, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # of ModelCheckpoint
    pytest.mark.filterwarnings("ignore:Found 1 module"),  # a frozen norm, in eval mode
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python's, of forking with threads
]
STARTED = ["pissa", "olora", "orthogonal", "eva", "corda", "lora_ga"]


class Logged(Lit):
    """Logs, counts with a metric, draws random numbers, and keeps a batch norm's statistics."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.net.add_module("6", torch.nn.BatchNorm1d(3))
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x + 0.01 * torch.randn_like(x))
        self.accuracy(logits, y)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.log("loss", loss)
        self.log_dict({"accuracy": self.accuracy}, on_epoch=True)
        return {"loss": loss}

    def on_train_epoch_end(self) -> None:
        self.seen.append(float(self.accuracy.compute()))


class AtStart(pl.Callback):
    """The adapter as training starts, and the loss of each step."""

    def __init__(self) -> None:
        self.adapter: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.adapter = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(
    module: Any, init: str = "eva", *more: pl.Callback, ckpt: Any = None, seed: int = 1, **settings: Any
) -> AtStart:
    pl.seed_everything(seed, verbose=False)
    start = AtStart()
    options = {"init_batches": settings.pop("init_batches", 3), "alpha": 4}
    run = trainer(LoRACallback(rank=2, init=init, **options), start, *more, **{"max_epochs": 2, **settings})
    run.fit(module, ckpt_path=ckpt)
    return start


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.equal(other[name]), name


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("init", STARTED)
def test_adapters_start_by_the_runs_own_batches(init: str, style: type[Lit]) -> None:
    batches = []

    class Recorded(style):  # type: ignore[misc, valid-type]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            batches.append(batch)
            return super().training_step(batch, batch_idx)

    module = Recorded()
    start = fit(module, init, max_steps=1)
    twin = Lit()
    config = LoRAConfig(rank=2, alpha=4, init=init)
    inject(twin, config, measured=calibrate(twin, config, twin.loss, batches[:3]))
    expected = adapter_state_dict(twin)
    if init == "lora_ga":  # its decomposition is random, so its vectors are known but for their signs
        for name, t in start.adapter.items():
            torch.testing.assert_close(t.abs(), expected[name].abs(), rtol=1e-3, atol=1e-4)
    elif init != "orthogonal":  # which is drawn
        assert_equal(start.adapter, expected)
    assert all(t.any() for name, t in start.adapter.items() if init != "eva" or "lora_A" in name)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_measuring_changes_nothing_else_of_the_run(init: str) -> None:
    one = Logged()
    start = fit(one, init)
    # The same adapters, given: nothing is measured in this run.
    other = Logged()
    inject(other, LoRAConfig(rank=2, alpha=4, init=init), start=False)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(other).items():
            tensor.copy_(start.adapter[name])
    given = fit(other, init)
    assert start.losses == given.losses
    assert one.seen == other.seen
    assert_equal(dict(one.state_dict()), dict(other.state_dict()))
    assert "log" not in vars(one)


def test_the_order_of_a_loader_with_a_generator_of_its_own_stays() -> None:
    def run(init: str) -> list[list[int]]:
        module, order = Lit(), []
        rows = torch.utils.data.TensorDataset(torch.arange(40))
        loader = DataLoader(rows, 8, shuffle=True, generator=torch.Generator().manual_seed(5))

        def step(batch: list[Tensor], batch_idx: int) -> Tensor:
            if module.trainer.sanity_checking or module.trainer.fit_loop._data_fetcher is not None:
                order.append(batch[0].tolist())
            return module(torch.ones(1, 8)).sum()

        module.training_step = step  # type: ignore[method-assign]
        run = trainer(LoRACallback(rank=2, init=init), max_epochs=1, limit_val_batches=0)
        run.fit(module, loader)
        return order

    assert run("eva") == run("kaiming")


class Several(pl.LightningDataModule):
    """Two loaders, of which the shorter starts anew when it is through."""

    def setup(self, stage: str) -> None:
        self.rows = data()

    def train_dataloader(self) -> Any:
        return {"one": DataLoader(self.rows, 8, shuffle=True), "two": DataLoader(self.rows, 16)}

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows, 20)


def test_it_is_measured_on_a_data_module_of_several_loaders_and_on_no_more_batches_than_there_are() -> None:
    class Both(Lit):
        def training_step(self, batch: dict[str, list[Tensor]]) -> Tensor:  # type: ignore[override]
            return self.loss(batch["one"]) + self.loss(batch["two"])

    module, start = Both(), AtStart()
    callback = LoRACallback(rank=2, init="corda", init_batches=1000)
    trainer(callback, start, max_epochs=1).fit(module, datamodule=Several())
    assert all(t.any() for t in start.adapter.values())
    assert len(start.losses) == 5


def test_data_that_are_empty_are_said_to_be() -> None:
    run = trainer(LoRACallback(rank=2, init="eva"), max_epochs=1)
    with pytest.raises(DataError, match="no batch to measure on"):
        run.fit(Lit(), DataLoader(torch.utils.data.TensorDataset(torch.empty(0, 8)), 4))


@pytest.mark.parametrize("init", [init for init in STARTED if init != "orthogonal"])
def test_a_resumed_run_starts_nothing_and_ends_as_the_whole_one(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Logged()
    fit(whole, init, ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3))

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    for place, name in ((torch.linalg, "svd"), (torch.linalg, "qr"), (torch.linalg, "eigh"), (torch, "svd_lowrank")):
        monkeypatch.setattr(place, name, fails)
    monkeypatch.setattr("lightning_lora.training.calibrate.calibrate", fails)
    resumed = Logged()
    fit(resumed, init, ckpt=str(tmp_path / "step=6.ckpt"), seed=2)
    assert_equal(dict(adapter_state_dict(resumed)), dict(adapter_state_dict(whole)))
    loaded = load_from_checkpoint(Logged, tmp_path / "step=9.ckpt")
    x = torch.randn(4, 8)
    trained = torch.load(tmp_path / "step=9.ckpt")["state_dict"]
    assert_equal(dict(adapter_state_dict(loaded)), trained)
    assert loaded.eval()(x).shape == (4, 3)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_a_run_that_validates_first_starts_its_adapters_when_it_trains(init: str) -> None:
    module = Lit()
    run = trainer(LoRACallback(rank=2, init=init, init_batches=2), max_epochs=1)
    run.validate(module, verbose=False)
    assert not any(t.any() for t in adapter_state_dict(module).values())
    run.fit(module)
    assert all(m.lora_A.any() and m.lora_B.any() for _, m in adapters(module))


def test_adapters_that_were_trained_are_not_started_again() -> None:
    module = Lit()
    fit(module, "eva")
    trained = {name: t.clone() for name, t in adapter_state_dict(module).items()}
    assert_equal(fit(module, "eva", seed=2).adapter, trained)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_it_is_measured_in_the_runs_own_precision(init: str, precision: str) -> None:
    start = fit(Lit(), init, precision=precision, max_steps=1)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert all(t.dtype == dtype for t in start.adapter.values())
    assert all(t.any() and t.isfinite().all() for t in start.adapter.values())


def test_an_average_of_the_weights_holds_the_start_as_well() -> None:
    module, average = Lit(), EMAWeightAveraging(decay=0.5)
    start = fit(module, "pissa", average)
    for name, tensor in start.adapter.items():
        if name.endswith(("lora_A0", "lora_B0")):
            assert dict(average._average_model.module.named_buffers())[name].equal(tensor)


class RankStart(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(dict(adapter_state_dict(pl_module)), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("init", ["eva", "pissa"])
def test_all_processes_start_with_the_adapters_of_the_first(init: str, tmp_path: Path) -> None:
    module = Shared()
    settings: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(module, init, RankStart(tmp_path), max_epochs=1, limit_val_batches=0, **settings)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_equal(first, second)
    assert all(t.any() for name, t in first.items() if "lora_A" in name)
    assert all(m.lora_B.any() for _, m in adapters(module))
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


def test_manual_optimization_cannot_be_measured_and_is_told_what_to_do_instead() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = self.loss(batch)
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]

    with pytest.raises(TrainingError, match=r"manual optimization.*inject\(module, config, measured=\.\.\.\)"):
        trainer(LoRACallback(rank=2, init="eva"), max_epochs=1).fit(Manual())
    # What the message says works.
    module, config = Manual(), LoRAConfig(rank=2, init="eva")
    inject(module, config, measured=calibrate(module, config, module.loss, list(module.train_dataloader())[:2]))
    start = {name: t.clone() for name, t in adapter_state_dict(module).items()}
    trainer(LoRACallback(config), max_epochs=1).fit(module)
    assert not module.net[0].lora_A.equal(start["net.0.lora_A"])
    # What draws, or reads weights alone, needs no step.
    trainer(LoRACallback(rank=2, init="pissa"), max_epochs=1).fit(Manual())


def test_progress_is_shown_where_the_runs_own_is(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Lit(), "eva", max_steps=1, enable_progress_bar=True)
    assert "Measuring" in "".join(capsys.readouterr())
    fit(Lit(), "eva", max_steps=1)
    assert "Measuring" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("batches", [0, -1, 2.5, True])
def test_a_number_of_batches_that_cannot_be_is_refused(batches: Any) -> None:
    with pytest.raises(ConfigError, match="init_batches is a whole number from 1 on"):
        LoRACallback(init_batches=batches)


class QuantizedLM(pl.LightningModule):
    """A causal language model of transformers in four bits, as QLoRA trains it."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.model = replace(source, quantization="nf4").load("AutoModelForCausalLM")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.TensorDataset(torch.randint(0, 200, (8, 12))), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("kind", ["a folder", "embedded"])
def test_loftq_finds_the_weights_that_a_transformers_model_was_quantized_from(kind: str, llama: ModelSource) -> None:
    pytest.importorskip("bitsandbytes")
    source = llama if kind == "a folder" else ModelSource()
    original, module = source.load("AutoModelForCausalLM"), QuantizedLM(source)
    trainer(LoRACallback(rank=4, target_modules=["q_proj", "down_proj"], init="loftq"), max_steps=0).fit(module)
    for name, layer in adapters(module.model):
        lost = (original.get_submodule(name).weight - dense(layer, layer.weight)).detach()
        left = (original.get_submodule(name).weight - layer.adapted_weight()).detach()
        torch.testing.assert_close(left.norm(), torch.linalg.svdvals(lost)[4:].norm(), rtol=1e-3, atol=1e-6)


def test_loftq_says_where_it_looks_for_the_weights_before_quantization() -> None:
    with pytest.raises(ConfigError, match="Sequential does not say where they are, as a transformers model does"):
        trainer(LoRACallback(rank=2, init="loftq"), max_epochs=1).fit(Lit())
