"""Calls to the Hub with a time limit each; they fail with our errors, which tell if another try may help.

The client of huggingface_hub sets no timeout on whoami, create_repo, uploads and commits, and does not repeat most of
them: a hung server would hold a run, or a thread and an open file for each call, for as long as it likes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    get_session,
)

from lightning_lora.errors import (
    ConfigError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    LightningLoRAError,
)
from lightning_lora.hub.hub_private import Forks

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds after which a call without a payload counts as hung."""
SLOWEST = 250_000
"""Bytes per second below which an upload counts as hung."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between one try and the next; there is one try more than waits."""
LONGEST_WAIT = 60.0
"""The most seconds to wait, whatever a server's Retry-After says."""

# Status of a request that timed out at the server, that came too early or too often, or at which the server failed.
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 525)


class StaleError(HubUnavailableError):
    """Somebody else's commit came first: read the head again."""


class _Call(threading.local):
    """The call to the Hub that a thread makes, if it makes one."""

    until: float | None = None
    """The time at which the call ends (time.monotonic)."""


_CALL = _Call()
_LEFT: list[threading.Thread] = []
"""Threads whose call nobody waits for any more, and that have not ended."""
_MOST_LEFT = 8
_AFTER = 0.5
_ASKED = "X-Lightning-Lora-Retry-After"
"""The header in which an answer keeps the Retry-After that it came with."""
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):  # where another thread holds it, the child would wait for ever
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)
    _FORKS = Forks()
    os.register_at_fork(before=_FORKS.before, after_in_parent=_FORKS.in_parent, after_in_child=_FORKS.in_child)


def within(seconds: float, doing: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Returns `call(*args, **kwargs)`, run in a daemon thread that is left to itself after `seconds` and cannot hold
    up the exit of the process. `doing` ends the sentence "... while" of an error.

    The client's requests end with the call: the client waits and reads no longer than `seconds`. Other traffic (Xet, a
    name server) may hold the thread and its connection for longer; no more than a few threads may hang so at a time.

    Raises HubError (HubAccessError for 401 and 403, HubUnavailableError where another try may help).
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    until = time.monotonic() + max(seconds, 0.0)

    def run() -> None:
        _CALL.until = until
        try:
            _give_up_in_time()
            answer.put((call(*args, **kwargs), None))
        except BaseException as error:
            answer.put((None, error))

    with _LOCK:
        _LEFT[:] = [thread for thread in _LEFT if thread.is_alive()]
        if len(_LEFT) >= _MOST_LEFT:
            raise HubUnavailableError(
                f"{len(_LEFT)} earlier calls to the Hub still hang, so no further one is made while {doing}."
            )
    thread = threading.Thread(target=run, name="lightning_lora hub call", daemon=True)
    thread.start()
    try:
        value, error = answer.get(timeout=max(seconds, 0.0))
    except queue.Empty:
        with _LOCK:
            _LEFT.append(thread)
        raise HubUnavailableError(f"The Hub did not answer within {seconds:.3g} s while {doing}.") from None
    if error is not None:
        raise translated(error, doing) from error
    return value  # type: ignore[return-value]


def _give_up_in_time() -> None:
    """Put hooks into the client, which has no timeout and is shared with others, that apply our calls' time limits."""
    hooks = get_session().event_hooks
    with _LOCK:
        if _limit not in hooks["request"]:
            hooks["request"].append(_limit)
            hooks["response"].append(_shorten)


def _limit(request: Any) -> None:
    """A hook of the client, before each request: no request waits beyond the call's end, nor starts after it."""
    if _CALL.until is None:
        return
    left = _CALL.until - time.monotonic()
    if left <= 0:
        raise HubUnavailableError("The time for this call to the Hub is over.")
    given = request.extensions.get("timeout") or {}
    left += _AFTER  # whoever waits for the call has given up by then, and says so in our words
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: left if (t := given.get(kind)) is None else min(t, left) for kind in kinds}


@functools.cache
def _in_time(client: str) -> Any:
    """A class for the body of an answer, derived from the client's own library (httpx, or what took its place): nothing
    more is read once the call is over, even if a byte comes now and then.

    A connection that is reset counts as one that is cut: the client goes on with a download only after a cut."""
    library: Any = importlib.import_module(client)

    class InTime(library.SyncByteStream):
        def __init__(self, stream: Any, until: float) -> None:
            self.stream, self.until = stream, until

        def __iter__(self) -> Iterator[bytes]:
            try:
                for part in self.stream:
                    if time.monotonic() > self.until:
                        raise HubUnavailableError("The time for this call to the Hub is over.")
                    yield part
            except library.ReadError as error:
                raise library.RemoteProtocolError(str(error)) from error

        def close(self) -> None:
            self.stream.close()

    return InTime


def _shorten(response: Any) -> None:
    """A hook of the client, after the head of each answer: without it, the client would read for as long as anything
    comes, and sleep for as long as a Retry-After says, be it a day."""
    if _CALL.until is None:
        return
    client = type(response).__module__.partition(".")[0]
    response.stream = _in_time(client)(response.stream, _CALL.until + _AFTER)
    with contextlib.suppress(KeyError, ValueError):
        asked = response.headers["Retry-After"]
        response.headers["Retry-After"] = f"{min(float(asked), LONGEST_WAIT):g}"
        response.headers[_ASKED] = asked


def retried(attempt: Callable[[], T], *, until: float | None = None) -> T:
    """Returns `attempt()`, called again after a growing wait where it raises HubUnavailableError, not beyond `until`
    (time.monotonic)."""
    for wait in [*WAITS, None]:
        try:
            return attempt()
        except HubUnavailableError as error:
            seconds = pause(error, wait)
            if seconds is None or (until is not None and time.monotonic() + seconds >= until):
                raise
            time.sleep(seconds)
    raise AssertionError


def asked(until: float, doing: str, call: Callable[..., T], *args: Any, most: float = float("inf"), **kwargs: Any) -> T:
    """`call(*args, **kwargs)`, `retried` until `until` (time.monotonic); one try takes `most` seconds. `doing` and the
    errors are those of `within`."""
    return retried(lambda: within(min(until - time.monotonic(), most), doing, call, *args, **kwargs), until=until)


def pause(error: HubUnavailableError, wait: float | None) -> float | None:
    """Seconds to wait after `error`, where the back-off says `wait`; None for no further try."""
    if wait is None or isinstance(error, StaleError):
        return wait and 0.0
    return max(wait, min(error.retry_after or 0.0, LONGEST_WAIT))


def plain_token(token: str) -> str:
    """`token` without the spaces and newlines around it that a file may have. Raises HubAccessError for an impossible
    token, and does not show it: the client would, in an error about its header."""
    if not re.fullmatch(r"[\x21-\x7e]+", token.strip()):
        raise HubAccessError("The token holds characters that no token has. Log in with `hf auth login`.")
    return token.strip()


def translated(error: BaseException, doing: str) -> LightningLoRAError:
    """Our error for `error`, of huggingface_hub or below it: it says what happened and what the user can do."""
    if isinstance(error, LightningLoRAError):
        return error
    if isinstance(error, LocalTokenNotFoundError):
        return HubAccessError(
            f"There is no token for the Hub, needed for {doing}. Log in with `hf auth login`, or set HF_TOKEN."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"The Hub is out of reach for {doing}: HF_HUB_OFFLINE is set. Unset it to go online.")
    if isinstance(error, HFValidationError):
        return ConfigError(str(error))
    causes = list(_causes(error))  # the LFS path wraps what happened in a RuntimeError
    http = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if http is not None:
        return _of_status(http, doing)
    last = causes[-1]
    what = f"{type(last).__name__}: {last}"
    if isinstance(last, (TypeError, AttributeError, AssertionError, LookupError)):
        return HubError(f"Something failed that should not while {doing}, with {what}")
    # Connections that were refused, reset or cut; Xet's own errors, which have no common class.
    return HubUnavailableError(f"The Hub could not be reached while {doing} ({what}).")


def _of_status(http: HfHubHTTPError, doing: str) -> HubError:
    status = http.response.status_code
    said = f" The Hub says: {http.server_message}" if http.server_message else ""
    if status in (409, 412):
        return StaleError(f"The repository changed while {doing}.{said}")
    if status in _TRANSIENT:
        headers = http.response.headers
        seconds = None
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(headers[_ASKED] if _ASKED in headers else headers["Retry-After"])
        again = "" if seconds is None else f" It asks to come again in {seconds:g} s."
        unavailable = HubUnavailableError(f"The Hub answered with status {status} while {doing}.{said}{again}")
        unavailable.retry_after = seconds
        return unavailable
    has_token = "authorization" in http.response.request.headers
    if isinstance(http, GatedRepoError):
        who = "the user of this token has not been let in"
        if not has_token:
            who = "its files need a token of a user who was let in; log in with `hf auth login`"
        return HubAccessError(f"The repository is gated, and {who} (status {status}), while {doing}.")
    if isinstance(http, RepositoryNotFoundError) and status in (401, 404):
        if not has_token:
            return HubNotFoundError(
                f"The Hub knows no such public repository (status {status}), while {doing}. Check the name. If it is "
                "private, log in with `hf auth login`, set HF_TOKEN, or pass token=."
            )
        return HubNotFoundError(
            f"The Hub knows no such repository, or this token may not see it (status {status}), while {doing}. Check "
            f"the name, and the token with `hf auth whoami`.{said}"
        )
    reads = http.response.request.method in ("GET", "HEAD")
    if reads and isinstance(http, RevisionNotFoundError):
        return HubNotFoundError(
            f"The repository has no such revision, that is no branch, tag or commit of that name, while {doing}."
        )
    if reads and status == 404:
        return HubNotFoundError(f"The Hub does not know it (status 404) while {doing}.{said}")
    if status == 401:
        return HubAccessError(
            f"The token is wrong, expired or revoked: the Hub refused it (status 401) while {doing}. Log in with "
            f"`hf auth login`, or set HF_TOKEN.{said}"
        )
    if status == 403:
        return HubAccessError(
            f"The token may not do this (status 403): {doing}. Make one with write access (to pull, read access will "
            f"do) at https://huggingface.co/settings/tokens, or ask an owner of the repository.{said}"
        )
    return HubError(f"The Hub refused with status {status} while {doing}.{said or f' {http}'}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and then the errors that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside, the client draws no progress bars, which would run through the Trainer's. Afterwards they are as the user
    set them, group by group, unless that changed meanwhile. Where the environment asks for bars, they stay."""
    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    states: dict[str, bool] = importlib.import_module("huggingface_hub.utils.tqdm").progress_bar_states
    before = dict(states)
    disable_progress_bars()
    ours = dict(states)
    try:
        yield
    finally:
        if states == ours:
            states.clear()
            states.update(before)


class Api(HfApi):
    """The client, whose create_commit does not check the card: `check_card` does, and create_commit would turn mere
    advice of the Hub into Python warnings."""

    def _validate_yaml(self, *_: Any, **__: Any) -> None:
        return None
