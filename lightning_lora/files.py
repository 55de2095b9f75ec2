"""Files and folders are written under a temporary name and then renamed: a reader sees the old or the new one, whole.

The temporary name contains the id of its process, so that the leftovers of a killed process can be recognised and
removed.
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
    """A hash of the host name and the namespace of process ids. Only where both are the same does an id mean the same
    process: a container has its own ids, and may share a disk with other machines."""
    spaces = ""
    with contextlib.suppress(OSError):
        spaces = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {spaces}".encode()).hexdigest()[:8]


_MACHINE = _machine()
_PROCESS = uuid.uuid4().hex[:8]
"""Distinguishes this process from an earlier one with the same id. (A fork has this value too, but another id.)"""
_OWNED = re.compile(
    r"(\.|-)(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<process>[0-9a-f]{8})-[0-9a-f]{8}(\.tmp|\.partial)?$"
)


def own_name(prefix: str, suffix: str = "") -> str:
    """A unique name that contains the id of this process. `remove_leftovers` uses it to see if the process still
    runs."""
    return f"{prefix}{_MACHINE}-{os.getpid()}-{_PROCESS}-{uuid.uuid4().hex[:8]}{suffix}"


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the files and folders in `folder` that dead processes of this machine left under names of `own_name`."""
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
    except (OSError, OverflowError):  # a process of another user, or no possible id
        return False
    return False


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, to write a file or a folder to. At the end of the block it replaces
    `path`; if the block fails, it is removed. Leftovers of dead processes beside `path` are removed first."""
    remove_leftovers(path.parent)
    beside = path.with_name(own_name(f".{path.name}.", ".tmp"))
    try:
        yield beside
        os.replace(beside, path)
    finally:
        _remove(beside)


def temporary_folder(kind: str) -> Path:
    """Make a new folder where temporary files go, after the leftovers of dead processes there are removed.

    Raises CheckpointError if it cannot be made; if the disk is full, the error says to set TMPDIR.
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
    """A `temporary_folder` that is removed at the end of the block. If it is full, the CheckpointError says so."""
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
    """The end of a sentence that says what went wrong in the folder for temporary files and, if it is full, what to
    do."""
    said = error.strerror or str(error)
    if error.errno not in FULL:
        return f"{said}."
    return (
        f"the folder for temporary files, {tempfile.gettempdir()}, is full ({said}). Free space there, or set TMPDIR "
        "to a folder with more."
    )


def has_less_room(path: str) -> bool:
    """True if temporary files go to another disk than the file `path`, and that disk has less free space."""
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
    """Write `files` (name -> content, or its parts) to `folder`. It is made if it does not exist; if it holds nothing
    else, it is replaced as a whole.

    If the folder holds other files too, they stay and each of ours is replaced atomically, in the order given. Raises
    CheckpointError where it cannot be written; the folder is then as it was, and nothing is left beside it.
    """
    # If `folder` is a link, the folder that it points to is replaced and the link stays.
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
        if not _put_whole(staged, folder, set(files)):
            for name in files:
                os.replace(staged / name, folder / name)
            flush(folder)
        made = []
        with contextlib.suppress(OSError):  # it is in place; not every file system can flush a folder
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


def _put_whole(staged: Path, folder: Path, names: set[str]) -> bool:
    """Put `staged` in the place of `folder`, where that does not exist or holds only files of these `names`; returns
    False where it holds others. Another run may make or remove the folder meanwhile: then this looks again."""
    for tries_left in reversed(range(10)):
        try:
            if not folder.exists():
                os.rename(staged, folder)
            elif {entry.name for entry in folder.iterdir()} <= names:
                _exchange(staged, folder)
            else:
                return False
            return True
        except OSError as error:
            if not tries_left or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise AssertionError


def _write(path: Path, content: bytes | tuple[bytes, memoryview]) -> None:
    with path.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)


def _discard(staged: Path) -> None:
    # Not rmtree: in Python 3.11 it turns Ctrl-C into an OSError about a closed file. The folder holds only files.
    with contextlib.suppress(OSError):
        for path in staged.iterdir():
            path.unlink()
        staged.rmdir()


def remove_folder(folder: Path) -> None:
    """Remove `folder` by renaming it first: a reader sees the whole folder or none. Does nothing if it does not
    exist."""
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
    """Wait until all `paths` are on the disk, since they are renamed afterwards. A thread for each flushes them at the
    same time: the file system then writes its journal once. One after the other takes several times as long."""
    if not threading.main_thread().is_alive():  # the interpreter is shutting down and starts no threads
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

    # No threading.Thread and no pool: Ctrl-C while one starts is lost in another error, or leaves a thread to wait for.
    for path in paths:
        _thread.start_new_thread(flush_one, (path,))
    errors = [error for error in (answers.get() for _ in paths) if error is not None]
    if errors:
        raise errors[0]


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    is_folder = path.is_dir()
    if is_folder and sys.platform == "win32":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(staged: Path, folder: Path) -> None:
    """Swap the names of `staged` and `folder`; in one step where the system can (Linux)."""
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
