"""Two processes on a CPU that share one adapted model (fully_shard): the same as one process that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from lightning_lora.engine import adapter_state_dict

from . import sharded_run
from .ddp_run import Shared, fit
from .sharded_run import together

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python's, of forking with threads
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_sharded_model_trains_as_one_that_is_not(dropout: float, dtype: torch.dtype | None) -> None:
    together(sharded_run.trains_as_one, dropout, dtype)


def test_a_sharded_model_takes_the_fused_step() -> None:
    together(sharded_run.takes_the_fused_step)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"init": "pissa"}, {"modules_to_save": ["last"]}, {"bias": "lora_only"}],
    ids=lambda config: next(iter(config), "plain"),
)
def test_the_adapter_of_a_sharded_model_is_saved_and_loaded_whole(config: dict[str, Any], tmp_path: Path) -> None:
    together(sharded_run.saves_and_loads, tmp_path, config)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init": "pissa"}], ids=lambda c: next(iter(c), "plain"))
def test_base_weights_may_come_once_the_model_is_sharded(config: dict[str, Any]) -> None:
    together(sharded_run.base_weights_may_come_after, config)


def test_what_would_let_processes_diverge_is_refused() -> None:
    together(sharded_run.refuses_what_would_go_wrong)


def test_flat_parts_of_parameters_are_not_saved_for_the_whole(tmp_path: Path) -> None:
    together(sharded_run.flat_parts_are_not_taken_for_tensors, tmp_path)


def test_a_model_that_is_split_over_processes_computes_as_one_that_is_not(tmp_path: Path) -> None:
    together(sharded_run.is_split_as_one, tmp_path)


@pytest.mark.parametrize(
    ("style", "settings"),
    [
        (sharded_run.Sharded, {}),
        (sharded_run.Sharded, {"lora_plus_ratio": 2.0}),
        (sharded_run.Sharded, {"product_decay": 0.1}),
        (sharded_run.Sharded, {"init": "pissa"}),
        (sharded_run.Split, {"product_decay": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_lightning_trains_a_sharded_model_as_one_that_is_not(
    style: type[Shared], settings: dict[str, Any], tmp_path: Path
) -> None:
    one, _ = fit(Shared, tmp_path / "one", **settings)
    together(sharded_run.fits_as_one, tmp_path, style, adapter_state_dict(one), settings)
    bases = [Shared(), Shared()]
    for base, run in zip(bases, ("one", "two")):
        load_adapter(base, tmp_path / run / "step=9-adapter")
    torch.testing.assert_close(*(adapter_state_dict(base) for base in bases), **sharded_run.CLOSE)
    with pytest.warns(UserWarning, match="random state of 2 processes and this run has 1"):  # nothing random is left
        again, _ = fit(Shared, tmp_path / "again", ckpt=str(tmp_path / "two" / "step=3.ckpt"), **settings)
    torch.testing.assert_close(adapter_state_dict(again), adapter_state_dict(one), **sharded_run.CLOSE)


def test_what_lightning_would_train_apart_is_refused(tmp_path: Path) -> None:
    together(sharded_run.is_told_of_what_is_not_sharded, tmp_path)
