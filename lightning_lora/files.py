"""Files and folders are written under another name first: a reader sees the old one or the new one, never half of one.

The other name says which process it belongs to, so that what a killed process left can be told and removed.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import hashlib
import os
import queue
import re
import shutil
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.errors import CheckpointError, LightningLoRAError

FULL = (errno.ENOSPC, errno.EDQUOT)


def _machine() -> str:
    """Where a process id means what it does here: a container has ids of its own, on disks that it shares."""
    spaces = ""
    with contextlib.suppress(OSError):
        spaces = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {spaces}".encode()).hexdigest()[:8]


_MACHINE = _machine()
_PROCESS = uuid.uuid4().hex[:8]
"""Tells this process from an earlier one that had its id. A fork has another id."""
_OWNED = re.compile(
    r"(\.|-)(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-[0-9a-f]{8}(\.tmp|\.partial)?$"
)


def own_name(prefix: str, suffix: str = "") -> str:
    """A name that nothing else has, by which `remove_leftovers` knows whether its process lives."""
    return f"{prefix}{_MACHINE}-{os.getpid()}-{_PROCESS}-{uuid.uuid4().hex[:8]}{suffix}"


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what dead processes of this machine left in `folder` under names of `own_name`."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if _is_left(entry.name)]
    except OSError:
        return
    for path in found:
        _remove(path)


def _remove(path: str | os.PathLike[str]) -> None:
    with contextlib.suppress(OSError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.remove(path)


def _is_left(name: str) -> bool:
    owned = _OWNED.search(name)
    if owned is None or owned["machine"] != _MACHINE:
        return False
    pid = int(owned["pid"])
    if pid == os.getpid():
        return owned["process"] != _PROCESS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's
        return False
    return False


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to. It takes the place of `path` at the end of the block, and is
    gone where the block fails. What dead processes left beside `path` is removed first."""
    remove_leftovers(path.parent)
    beside = path.with_name(own_name(f".{path.name}.", ".tmp"))
    try:
        yield beside
        os.replace(beside, path)
    finally:
        _remove(beside)


def temporary_folder(kind: str) -> Path:
    """A new folder where temporary files go, in place of those that dead processes left there.

    Raises CheckpointError, naming TMPDIR, where it cannot be made.
    """
    try:
        root = tempfile.gettempdir()
        remove_leftovers(root)
        folder = Path(root) / own_name(f"lightning-lora-{kind}-")
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise CheckpointError(f"A folder for temporary files is needed, and there is none: {reason(error)}") from error
    return folder


@contextmanager
def within_temporary_folder(kind: str) -> Iterator[Path]:
    """A `temporary_folder`, gone afterwards. Where it is full, the CheckpointError says so."""
    folder = temporary_folder(kind)
    try:
        yield folder
    except (OSError, LightningLoRAError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise CheckpointError(f"There was no room to work in: {reason(cause)}") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reason(error: OSError) -> str:
    """What went wrong in the folder for temporary files, as the end of a sentence; where it is full, what to do."""
    said = error.strerror or str(error)
    if error.errno not in FULL:
        return f"{said}."
    return (
        f"the folder for temporary files, {tempfile.gettempdir()}, is full ({said}). Free space there, or set TMPDIR "
        "to a folder with more."
    )


def has_less_room(path: str) -> bool:
    """Whether temporary files go to another disk than the file `path`, one with less room."""
    folders = tempfile.gettempdir(), os.path.dirname(path) or "."
    try:
        temporary, other = (shutil.disk_usage(folder).free for folder in folders)
        disks = {os.stat(folder).st_dev for folder in folders}
    except OSError:
        return False
    return len(disks) > 1 and temporary < other


# Write a folder so that a reader sees the old one or the new one, never half of one.

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
        _flush_all([*(staged / name for name in files), staged])
        if not folder.exists():
            os.rename(staged, folder)
        elif {entry.name for entry in folder.iterdir()} <= set(files):
            _exchange(staged, folder)
        else:
            for name in files:
                os.replace(staged / name, folder / name)
            flush(folder)
        made = []
        with contextlib.suppress(OSError):  # written and in place: a file system without it may still lose power
            flush(folder.parent)
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


def _flush_all(paths: list[Path]) -> None:
    """What is renamed after must be on the disk whole. All at once: a file system then writes its journal once for
    them, not once for each, which takes several times as long."""
    if not threading.main_thread().is_alive():  # the interpreter ends, and starts no threads
        for path in paths:
            flush(path)
        return
    answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def flush_one(path: Path) -> None:
        try:
            flush(path)
        except BaseException as error:
            answers.put(error)
        else:
            answers.put(None)

    # Not threading's, nor a pool's: Ctrl-C while one starts is lost in another error, or leaves one to wait for.
    for path in paths:
        _thread.start_new_thread(flush_one, (path,))
    errors = [error for error in (answers.get() for _ in paths) if error is not None]
    if errors:
        raise errors[0]


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
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
