"""Killed anywhere, resumed from any checkpoint, ended or extended: the same bits as the run that was left alone.

`python tests/training/kills.py KILLS SEED` does the same for all settings, as often as one likes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .kills import HOOKS, SETTINGS, Setting, check, differences, end, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's own
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Resuming in mid-epoch, but an IterableDataset"),
    pytest.mark.filterwarnings("ignore:Not exactly the run that was interrupted.*weights or schedules had changed"),
]

IN_SECONDS = [
    "loader: generator",
    "loader: persistent",
    "loader: unsized",
    "loader: stream",
    "loader: stateful, stream",
    "loader: stateful, stream without a state",
    "loader: stateful, unsized",
    "by hand: replacement, exceptions",
    "by hand: counting sampler, exceptions",
    "by hand: sampler with set_epoch, exceptions",
    "by hand: own generators, exceptions",
    "by hand: stateful, generator, exceptions",
    "by hand: two, exceptions",
    "window and validation",
    "validation saves",
    "time",
    "exceptions",
    "by hand, first",
    "windows by epoch",
    "an epoch's steps",
    "best of training",
    "plateau by epoch, validation saves",
    "plateau by epoch, epoch saves",
    "plateau by step",
    "early stopping",
    "manual, exceptions, validation",
    "two optimizers",
    "max_steps in windows",
    "stopped in an epoch, validation saves",
    "max_steps in the last epoch",
    "more epochs, generator",
    "reloaded, generator",
]


@pytest.mark.parametrize("name", IN_SECONDS)
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(name: str, tmp_path: Path) -> None:
    assert check(SETTINGS[name], random.Random(name), 4, tmp_path) == []


@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_saved_before_others_had_their_turn_gives_the_run_that_was_left_alone(
    hook: str, tmp_path: Path
) -> None:
    setting = Setting(
        saver={"every_n_epochs": 9},
        by_hand=(hook,),
        by_hand_first=True,
        schedule="epoch val_loss",
        stopping={"monitor": "val_loss", "patience": 9, "min_delta": 0.02},
        trainer={"accumulate_grad_batches": 2, "val_check_interval": 3},
    )
    whole, run, _, _ = fit(setting, tmp_path / "whole")
    saved = sorted((tmp_path / "whole").glob("by-hand*"))
    for path in saved[:1] + saved[1:][-1:]:
        resumed, its_run, _, _ = fit(setting, tmp_path / path.stem, ckpt=path)
        assert differences(end(resumed, its_run), end(whole, run)) == []


@pytest.mark.parametrize("windows", [None, {0: 4, 1: 3, 2: 2}])
def test_a_run_that_is_killed_soon_after_it_was_resumed_goes_on_as_well(
    windows: dict[int, int] | None, tmp_path: Path
) -> None:
    in_batch = ("on_before_backward", "on_after_backward")  # every third call saves, first inside batch 1
    setting = Setting(by_hand=in_batch, on_exception=True, windows=windows)
    whole, run, _, _ = fit(setting, tmp_path / "whole")
    first = min((tmp_path / "whole").glob("by-hand*"))
    for call in range(5, 10):
        folder = tmp_path / str(call)
        *_, was_killed = fit(setting, folder, call, first)
        (saved,) = folder.glob("exception*")
        resumed, its_run, _, _ = fit(setting, folder, ckpt=saved)
        assert was_killed
        assert differences(end(resumed, its_run), end(whole, run)) == []


def test_what_the_sanity_check_took_from_the_validations_sampler_counts_in_a_resumed_run(tmp_path: Path) -> None:
    setting = Setting(validation="counting", trainer={"limit_val_batches": 2})
    whole, run, _, _ = fit(setting, tmp_path / "whole")
    resumed, its_run, _, _ = fit(setting, tmp_path / "again", ckpt=tmp_path / "whole/step=1-epoch=0.ckpt")
    assert differences(end(resumed, its_run), end(whole, run)) == []
    assert resumed.log_["epoch", 0] == whole.log_["epoch", 0], "the metrics of the first validation"
