"""The private names of huggingface_hub that we use: each once, with the reason."""

from __future__ import annotations

import sys
import threading
from typing import Any

from lightning_lora.borrowed import attribute, found


class Forks:
    """Lets a process fork while other threads talk to the Hub.

    The client, which all threads share, is made under one lock and keeps its connections under another. A thread that
    holds one of them at the moment of a fork is not in the child: the child would wait for ever, for the first lock in
    its first call, for the second in the client's own hook, which closes the parent's connections. So a fork waits for
    the first lock, and the child starts without a client. Where the names are gone, forks are as without this package.
    """

    def __init__(self) -> None:
        path = "huggingface_hub.utils._http"
        purpose = "forks a process while another thread talks to the Hub"
        self.lock: threading.Lock = found(f"{path}:_CLIENT_LOCK", purpose, threading.Lock())
        self.owner: Any = sys.modules.get(path) if found(f"{path}:_GLOBAL_CLIENT", purpose, self) is not self else None
        self.client: Any = None
        """The parent's client, during a fork; in a child for ever: its connections are not the child's to close."""

    def before(self) -> None:
        self.lock.acquire()
        if self.owner is not None:
            self.client, self.owner._GLOBAL_CLIENT = self.owner._GLOBAL_CLIENT, None

    def in_parent(self) -> None:
        if self.owner is not None:
            self.client, self.owner._GLOBAL_CLIENT = None, self.client
        self.lock.release()

    def in_child(self) -> None:
        self.lock.release()


def is_left_out(operation: Any) -> bool:
    """True if the client leaves the file of `operation` out of the commit, as the repository's .gitignore says. Raises
    MovedError where the client does not tell: else an adapter without its tensors could be pushed."""
    return bool(attribute(operation, "_should_ignore", "sees which files a repository's .gitignore keeps out"))
