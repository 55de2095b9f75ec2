"""A guard for calls whose fault would be that they never end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE = 120
"""Seconds after which a call counts as hung: far more than what is tested takes on a busy machine, and far less than
the hour for which a hanging server keeps a caller that waits for it."""


@contextmanager
def no_hang() -> Iterator[None]:
    """Fail where what is inside does not end, in place of waiting for ever. How long it takes is no matter else."""

    def fail(*_: Any) -> None:
        raise AssertionError(f"it hangs: {PATIENCE} s passed")

    before = signal.signal(signal.SIGALRM, fail)
    left = signal.alarm(PATIENCE)  # of another guard's time, around this one
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.alarm(left)
