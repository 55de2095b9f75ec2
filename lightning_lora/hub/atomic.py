"""Write a folder so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import os
import queue
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from lightning_lora.errors import CheckpointError
from lightning_lora.hub.temporary import own_name, remove_leftovers

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_folder(folder: Path, files: Mapping[str, bytes | tuple[bytes, memoryview]]) -> None:
    """Put `files` (name -> content, or its parts) into `folder`, which is made or, if it holds nothing else, replaced
    as a whole.

    Where it holds other files too, those stay and each of ours is replaced atomically, in the order given. Raises
    CheckpointError where it cannot be written; the folder is then as it was, and nothing is left beside it.
    """
    # Through a link, the folder that it points to is replaced and the link stays.
    folder = Path(os.path.realpath(folder))
    remove_leftovers(folder.parent)
    staged = folder.with_name(own_name(f".{folder.name}.", ".tmp"))
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: an adapter is saved as a folder. Choose another name.")
        made = _make(folder.parent)
        staged.mkdir()
        for name, content in files.items():
            _write(staged / name, content)
        _sync_all([*(staged / name for name in files), staged])
        if not folder.exists():
            os.rename(staged, folder)
        elif {entry.name for entry in folder.iterdir()} <= set(files):
            _exchange(staged, folder)
        else:
            for name in files:
                os.replace(staged / name, folder / name)
            _sync(folder)
        made = []
        with contextlib.suppress(OSError):  # written and in place: a file system without it may still lose power
            _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"The adapter could not be written to {folder}: {error.strerror or error}. "
            "What was there before is still there."
        ) from error
    finally:
        try:
            _discard(staged)
        except BaseException:  # Ctrl-C
            _discard(staged)
            raise
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def _write(path: Path, content: bytes | tuple[bytes, memoryview]) -> None:
    with path.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def _discard(staged: Path) -> None:
    # Not rmtree, in which Python 3.11 turns Ctrl-C into an OSError of a closed file. It holds files alone.
    with contextlib.suppress(OSError):
        for path in staged.iterdir():
            path.unlink()
        staged.rmdir()


def remove_folder(folder: Path) -> None:
    """Remove `folder` so that it is there whole or not at all; nothing happens where it is not."""
    aside = folder.with_name(own_name(f".{folder.name}.", ".tmp"))
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def _make(folder: Path) -> list[Path]:
    """Make `folder` and its parents; returns the ones that were not there, outermost first."""
    missing: list[Path] = []
    while not folder.exists():
        missing.insert(0, folder)
        folder = folder.parent
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing


def _sync_all(paths: list[Path]) -> None:
    """What is renamed after must be on the disk whole. All at once: a file system then writes its journal once for
    them, not once for each, which takes several times as long."""
    if not threading.main_thread().is_alive():  # the interpreter ends, and starts no threads
        for path in paths:
            _sync(path)
        return
    answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def sync(path: Path) -> None:
        try:
            _sync(path)
        except BaseException as error:
            answers.put(error)
        else:
            answers.put(None)

    # Not threading's, nor a pool's: Ctrl-C while one starts is lost in another error, or leaves one to wait for.
    for path in paths:
        _thread.start_new_thread(sync, (path,))
    errors = [error for error in (answers.get() for _ in paths) if error is not None]
    if errors:
        raise errors[0]


def _sync(path: Path) -> None:
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":  # has no handle on a folder
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(staged: Path, folder: Path) -> None:
    """Give `staged` the name `folder` and the other way round; in one step where the system can (Linux)."""
    if _exchanged_at_once(staged, folder):
        return
    aside = folder.with_name(f"{staged.name}.old")
    os.rename(folder, aside)
    try:
        os.rename(staged, folder)
    except BaseException:
        os.rename(aside, folder)
        raise
    os.rename(aside, staged)


def _exchanged_at_once(first: Path, second: Path) -> bool:
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
