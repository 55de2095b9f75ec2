"""What is written under another name first: names that say whose it is, and the end of what dead processes left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
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
