"""Fetches a checkpoint whose `ckpt_path` is no local file into a new folder; from the Hub, its checksum is checked.

Lightning would leave http to torch.hub, which keeps downloads under the last part of the address: the second run's
last.ckpt would be the first one's.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote
from urllib.request import Request, urlopen

from lightning_lora.errors import CheckpointError, HubNotFoundError, listed
from lightning_lora.files import FULL, within_temporary_folder
from lightning_lora.hub.download import SLOWEST, Remote
from lightning_lora.hub.staging import CHECKPOINT

# Other kinds of repositories are left to fsspec.
_REFERENCE = re.compile(
    r"hf://(?!datasets/|spaces/|buckets/)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/[a-z]+/[^/]+|[^/]+))?(?:/(?P<file>.+?))?/?"
)
_BLOCK = 1 << 20


_LOCAL = re.compile(r"^(file|local)://")


def is_local(path: Any) -> bool:
    """True if `path` names a file on this machine."""
    return "://" not in str(path) or _LOCAL.match(str(path)) is not None


def is_on_hub(path: Any) -> bool:
    """True if `path` names a file in a repository for models on the Hub."""
    return _REFERENCE.fullmatch(str(path)) is not None


def local_path(path: Any) -> str:
    """The absolute path of a file for which `is_local` is true, as fsspec reads it."""
    return os.path.abspath(os.path.expanduser(_LOCAL.sub("", str(path))))


@contextmanager
def local_checkpoint(path: Any, *, endpoint: str | None = None, timeout: float = 60.0) -> Iterator[str]:
    """The path of a local file: `path` itself, or a temporary copy of the remote file that `path` names.

    "hf://user/name@revision" names training.ckpt in a repository on the Hub, "hf://user/name@revision/other.ckpt"
    another file of it. "https://" addresses are downloaded; other schemes are those of fsspec. Raises HubNotFoundError
    and other HubErrors for the Hub, CheckpointError where another place does not give the file.
    """
    if is_local(path):
        yield local_path(path)
        return
    with within_temporary_folder("resume") as folder:
        local = folder / CHECKPOINT
        found = _REFERENCE.fullmatch(str(path))
        if found is not None:
            local = _fetch(found, folder, endpoint, timeout)
        else:
            _download(str(path), local, timeout)
        yield str(local)


def _fetch(found: re.Match[str], folder: Path, endpoint: str | None, timeout: float) -> Path:
    inside, _, name = (found["file"] or CHECKPOINT).rpartition("/")
    remote = Remote(found["repo"], endpoint=endpoint, token=None, timeout=timeout, subfolder=inside)
    commit = remote.commit_of(unquote(found["revision"] or "main"))
    entries = remote.entries(commit)
    file = entries.get(name)
    if file is None:
        raise HubNotFoundError(
            f"{found['repo']} has no {found['file'] or CHECKPOINT} at {commit[:8]}; beside it lie: "
            f"{listed(entries) or 'nothing'}. Training checkpoints are pushed with HubPush(push_checkpoints=True)."
        )
    return remote.fetch(commit, file, folder)


def _download(address: str, local: Path, timeout: float) -> None:
    try:
        if address.lower().startswith(("http://", "https://")):
            with urlopen(Request(address, headers={"Accept-Encoding": "identity"}), timeout=timeout) as response:
                _copy(response, local, timeout, response.headers.get("Content-Length"))
        else:
            import fsspec  # Lightning's own dependency; slow to import

            with fsspec.open(address, "rb") as remote, local.open("wb") as file:
                shutil.copyfileobj(remote, file, _BLOCK)
    except FileNotFoundError:
        raise
    except (OSError, HTTPException, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise CheckpointError(
            f"The checkpoint {address} could not be fetched: {error}. Check the address, or download the file and "
            "pass its path."
        ) from error


def _copy(response: IO[bytes], local: Path, timeout: float, size: str | None) -> None:
    begun, have = time.monotonic(), 0
    with local.open("wb") as file:
        while block := response.read(_BLOCK):
            have += file.write(block)
            if time.monotonic() - begun > timeout + have / SLOWEST:
                raise OSError(f"only {have:,} bytes arrived in {time.monotonic() - begun:.0f} s")
    if size is not None and have != int(size):
        raise OSError(f"{have:,} of {size} bytes arrived")
