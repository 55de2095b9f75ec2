"""The rank changes while a run goes on, and a run that is resumed is the run that was not interrupted."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging

from lightning_lora import LoRACallback, load_adapter
from lightning_lora.engine import adapter_state_dict, injection_of, pairs
from lightning_lora.errors import ConfigError, TrainingError

from .lit import Lit, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

SCHEDULE = {4: 2, 9: 6}
STEPS = 14


def rank_at(step):
    return 4 if step < 4 else 2 if step < 9 else 6


class Ranks(Callback):
    """Notes the rank that each batch trains, at its global step."""

    def __init__(self):
        self.seen = {}

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen[trainer.global_step] = {pair.spec.rank for pair in pairs(pl_module)}


def fit(folder, resume=None, model=None, steps=STEPS, **fields):
    torch.manual_seed(0)
    model = model or Lit()
    ranks = Ranks()
    lora = LoRACallback(**{"rank": 4, "rank_schedule": SCHEDULE, "dropout": 0.1, **fields})
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(lora, ranks, saver, max_steps=steps, max_epochs=-1)
    run.fit(model, ckpt_path=resume)
    return model, lora, run, ranks


@pytest.mark.parametrize("fields", [{}, {"lora_plus_ratio": 4.0, "product_decay": 0.1}, {"init": "pissa"}])
@pytest.mark.parametrize("at", [3, 4, 5, 9, 11])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, at, fields):
    whole, lora, run, ranks = fit(tmp_path / "whole", **fields)
    assert ranks.seen == {step: {rank_at(step)} for step in range(STEPS)}
    assert lora.config == injection_of(whole).config
    again, resumed, other, _ = fit(tmp_path / "again", resume=tmp_path / f"whole/step={at}.ckpt", **fields)
    states = [adapter_state_dict(model) for model in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for mine, theirs in zip(*(one.optimizers[0].state_dict()["state"].values() for one in (run, other))):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert resumed.config == lora.config


def test_checkpoints_of_every_rank_are_loaded_and_their_folders_fit_the_base(tmp_path):
    model, _, run, _ = fit(tmp_path)
    for step in (2, 7, 12):
        (loss,) = run.validate(model, ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)
        assert {pair.spec.rank for pair in pairs(model)} == {rank_at(step - 1)}
        plain = Lit()
        load_adapter(plain, tmp_path / f"step={step}-adapter")
        (same,) = trainer().validate(plain, verbose=False)
        assert same["val_loss"] == pytest.approx(loss["val_loss"], rel=1e-5)


def test_the_run_before_the_first_change_is_the_run_without_a_schedule(tmp_path):
    model, *_ = fit(tmp_path / "a", steps=4)
    plain, *_ = fit(tmp_path / "b", steps=4, rank_schedule=None)
    states = [adapter_state_dict(m) for m in (model, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Rprop(Lit):
    def configure_optimizers(self):
        return torch.optim.Rprop(self.parameters())


def test_what_cannot_follow_is_refused_by_name_when_training_starts(tmp_path):
    with pytest.raises(TrainingError, match="Rprop keeps 'prev'"):
        fit(tmp_path, model=Rprop())
    with pytest.raises(TrainingError, match="WeightAveraging"):
        trainer(LoRACallback(rank_schedule={3: 2}), WeightAveraging(), max_steps=2).fit(Lit())
    with patch.dict(os.environ), pytest.raises(TrainingError, match="DDPStrategy"):  # Lightning writes into it
        trainer(LoRACallback(rank_schedule={3: 2}), strategy="ddp", max_steps=2).fit(Lit())
    if torch.distributed.is_initialized():  # Lightning leaves the group of this process to later tests
        torch.distributed.destroy_process_group()
    for wrong in ({}, 8, {0: 4}, {3: 0}, {"3": 4}):
        with pytest.raises(ConfigError, match="rank_schedule"):
            LoRACallback(rank_schedule=wrong)
