"""What a run of several adapters logs, stops, saves and resumes; and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import LBFGS

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    MultiLoRACallback,
    adapter_state_dict,
    inject,
    load_adapter,
    load_from_checkpoint,
    remove,
)
from lightning_lora.errors import AdapterStateError, CheckpointError, ConfigError, TargetError, TrainingError
from lightning_lora.page import written
from lightning_lora.training.many.strategy import check_strategy
from tests.page.strict import Strict
from tests.training.lit import trainer

from .modules import KINDS, LR, Lit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
MLP = KINDS["manual optimization"]


class Plain(Lit):
    """An MLP with automatic optimization, whose dropout draws random numbers."""

    def __init__(self, lr: float = LR) -> None:
        super().__init__(MLP, lr)
        self.automatic_optimization = True


ADAPTERS: dict[str, Any] = {"a": {"rank": 4, "seed": 1}, "b": {"rank": 2, "alpha": 8, "seed": 2, "lr": 50 * LR}}


def values(callback: MultiLoRACallback) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, folder in callback.adapter_folders.items():
        fresh = Plain()
        load_adapter(fresh, folder)
        found[name] = adapter_state_dict(fresh)
    return found


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n][key], b[n][key]) for n in a for key in (*a[n], *b[n]))


def fitted(
    tmp_path: Path, *callbacks: Callback, ckpt_path: Any = None, module: Any = None, wave: int = 1, **settings: Any
) -> Any:
    seed_everything(0, verbose=False)
    callback = MultiLoRACallback(ADAPTERS, wave=wave, log_every_n_steps=2)
    run = trainer(callback, *callbacks, **{"default_root_dir": tmp_path, "max_epochs": 2, **settings})
    run.fit(module or Plain(), ckpt_path=ckpt_path)
    return callback, run


@pytest.mark.parametrize("wave", [1, 2])
def test_each_adapter_has_its_metrics_its_losses_and_a_row_in_the_log(wave: int, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback, run = fitted(tmp_path, logger=logger, wave=wave)
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    last = next(row for row in reversed(rows) if row["val_loss"])
    for name in callback.names:
        assert float(last[f"val_loss/{name}"]) == pytest.approx(callback.metrics[name]["val_loss"])
        assert float(run.callback_metrics[f"val_loss/{name}"]) == pytest.approx(callback.metrics[name]["val_loss"])
    mean = sum(own["val_loss"] for own in callback.metrics.values()) / 2
    assert float(last["val_loss"]) == pytest.approx(mean)
    logged = [row for row in rows if row["train_loss/a"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5, 7, 9, 11], "where Lightning's own log_every_n_steps logs"
    assert run.validate(Plain(), verbose=False)[0].keys() == {"val_loss/a", "val_loss/b"}


def test_a_page_has_each_adapters_settings_metrics_and_curve(tmp_path: Path) -> None:
    callback, run = fitted(tmp_path, val_check_interval=3)
    text = callback.write_page(tmp_path / "page.html").read_text()
    table, *others = Strict(text).tables
    best, worst = sorted(callback.names, key=lambda name: callback.metrics[name]["val_loss"])
    assert table[0] == ["adapter", "rank", "alpha", "lr", "seed", "val_loss", "parameters", "validations"]
    given = {"a": ["4", "16", "", "1"], "b": ["2", "8", written(50 * LR), "2"]}
    for row, name in zip(table[1:], (best, worst), strict=True):
        loss, count = callback.metrics[name]["val_loss"], len(others[-1]) - 1
        parameters = sum(p.numel() for p in values(callback)[name].values())
        assert row == [name, *given[name], written(loss), written(parameters), str(count)]
    assert others[-1][0] == ["step", best, worst]
    assert others[-1][-1] == [str(run.global_step), *(written(callback.metrics[n]["val_loss"]) for n in (best, worst))]
    assert "val_loss against rank" in text

    with pytest.raises(ConfigError, match="gave each adapter val_loss"):
        callback.write_page(tmp_path / "page.html", monitor="val_accuracy")
    with pytest.raises(ConfigError, match="mode is one of"):
        callback.write_page(tmp_path / "page.html", mode="least")
    with pytest.raises(ConfigError, match="nothing to show"):
        MultiLoRACallback(ADAPTERS).write_page(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_the_curves_of_a_page_outlive_an_interruption(tmp_path: Path) -> None:
    savers = [ModelCheckpoint(tmp_path / n, "{step}", save_top_k=-1, every_n_train_steps=1) for n in ("all", "more")]
    whole, _ = fitted(tmp_path, savers[0], val_check_interval=3)
    resumed, _ = fitted(tmp_path, savers[1], ckpt_path=tmp_path / "all" / "step=7.ckpt", val_check_interval=3)
    tables = [Strict(c.write_page(tmp_path / "page.html").read_text()).tables for c in (whole, resumed)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("every", "wave"), [(1, 1), (2, 1), (4, 2), (5, 2)])
def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_was_not_interrupted(
    every: int, wave: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"wave": wave, "accumulate_grad_batches": 2 if every == 2 else 1}
    every_step = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=every)
    whole, run = fitted(tmp_path, every_step, **settings)
    path = sorted((tmp_path / "all").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)[0]
    assert {p.name for p in path.with_name(f"{path.stem}-adapters").iterdir()} == set(ADAPTERS)
    assert not [key for key in torch.load(path)["state_dict"] if "lora" not in key]
    again = ModelCheckpoint(tmp_path / "again", "{step}", save_top_k=-1, every_n_train_steps=every)
    resumed, later = fitted(tmp_path, again, ckpt_path=path, **settings)
    assert same(values(whole), values(resumed))
    assert whole.metrics == resumed.metrics
    assert run.global_step == later.global_step


def test_early_stopping_stops_the_adapter_that_got_no_better_and_leaves_the_others(tmp_path: Path) -> None:
    stops = {}
    for name, one in ADAPTERS.items():
        seed_everything(0, verbose=False)
        fields = {key: value for key, value in one.items() if key not in ("seed", "lr")}
        module = Plain(one.get("lr", LR))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(one["seed"])
            inject(module, LoRAConfig(**fields))
        run = trainer(LoRACallback(**fields), EarlyStopping("val_loss", patience=2), max_epochs=12)
        run.fit(module)
        stops[name] = run.current_epoch, adapter_state_dict(module)
    assert stops["b"][0] < stops["a"][0]  # a rate that is ten times as high overshoots

    callback, run = fitted(tmp_path, EarlyStopping("val_loss", patience=2), max_epochs=12)
    assert "b" in callback.stopped
    assert run.current_epoch == stops["a"][0]
    assert same(values(callback), {name: own for name, (_, own) in stops.items()})


def test_an_adapter_can_be_stopped_and_the_run_ends_with_the_last_one(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            for name, step in (("a", 2), ("b", 4)):
                if run.global_step == step:
                    callback.stop(name)

    seed_everything(0, verbose=False)
    callback = MultiLoRACallback(ADAPTERS, wave=1)
    run = trainer(callback, Stops(), max_epochs=5, default_root_dir=tmp_path)
    run.fit(Plain())
    assert callback.stopped == ("a", "b")
    assert run.global_step == 4
    short, _ = fitted(tmp_path / "short", max_steps=2)
    assert torch.equal(*(own["net.0.lora_A"] for own in (values(callback)["a"], values(short)["a"])))
    with pytest.raises(ConfigError, match="No adapter is called 'c'"):
        callback.stop("c")


def test_the_base_is_put_back_and_other_callbacks_find_what_several_adapters_left(tmp_path: Path) -> None:
    module = Plain()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    saver = ModelCheckpoint(tmp_path, "one")
    callback, _ = fitted(tmp_path, saver, module=module)
    assert callback.adapter_folders["a"] == tmp_path / "one-adapters" / "a"
    with pytest.raises(CheckpointError, match="several adapters"):
        load_from_checkpoint(Plain, tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match="several adapters"):
        trainer(LoRACallback(rank=4), max_epochs=3).fit(Plain(), ckpt_path=tmp_path / "one.ckpt")
    other = MultiLoRACallback({"a": ADAPTERS["a"], "c": ADAPTERS["b"]})
    with pytest.raises(CheckpointError, match="adapters a, b, and this run trains a, c"):
        trainer(other, max_epochs=3).fit(Plain(), ckpt_path=tmp_path / "one.ckpt")
    remove(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


GIVEN: dict[str, tuple[Any, str]] = {
    "none": ({}, "takes a dict of adapters"),
    "a list": (["r4"], "takes a dict of adapters"),
    "a name with a slash": ({"a/b": {}}, "without slashes"),
    "a hidden name": ({".a": {}}, "without slashes"),
    "no config": ({"a": 8}, "'a' is a LoRAConfig or a dict"),
    "a field that is none": ({"a": {"rnak": 8}}, "'a'.*Did you mean 'rank'"),
    "a rate of zero": ({"a": {"lr": 0}}, "'a': lr is a"),
    "a negative seed": ({"a": {"seed": -1}}, "'a': seed is a"),
    "an activated LoRA": ({"a": {"alora_invocation_tokens": [1]}}, "activated LoRA"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_an_adapter_that_cannot_be_is_named(given: str) -> None:
    with pytest.raises(ConfigError, match=GIVEN[given][1]):
        MultiLoRACallback(GIVEN[given][0])


class Counts(Plain):
    """Its step writes to a buffer what depends on the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.mean: Tensor

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        self.mean += loss.detach()  # type: ignore[union-attr]
        return loss


class Lbfgs(Plain):
    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters())


class Adapted(Plain):
    def __init__(self) -> None:
        super().__init__()
        inject(self, LoRAConfig(rank=2))


REFUSED: dict[str, tuple[Any, dict[str, Any], list[Callback], type[Exception], str]] = {
    "averaged weights": (Plain, {}, [WeightAveraging()], TrainingError, "WeightAveraging"),
    "an optimizer that lists its parameters": (Lbfgs, {}, [], TrainingError, "LBFGS"),
    "a buffer of each": (Counts, {}, [], TrainingError, "the buffer 'mean'"),
    "adapters that are there": (Adapted, {}, [], AdapterStateError, "has adapters already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_cannot_train_several_adapters_is_refused_by_name(case: str, tmp_path: Path) -> None:
    module, settings, callbacks, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        trainer(MultiLoRACallback(ADAPTERS), *callbacks, default_root_dir=tmp_path, max_epochs=1, **settings).fit(
            module()
        )


def test_a_strategy_under_which_several_cannot_train_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="DDPStrategy"):
        check_strategy(DDPStrategy())
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TrainingError, match="16-mixed"):
        check_strategy(SingleDeviceStrategy(precision_plugin=plugin))


def test_a_config_that_does_not_fit_is_named_and_leaves_the_module_as_it_was() -> None:
    module = Plain()
    callback = MultiLoRACallback({"good": {"rank": 2}, "bad": {"target_modules": ["nowhere"]}})
    with pytest.raises(TargetError, match=r"'bad'.*nowhere"):
        trainer(callback, max_epochs=1).fit(module)
    assert all(p.requires_grad for p in module.parameters())
    assert type(module.net[0]) is nn.Linear


def test_that_a_run_goes_on_from_trained_adapters_is_said_and_of_fresh_ones_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_lora.training.callback.rank_zero_info", said.append)
    callback, module = MultiLoRACallback(ADAPTERS, wave=1), Plain()
    for is_trained in (False, True):
        run = trainer(callback, default_root_dir=tmp_path, max_epochs=1)
        run.validate(module, verbose=False)
        said.clear()
        run.fit(module)
        assert any("trained adapters already" in line for line in said) is is_trained
