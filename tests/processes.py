"""Work in a process that is forked from the test's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


def forked(work: Callable[[], bool], *, seconds: float = 60) -> bool:
    """What `work` returns in a process that is forked here; False where it does not return."""
    child = os.fork()
    if not child:
        threading.Timer(seconds, os._exit, (3,)).start()
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0
