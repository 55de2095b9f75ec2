"""Exact resumption: a run that was stopped anywhere and goes on from a checkpoint is the run that was not stopped.

Lightning restores loops, optimizers and schedulers. It restores no random state, no place in the data, no gradients of
an open accumulation window and no metrics of an epoch that is not through, and its counters say different things of
one and the same place. Here a checkpoint says where the run is with one of two words:

    between   the next thing is the start of an epoch
    inside    in an epoch, after `batches` of it; the end of the last one (its validation) is still to come or is done

If a checkpoint was saved in the middle of a batch, the batch counts as not begun: it is trained on again, from the
state of the run when it began. The same holds for a validation and for the start and the end of an epoch. But where a
ModelCheckpoint saves at their end, all other callbacks have had the hook, and the run goes on from there. Random
numbers that hooks draw between two batches do not count, nor those that a validation draws: the random state goes back
to where the last batch left it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lora.training import lightning_private as private
from lightning_lora.training.going_on import GoingOn, tensors
from lightning_lora.training.loaders import (
    LoaderStart,
    is_watched,
    knows_its_place,
    may_start_again,
    seed_persistent_workers,
    state_of,
    watch,
)
from lightning_lora.training.rounds import Holders, rest_of, running_round
from lightning_lora.training.run_state import (
    BufferWatch,
    EpochMetrics,
    Trained,
    callback_metrics,
    has_stopped,
    of_all_ranks,
    plain,
    random_state,
    set_random_state,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ExactResume(GoingOn):
    """The part of the callback that makes a resumed run the run that was not interrupted."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no run yet, so a callback can be copied and pickled after it was used."""
        kept = ("stage", "saved", "last_saves", "loader_states")
        return {**ExactResume().__dict__, **{name: getattr(self, name) for name in kept}}

    # What a checkpoint holds of it.

    def state_dict(self) -> dict[str, Any]:
        if self.saved is not None:  # loaded, and training has not gone on yet
            return {"ranks": self.saved}
        own = self._state() if self.trainer is not None else {"random": self.random or random_state(), "place": None}
        interrupted = self.trainer is not None and self.trainer.state.status == TrainerStatus.INTERRUPTED
        return {"ranks": of_all_ranks(own, may_be_alone=interrupted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.stage != "fit":  # validate, test and predict take weights from a checkpoint, and no place in training
            return
        self.saved = state["ranks"]
        if any(rank is not None and "place" not in rank for rank in state["ranks"]):
            rank_zero_warn(
                "Not exactly the run that was interrupted: the checkpoint was saved by an earlier version of "
                "lightning_lora, which noted the place in the data in another way."
            )
            self.saved = [{"place": None, "random": rank["now"]} for rank in state["ranks"]]

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        if self.entry is not None:
            return self.entry
        place = self.place()
        known = self.random_at == trainer.fit_loop.epoch_loop.batch_progress.total.processed
        amid, running = self._is_amid(), running_round(trainer)
        held = self.before if amid else self._held()
        rest = rest_of(running) if running is not None and not amid else None
        return {
            "place": place,
            "round": rest,
            "before_run": self.random_before if place["total"] == 0 else None,
            "random": self.random if known else random_state(),
            "stepped": self._stepped(),
            "own": held["own"],
            "start": self.start.epoch if place["kind"] == "inside" else None,
            "restarts": self.start.restarts if place["kind"] == "inside" else {},
            "fetched": held["fetched"],
            "fetched_at": [self.fetched_at.get(place["total"] - i) for i in (1, 2)],
            "metrics": plain(held["metrics"]) if place["kind"] == "inside" else None,
            "gradients": self._open_gradients(),
            "callback_metrics": tensors(callback_metrics(trainer)),
            "stopped_early": trainer.should_stop and any(has_stopped(c) for c in trainer.callbacks),
            "seeds": self.own.seeds(),
            "amid": self.amid if amid else "",
            "changed": self._has_changed(),
            "unread": self.holders.unread if amid else [],
        }

    def _has_changed(self) -> bool:
        """True if weights or schedules have changed since the place that a checkpoint will name."""
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if self._is_amid():
            return bool(self.before["version"] != self._version())
        was_raised = self.trainer.state.status == TrainerStatus.INTERRUPTED
        between = was_raised and self.amid == "batch" and batch.processed > batch.completed
        return between and running_round(self.trainer) is None  # an exception in a schedule's step

    def place(self) -> dict[str, Any]:
        """The place of the run, in the words of the module's docstring."""
        if self.entry is not None:
            return self.entry["place"]
        fit_loop = self.trainer.fit_loop
        epoch, batch = fit_loop.epoch_progress.current, fit_loop.epoch_loop.batch_progress
        done = batch.total.processed
        if self.cut or epoch.started > epoch.completed:
            started = epoch.started - 1
            return {
                "kind": "inside",
                "epoch": started,
                "batches": batch.current.processed,
                "total": done,
                "of": self.trainer.num_training_batches,
                "is_last": batch.is_last_batch and not self._in_batch(),
                "ended": self.cut or self.ended == done,
                "validated": self.validated == done and not (self.amid == "validation" and self._is_amid()),
            }
        return {"kind": "between", "epoch": epoch.completed, "batches": batch.current.processed, "total": done}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's counters in `checkpoint` to the place of the run, in the one form that can be resumed."""
        if self.trainer is None or "loops" not in checkpoint:
            return
        place, loops = self.place(), checkpoint["loops"]["fit_loop"]
        _set_counts(loops["epoch_progress"], place["epoch"], place["epoch"] + int(place["kind"] == "inside"))
        amid = self.entry is None and self._is_amid()
        if amid:
            self.holders.put(self.before["others"], checkpoint)
        if place["kind"] == "inside":
            batch = loops["epoch_loop.batch_progress"]
            for counts, value in ((batch["current"], place["batches"]), (batch["total"], place["total"])):
                counts.update(dict.fromkeys(counts, value))
            batch["is_last_batch"] = place["is_last"]
        step = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counts in step.values():
            counts["ready"] = counts["completed"]
        if "combined_loader" in loops["state_dict"]:
            loader = private.combined_loader(self.trainer.fit_loop)
            states = self.before["loaders"] if amid or self._is_at_batch_end() else self._loader_states()
            if states is None or (loader is not None and not all(map(knows_its_place, loader.flattened))):
                del loops["state_dict"]["combined_loader"]
            else:
                loops["state_dict"]["combined_loader"] = states

    def values_before_batch(self) -> dict[str, Tensor]:
        """The buffers that the running batch has changed, as they were before it."""
        return self.buffers.before() if self.trainer is not None and self._is_amid() else {}

    def _in_batch(self) -> bool:
        """True if a batch has begun and not ended."""
        epoch, batch = self.trainer.fit_loop.epoch_progress.current, self.trainer.fit_loop.epoch_loop.batch_progress
        return epoch.started > epoch.processed and batch.current.ready > batch.current.processed

    def _is_amid(self) -> bool:
        """True if a run that resumes from here goes back to the state in `before`."""
        if not self.amid or self.extra or self.cut:
            return bool(self.before) and (self.extra or self.cut)
        if self.amid == "batch":
            return bool(self.before["total"] == self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        running = running_round(self.trainer)
        return running is None or not running.is_saved_last

    def _is_at_batch_end(self) -> bool:
        running = running_round(self.trainer) if self.amid == "batch" and not self._is_amid() else None
        return running is not None and bool(running.rest)

    def _stepped(self) -> int:
        """The number of finished batches after which the optimizer has stepped."""
        (done, stepped), batch = self.stepped, self.trainer.fit_loop.epoch_loop.batch_progress
        return stepped + int(batch.total.processed > done and not private.is_accumulating(self.trainer))

    def _open_gradients(self) -> dict[str, Tensor]:
        """The gradients that the next batch adds to."""
        module = self.trainer.lightning_module
        if self._in_batch() and self.gradients is not None:
            return self.gradients
        if self._in_batch():
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
            is_open = done % self.trainer.accumulate_grad_batches != 0
        else:
            is_open = self.place()["kind"] == "inside" and private.is_accumulating(self.trainer)
        return self.trained.gradients() if is_open or not module.automatic_optimization else {}

    # Noted while training goes on.

    def setup(self, stage: str) -> None:
        self.stage, self.saved = stage, None
        if stage == "fit":  # a save before training starts is of this run, not of the one before
            self.trainer, self.random, self.unchecked = None, {}, None

    def before_run(self, rank: int) -> None:
        """Before the sanity check and the first iterator of the data, which draw random numbers."""
        if self.saved is not None:
            saved = self.saved[rank % len(self.saved)] or next(state for state in self.saved if state is not None)
            if saved["place"] is None:  # saved here or earlier, or without training
                set_random_state(saved["random"])
                self.saved = None
            elif saved["before_run"] is not None:
                set_random_state(saved["before_run"])
        self.random = self.random_before = random_state()

    def on_train_start(self, trainer: Any, own: Callback) -> None:
        """Go on where the checkpoint was saved, or start so that a later checkpoint can."""
        private.check(trainer)
        self.trainer, self.holders = trainer, Holders(trainer, own)
        ranks, self.saved, self.entry = self.saved, None, None
        self.amid, self.before, self.rest = "", {}, None
        self.gradients, self.fetched_at = None, {}
        self.ended = self.validated = -1
        self.cut = self.extra = False
        self.buffers, self.trained = BufferWatch(trainer.lightning_module), Trained(trainer.lightning_module)
        self.metrics = EpochMetrics(trainer)
        self._watch_loaders()
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        self.stepped = (done, private.batches_that_stepped(trainer))
        if ranks is not None:
            self.restore(trainer, ranks)
        else:
            self._note_random()

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        fetcher = private.data_fetcher(trainer)
        if fetcher is not None and not is_watched(fetcher.combined_loader):  # loaders are made anew for each epoch
            self._watch_loaders()
        set_random_state(self.random)

    def begin_batch(self, fetcher: Any) -> bool:
        """Called before a batch is fetched. Returns False if none is: the first call after resuming may have to end an
        earlier one."""
        trainer = self.trainer
        entry, self.entry = self.entry, None
        batch = trainer.fit_loop.epoch_loop.batch_progress
        if entry is not None:
            self.enter(trainer, entry, fetcher)
            if not entry["place"]["ended"]:
                return False
            if entry["place"]["is_last"]:
                raise StopIteration
        elif self.start.epoch is None and may_start_again(fetcher.combined_loader):
            iter(fetcher)  # after all hooks that draw random numbers
        if batch.current.ready:
            set_random_state(self.random)
        else:
            self._note_random()
        self.extra = False
        self.ended = done = batch.total.processed
        self.stepped = (done, private.batches_that_stepped(trainer))
        self.fetched_at = {done: self.random} | {n: self.fetched_at.get(n, self.random) for n in (done - 1, done - 2)}
        self.begin("batch")
        self.gradients = None
        return True

    def on_before_backward(self, trainer: Trainer) -> None:
        if self.gradients is None:
            self.gradients = self.trained.gradients()

    def on_train_batch_end(self) -> None:
        self._note_random()

    def begin_sanity_check(self, trainer: Trainer) -> None:
        """Called before the iterator of the sanity check is made: a resumed run has no such check."""
        self.unchecked = state_of(trainer)

    def begin_validation(self) -> None:
        """Called before the iterator of a validation is made."""
        trainer = self.trainer
        if private.combined_loader(trainer.fit_loop.epoch_loop.val_loop) is not self.validated_on:
            self._find_state()
        self.begin("validation")
        stopping, trainer.should_stop = trainer.should_stop, False
        self.extra = stopping and not private.would_validate(trainer)
        trainer.should_stop = stopping
        set_random_state(self.random)
        if self.validated_on is not None:
            seed_persistent_workers(self.validated_on)

    def end_validation(self) -> None:
        """Called before the hooks at the end of a validation."""
        self.validated = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def end_epoch(self) -> None:
        """Called before the hooks at the end of an epoch."""
        epoch_loop = self.trainer.fit_loop.epoch_loop
        stopped = self.trainer.should_stop or 0 <= epoch_loop.max_steps <= epoch_loop.global_step
        self.ended = epoch_loop.batch_progress.total.processed
        self.cut = stopped and not private.is_epoch_through(self.trainer)
        if not self.extra:  # else the state from before that validation counts
            self.begin("epoch end")

    def begin(self, amid: str) -> None:
        """Note the state of the run: a checkpoint from the middle of what begins now counts as saved here."""
        self.amid = amid
        self.before = self._held()

    def _note_random(self) -> None:
        self.random = random_state()
        self.random_at = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _held(self) -> dict[str, Any]:
        trainer = self.trainer
        self.buffers.note()
        fetcher = private.data_fetcher(trainer)
        return {
            "own": self.own.state(),
            "metrics": self.metrics.state(),
            "loaders": self._loader_states(),
            "fetched": fetcher.fetched if private.iterator_given(fetcher) is not None else None,
            "others": self.holders.state(in_batch=self.amid == "batch"),
            "total": trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            "version": self._version(),
        }

    def _loader_states(self) -> list[dict[str, Any]] | None:
        """The states of stateful loaders, in which a batch counts as read when it is trained on. None before the first
        batch of the run, where Lightning may have one already: a loader without a state starts with it."""
        if private.is_ahead(private.data_fetcher(self.trainer)):
            return self.start.unfetched
        return private.loader_states(private.combined_loader(self.trainer.fit_loop))

    def _version(self) -> tuple[int, ...]:
        """Numbers that change when weights or schedules do."""
        schedules = (config.scheduler for config in self.trainer.lr_scheduler_configs)
        return (self.trained.version(), *(getattr(schedule, "last_epoch", 0) for schedule in schedules))

    def _watch_loaders(self) -> None:
        self.start = LoaderStart()
        self._find_state()
        if (loader := private.combined_loader(self.trainer.fit_loop)) is not None:
            watch(loader, self.start)

    def _find_state(self) -> None:
        self.validated_on = private.combined_loader(self.trainer.fit_loop.epoch_loop.val_loop)
        self.own = self.start.own = state_of(self.trainer)
        if self.unchecked is not None:
            self.own.count_from(self.unchecked)


def _set_counts(progress: dict[str, Any], completed: int, ready: int) -> None:
    for counts in progress.values():
        counts.update(ready=ready, started=ready, processed=completed, completed=completed)
