"""A folder is on the disk whole before it takes its place."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_lora import files as atomic
from lightning_lora.files import write_folder

FILES = {"small": b"abc" * 1000, "large": b"w" * (3 << 20), "empty": b""}


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The files and folders that were flushed, by their inodes; 0 where a folder took its place."""
    seen: list[int] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        seen.append(os.fstat(handle).st_ino)

    def noted_rename(old: Any, new: Any) -> None:
        rename(old, new)
        seen.append(0)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    return seen


def check(folder: Path, flushed: list[int]) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    before, after = flushed[: flushed.index(0)], flushed[flushed.index(0) + 1 :]
    assert set(before) == {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert after == [folder.parent.stat().st_ino]


def test_all_of_it_is_flushed_before_it_takes_its_place_and_that_after(tmp_path, flushed):
    write_folder(tmp_path / "adapter", FILES)
    check(tmp_path / "adapter", flushed)


def test_so_it_is_where_the_interpreter_ends_and_starts_no_threads(tmp_path, flushed, monkeypatch):
    monkeypatch.setattr(atomic._thread, "start_new_thread", None)
    monkeypatch.setattr(atomic.threading, "main_thread", lambda: SimpleNamespace(is_alive=lambda: False))
    write_folder(tmp_path / "adapter", FILES)
    check(tmp_path / "adapter", flushed)


@pytest.mark.parametrize("meanwhile", ["made", "removed"])
def test_a_folder_that_another_run_makes_or_removes_meanwhile_is_written(
    meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, others = tmp_path / "adapter", os.rename, []
    if meanwhile == "removed":
        write_folder(folder, {"a": b"before"})

    def once(*_: object) -> None:
        if not others:
            others.append(meanwhile)
            if meanwhile == "made":
                folder.mkdir()
                (folder / "a").write_bytes(b"theirs")
            else:
                (folder / "a").unlink()
                folder.rmdir()

    def late(source: Path, target: Path) -> None:
        once()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    monkeypatch.setattr(atomic, "_exchanged_at_once", lambda *_: bool(once()))
    write_folder(folder, {"a": b"ours"})
    assert others
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == {"a": b"ours"}
    assert list(tmp_path.iterdir()) == [folder]
