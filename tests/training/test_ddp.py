"""Two processes on a CPU, by every launcher: the same result as one process on the same global batches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import no_hang
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from lightning_lora import LoRACallback
from lightning_lora.engine import adapter_state_dict, adapters
from lightning_lora.training.checkpoint import METADATA
from lightning_lora.training.signals import SigtermLater

from . import ddp_run
from .ddp_run import Shared, SharedInConfigureModel, SharedInSetup, WithDropout, fit
from .lit import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # Python's, of forking with threads
]
# Sums over two processes are added in another order: a few units in the last place of float32 over ten steps.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def by_script(style: str, out: Path, *ckpt: str) -> dict[str, Tensor]:
    """`strategy="ddp"`, which starts the script again for the second process."""
    command = [sys.executable, "-W", "ignore", ddp_run.__file__, "ddp", "2", style, str(out), *ckpt]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return torch.load(out / "adapter.pt")


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
@pytest.mark.parametrize("style", [Shared, SharedInConfigureModel])
def test_forked_processes_train_as_one_and_leave_the_parent_adapted(
    style: type[Shared], strategy: str, tmp_path: Path
) -> None:
    one, _ = fit(style, tmp_path / "one")
    two, run = fit(style, tmp_path / "two", strategy, 2)
    torch.testing.assert_close(adapter_state_dict(two), adapter_state_dict(one), **CLOSE)
    assert all(bool(m.lora_B.abs().sum() > 0) for _, m in adapters(two))
    run.save_checkpoint(tmp_path / "after.ckpt")
    for path in (tmp_path / "after.ckpt", tmp_path / "two" / "step=9.ckpt"):
        saved = torch.load(path)
        assert set(saved["state_dict"]) == set(adapter_state_dict(one))
        assert saved[METADATA]
    assert (tmp_path / "two" / "step=9-adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_spawned_processes_train_as_one_and_leave_the_parent_adapted(tmp_path: Path) -> None:
    one, _ = fit(Shared, tmp_path / "one")
    two, run = fit(Shared, tmp_path / "two", "ddp_spawn", 2)
    torch.testing.assert_close(adapter_state_dict(two), adapter_state_dict(one), **CLOSE)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert set(torch.load(tmp_path / "after.ckpt")["state_dict"]) == set(adapter_state_dict(one))


@pytest.mark.slow
def test_processes_of_a_script_train_as_one(tmp_path: Path) -> None:
    one, _ = fit(Shared, tmp_path / "one")
    two = by_script("Shared", tmp_path / "two")
    torch.testing.assert_close(two, adapter_state_dict(one), **CLOSE)


@pytest.mark.parametrize("step", [3, 6])
def test_each_process_goes_on_with_its_own_random_numbers(step: int, tmp_path: Path) -> None:
    whole, _ = fit(WithDropout, tmp_path / "whole", "ddp_fork", 2)
    path = str(tmp_path / "whole" / f"step={step}.ckpt")
    resumed, _ = fit(WithDropout, tmp_path / "resumed", "ddp_fork", 2, path)
    for name, tensor in adapter_state_dict(whole).items():
        assert torch.equal(tensor, adapter_state_dict(resumed)[name])


def test_a_checkpoint_of_two_processes_resumes_in_one_and_says_what_differs(tmp_path: Path) -> None:
    fit(Shared, tmp_path / "two", "ddp_fork", 2)
    one, _ = fit(Shared, tmp_path / "one")
    with pytest.warns(UserWarning, match="random state of 2 processes and this run has 1"):
        resumed, _ = fit(Shared, tmp_path / "resumed", ckpt=str(tmp_path / "two" / "step=3.ckpt"))
    # Nothing random is left in this run, so it ends where the others do.
    torch.testing.assert_close(adapter_state_dict(resumed), adapter_state_dict(one), **CLOSE)


class FailsInOne(Shared):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.failing = rank

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == self.failing and batch_idx == 3:
            raise ValueError("stop")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # as torch does, which ends the others when one process has failed


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_forked_process_that_fails_leaves_a_checkpoint_of_what_was_trained(rank: int, tmp_path: Path) -> None:
    """Lightning alone writes one of the process that forked it, where nothing was trained."""
    saver = OnExceptionCheckpoint(tmp_path)
    run = trainer(LoRACallback(rank=2), saver, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # of this process, which saves too, but what is untrained
    try:
        with (
            no_hang(),
            pytest.raises(ProcessRaisedException, match="stop"),
            pytest.warns(UserWarning, match="was not written by this process"),
        ):
            run.fit(FailsInOne(rank))
    finally:
        signal.signal(signal.SIGTERM, before)
    first, _ = torch.load(saver.ckpt_path)["callbacks"]["LoRACallback"]["random"]["ranks"]
    assert first["place"]["batches"] == 3


def test_sigterm_that_came_while_a_run_saved_acts_afterwards() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        later = SigtermLater()
        later.begin()
        later.begin()
        signal.raise_signal(signal.SIGTERM)
        assert came == []
        later.end()
        assert came == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_module_built_in_setup_is_said_to_stay_behind(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the trained adapters did not come back to this one"):
        module, _ = fit(SharedInSetup, tmp_path, "ddp_fork", 2)
    assert not hasattr(module, "net")
    assert set(torch.load(tmp_path / "step=9.ckpt")["state_dict"]) == {
        f"net.{layer}.lora_{factor}" for layer in (0, 3) for factor in "AB"
    }
