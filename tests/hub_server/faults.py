"""Scripted faults: which request goes wrong, how, and how often."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

KINDS = (
    "reset",  # the connection is reset before anything is done
    "reset_upload",  # ... after half of the request's body was read
    "reset_download",  # the answer stops in the middle, with a reset
    "truncate",  # the answer stops in the middle, with a clean end of the connection
    "lost_response",  # all is done, and the connection is reset instead of an answer
    "flip",  # one bit of the answer's body is another
    "hang",  # no answer for `seconds`, then the connection is closed
    "drip",  # one byte of the answer's body each `seconds`
    "stale",  # somebody else commits just before this request is handled
    "status",  # an error status, with Retry-After if `retry_after` is given
)


@dataclass
class Fault:
    """Applies to the next `times` requests whose method and path (with the query) match, after letting `after` pass."""

    kind: str
    method: str | None = None
    path: str = ""
    """A regular expression, searched for."""
    times: int = 1
    after: int = 0
    seconds: float = 3600.0
    status: int = 500
    retry_after: float | None = None
    hits: int = 0
    """How often it happened so far."""
    _seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, or a status; not {self.kind!r}")

    def applies(self, method: str, path: str) -> bool:
        """Whether it happens to this request; counts it."""
        if (self.method is not None and method != self.method) or not re.search(self.path, path):
            return False
        with self._lock:
            self._seen += 1
            if self._seen <= self.after or self.hits >= self.times:
                return False
            self.hits += 1
            return True


def flipped(body: bytes) -> bytes:
    """`body` with the lowest bit of its middle byte turned."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
