"""Whatever stops a run, the last good checkpoint still loads, and no half file has a checkpoint's name."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hanging import no_hang
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch.multiprocessing import ProcessRaisedException

from lightning_lora import LoRACallback, load_from_checkpoint
from lightning_lora.errors import CheckpointError

from .ddp_run import Shared
from .lit import Lit, trainer

SCRIPT = Path(__file__).with_name("interrupted_run.py")

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


def assert_all_whole(folder: Path) -> list[Path]:
    """Every checkpoint and adapter folder in `folder` loads; returns the checkpoints, oldest first."""
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert checkpoints
    for path in checkpoints:
        assert torch.load(path)["state_dict"]
    for adapter in folder.glob("*-adapter"):
        assert load_file(adapter / "adapter_model.safetensors")
    return checkpoints


def resume(folder: Path, path: Path) -> None:
    saver = ModelCheckpoint(folder / "resumed", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    step = torch.load(path)["global_step"]
    run = trainer(LoRACallback(rank=2), saver, max_epochs=-1, max_steps=step + 2)
    run.fit(Lit(), ckpt_path=str(path))
    assert run.global_step == step + 2


@pytest.mark.parametrize("moment", ["at-work", "saving"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_whole_checkpoints(how: signal.Signals, moment: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), moment]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with no_hang():
            while not (tmp_path / moment).exists():
                assert process.poll() is None, "it ended by itself"
                time.sleep(0.02)
            process.send_signal(how)
            (tmp_path / "signalled").touch()
            process.wait()
    finally:
        process.kill()
    assert process.returncode != 0 or how is signal.SIGTERM, "Lightning ends fit() in peace on SIGTERM"
    newest = assert_all_whole(tmp_path)[-1]
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert not left or how is signal.SIGKILL
    resume(tmp_path, newest)
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    run.save_checkpoint(tmp_path / "again.ckpt")
    assert not any(path.exists() for path in left), "the next save takes away what was left"


@pytest.mark.parametrize("where", ["checkpoint", "adapter folder"])
def test_a_disk_that_fills_is_said_and_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, calls = os.fsync, 0

    def full_later(descriptor: int) -> None:
        nonlocal calls
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls += ".ckpt." in path
        if calls > 1 and (".ckpt." in path) == (where == "checkpoint"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(Lit())
    monkeypatch.undo()
    assert assert_all_whole(tmp_path)[0].name == "step=1.ckpt"
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    assert [p.name for p in tmp_path.glob("*-adapter")] == ["step=1-adapter"]
    resume(tmp_path, tmp_path / "step=1.ckpt")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_small_disk_that_really_fills_keeps_the_checkpoints_that_fitted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        saver = ModelCheckpoint(disk, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        with pytest.raises(CheckpointError, match="No space left on device"):
            trainer(LoRACallback(rank=2), saver, max_epochs=10).fit(Lit())
        assert len(assert_all_whole(disk)) >= 2
        assert [p.name for p in disk.iterdir() if p.suffix == ".tmp"] == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        run.save_checkpoint(tmp_path / "x.ckpt")


def test_a_path_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    with pytest.raises(CheckpointError, match="could not be written"):
        run.save_checkpoint(tmp_path / "file" / "x.ckpt")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.slow
def test_two_runs_in_one_folder_both_end_and_leave_whole_checkpoints(tmp_path: Path) -> None:
    """They write the same names at the same time."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from lightning.pytorch.callbacks import ModelCheckpoint;"
        "from lightning_lora import LoRACallback; from training.lit import Lit, trainer;"
        "saver = ModelCheckpoint(sys.argv[1], save_last=True, every_n_train_steps=1, enable_version_counter=False);"
        "trainer(LoRACallback(rank=2), saver, max_epochs=8).fit(Lit())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), str(Path(__file__).parents[1])]
    runs = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors.decode()
    assert_all_whole(tmp_path)
    assert load_from_checkpoint(Lit, tmp_path / "last.ckpt")
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_folder_beside_a_checkpoint_says_which_step_it_is_of(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(Lit())
    for step in (2, 4):
        with safe_open(tmp_path / f"step={step}-adapter" / "adapter_model.safetensors", "pt") as file:
            note = file.metadata()
        assert (note["step"], note["epoch"]) == (str(step), "0")


def test_a_checkpoint_for_which_temporary_files_have_no_room_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    monkeypatch.setattr("lightning_lora.training.checkpoint_file.has_less_room", lambda path: True)
    with pytest.raises(CheckpointError, match=r"temporary files, .*, is full .*set TMPDIR"):
        run.save_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python's, of forking with threads
@pytest.mark.parametrize("who", ["alone", "both"])
def test_a_process_that_fails_leaves_its_checkpoint_and_waits_for_no_other(who: str, tmp_path: Path) -> None:
    path = tmp_path / "on_exception.ckpt"
    command = [sys.executable, "-W", "ignore", str(SCRIPT.with_name("alone_run.py")), str(tmp_path), who]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, "it waits for the other process"
            time.sleep(0.1)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    first, second = torch.load(path)["callbacks"]["LoRACallback"]["random"]["ranks"]
    assert first["place"]["batches"] == 3
    if who == "both":
        assert second["place"] == first["place"]
        assert second["random"].keys() == first["random"].keys()
        return
    assert second is None
    with pytest.warns(UserWarning, match="random state of 2 processes and this run has 1"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Shared(), ckpt_path=path)
    both = trainer(LoRACallback(rank=2), max_epochs=1, strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    with pytest.raises(ProcessRaisedException, match="the gradients of one process alone"):
        both.fit(Shared(), ckpt_path=path)
