"""What a dead process left is removed, and nothing that anybody else may still use."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora import files as atomic
from lightning_lora import files as temporary
from lightning_lora.errors import CheckpointError
from lightning_lora.files import (
    own_name,
    remove_folder,
    remove_leftovers,
    within_temporary_folder,
    write_folder,
    written_beside,
)
from lightning_lora.hub.push import stage_model
from lightning_lora.hub.staging import stage

DIES = """
import sys
from pathlib import Path
from lightning_lora.files import own_name
for prefix, suffix in (("last.ckpt.", ".partial"), (".best-adapter.", ".tmp"), ("lightning-lora-push-", "")):
    path = Path(sys.argv[1]) / own_name(prefix, suffix)
    path.write_text("half") if suffix == ".partial" else (path.mkdir(), (path / "half").write_text("x"))
"""


@pytest.fixture
def left(tmp_path: Path) -> list[Path]:
    """Names that a process took and did not give back."""
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=True)
    found = sorted(tmp_path.iterdir())
    assert len(found) == 3
    return found


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4))
    inject(made, LoRAConfig(rank=2, target_modules=["0"]))
    return made


def test_what_a_dead_process_left_is_removed(left: list[Path]) -> None:
    remove_leftovers(left[0].parent)
    assert not any(path.exists() for path in left)


def test_what_others_may_use_stays(left: list[Path], tmp_path: Path) -> None:
    name = left[0].name
    pid = name.split("-")[-3]
    kept = {
        "of this process": own_name(".x-adapter.", ".tmp"),
        "of a process that lives": name.replace(f"-{pid}-", f"-{os.getppid()}-"),
        "of another machine": name.replace(temporary._MACHINE, "0123abcd"),
        "of an earlier version": ".x-adapter.0a1b2c3d.tmp",
        "a user's": "step-1-adapter",
        "a user's, put aside": f"{left[1].name}.old",
    }
    for other in kept.values():
        (tmp_path / other).mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept.values())


def test_what_an_earlier_process_with_this_ones_id_left_is_removed(tmp_path: Path) -> None:
    name = own_name(".x-adapter.", ".tmp").replace(temporary._PROCESS, "00000000")
    (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    name = own_name(".x-adapter.", ".tmp").replace(temporary._PROCESS, "00000000")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_save_removes_what_was_left_beside_it(left: list[Path], tmp_path: Path) -> None:
    save_adapter(model(), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_staging_removes_what_was_left_among_temporary_files(
    left: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staged = stage_model(model())
    assert list(tmp_path.iterdir()) == [staged.folder]
    staged.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "x-adapter", {"a": b"1", "b": b"2"})
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # killed here
    remove_folder(tmp_path / "x-adapter")
    assert not (tmp_path / "x-adapter").exists()
    monkeypatch.undo()
    (aside,) = tmp_path.iterdir()
    aside.rename(aside.with_name(aside.name.replace(temporary._PROCESS, "00000000")))
    save_adapter(model(), tmp_path / "y-adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["y-adapter"]
    remove_folder(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_beside_takes_its_place_whole_or_leaves_nothing(kind: str, tmp_path: Path) -> None:
    def write(path: Path, text: str) -> Path:
        if kind == "folder":
            path.mkdir()
        (path / "x" if kind == "folder" else path).write_text(text)
        return tmp_path

    place = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError), written_beside(place) as beside:
        write(beside, "half").joinpath("absent").read_text()
    assert list(tmp_path.iterdir()) == []
    with written_beside(place) as beside:
        write(beside, "whole")
        assert not place.exists()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x" if kind == "folder" else "a.json"]
    assert list(tmp_path.iterdir()) == [place]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_folder_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(model(), tmp_path / "adapter")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.hub.staging.shutil.copyfile", full)
        with pytest.raises(CheckpointError, match=r"temporary files, .*/tmp, is full .*set TMPDIR"):
            stage(adapter)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_lora.files._write", full)
        with pytest.raises(CheckpointError, match=r"temporary files, .*/tmp, is full .*set TMPDIR"):
            stage_model(model())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(CheckpointError, match=r"temporary files, .*/tmp, is full .*set TMPDIR"):
            stage(adapter)
    with (
        pytest.raises(CheckpointError, match=r"temporary files, .*/tmp, is full .*set TMPDIR"),
        within_temporary_folder("resume"),
    ):
        full()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_ctrl_c_while_files_are_flushed_ends_the_save_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the disk does not answer: no thread of it is waited for."""
    hangs, flush, flushed = threading.Event(), os.fsync, threading.Semaphore(0)

    def slow(handle: int) -> None:
        hangs.wait(20)
        flush(handle)
        flushed.release()

    class Interrupted:
        def put(self, _: Any) -> None: ...

        def get(self) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(atomic.queue, "SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "adapter", {"a": b"1"})
    assert list(tmp_path.iterdir()) == []
    hangs.set()
    flushed.acquire(timeout=20)


def test_ctrl_c_at_any_moment_of_saving_is_ctrl_c_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    """Sent again and again, to a process that does nothing but save."""
    done = subprocess.run([sys.executable, "-c", SAVES, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    assert {path.name: path.stat().st_size for path in (tmp_path / "x").iterdir()} == {"a": 5000, "b": 100000}
    write_folder(tmp_path / "x", {"a": b"1", "b": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


SAVES = """
import os, random, signal, sys, threading, time
from pathlib import Path
from lightning_lora.files import write_folder
end, interrupts = time.monotonic() + 5, 0
def pest():
    while time.monotonic() < end - 0.5:
        time.sleep(0.05 + random.random() * 0.05)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=pest, daemon=True).start()
while time.monotonic() < end:
    try:
        while time.monotonic() < end:
            write_folder(Path(sys.argv[1]) / "x", {"a": b"1" * 5000, "b": b"2" * 100000})
    except KeyboardInterrupt:
        interrupts += 1
print(interrupts)
"""
