from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, inject, remove
from lightning_lora.engine import Adapter, adapter_state_dict, adapters
from lightning_lora.errors import AdapterStateError, ConfigError, TargetError, TrainingError
from lightning_lora.training.strategy import AdapterPolicy, attach

from .lit import STYLES, BuiltInConfigureModel, BuiltInSetup, Lit, OverridesSetup, net, trainer


def moved(module: nn.Module) -> bool:
    return all(bool(m.lora_B.abs().sum() > 0) for _, m in adapters(module))


@pytest.mark.parametrize("style", STYLES)
def test_a_module_of_any_style_is_adapted_and_trained(style: type[Lit]) -> None:
    module, base = style(), net()
    trainer(callback := LoRACallback(rank=2), max_epochs=1).fit(module)
    assert callback.report is not None
    assert [row.name for row in callback.report.modules] == ["net.0", "net.3"]
    assert callback.report.head == "net.5"
    assert moved(module)
    for (name, p), q in zip(net().named_parameters(), base.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(module.net.get_parameter(name), p), "the base has not moved"
    remove(module)
    assert all(torch.equal(a, b) for a, b in zip(module.net.state_dict().values(), base.state_dict().values()))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_the_model_is_adapted_without_training_and_gives_the_base_outputs(style: type[Lit], entry: str) -> None:
    module = style()
    getattr(trainer(LoRACallback(rank=2)), entry)(module, verbose=False) if entry != "predict" else trainer(
        LoRACallback(rank=2)
    ).predict(module)
    assert isinstance(module.net[0], Adapter)
    x = torch.randn(5, 8)
    assert torch.equal(module.eval()(x), net().eval()(x))


@pytest.mark.parametrize("style", STYLES)
def test_fit_twice_goes_on_with_the_same_adapters(style: type[Lit]) -> None:
    module = style()
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module)
    first = {k: v.clone() for k, v in adapter_state_dict(module).items()}
    run.fit_loop.max_epochs = 2
    run.fit(module)
    assert not torch.equal(first["net.0.lora_B"], adapter_state_dict(module)["net.0.lora_B"])
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)  # a new Trainer, a new callback, the same config


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("which", ["best", "last", "path"])
def test_fit_then_test_reads_the_checkpoint(style: type[Lit], which: str, tmp_path: Path) -> None:
    module = style()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    run = trainer(LoRACallback(rank=2), checkpoint, max_epochs=2)
    run.fit(module)
    trained = {k: v.clone() for k, v in adapter_state_dict(module).items()}
    for _, m in adapters(module):
        nn.init.zeros_(m.lora_B)
    path = {"best": "best", "last": "last", "path": checkpoint.last_model_path}[which]
    run.test(module, ckpt_path=path, verbose=False, weights_only=True)
    if which != "best":
        assert all(torch.equal(v, trained[k]) for k, v in adapter_state_dict(module).items())
    assert moved(module)
    assert len(run.predict(module, ckpt_path=path)) == 2


def test_settings_are_a_config_or_its_fields() -> None:
    assert LoRACallback(rank=4, alpha=2).config == LoRACallback(LoRAConfig(rank=4, alpha=2.0)).config
    with pytest.raises(ConfigError, match="not both: rank"):
        LoRACallback(LoRAConfig(), rank=4)
    with pytest.raises(ConfigError, match=r"'rnak'\. Did you mean 'rank'"):
        LoRACallback(rnak=4)
    with pytest.raises(ConfigError, match="config must be a LoRAConfig, not a int"):
        LoRACallback(8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank"):
        LoRACallback(rank=0)


def test_a_pattern_that_matches_nothing_is_an_error_before_anything_is_changed() -> None:
    module = Lit()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(TargetError, match="q_proj"):
        trainer(LoRACallback(target_modules=["q_proj"]), max_epochs=1).fit(module)
    assert type(module.net[0]) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


def test_adapters_of_another_config_are_an_error() -> None:
    module = Lit()
    inject(module, LoRAConfig(rank=4))
    with pytest.raises(AdapterStateError, match="another config"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    trainer(LoRACallback(rank=4), max_epochs=1).fit(module)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_shards_in_a_way_of_its_own_is_refused(kind: type[Strategy]) -> None:
    with pytest.raises(TrainingError, match=f"does not support {kind.__name__} yet"):
        attach(object.__new__(kind), AdapterPolicy())


def test_an_adapter_that_gets_no_gradient_is_reported_by_name() -> None:
    class Unused(Lit):
        def build(self, seed: int) -> None:
            super().build(seed)
            self.forgotten = nn.Linear(4, 4)
            self.head = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="1 adapters received no gradient in the first batch: forgotten"):
        trainer(LoRACallback(rank=2, target_modules=["net.0", "forgotten"]), max_epochs=1).fit(Unused())


def test_every_adapter_of_two_optimizers_is_heard_before_one_is_reported() -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    module = Manual()
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert moved(module)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lora_first", [True, False])
def test_weight_averaging_averages_the_adapters(style: type[Lit], lora_first: bool, tmp_path: Path) -> None:
    ours, average = LoRACallback(rank=2), EMAWeightAveraging(decay=0.5)
    order = [ours, average] if lora_first else [average, ours]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    module = style()
    with_configure_model = style is BuiltInConfigureModel
    expected = pytest.warns(UserWarning, match="configure_model") if with_configure_model else _no_warning()
    if style is BuiltInSetup and not lora_first:
        pytest.skip("Lightning's own averaging copies a module whose layers are built in setup() before they are")
    with expected:
        trainer(*order, checkpoint, max_epochs=1).fit(module)
    assert moved(module)
    saved = torch.load(checkpoint.best_model_path)
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == set(adapter_state_dict(module))
    assert not torch.equal(saved["state_dict"]["net.0.lora_B"], saved["current_model_state"]["net.0.lora_B"])
    resumed = style()
    with pytest.warns(UserWarning, match="configure_model") if with_configure_model else _no_warning():
        again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=3)
        trainer(LoRACallback(rank=2), EMAWeightAveraging(decay=0.5), again, max_epochs=2).fit(
            resumed, ckpt_path=checkpoint.best_model_path, weights_only=True
        )
    assert moved(resumed)


def _no_warning() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_other_features_of_the_trainer_work(tmp_path: Path) -> None:
    module = Lit()
    run = trainer(
        LoRACallback(rank=2, lora_plus_ratio=4),
        GradientAccumulationScheduler({0: 2}),
        StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
        ModelSummary(max_depth=2),
        max_epochs=3,
        gradient_clip_val=0.5,
        default_root_dir=tmp_path,
    )
    run.fit(module)
    assert moved(module)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_learning_rate_finder_trains_adapters_and_restores_them(tmp_path: Path) -> None:
    module = Lit()
    finder = LearningRateFinder(num_training_steps=12, early_stop_threshold=None)
    trainer(LoRACallback(rank=2), finder, max_epochs=1, default_root_dir=tmp_path).fit(module)
    losses = finder.optimal_lr.results["loss"]
    assert losses[0] != losses[-1]
    assert list(tmp_path.iterdir()) == [], "its own checkpoint, and any adapter folder of it, are gone"
    assert moved(module)


def test_the_batch_size_finder_works(tmp_path: Path) -> None:
    module = Lit(batch_size=2)
    finder = BatchSizeFinder(mode="power", max_trials=2, steps_per_trial=1, init_val=2)
    trainer(LoRACallback(rank=2), finder, max_epochs=1, default_root_dir=tmp_path).fit(module)
    assert module.batch_size == 4
    assert list(tmp_path.iterdir()) == []
    assert moved(module)


def test_a_model_compiled_by_lightning_trains() -> None:
    module = Lit()
    compiled = torch.compile(module, backend="eager")
    trainer(LoRACallback(rank=2), max_epochs=1).fit(compiled)  # type: ignore[arg-type]
    assert moved(module)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
def test_adapters_stay_in_float32_or_wider_under_every_precision(precision: Any) -> None:
    module = Lit()
    trainer(LoRACallback(rank=2), max_epochs=1, precision=precision).fit(module)
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert module.net[0].lora_A.dtype is wide
    assert module.net[0].weight.dtype is (torch.bfloat16 if precision == "bf16-true" else wide)
    assert moved(module)


@pytest.mark.parametrize("style", STYLES)
def test_a_trained_module_can_be_copied_and_pickled(style: type[Lit]) -> None:
    module = style()
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    x = torch.randn(3, 8)
    module.eval()
    module.trainer = None
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))


def test_hooks_put_on_the_instance_are_kept() -> None:
    module = OverridesSetup()
    calls: list[str] = []
    module.setup = lambda stage: calls.append(stage)  # type: ignore[method-assign]
    own = module.__dict__["setup"]
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    assert calls == ["fit"]
    assert module.__dict__["setup"] is own
    assert moved(module)


def test_a_transformers_model_in_a_module_of_ones_own_is_adapted() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )

    class LM(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = LM()
    callback = LoRACallback(rank=2)
    tokens = torch.randint(0, 32, (8, 12))
    trainer(callback, max_epochs=1).fit(module, torch.utils.data.DataLoader(tokens, batch_size=4))
    assert callback.report is not None
    assert callback.report.head == "model.lm_head"
    assert len(callback.report.modules) == 14
    assert moved(module)
