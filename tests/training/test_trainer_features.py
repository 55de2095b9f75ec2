"""What a Trainer can be told, and what a module does by itself, with adapters in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, remove
from lightning_lora.engine import adapters
from lightning_lora.engine.layers.frozen import FrozenNorm
from lightning_lora.errors import AdapterStateError, TrainingError
from lightning_lora.training.strategy import freeze_new_norms

from .lit import STYLES, Lit, loader, net, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training"),  # frozen norms
]


def moved(module: nn.Module) -> bool:
    return all(bool(m.lora_B.abs().sum() > 0) for _, m in adapters(module))


def same_base(module: Lit, seed: int = 0) -> bool:
    remove(module)
    return all(torch.equal(a, b) for a, b in zip(module.net.state_dict().values(), net(seed).state_dict().values()))


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
        {"barebones": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"max_steps": 3},
        {"inference_mode": False},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
        {"check_val_every_n_epoch": None, "val_check_interval": 2},
        {"detect_anomaly": True},
        {"deterministic": "warn"},
        {"strategy": SingleDeviceStrategy(device=torch.device("cpu"))},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    ],
    ids="-".join,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:.*barebones", "ignore:You are running in")
def test_a_setting_of_the_trainer_leaves_training_as_it_is(settings: dict[str, Any]) -> None:
    module = Lit()
    quiet: dict[str, Any] = {"max_epochs": 2}
    if "barebones" in settings:
        quiet |= {
            "enable_checkpointing": None,
            "enable_progress_bar": None,
            "enable_model_summary": None,
            "logger": None,
        }
    run = trainer(LoRACallback(rank=2), **{**quiet, **settings})
    run.fit(module)
    assert moved(module)
    if "barebones" not in settings:
        run.test(module, verbose=False)
    assert same_base(module)


def test_validate_before_fit_and_test_after_it_with_one_trainer() -> None:
    module = Lit()
    run = trainer(callback := LoRACallback(rank=2), max_epochs=1)
    run.validate(module, verbose=False)
    assert not moved(module)
    run.fit(module)
    assert moved(module)
    trained = {k: v.clone() for k, v in adapter_state_dict(module).items()}
    run.test(module, verbose=False)
    run.predict(module)
    assert all(torch.equal(v, trained[k]) for k, v in adapter_state_dict(module).items())
    assert callback.report is not None
    assert same_base(module)


def test_adapters_that_were_made_in_inference_mode_can_be_trained() -> None:
    class Sees(Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert torch.is_inference_mode_enabled()

    module = Lit()
    trainer(LoRACallback(rank=2), Sees(), inference_mode=True).validate(module, verbose=False)
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert moved(module)


@pytest.mark.parametrize("style", STYLES)
def test_one_trainer_and_one_callback_fit_one_module_after_another(style: type[Lit], tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    first, second = style(seed=0), style(seed=1)
    run.fit(first)
    run.save_checkpoint(tmp_path / "first.ckpt")
    run.fit_loop.epoch_progress.reset()
    run.fit(second)
    run.save_checkpoint(tmp_path / "second.ckpt")
    assert moved(first)
    assert moved(second)
    for seed, name in ((0, "first"), (1, "second")):  # each knows its own base
        trainer(LoRACallback(rank=2)).test(style(seed=seed), ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
    assert same_base(first, 0)
    assert same_base(second, 1)


def test_a_callback_refuses_a_second_module_with_adapters_of_another_config() -> None:
    callback = LoRACallback(rank=2)
    trainer(callback, max_epochs=1).fit(Lit())
    second = Lit()
    inject(second, LoRAConfig(rank=4))
    with pytest.raises(AdapterStateError, match="another config"):
        trainer(callback, max_epochs=1).fit(second)


@pytest.mark.parametrize("part", ["", "net"])
def test_a_module_that_was_adapted_before_is_saved_and_averaged_like_any_other(part: str, tmp_path: Path) -> None:
    def fit(folder: Path, ckpt: str | None = None) -> ModelCheckpoint:
        module = Lit()
        inject(module.get_submodule(part), LoRAConfig(rank=2))
        saver = ModelCheckpoint(folder, every_n_train_steps=2)
        trainer(LoRACallback(rank=2), EMAWeightAveraging(decay=0.5), saver, max_epochs=2).fit(module, ckpt_path=ckpt)
        assert moved(module)
        return saver

    fit(tmp_path / "2", fit(tmp_path / "1").best_model_path)


def test_two_lora_callbacks_in_one_trainer_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"more than one stateful callback of type `LoRACallback`"):
        trainer(LoRACallback(rank=2), LoRACallback(rank=4))


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_users_callback_sees_the_adapted_model_wherever_it_is_listed(lora_first: bool) -> None:
    seen: list[int] = []

    class User(Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(sum(p.requires_grad for p in pl_module.parameters()))

    ours = LoRACallback(rank=2)
    trainer(*([ours, User()] if lora_first else [User(), ours]), max_epochs=1).fit(Lit())
    assert seen == [4]


def test_an_optimizer_of_a_part_of_the_model_trains_that_part_and_names_the_rest() -> None:
    class Part(Lit):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net[3].parameters(), lr=1e-2)

    module = Part()
    with pytest.warns(UserWarning, match=r"was not given net\.0\.lora_A, net\.0\.lora_B"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert moved(module)
    module = Part()
    trainer(LoRACallback(rank=2, target_modules=["net.3"]), max_epochs=1).fit(module)
    assert moved(module)


def test_manual_optimization_trains() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()

    module = Manual()
    trainer(LoRACallback(rank=2, lora_plus_ratio=4), max_epochs=1).fit(module)
    assert moved(module)


# Lightning says it once in a process.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_first_batch_that_is_skipped_is_no_sign_of_unused_adapters() -> None:
    class Skips(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Skips()
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert moved(module)


def test_what_would_be_trained_but_not_saved_is_an_error() -> None:
    class Unfreezes(Lit):
        def configure_optimizers(self) -> Any:
            self.net[5].requires_grad_(True)
            return super().configure_optimizers()

    with pytest.raises(TrainingError, match=r"net\.5\.weight, net\.5\.bias would be trained, but not saved"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Unfreezes())
    trainer(LoRACallback(rank=2, modules_to_save=["net.5"]), max_epochs=1).fit(Unfreezes())


# Exact resume, with other loaders than test_resume's.


class Several(Lit):
    """Shuffled loaders at once, of different lengths: the shorter ones start again within an epoch."""

    mode = "max_size_cycle"

    def train_dataloader(self) -> Any:
        return CombinedLoader(
            {"a": loader(8, shuffle=True), "b": loader(16, shuffle=True), "c": loader(20, True)}, self.mode
        )

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        loss = sum((self.loss(part) for part in parts if part is not None), torch.zeros(()))
        self.losses.append(loss.detach())
        return loss


def run_and_resume(
    make: Any, folder: Path, steps: Any, *, saves: dict[str, int] | None = None, **settings: Any
) -> None:
    def fit(name: str, ckpt: Path | None = None) -> Any:
        pl.seed_everything(1 if ckpt is None else 7, verbose=False)
        module = make()
        often = saves or {"every_n_train_steps": 1}
        saver = ModelCheckpoint(folder / name, filename="{step}", save_top_k=-1, **often)  # type: ignore[arg-type]
        run = trainer(LoRACallback(rank=2, dropout=0.1), saver, **{"max_epochs": 3, **settings})
        run.fit(module, ckpt_path=ckpt)
        return module

    whole = fit("whole")
    for step in steps:
        resumed = fit(str(step), folder / "whole" / f"step={step}.ckpt")
        assert [a.item() for a in resumed.losses] == [a.item() for a in whole.losses[step:]], step
        assert all(torch.equal(v, adapter_state_dict(resumed)[k]) for k, v in adapter_state_dict(whole).items())


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders_resume_exactly(mode: str, tmp_path: Path) -> None:
    def make() -> Lit:
        module = Several()
        module.mode = mode
        return module

    run_and_resume(make, tmp_path, (1, 2, 3, 4) if mode == "min_size" else (1, 3, 4, 5, 6, 9))


@pytest.mark.parametrize(
    "settings",
    [
        {"reload_dataloaders_every_n_epochs": 1},
        {"reload_dataloaders_every_n_epochs": 2},
        {"limit_train_batches": 3},
        {"max_epochs": -1, "max_steps": 12},
        {"overfit_batches": 3},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit", "ignore:Replacing the dataset sampler")
def test_a_run_resumes_exactly_under_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    last = 8 if 3 in (settings.get("limit_train_batches"), settings.get("overfit_batches")) else 10
    run_and_resume(Lit, tmp_path, (1, 3, 5, 6, last), **settings)


@pytest.mark.parametrize("saves", [{"every_n_epochs": 1}, {"every_n_train_steps": 5}], ids=str)
@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_makes_its_loaders_anew_resumes_exactly_between_two_epochs(
    every: int, saves: dict[str, int], tmp_path: Path
) -> None:
    run_and_resume(Lit, tmp_path, (5, 10), saves=saves, reload_dataloaders_every_n_epochs=every)


def test_a_run_in_double_precision_resumes_exactly(tmp_path: Path) -> None:
    run_and_resume(Lit, tmp_path, (1, 5, 6), precision="64-true")


def test_accumulation_on_a_schedule_resumes_exactly(tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    losses: dict[str, list[float]] = {}
    for name, ckpt in (("whole", None), ("resumed", tmp_path / "whole" / "step=6.ckpt")):
        module = Lit()
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer(LoRACallback(rank=2), GradientAccumulationScheduler({1: 2}), saver, max_epochs=2).fit(
            module, ckpt_path=ckpt
        )
        losses[name] = [loss.item() for loss in module.losses]
    assert losses["resumed"] == losses["whole"][7:]  # five steps of one batch, then one of two


# Norms.


class WithNorm(Lit):
    def build(self, seed: int) -> None:
        base = net(seed)
        self.net = nn.Sequential(base[0], nn.BatchNorm1d(32), base[1], base[3], base[5])  # type: ignore[assignment]

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_norms_that_lightning_replaces_stay_frozen() -> None:
    """As Trainer(sync_batchnorm=True) does, which DDP refuses on a CPU."""
    module = WithNorm()
    inject(module, LoRAConfig(rank=2))
    nn.SyncBatchNorm.convert_sync_batchnorm(module)
    norm = module.net[1]
    assert not isinstance(norm, FrozenNorm)
    freeze_new_norms(module)
    module.train()(torch.randn(4, 8))
    assert isinstance(norm, FrozenNorm)
    assert isinstance(norm, nn.SyncBatchNorm)
    assert int(norm.num_batches_tracked) == 0
    remove(module)
    assert type(norm) is nn.SyncBatchNorm


def test_weight_averaging_that_would_reset_frozen_norms_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"StochasticWeightAveraging estimates .* those of net\.1 are frozen"):
        trainer(LoRACallback(rank=2), StochasticWeightAveraging(1e-3, 1), max_epochs=3).fit(WithNorm())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lora_first", [True, False])
def test_stochastic_weight_averaging_averages_the_adapters(style: type[Lit], lora_first: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        ours: list[Callback] = [LoRACallback(rank=2), StochasticWeightAveraging(1e-3, 1)]
        return ours if lora_first else ours[::-1]

    module = style()
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(*callbacks(), saver, max_epochs=4).fit(module)
    assert moved(module)
    resumed = style()
    again = ModelCheckpoint(tmp_path / "2", every_n_epochs=1, save_top_k=-1)
    trainer(*callbacks(), again, max_epochs=4).fit(resumed, ckpt_path=tmp_path / "epoch=2.ckpt")
    for name, tensor in adapter_state_dict(module).items():
        assert torch.equal(tensor, adapter_state_dict(resumed)[name])
    assert same_base(module)
