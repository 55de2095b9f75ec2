"""Push to the Hub while training goes on, as a `HubPush` says: the hooks that LoRACallback and its strategy call."""

from __future__ import annotations

import inspect
import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.errors import ConfigError, HubError, LightningLoRAError
from lightning_lora.format.folder import CARD, CONFIG, TENSORS
from lightning_lora.hub.address import base_id
from lightning_lora.hub.card import Card, RunFacts
from lightning_lora.hub.push import in_words, stage_model
from lightning_lora.hub.repository import HubRepository
from lightning_lora.hub.staging import PICTURE, Staged, stage
from lightning_lora.training.curve import curve_picture
from lightning_lora.training.push import HubPush
from lightning_lora.training.push_queue import BackgroundPusher, Job
from lightning_lora.training.signals import interruptible

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

log = logging.getLogger(__name__)

WAIT_ON_EXCEPTION = 20.0
"""Seconds: whoever sends SIGTERM kills soon after, often in 30."""


class Pushing:
    """The pushes of one run after another. No method raises but `check` and `start`.

    All processes of a run call `check` and `start`; the other methods push only in the first process.
    """

    def __init__(self, settings: HubPush) -> None:
        if not isinstance(settings, HubPush):
            raise ConfigError(f"push is a HubPush, such as HubPush('user/name'), not {settings!r}.")
        self.settings = settings
        self._forget()

    def _forget(self) -> None:
        self.unpushed: list[Job] = []
        """The jobs that are not on the Hub after the run."""
        self._pushed: list[Any] = []
        self._repository: HubRepository | None = None
        self._queue: BackgroundPusher | None = None
        self._history: list[tuple[int, dict[str, float]]] = []
        self._held: Job | None = None
        self._best: Job | None = None
        self._last: tuple[Job, str | None] | None = None
        """The job of the last adapter folder, and the checkpoint that goes with it."""
        self._first_step = 0
        self._root = Path()

    @property
    def pushed(self) -> list[Any]:
        """The commits of this run so far."""
        return list(self._pushed if self._queue is None else self._queue.commits)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}  # copied with its callback, to processes and by deepcopy: threads are not

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.settings = state["settings"]
        self._forget()

    # Before the first step.

    def check(self, trainer: Trainer) -> None:
        """Raise, in every process, unless token, repository and permission allow the pushes that will come."""
        self._forget()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.settings.every == "best" and not any(_monitors(callback) for callback in _savers(trainer)):
            raise ConfigError("every='best' needs a ModelCheckpoint that monitors a metric.")
        repository = HubRepository(self.settings)
        _in_first_process(trainer, repository.check)
        self._repository = repository

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise, in every process, unless the Hub accepts the adapter's card; then start the worker."""
        repository = self._repository
        if repository is None:
            return
        self._first_step, self._root = trainer.global_step, Path(trainer.default_root_dir)

        def check_card() -> None:
            staged = stage_model(pl_module)
            try:
                repository.check_card(staged.card(self._facts(trainer, {})))
            finally:
                staged.discard()

        _in_first_process(trainer, check_card)
        if trainer.is_global_zero:
            self._queue = BackgroundPusher(repository)
            rank_zero_info(f"Adapters are pushed to {repository}, in the background.")

    # While training goes on.

    def record(self, trainer: Trainer) -> None:
        """Note the metrics of a validation, for the picture in the card."""
        if self._queue is not None:
            self._history.append((trainer.global_step, _metrics(trainer)))

    def on_checkpoint_saved(
        self,
        pl_module: LightningModule,
        path: str,
        adapter: str | os.PathLike[str] | None,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Push the folder `adapter`, saved beside the checkpoint `path`, or `tensors` where there is no folder."""
        if self._queue is None:
            return
        with _told():
            trainer = pl_module.trainer
            is_best = any(_monitors(callback) and callback.best_model_path == path for callback in _savers(trainer))
            if self.settings.every == "best" and not is_best:
                return
            checkpoint = path if self.settings.push_checkpoints and os.path.isfile(path) else None
            if adapter is not None:
                staged = stage(adapter, checkpoint=checkpoint)
            else:
                staged = stage_model(pl_module, tensors=tensors)
            job = self._job(trainer, staged, adapter, is_best=is_best)
            self._last = None if adapter is None else (job, checkpoint)
            if is_best:
                self._best = job
            if self.settings.every == "end":
                if self._held is not None:
                    self._held.staged.discard()
                self._held = job
            else:
                self._queue.put(job)

    def _job(
        self,
        trainer: Trainer,
        staged: Staged,
        source: Any,
        *,
        is_best: bool = False,
        is_final: bool = False,
        is_measured: bool = True,
    ) -> Job:
        metrics, step = _metrics(trainer) if is_measured else {}, trainer.global_step
        self._history.append((step, metrics))
        if is_final and (picture := curve_picture(self._history, _monitored(trainer))):
            staged = staged.with_file(PICTURE, picture)
        kinds = [word for word, holds in (("best so far", is_best), ("final", is_final)) if holds]
        kind = f" ({', '.join(kinds)})" if kinds else ""
        lines = [f"epoch: {trainer.current_epoch}", f"step: {step}", *(f"{n}: {v:.8g}" for n, v in metrics.items())]
        return Job(
            staged,
            self._facts(trainer, metrics, step),
            step,
            title=f"Step {step}{kind}{in_words(metrics)}",
            description="\n".join(lines),
            tag=f"step-{step}" if self.settings.tag_checkpoints else None,
            source=None if source is None else os.path.abspath(source),
            is_best=is_best,
            is_final=is_final,
        )

    def _facts(self, trainer: Trainer, metrics: Mapping[str, float], step: int | None = None) -> RunFacts:
        given = Card.of(self.settings.card)
        data, datasets = given.data, list(given.datasets)
        path = base_id(getattr(getattr(trainer.datamodule, "source", None), "path", None))  # type: ignore[attr-defined]
        if not datasets and path and not os.path.splitext(path)[1]:
            datasets = [path]
        notes = {} if step is None else {"epochs": str(trainer.current_epoch)}
        best = self._best
        if best is not None and best.step != step:
            revision = f", revision `{best.commit.oid}`" if best.commit is not None else ""
            notes["best so far"] = f"step {best.step}{in_words(best.run.metrics)}{revision}"
        return RunFacts(
            repo_id=self._repository.repo_id if self._repository else None,
            metrics=metrics,
            step=step,
            data=data or (datasets[0] if datasets else None),
            datasets=datasets,
            notes=notes,
            front_matter=given.front_matter,
        )

    # At the end.

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Push the final adapter, the one that `trainer.save_checkpoint` would save now, and wait for all jobs that
        are not pushed yet."""
        if self._repository is None:
            return
        queue, final = self._queue, None
        if queue is not None:
            queue.hold()  # the last checkpoint, if it waits, and the final adapter are one commit
        with _told():
            if self.settings.every != "best" and trainer.global_step > self._first_step:
                final = trainer.strategy.final_adapter()  # type: ignore[attr-defined]  # each process has a part
            if queue is not None and final is not None:
                queue.put(self._final_job(trainer, stage_model(pl_module, **final)))
            if self._held is not None:
                self._held.staged.discard()
        if queue is not None:
            self._end(queue, self.settings.timeout_at_end + queue.size / 1e6, _soon_after_sigterm(trainer))

    def _final_job(self, trainer: Trainer, staged: Staged) -> Job:
        """The job of the final adapter. If its values are those of the last checkpoint, its folder and metrics are
        used. If callbacks changed the values when training ended, metrics are left out: they do not hold for `staged`.
        """
        last, checkpoint = self._last or (None, None)
        if last is None or last.step != trainer.global_step:
            return self._job(trainer, staged, None, is_final=True)
        if last.staged.values != staged.values:
            return self._job(trainer, staged, None, is_final=True, is_measured=False)
        if os.path.isdir(last.source or ""):
            staged.discard()
            kept = checkpoint if checkpoint and os.path.isfile(checkpoint) else None
            staged = stage(last.source or "", checkpoint=kept)
        is_best = self._best is not None and self._best.step == last.step
        return self._job(trainer, staged, last.source, is_best=is_best, is_final=True)

    def abort(self) -> None:
        """After an exception or a signal: push the waiting checkpoints, as far as the time allows."""
        queue = self._queue
        if queue is None:
            return
        if self._held is not None:
            queue.put(self._held)
        self._end(queue, min(self.settings.timeout_at_end, WAIT_ON_EXCEPTION))

    def _end(self, queue: BackgroundPusher, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
        self._queue = self._held = None
        with _told():
            with interruptible():
                try:
                    queue.flush(seconds, stop)
                except KeyboardInterrupt:
                    log.warning("No longer waiting for the Hub.")
            self.unpushed = queue.close()
            self._pushed = list(queue.commits)
            if queue.commits:
                count, last = len(queue.commits), queue.commits[-1].commit_url
                rank_zero_info(f"Pushed {count} commit{'' if count == 1 else 's'}, the last one is {last}")
            for job in self.unpushed:
                command = self._command(self._kept(job))
                log.error(
                    "Step %d was not pushed to %s: %s\nPush it with: %s", job.step, queue.repository, job.error, command
                )

    def _kept(self, job: Job) -> Path:
        """A folder that still holds the adapter of `job`: the one beside the checkpoint, or a new one."""
        try:
            if job.source is not None and Path(job.source).is_dir():
                staged = stage(job.source)
                staged.discard()
                if staged.values == job.staged.values:
                    job.staged.discard()
                    return Path(job.source)
            root = Path(job.source).parent if job.source is not None else self._root
            kept = root / f"step{job.step}-not-pushed-adapter"
            kept.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, TENSORS):
                shutil.copyfile(job.staged.folder / name, kept / name)
            (kept / CARD).write_text(job.staged.card(job.run), encoding="utf-8")
        except (OSError, LightningLoRAError):
            return job.staged.folder
        job.staged.discard()
        return kept

    def _command(self, folder: Path) -> str:
        to = self.settings
        parts = [f"adapter={folder}", f"repo_id={self._repository.repo_id if self._repository else to.repo_id}"]
        parts += [f"branch={to.branch}"] if to.branch else []
        parts += ["private=false"] if not to.private else []
        parts += ["create_pr=true"] if to.create_pr else []
        parts += [f"endpoint={to.endpoint}"] if to.endpoint else []
        return f"lightning-lora push {' '.join(_quoted(part) for part in parts)}"


def _quoted(override: str) -> str:
    """Hydra reads "=" inside a value as the start of another unless it is quoted."""
    name, _, value = override.partition("=")
    return shlex.quote(f"{name}='{value}'" if "=" in value or "," in value else override)


def _in_first_process(trainer: Trainer, action: Callable[[], None]) -> None:
    """Call `action()` in the first process. Raise its error in every process, or the others would wait for ever."""
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            action()
        except Exception as raised:
            error = raised
    said = error if error is None or isinstance(error, LightningLoRAError) else HubError(f"{error}")
    said = trainer.strategy.broadcast(said)
    if said is not None:
        raise error or said


def _savers(trainer: Trainer) -> list[Any]:
    return list(trainer.checkpoint_callbacks)


def _monitors(callback: Any) -> bool:
    return getattr(callback, "monitor", None) is not None


def _monitored(trainer: Trainer) -> str | None:
    return next((callback.monitor for callback in _savers(trainer) if _monitors(callback)), None)


def _metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics that were logged last: the monitored one first, then those of validation."""
    values: dict[str, float] = {}
    for name, value in trainer.callback_metrics.items():
        if value.numel() == 1 and math.isfinite(number := value.item()):
            values[name] = float(number)
    for name in [name for name in values if name.endswith("_step") and name.removesuffix("_step") in values]:
        del values[name]
    monitored = _monitored(trainer)
    order = sorted(values, key=lambda name: (name != monitored, not name.startswith("val"), name))
    return {name: values[name] for name in order}


@contextmanager
def _told() -> Iterator[None]:
    """Log an exception, and let training go on."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, LightningLoRAError)
        log.error("Nothing was pushed of this: %s", error, exc_info=None if known else error)


def _soon_after_sigterm(trainer: Trainer) -> Callable[[], bool]:
    since: list[float] = []

    def stop() -> bool:
        if trainer.received_sigterm:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > WAIT_ON_EXCEPTION

    return stop


class PushCallback(Callback):
    """`callbacks.push` of a settings file: pushes as `LoRACallback(push=HubPush(repo_id, **settings))` does, and does
    nothing where `repo_id` is None.

    Put it after the LoRACallback whose adapters it pushes.
    """

    def __init__(self, repo_id: str | None = None, **settings: Any) -> None:
        self._pushing = None if repo_id is None else Pushing(HubPush(repo_id, **settings))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._pushing is None or stage != "fit":
            return
        policy = getattr(trainer.strategy, "lora", None)
        if policy is None:
            raise ConfigError("callbacks.push pushes what a LoRACallback trains, and there is none before it.")
        if policy.push is None:
            policy.push = self._pushing  # from here on LoRACallback calls its hooks
            policy.push.check(trainer)
        elif policy.push.settings != self._pushing.settings:
            raise ConfigError("LoRACallback has a push of its own: leave out one of the two.")


def _signature() -> inspect.Signature:
    """The signature of HubPush, with a repo_id that may be left out: the entries that a settings file may have."""
    parameters = dict(inspect.signature(HubPush, eval_str=True).parameters)
    first = parameters["repo_id"]
    parameters["repo_id"] = first.replace(annotation=str | None, default=None)
    return inspect.Signature(list(parameters.values()))


PushCallback.__signature__ = _signature()  # type: ignore[attr-defined]
