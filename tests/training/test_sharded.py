"""Two processes on a CPU that share one adapted model (fully_shard): the same as one process that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import sharded_run
from .sharded_run import together

pytestmark = [
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
