"""Pushes beside the training: a daemon thread with a short queue, in which the newest replaces what waits.

Nothing here blocks or raises into the training. Of the jobs that wait, and of those that the Hub refused, the newest,
the best and the final one are kept. If the Hub is away, a job is tried again at growing intervals until the end of the
run. If the Hub says no (401, 403, 404), it is tried again with the next checkpoint and at the end, with the token that
is there then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from huggingface_hub import CommitInfo

from lightning_lora.errors import HubAccessError, HubError, HubNotFoundError, HubUnavailableError, LightningLoRAError
from lightning_lora.hub.card import RunFacts
from lightning_lora.hub.client import pause, without_progress_bars
from lightning_lora.hub.push import Push
from lightning_lora.hub.repository import HubRepository
from lightning_lora.hub.staging import Staged

log = logging.getLogger(__name__)

LINGER = 0.25
"""Seconds that a job waits for another one of the same step: `best.ckpt` and `last.ckpt` are one commit."""
BACK_OFF = 1.0
"""Seconds before the second try; twice as many before each further one."""
LONGEST_BACK_OFF = 300.0
_POLL = 0.02


@dataclass
class Job:
    """One checkpoint that is to be pushed."""

    staged: Staged
    run: RunFacts
    step: int
    title: str
    description: str = ""
    tag: str | None = None
    source: str | None = None
    """The adapter folder that it was copied from; it may be gone by now."""
    is_best: bool = False
    is_final: bool = False
    error: LightningLoRAError | None = None
    """The reason why it is not on the Hub."""
    commit: CommitInfo | None = None
    push: Push | None = field(default=None, repr=False)
    tries: int = 0
    not_before: float = 0.0
    is_refused: bool = False
    """True if it waits for the next checkpoint, or for the end of the run, to be tried again."""


class BackgroundPusher:
    """Takes jobs by `put`; `flush` waits for them for a limited time; `close` returns those that are not on the Hub."""

    def __init__(self, repository: HubRepository, linger: float | None = None) -> None:
        self.repository = repository
        self.commits: list[CommitInfo] = []
        """The commits made so far."""
        self._linger = LINGER if linger is None else linger
        self._change = threading.Condition()
        self._waiting: list[Job] = []
        self._active: Job | None = None
        self._failed: list[Job] = []
        self._said = ""
        """The last error that was logged."""
        self._done: dict[int, str] = {}
        """Step -> the hash of the tensors that were pushed."""
        self._flushing = self._closed = self._holding = False
        threading.Thread(target=self._work, name="lightning_lora push", daemon=True).start()

    def put(self, job: Job) -> None:
        """Push `job`. It replaces a waiting job of the same step, and those that are neither best nor final."""
        with self._change:
            if not job.is_final and self._is_known(job):
                job.staged.discard()
                return
            for other in [j for j in self._waiting if j.step == job.step]:
                if other.is_best and other.staged.values != job.staged.values:
                    continue  # weights were changed when training ended: the best is another adapter
                job.is_best |= other.is_best
                job.is_final |= other.is_final
                self._drop(other)
            job.not_before = time.monotonic() + self._linger
            for other in self._waiting:
                other.is_refused = False
            self._waiting.append(job)
            self._drop_superseded()
            self._change.notify_all()

    def _is_known(self, job: Job) -> bool:
        """True if this very adapter is on the Hub, or on its way."""
        for other in (*self._waiting, self._active):
            if other is not None and (other.step, other.staged.values) == (job.step, job.staged.values):
                if job.is_best and not other.is_best:
                    other.is_best, other.title = True, job.title
                return True
        return self._done.get(job.step) == job.staged.values

    def _drop_superseded(self) -> None:
        self._waiting.sort(key=lambda job: job.step)
        bests = [job for job in (*self._waiting, self._active) if job is not None and job.is_best]
        best = max(bests, key=lambda job: job.step, default=None)
        for job in self._waiting[:-1]:
            if not job.is_final and job is not best:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        self._waiting.remove(job)
        job.staged.discard()

    def hold(self) -> None:
        """Begin no push until the next `flush`: a job that is put before that may replace one that waits now."""
        with self._change:
            self._holding = True

    def flush(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until no job waits any more, at most for `seconds`, or until `until()`. Returns True if all are done."""
        end = time.monotonic() + seconds
        with self._change:
            self._flushing, self._holding = True, False
            for job in self._waiting:
                job.not_before, job.tries, job.is_refused = 0.0, 0, False
            self._change.notify_all()
        try:
            # Asked again and again: Ctrl-C ends this wait, and inside of a condition's it may lose the lock.
            while True:
                with self._change:
                    idle = self._is_idle()
                if idle or time.monotonic() >= end or until():
                    return idle
                time.sleep(_POLL)
        finally:
            self._flushing = False

    def _is_idle(self) -> bool:
        return self._active is None and all(job.is_refused for job in self._waiting)

    def close(self) -> list[Job]:
        """Take no more jobs. Returns those not on the Hub, oldest first; the caller owns their staged copies."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            active = [] if self._active is None else [self._active]
            left = [*self._failed, *active, *self._waiting]
            for job in left:
                job.error = job.error or HubUnavailableError("There was no time left to push it.")
            self._waiting, self._failed = [], []
            return sorted(left, key=lambda job: job.step)

    @property
    def size(self) -> int:
        """The number of bytes that wait to be pushed."""
        with self._change:
            return sum(job.staged.size for job in (*self._waiting, self._active) if job is not None)

    # In the thread.

    def _work(self) -> None:
        while (job := self._next()) is not None:
            with without_progress_bars():
                error = self._attempt(job)
            with self._change:
                self._active = None
                if not self._closed:
                    self._settle(job, error)
                self._change.notify_all()

    def _next(self) -> Job | None:
        with self._change:
            while not self._closed:
                # The oldest first, so that the history is in the order of the steps.
                waiting = () if self._holding else self._waiting
                job = next((job for job in waiting if not job.is_refused), None)
                wait = None if job is None else job.not_before - time.monotonic()
                if job is not None and wait is not None and (wait <= 0 or (self._flushing and job.tries == 0)):
                    self._waiting.remove(job)
                    self._active = job
                    return job
                self._change.wait(wait)
            return None

    def _attempt(self, job: Job) -> LightningLoRAError | None:
        try:
            if job.commit is None:
                job.push = job.push or Push(self.repository, job.staged, job.run, job.title, job.description)
                job.commit = job.push.attempt()
            if job.tag is not None and self.repository.tag(job.tag, job.commit.oid, job.title) is not None:
                # The tag of another run.
                self.repository.tag(f"{job.tag}-{job.commit.oid[:7]}", job.commit.oid, job.title)
        except LightningLoRAError as error:
            return error
        except BaseException as error:
            log.debug("push of step %d", job.step, exc_info=True)
            return HubError(f"The push failed with {type(error).__name__}: {error}")
        return None

    def _settle(self, job: Job, error: LightningLoRAError | None) -> None:
        job.error = error
        if error is None:
            assert job.commit is not None
            self.commits.append(job.commit)
            self._done[job.step] = job.staged.values
            job.staged.discard()
        elif isinstance(error, HubUnavailableError):
            back_off = min(BACK_OFF * 2.0 ** min(job.tries, 32), LONGEST_BACK_OFF)
            job.tries += 1
            job.not_before = time.monotonic() + (pause(error, back_off) or 0.0)
            self._waiting.append(job)
            self._drop_superseded()
        elif isinstance(error, (HubAccessError, HubNotFoundError)):
            self._say(job, error, " It is tried again with the next checkpoint, and at the end of the run.")
            job.is_refused = True
            self._waiting.append(job)
            self._drop_superseded()
        else:
            self._say(job, error)
            self._failed.append(job)
            self._keep_few_failed()

    def _say(self, job: Job, error: LightningLoRAError, more: str = "") -> None:
        if str(error) != self._said:  # a Hub that refuses every commit says so once
            log.warning("Step %d was not pushed to %s: %s%s", job.step, self.repository, error, more)
            self._said = str(error)

    def _keep_few_failed(self) -> None:
        """Of the jobs that the Hub refused, keep the newest, the best and the final one: the others' copies would fill
        the disk."""
        best = max((job for job in self._failed if job.is_best), key=lambda job: job.step, default=None)
        newest = max(self._failed, key=lambda job: job.step)
        for job in [job for job in self._failed if not job.is_final and job is not best and job is not newest]:
            self._failed = [other for other in self._failed if other is not job]
            job.staged.discard()
