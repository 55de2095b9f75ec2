"""Brings a run back to where its checkpoint was saved: the second half of an exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_lora.errors import TrainingError, listed
from lightning_lora.training import lightning_private as private
from lightning_lora.training.loaders import LoaderStart, LoaderState, knows_its_place
from lightning_lora.training.rounds import have_round, named
from lightning_lora.training.run_state import EpochMetrics, RandomState, Trained, set_random_state


class GoingOn:
    """Where a run is, and how it goes there from a checkpoint."""

    own: LoaderState
    start: LoaderStart
    trained: Trained
    metrics: EpochMetrics

    def __init__(self) -> None:
        self.stage = ""
        self.trainer: Any = None
        """The Trainer that trains, or trained last."""
        self.saved: list[dict[str, Any] | None] | None = None
        """The state of each process from a checkpoint, until training starts."""
        self.last_saves: dict[str, tuple[int, str]] = {}
        """The step at which each ModelCheckpoint had last saved, and where, from that checkpoint."""
        self.loader_states: list[dict[str, Any]] = []
        """The states of stateful loaders, from that checkpoint."""
        self.entry: dict[str, Any] | None = None
        """The state of this process from that checkpoint, where it waits for the first batch."""
        self.unchecked: LoaderState | None = None
        """What the loaders kept themselves before the sanity check read from those of the validation."""
        self.random: RandomState = {}
        self.random_before: RandomState = {}
        """The random state before Lightning makes the first iterator of the data."""
        self.random_at = -1
        """The number of batches, of all epochs, after which `random` was the random state."""
        self.fetched_at: dict[int, RandomState] = {}
        """The random states when the last three batches began, by the number of batches before them: then the batch,
        or the one after it, is fetched."""
        self.amid = ""
        """What is running: "epoch start", "batch", "validation", "epoch end". A resumed run goes back to its start."""
        self.before: dict[str, Any] = {}
        """The state of the run when that began."""
        self.rest: list[str] | None = None
        """The names of those whose on_train_epoch_end is still to be called, where others had it before the save."""
        self.gradients: dict[str, Tensor] | None = None
        """The gradients before the running batch added its own."""
        self.stepped = (0, 0)
        """When the last batch began: the number of batches done, and of those after which the optimizer had stepped,
        by which loggers count. Lightning counts a batch at its end, before some checkpoints and after others."""
        self.ended = -1
        """The number of batches after which the end of the last one, with its validation, was last done."""
        self.validated = -1
        """The number of batches after which a validation was last done."""
        self.cut = False
        """True if max_steps, max_time or early stopping ended the epoch before its last batch."""
        self.extra = False
        """True if the last validation came only because the run stops: what it changed does not count."""
        self.validated_on: CombinedLoader | None = None

    def restore(self, trainer: Any, ranks: list[dict[str, Any] | None]) -> None:
        """When training starts, go to where the checkpoint was saved; `enter` goes on inside an epoch."""
        if len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random state of {len(ranks)} processes and this run has "
                f"{trainer.world_size}: it goes on from other random numbers than the run that was interrupted."
            )
        elif None in ranks:
            rank_zero_warn(
                "The checkpoint was saved on an exception, which not all processes may have had, so it holds the "
                "random state and the gradients of one process alone: the others go on from its random numbers."
            )
        known = next(state for state in ranks if state is not None)
        saved = ranks[trainer.global_rank % len(ranks)] or {**known, "gradients": {}}
        self.own.check_seeds(saved.get("seeds", {}))
        place, fit_loop = saved["place"], trainer.fit_loop
        self.random = saved["random"]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                step, path = self.last_saves.get(callback.state_key, (0, ""))
                is_here = Path(callback.dirpath or "") in Path(path).parents  # in another folder, nothing is saved yet
                private.set_last_save(callback, step, path if is_here else "")
        every = trainer.reload_dataloaders_every_n_epochs
        if every:  # Lightning counts from the epoch of the checkpoint, not from the last one that loaded anew
            private.set_last_reload(fit_loop, place["epoch"] - place["epoch"] % every)
        self.own.say_what_is_absent(saved["own"])
        self._say_what_is_not_exact(trainer, saved)
        private.live_callback_metrics(trainer).update(tensors(saved["callback_metrics"], trainer.lightning_module))
        private.forget_restart(fit_loop)
        self.random_at = place["total"]
        private.set_batches_that_stepped(trainer, saved.get("stepped", private.batches_that_stepped(trainer)))
        self.stepped = (place["total"], private.batches_that_stepped(trainer))
        self._load_loader_states(saved)
        begun = int(place["kind"] == "inside")
        for counts in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            counts.ready = counts.started = place["epoch"] + begun
            counts.processed = counts.completed = place["epoch"]
        if place["kind"] == "inside":
            private.restart_in_epoch(fit_loop)
            self.entry = saved
            return
        if not (every and fit_loop.epoch_progress.current.completed % every == 0):
            self.own.load(saved["own"])
        self.trained.set_gradients(saved["gradients"])

    def _load_loader_states(self, saved: dict[str, Any]) -> None:
        """Bring stateful loaders to their place. From data without a length, the new iterator fetches a batch at once:
        from the random state in which that was done, at the start of the batch before it or of the epoch."""
        if saved["place"]["kind"] == "inside":
            back = int((saved["round"] or {}).get("hook") == "on_train_batch_end")  # the hooks of the last one go on
            if saved["place"]["batches"] > back:
                self.start.first = saved["fetched_at"][back]
            elif saved["start"] is not None:
                set_random_state(saved["start"]["global"])
        private.load_loader_states(self.trainer.fit_loop, self.loader_states)
        self.start.first = None

    def enter(self, trainer: Any, saved: dict[str, Any], fetcher: Any) -> None:
        """In the loop over batches, before the first one, go to where the checkpoint was saved inside the epoch."""
        place = saved["place"]
        batch = trainer.fit_loop.epoch_loop.batch_progress
        for counts, value in ((batch.current, place["batches"]), (batch.total, place["total"])):
            counts.ready = counts.started = counts.processed = counts.completed = value
        batch.is_last_batch = place["is_last"]
        for callback in trainer.callbacks:
            if isinstance(callback, GradientAccumulationScheduler):  # it acts at an epoch's start, which is over
                callback.on_train_epoch_start(trainer)
        if "stepped" in saved and not place["ended"] and not private.is_accumulating(trainer):
            # The end of the batch is still to come, and Lightning counts the batch there.
            private.set_batches_that_stepped(trainer, private.batches_that_stepped(trainer) - 1)
        rest = saved["round"] or {"hook": ""}
        last = None
        if not place["is_last"] or rest["hook"] == "on_train_batch_end":
            last = self._skip(saved, fetcher)
        self.own.load(saved["own"])
        self.metrics.load(saved["metrics"])
        self.trained.set_gradients(saved["gradients"])
        if place["batches"]:
            private.logging_goes_on(trainer)
        for i, state in enumerate(saved["fetched_at"], 1):
            self.fetched_at[place["total"] - i] = state or saved["random"]
        self.validated = place["total"] if place["validated"] else -1
        private.skip_next_validation(trainer, place["validated"] and not place["ended"])
        self.random, self.random_at = saved["random"], place["total"]
        if rest["hook"] == "on_train_epoch_end":
            self.rest = rest["of"]
        elif rest["hook"]:
            self._have_rest(trainer, rest, last)
        set_random_state(self.random)
        if saved["stopped_early"]:
            rank_zero_info("EarlyStopping had stopped the run when the checkpoint was saved: it stops here as well.")
            trainer.should_stop = True

    def _skip(self, saved: dict[str, Any], fetcher: Any) -> Any:
        """Move past the batches of the epoch that were trained on. Returns the last one if it is read on the way."""
        place, rest = saved["place"], saved["round"]
        last = None
        if all(knows_its_place(loader) for loader in fetcher.combined_loader.flattened):
            fetcher.fetched = place["batches"]
            if rest is not None and rest["hook"] == "on_train_batch_end":  # the loaders' state is from before it
                fetcher.fetched -= 1
                set_random_state(saved["fetched_at"][0])
                last = next(fetcher)
            return last
        if saved["start"] is None:
            if place["batches"]:
                rank_zero_warn(
                    "Not exactly the run that was interrupted: its data cannot be read again from the start of the "
                    "epoch, since a loader or its dataset keeps a place, and another has no state to go back to it. "
                    "Give all of them a state (torchdata's StatefulDataLoader, of datasets with state_dict), or none."
                )
            return last
        self.start.set(saved["start"])
        self.start.replayed = saved["restarts"]
        iter(fetcher)
        items = private.iterator_given(fetcher) or fetcher
        count = saved["fetched"] if saved["fetched"] is not None else place["batches"]
        for i in range(count):
            # This batch or the next one is fetched from it.
            for state in saved["fetched_at"][count - 1 - i : count - i]:
                if state is not None:
                    set_random_state(state)
            try:
                last = next(items)
            except StopIteration:
                raise TrainingError(
                    f"The checkpoint was saved after batch {count} of epoch {place['epoch']}, and this run's data ends "
                    f"after batch {i}. Go on with the data and the batch size that it was saved with."
                ) from None
        self.start.replayed = {}
        self.start.epoch = saved["start"]
        return last

    def _have_rest(self, trainer: Any, rest: dict[str, Any], last: Any) -> None:
        """Call the hooks that were still to come when the checkpoint was saved."""
        module, index = trainer.lightning_module, trainer.fit_loop.epoch_loop.batch_idx
        args: tuple[Any, ...] = ()
        if rest["hook"] == "on_validation_end":
            trainer.validating = True
        elif last is None or not rest["is_whole"]:  # not whole: no checkpoint can hold the outputs
            names = [
                name for name, one in named(trainer) if name in rest["of"] and getattr(one, "_resume", 0) is not self
            ]
            if names:
                rank_zero_warn(
                    f"Not exactly the run that was interrupted: the checkpoint was saved before on_train_batch_end of "
                    f"{listed(names)} was called for batch {index}, whose batch or outputs cannot be had again, so it "
                    "is not called for it."
                )
            return
        else:
            batch = private.moved_batch(trainer, last[0])
            private.logging_begins(trainer, batch)
            args = (move_data_to_device(rest["outputs"], module.device), batch, index)
        if rest["torn"]:
            rank_zero_warn(
                f"Not exactly the run that was interrupted: it ended in {rest['hook']} of {rest['torn']}, which is "
                f"called again for batch {index}. What it had done already is done twice."
            )
        set_random_state(rest["random"])
        have_round(trainer, rest["hook"], rest["of"], *args)
        trainer.training = True
        if args:
            private.logging_ends(trainer)

    def _say_what_is_not_exact(self, trainer: Any, saved: dict[str, Any]) -> None:
        place, loader = saved["place"], private.combined_loader(trainer.fit_loop)
        loaders = list(loader.flattened) if loader is not None else []
        inside = place["kind"] == "inside" and place["batches"] > 0
        if inside and place["of"] != trainer.num_training_batches:
            rank_zero_warn(
                f"Not exactly the run that was interrupted: its epochs had {place['of']} batches, this run's have "
                f"{trainer.num_training_batches}. It goes on after the first {place['batches']} of them."
            )
        streams = [x for x in loaders if isinstance(getattr(x, "dataset", None), IterableDataset)]
        if inside and any(not knows_its_place(x) for x in streams):
            rank_zero_warn(
                "Resuming in mid-epoch, but an IterableDataset has no position to go back to: it is read again from "
                f"its start past the {place['batches']} batches that were seen, which is exact only if it gives the "
                "same rows each time. Use a stateful loader (torchdata's StatefulDataLoader, of a dataset with "
                "state_dict) to go there at once."
            )
        for x in loaders:
            if getattr(x, "persistent_workers", False) and place["total"] and (names := self.own.unreadable(x)):
                rank_zero_warn(
                    f"Not exactly the run that was interrupted: {', '.join(names)} is copied into each of the loader's "
                    "persistent workers, whose state nobody can read. Draw from the global generators of torch, numpy "
                    "or random, which are seeded anew each epoch, or use persistent_workers=False."
                )
        batch, epoch = place["batches"], place["epoch"]
        where = {
            "epoch start": f"the start of epoch {epoch}",
            "batch": f"batch {batch} of epoch {epoch}",
            "validation": f"the validation after batch {batch} of epoch {epoch}",
            "epoch end": f"the end of epoch {epoch}",
            "": f"the schedules' step after batch {batch} of epoch {epoch}",
        }[saved["amid"]]
        if saved["changed"]:
            rank_zero_warn(
                f"Not exactly the run that was interrupted: the checkpoint was saved in the middle of {where}, in "
                "which weights or schedules had changed already. Take an earlier checkpoint for the same run."
            )
        if saved["unread"]:
            rank_zero_warn(
                f"The checkpoint was saved in the middle of {where}, from whose start this run goes on. What "
                f"on_save_checkpoint of {listed(saved['unread'])} wrote into it is of the middle: where that had "
                "changed since the start, this is not exactly the run that was interrupted."
            )


def tensors(metrics: dict[str, Any], module: Any = None) -> dict[str, Tensor]:
    device = "cpu" if module is None else module.device
    return {name: value.detach().to(device) for name, value in metrics.items() if isinstance(value, Tensor)}
