"""Signals during a run's last acts: SIGTERM waits for a checkpoint, and Ctrl-C ends the wait for the Hub."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class SigtermLater:
    """Holds SIGTERM back while a run saves on an exception.

    Whoever sees one process fail ends the others by SIGTERM, while they save because of the same failure. Lightning's
    handler then talks to the other processes; where those are gone it raises, in the middle of the save.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._came = False

    def begin(self) -> None:
        if self._before is None and threading.current_thread() is threading.main_thread():
            self._came = False
            self._before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL

    def end(self) -> None:
        """Handle SIGTERM again as before, and let it act if it came meanwhile.

        In one of several processes it does not act: Lightning's handler would wait there for others that may never
        answer, and the process ends by its exception anyway.
        """
        before, self._before = self._before, None
        if before is None:
            return
        if signal.getsignal(signal.SIGTERM) == self._note:  # else somebody has taken it over
            signal.signal(signal.SIGTERM, before)
        if self._came and not (dist.is_available() and dist.is_initialized()):
            signal.raise_signal(signal.SIGTERM)

    def _note(self, *_: Any) -> None:
        self._came = True


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the wait, where Lightning has turned it off already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
