"""`ckpt_path="hf://user/name@revision"`: a training checkpoint that was pushed, fetched with its checksum checked."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lightning_lora.errors import HubNotFoundError, listed
from lightning_lora.hub.download import Remote
from lightning_lora.hub.staging import CHECKPOINT

# Of other kinds of repositories Lightning may know what to do.
_REFERENCE = re.compile(
    r"hf://(?!datasets/|spaces/|buckets/)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/[a-z]+/[^/]+|[^/]+))?(?:/(?P<file>.+?))?/?"
)


@contextmanager
def local_checkpoint(path: Any, *, endpoint: str | None = None, timeout: float = 60.0) -> Iterator[Any]:
    """A local file with what `path` refers to on the Hub, gone afterwards; `path` itself where it is something else.

    "hf://user/name@revision" means its training.ckpt, "hf://user/name@revision/other.ckpt" another file. Raises
    HubNotFoundError where there is none, and other HubErrors.
    """
    found = _REFERENCE.fullmatch(path) if isinstance(path, str) else None
    if found is None:
        yield path
        return
    remote = Remote(found["repo"], endpoint=endpoint, token=None, timeout=timeout)
    commit = remote.commit_of(unquote(found["revision"] or "main"))
    name = found["file"] or CHECKPOINT
    file = remote.listed(commit, [name]).get(name)
    if file is None:
        raise HubNotFoundError(
            f"{found['repo']} has no {name} at {commit[:8]}; it has: {listed(remote.names(commit)) or 'nothing'}. "
            "Training checkpoints are pushed with HubPush(push_checkpoints=True)."
        )
    with tempfile.TemporaryDirectory(prefix="lightning-lora-resume-") as folder:
        local = Path(folder) / CHECKPOINT
        remote.fetch(commit, file, local)
        yield str(local)
