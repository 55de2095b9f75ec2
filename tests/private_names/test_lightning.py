"""Private names of Lightning and torchmetrics do what we rely on; a run says which one is gone before it starts."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_lora import LoRACallback, adapter_state_dict
from lightning_lora.borrowed import PURPOSES
from lightning_lora.errors import MovedError, TrainingError
from lightning_lora.training import lightning_private, torchmetrics_private
from lightning_lora.training.lightning_private import ATTRIBUTES, HOOK_LOCALS
from lightning_lora.training.starting import AdaptingLauncher, check_adapted_before_launch
from tests.private_names.moved import moved, take_away


class _Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.dropout(self.layer(batch)).square().mean()
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(40.0).view(10, 4) / 40, batch_size=2, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(2, 4))


class _Asks(Callback):
    """Notes the running hook at the end of the first batch."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.calls += list(lightning_private.hook_calls(trainer))


def _fit(root: Path, callbacks: list[Callback], epochs: int = 2, ckpt_path: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = _Lit()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **quiet, **settings}
    callbacks = [LoRACallback(rank=2, alpha=2, target_modules=["layer"]), *callbacks]
    trainer = Trainer(default_root_dir=root, max_epochs=epochs, callbacks=callbacks, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _fit(tmp_path_factory.mktemp("fitted"), [_Asks(), Callback()], 1)


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in ATTRIBUTES.items() for name in names])
def test_an_attribute_of_lightning_is_there_and_a_run_says_if_it_is_gone(where: str, name: str, fitted: Trainer):
    owner: Any = fitted
    for part in where.split("."):
        assert hasattr(owner, part), moved(f"lightning.pytorch.Trainer.{where}")
        owner = getattr(owner, part)
    assert hasattr(owner, name), moved(f"lightning: {type(owner).__name__}.{name} ({where})")
    with pytest.raises(MovedError, match=rf"\.{name}, by which"):
        lightning_private.check(_Without(fitted, where.split("."), name))


class _Without:
    """`owner`, without the attribute `name` of what `path` leads to."""

    def __init__(self, owner: Any, path: list[str], name: str) -> None:
        self.owner, self.path, self.name = owner, path, name

    def __getattr__(self, name: str) -> Any:
        if not self.path and name == self.name:
            raise AttributeError(name)
        inner = getattr(self.owner, name)
        return _Without(inner, self.path[1:], self.name) if self.path[:1] == [name] else inner


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in PURPOSES
        if p.startswith("lightning.pytorch.") and not p.endswith(":_CallbackConnector.on_trainer_init")
    ],
)
def test_a_run_says_if_a_name_of_lightning_is_gone(path: str, fitted: Trainer, monkeypatch: pytest.MonkeyPatch):
    take_away(monkeypatch, path)
    with pytest.raises(MovedError, match=path.rpartition(".")[2].rpartition(":")[2]):
        lightning_private.check(fitted)


@pytest.mark.parametrize("name", HOOK_LOCALS)
def test_a_hook_is_called_with_the_local_variables_that_we_read(
    name: str, fitted: Trainer, monkeypatch: pytest.MonkeyPatch
):
    code = lightning_private._call_callbacks.__code__
    assert name in code.co_varnames + code.co_cellvars, moved(f"lightning: _call_callback_hooks's {name}")
    monkeypatch.setattr(lightning_private, "HOOK_LOCALS", (f"{name}_of_another_name",))
    with pytest.raises(MovedError, match=f"{name}_of_another_name"):
        lightning_private.check(fitted)


def test_training_does_not_start_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ATTRIBUTES, "strategy", ("_a_name_of_yesterday",))
    steps: list[int] = []
    counts = Callback()
    counts.on_train_batch_start = lambda *_: steps.append(1)  # type: ignore[method-assign]
    with pytest.raises(MovedError, match="_a_name_of_yesterday"):
        _fit(tmp_path, [counts], 1)
    assert steps == []


def test_a_running_hook_tells_who_has_it_still_to_come(fitted: Any):
    _, asks, after, *_ = fitted.callbacks
    hook, by, later, args, was_raised = asks.calls[0]
    assert (hook, by, later[0], later[-1]) == ("on_train_batch_end", asks, after, fitted.lightning_module)
    assert (len(args), was_raised) == (3, False)


def test_a_checkpoint_of_the_run_can_be_had(fitted: Any):
    assert lightning_private.checkpoint_of(fitted)["global_step"] == fitted.global_step == 5
    assert lightning_private.last_save(ModelCheckpoint()) == (0, "")
    assert not lightning_private.starts_scripts(fitted)
    assert lightning_private.average_of(WeightAveraging()) is None
    assert lightning_private.average_of(StochasticWeightAveraging(0.1)) is None
    assert lightning_private.rows_still_to_log(fitted) == 0
    assert lightning_private.data_given(fitted) is not None
    assert not lightning_private.logs_hyperparameters(fitted.lightning_module)
    for kind in (MLFlowLogger, WandbLogger):
        logger = kind.__new__(kind)  # which needs no server
        vars(logger).update(_log_model="all", _logged_model_time={"a.ckpt": 1.0}, _checkpoint_name="model")
        assert lightning_private.logs_models(logger)
        assert lightning_private.logged_models(logger) == {"a.ckpt": 1.0}
    assert lightning_private.model_name(logger) == "model"
    for name in ("_log_model", "_logged_model_time", "_checkpoint_name"):
        assert name in inspect.getsource(WandbLogger)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(step: int, tmp_path: Path):
    whole = _fit(tmp_path, [], accumulate_grad_batches=2)
    settings = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False, "filename": "{step}"}
    saves = ModelCheckpoint(tmp_path / "saved", **settings)
    _fit(tmp_path, [saves], limit_train_batches=5, accumulate_grad_batches=2)
    resumed = _fit(tmp_path, [], accumulate_grad_batches=2, ckpt_path=tmp_path / f"saved/step={step}.ckpt")
    states = [adapter_state_dict(trainer.lightning_module) for trainer in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))
    assert whole.callback_metrics == resumed.callback_metrics


def test_what_a_metric_has_gathered_is_put_back_and_nothing_where_a_name_is_gone():
    metric = MeanMetric()
    metric.update(torch.tensor([1.0, 2.0]))
    held = torchmetrics_private.metric_state(metric)
    metric.update(torch.tensor([9.0]))
    assert metric.compute() == 4
    torchmetrics_private.put_metric_state(metric, *held)
    assert metric.compute() == 1.5
    with pytest.raises(MovedError, match="_defaults"):
        torchmetrics_private.metric_state(SimpleNamespace(_update_count=1))  # type: ignore[arg-type]
    with pytest.raises(MovedError, match="_update_count"):
        torchmetrics_private.put_metric_state(SimpleNamespace(), 1, {})  # type: ignore[arg-type]


def test_what_a_trainer_no_longer_has_is_said():
    nothing: Any = SimpleNamespace(fit_loop=SimpleNamespace(), lightning_module=None, _iterator=SimpleNamespace())
    for call in (
        lambda: lightning_private.is_accumulating(nothing),
        lambda: lightning_private.training_loader(nothing),
        lambda: lightning_private.moved_batch(nothing, 1),
        lambda: lightning_private.restart_loaders(nothing, []),
        lambda: lightning_private.last_save(nothing),
        lambda: lightning_private.set_last_save(nothing, 1, ""),
        lambda: lightning_private.average_of(nothing),
        lambda: lightning_private.logs_models(nothing),
        lambda: lightning_private.logged_models(nothing),
        lambda: lightning_private.model_name(nothing),
        lambda: lightning_private.checkpoint_of(nothing),
    ):
        with pytest.raises(MovedError):
            call()


def test_a_launcher_that_is_gone_is_said_or_taken_for_any(monkeypatch: pytest.MonkeyPatch):
    launcher = Trainer(accelerator="cpu", strategy="ddp_fork", devices=2, logger=False).strategy.launcher
    assert lightning_private.launches_processes(launcher)
    assert not lightning_private.launches_processes(None)
    take_away(monkeypatch, "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher")
    with pytest.raises(MovedError, match="_MultiProcessingLauncher"):
        lightning_private.launches_processes(launcher)
    take_away(monkeypatch, "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher")
    assert lightning_private.starts_scripts(SimpleNamespace(world_size=2))
    assert not lightning_private.starts_scripts(SimpleNamespace(world_size=1))


def test_a_callback_hears_of_a_trainer_while_that_is_made_or_a_launched_process_refuses(
    monkeypatch: pytest.MonkeyPatch,
):
    settings: Any = {"accelerator": "cpu", "strategy": "ddp_fork", "devices": 2, "logger": False}
    launch = type(Trainer(**settings).strategy.launcher).launch
    assert isinstance(Trainer(**settings, callbacks=[LoRACallback(rank=2)]).strategy.launcher, AdaptingLauncher)
    other = Trainer(**settings)
    assert type(other.strategy.launcher).launch is launch, "nothing is patched for other Trainers"
    other.callbacks.append(LoRACallback(rank=2))  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="after the Trainer was made"):
        check_adapted_before_launch(other)
    monkeypatch.setattr(lightning_private, "_trainer_init", lambda: None)
    late = Trainer(**settings, callbacks=[LoRACallback(rank=2)])
    with pytest.raises(TrainingError, match="after the Trainer was made"):
        check_adapted_before_launch(late)
    check_adapted_before_launch(Trainer(accelerator="cpu", logger=False))
