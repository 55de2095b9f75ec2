"""What loggers are told of a run: the settings of its adapters, once, whatever the module saves by itself."""

from __future__ import annotations

import pickle
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_lora import LoRACallback, load_adapter
from lightning_lora.engine import adapter_state_dict

from .lit import Lit, data, loader, net, trainer


def settings(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "hparams.yaml").read_text())


def csv(folder: Path) -> CSVLogger:
    return CSVLogger(folder, name="", version="")


class Silent(Lit):
    """Saves no hyper-parameters."""

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None: ...


class Warmed(Silent):
    """Starts at a rate of zero, and climbs."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))]


@pytest.mark.parametrize(
    ("module", "theirs"), [(Silent(lr=0.03), {}), (Lit(lr=0.03), {"seed": 0, "lr": 0.03}), (Warmed(lr=0.03), {})]
)
def test_a_logger_gets_what_the_adapter_is_and_how_it_trains_beside_what_the_module_saves(tmp_path, module, theirs):
    callback = LoRACallback(rank=2, alpha=6, target_modules=["net.0"], dropout=0.1, lora_plus_ratio=4)
    trainer(callback, max_epochs=1, logger=csv(tmp_path)).fit(module, loader(8))
    assert settings(tmp_path) == theirs | {
        "lora/rank": 2,
        "lora/alpha": 6,
        "lora/target_modules": ["net.0"],
        "lora/dropout": 0.1,
        "lora/lora_plus_ratio": 4,
        "optimizer/class": "AdamW",
        "optimizer/lr": 0.03,
        "data/class": type(data()).__name__,
    }


class Strict(DummyLogger):
    """As MLflow: a setting that was logged can be logged again, and not changed. As TensorBoard: the first is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        self.all: dict[str, Any] = {}

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        changed = [name for name in params if name in self.all and self.all[name] != params[name]]
        if changed:
            raise ValueError(f"changing {changed} is not allowed")
        self.first = self.first or dict(params)
        self.all.update(params)


def test_the_first_that_a_logger_is_given_has_all_settings_of_module_and_adapter_in_it():
    logger = Strict()
    trainer(LoRACallback(rank=2), max_epochs=1, logger=logger).fit(Lit())
    assert logger.first == logger.all
    assert {"seed", "lr", "lora/rank", "optimizer/lr"} <= logger.first.keys()


class OwnNames(Lit):
    """Saves settings by names that ours have too."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lora": {"rank": 99}, "optimizer": "adam", "data": "mine"})


def test_settings_of_the_module_keep_their_names_and_ours_get_another(tmp_path):
    trainer(LoRACallback(rank=2), max_epochs=1, logger=csv(tmp_path)).fit(OwnNames())
    logged = settings(tmp_path)
    assert (logged["lora"], logged["optimizer"], logged["data"]) == ({"rank": 99}, "adam", "mine")
    assert (logged["run/lora/rank"], logged["run/optimizer/class"]) == (2, "AdamW")


class Half(Warmed):
    def configure_optimizers(self) -> Any:
        optimizer = super(Warmed, self).configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("schedule", [Half, Silent])
def test_a_resumed_run_logs_the_rate_that_its_checkpoint_goes_on_with(tmp_path, schedule):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    logger = Strict()
    trainer(LoRACallback(rank=2), saver, max_epochs=1, logger=logger).fit(schedule(lr=0.5))
    resumed = trainer(LoRACallback(rank=2), saver, max_epochs=2, logger=logger)
    resumed.fit(schedule(lr=7.0), ckpt_path=tmp_path / "last.ckpt")  # Lightning takes the checkpoint's
    assert resumed.optimizers[0].param_groups[0]["lr"] < 1
    assert logger.all["optimizer/lr"] == 0.5


def test_a_logger_that_refuses_a_changed_setting_does_not_end_a_second_run():
    logger, module = Strict(), Silent(lr=0.5)
    trainer(LoRACallback(rank=2), max_epochs=1, logger=logger).fit(module)
    module.lr = 0.25
    with pytest.warns(match="Strict did not take the settings of this run: changing .'optimizer/lr'. is not allowed"):
        trainer(LoRACallback(rank=2), max_epochs=1, logger=logger).fit(module)


@pytest.mark.filterwarnings("ignore:.*The number of training batches")
def test_the_rate_that_a_finder_found_is_logged(tmp_path):
    module = Silent(lr=0.5)
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    settings_ = {"max_epochs": 8, "default_root_dir": tmp_path, "logger": csv(tmp_path), "enable_checkpointing": True}
    trainer(LoRACallback(rank=2), finder, **settings_).fit(module)
    assert settings(tmp_path)["optimizer/lr"] == pytest.approx(module.lr) != 0.5


def test_rates_of_several_groups_are_logged_each_and_a_trainer_that_logs_no_settings_logs_none_of_ours(tmp_path):
    class Groups(Silent):
        def configure_optimizers(self) -> Any:
            heads = [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[3].parameters()}]
            return torch.optim.SGD(heads, lr=0.2)

    trainer(LoRACallback(rank=2), max_epochs=1, logger=csv(tmp_path / "a")).fit(Groups())
    assert settings(tmp_path / "a")["optimizer/lr"] == [0.1, 0.2]
    silent = partial(trainer, LoRACallback(rank=2), max_epochs=1, enable_autolog_hparams=False)
    silent(logger=(logger := Strict())).fit(Groups())
    assert logger.all == {}


class ByHand(Half):
    """LoRA+ as somebody would write it without this package's."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def configure_optimizers(self) -> Any:
        shares = [self.net[0], self.net[3]] if self.groups == 2 else [self]
        names = [f"pg{n}/" if len(shares) > 1 else "" for n in (1, 2)]
        parts = [
            {"params": [p for n, p in share.named_parameters() if n.endswith(f"lora_{f}")], "name": f"{name}lora_{f}"}
            for share, name in zip(shares, names)
            for f in "AB"
        ]
        optimizer = torch.optim.AdamW([p | {"lr": 0.04 if p["name"].endswith("B") else 0.01} for p in parts])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class Shared(Half):
    def __init__(self, groups: int) -> None:
        super().__init__(lr=0.01)
        self.groups = groups

    def configure_optimizers(self) -> Any:
        shares = [self.net[0], self.net[3]] if self.groups == 2 else [self]
        optimizer = torch.optim.AdamW([{"params": share.parameters()} for share in shares], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_monitor_of_learning_rates_shows_those_of_lora_plus_as_of_groups_made_by_hand(tmp_path, groups):
    plus, by_hand = (LearningRateMonitor("step"), LearningRateMonitor("step"))
    run = {"max_epochs": 2, "log_every_n_steps": 1}
    module = Shared(groups)
    trained = trainer(LoRACallback(rank=2, lora_plus_ratio=4), plus, logger=csv(tmp_path), **run)
    torch.manual_seed(0)
    trained.fit(module)
    torch.manual_seed(0)
    trainer(LoRACallback(rank=2), by_hand, logger=DummyLogger(), **run).fit(other := ByHand(groups))
    assert plus.lrs == by_hand.lrs
    assert {name.rpartition("_")[2] for name in plus.lrs} == {"A", "B"}
    assert "lr-AdamW/" + ("lora_B" if groups == 1 else "pg2/lora_B") in (tmp_path / "metrics.csv").read_text()
    assert all(map(torch.equal, module.parameters(), other.parameters())), "being looked at changes no step"
    assert [sorted(group) for group in trained.optimizers[0].state_dict()["param_groups"]] == [
        sorted({*torch.optim.AdamW(net().parameters()).state_dict()["param_groups"][0], "initial_lr"})
    ] * groups


def test_what_is_trained_whole_is_shown_with_the_rate_of_the_others(tmp_path):
    monitor = LearningRateMonitor()
    callback = LoRACallback(rank=2, lora_plus_ratio=4, modules_to_save=["net.5"])
    trainer(callback, monitor, max_epochs=1, logger=csv(tmp_path), log_every_n_steps=1).fit(Silent(lr=0.5))
    assert {name: rates[-1] for name, rates in monitor.lrs.items()} == {"lr-AdamW/others": 0.5, "lr-AdamW/lora_B": 2.0}


class Tracked:
    """MLflow's client, as far as Lightning's logger uses it: artifacts are copied into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(lifecycle_stage="active", experiment_id="0")

    def create_run(self, **_: Any) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="1"))

    def log_artifact(self, run: str, path: str, place: str) -> None:
        (self.folder / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.folder / place)

    def log_artifacts(self, run: str, folder: str, place: str) -> None:
        shutil.copytree(folder, self.folder / place, dirs_exist_ok=True)

    def log_batch(self, *_: Any, **__: Any) -> None: ...
    def get_run(self, run: str) -> None: ...


@pytest.fixture
def mlflow(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    names = ("mlflow", "mlflow.tracking", "mlflow.tracking.context", "mlflow.entities", "mlflow.utils.mlflow_tags")
    modules = {name: ModuleType(name) for name in names}
    modules["mlflow"].set_tracking_uri = lambda uri: None  # type: ignore[attr-defined]
    modules["mlflow.tracking"].MlflowClient = lambda uri: Tracked(tmp_path / "tracked")  # type: ignore[attr-defined]
    modules["mlflow.tracking"].context = modules["mlflow.tracking.context"]  # type: ignore[attr-defined]
    modules["mlflow.entities"].Param = modules["mlflow.entities"].Metric = dict  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path / "tracked"


@pytest.mark.parametrize(("log_model", "names"), [(True, ["epoch1", "last"]), ("all", ["epoch0", "epoch1", "last"])])
@pytest.mark.parametrize("save_last", [True, "link"])
def test_mlflow_takes_the_adapter_folder_with_each_checkpoint(mlflow, tmp_path, log_model, names, save_last):
    naming = {"filename": "epoch{epoch}", "auto_insert_metric_name": False, "save_last": save_last}
    saver = ModelCheckpoint(tmp_path / "checkpoints", **naming)
    logger = MLFlowLogger(log_model=log_model, tracking_uri="none")
    trainer(LoRACallback(rank=2), saver, max_epochs=2, logger=logger).fit(Lit())
    assert sorted(path.name for path in mlflow.iterdir()) == names
    for name in names:
        saved = torch.load(mlflow / name / f"{name}.ckpt")["state_dict"]
        load_adapter(module := Lit(), mlflow / name / "adapter")
        assert all(torch.equal(tensor, saved[key]) for key, tensor in adapter_state_dict(module).items())


@pytest.mark.parametrize(("log_model", "adapts"), [(False, {}), (True, {"save_adapter": False})])
def test_mlflow_takes_no_folder_where_there_is_none_or_no_model_is_logged(mlflow, tmp_path, log_model, adapts):
    logger = MLFlowLogger(log_model=log_model, tracking_uri="none")
    saver = ModelCheckpoint(tmp_path / "checkpoints")
    trainer(LoRACallback(rank=2, **adapts), saver, max_epochs=1, logger=logger).fit(Lit())
    assert not list(mlflow.rglob("adapter"))
    assert mlflow.is_dir() == log_model


class Artifact:
    """W&B's, as far as it is used here."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.files = name, []

    def add_file(self, path: str, name: str, policy: str) -> None:
        self.files.append(name)

    def add_dir(self, path: str) -> None:
        self.files += sorted(file.name for file in Path(path).iterdir())


def test_wandb_takes_the_adapter_folder_as_an_artifact_beside_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(Artifact=Artifact, RunDisabled=None, Run=None))
    logged: list[tuple[str, list[str], list[str]]] = []
    run = SimpleNamespace(
        id="7",
        config=SimpleNamespace(update=lambda *_, **__: None),
        log=lambda *_: None,
        log_artifact=lambda artifact, aliases: logged.append((artifact.name, artifact.files, aliases)),
    )
    saver = ModelCheckpoint(tmp_path)
    trainer(
        LoRACallback(rank=2), saver, max_epochs=1, logger=WandbLogger(log_model=True, experiment=run)
    ).fit(Lit())  # fmt: skip
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    both = ["latest", "best"]
    assert logged == [("model-7", ["model.ckpt"], both), ("model-7-adapter", adapter, both)]


def test_a_monitor_and_a_logger_that_were_used_can_be_pickled(mlflow):
    monitor, logger = LearningRateMonitor(), MLFlowLogger(log_model=True, tracking_uri="none")
    callback = LoRACallback(rank=2, lora_plus_ratio=4)
    trainer(callback, monitor, max_epochs=1, logger=logger).fit(Lit())
    logger._mlflow_client = None
    for it in (monitor, logger):
        assert type(pickle.loads(pickle.dumps(it))) is type(it)
