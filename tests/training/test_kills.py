"""Killed anywhere, resumed from any checkpoint, ended or extended: the same bits as the run that was left alone.

`python tests/training/kills.py KILLS SEED` does the same for all settings, as often as one likes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .kills import SETTINGS, check

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's own
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Resuming in mid-epoch, but an IterableDataset"),
    pytest.mark.filterwarnings("ignore:Not exactly the run that was interrupted.*an optimizer had changed weights"),
]

IN_SECONDS = [
    "loader: generator",
    "loader: persistent",
    "loader: unsized",
    "loader: stream",
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
    "max_steps in the last epoch",
    "more epochs, generator",
    "reloaded, generator",
]


@pytest.mark.parametrize("name", IN_SECONDS)
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(name: str, tmp_path: Path) -> None:
    assert check(SETTINGS[name], random.Random(name), 4, tmp_path) == []
