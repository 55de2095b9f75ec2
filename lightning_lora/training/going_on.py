"""Brings a run back to where its checkpoint was saved: the second half of an exact resumption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_lora.errors import TrainingError, listed
from lightning_lora.training import lightning_private as private
from lightning_lora.training.loaders import LoaderStart, knows_its_place
from lightning_lora.training.rounds import have_round, named
from lightning_lora.training.run_state import set_random_state

if TYPE_CHECKING:
    from lightning_lora.training.resume import ExactResume


def restore(resume: ExactResume, trainer: Any, ranks: list[dict[str, Any] | None]) -> None:
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
    resume.own.check_seeds(saved.get("seeds", {}))
    place, fit_loop = saved["place"], trainer.fit_loop
    resume.random = saved["random"]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            private.set_step_of_last_save(callback, resume.saved_at.get(callback.state_key, 0))
    every = trainer.reload_dataloaders_every_n_epochs
    if every:  # Lightning counts from the epoch of the checkpoint, not from the last one that loaded anew
        private.set_last_reload(fit_loop, place["epoch"] - place["epoch"] % every)
    resume.own.say_what_is_absent(saved["own"])
    _say_what_is_not_exact(resume, trainer, saved)
    private.live_callback_metrics(trainer).update(tensors(saved["callback_metrics"], trainer.lightning_module))
    private.forget_restart(fit_loop)
    resume.random_at = place["total"]
    private.set_batches_that_stepped(trainer, saved.get("stepped", private.batches_that_stepped(trainer)))
    resume.stepped = (place["total"], private.batches_that_stepped(trainer))
    private.load_loader_states(fit_loop)
    begun = int(place["kind"] == "inside")
    for counts in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
        counts.ready = counts.started = place["epoch"] + begun
        counts.processed = counts.completed = place["epoch"]
    if place["kind"] == "inside":
        private.restart_in_epoch(fit_loop)
        resume.entry = saved
        return
    if not (every and fit_loop.epoch_progress.current.completed % every == 0):
        resume.own.load(saved["own"])
    resume.trained.set_gradients(saved["gradients"])


def enter(resume: ExactResume, trainer: Any, saved: dict[str, Any], fetcher: Any) -> None:
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
        last = _skip(resume.start, saved, fetcher)
    resume.own.load(saved["own"])
    resume.metrics.load(saved["metrics"])
    resume.trained.set_gradients(saved["gradients"])
    if place["batches"]:
        private.logging_goes_on(trainer)
    for i, state in enumerate(saved["fetched_at"], 1):
        resume.fetched_at[place["total"] - i] = state or saved["random"]
    resume.validated = place["total"] if place["validated"] else -1
    private.skip_next_validation(trainer, place["validated"] and not place["ended"])
    resume.random, resume.random_at = saved["random"], place["total"]
    if rest["hook"] == "on_train_epoch_end":
        resume.rest = rest["of"]
    elif rest["hook"]:
        _have_rest(resume, trainer, rest, last)
    set_random_state(resume.random)
    if saved["stopped_early"]:
        rank_zero_info("EarlyStopping had stopped the run when the checkpoint was saved: it stops here as well.")
        trainer.should_stop = True


def _skip(start: LoaderStart, saved: dict[str, Any], fetcher: Any) -> Any:
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
        return last
    start.set(saved["start"])
    start.replayed = saved["restarts"]
    iter(fetcher)
    items = private.iterator_given(fetcher) or fetcher
    count = saved["fetched"] if saved["fetched"] is not None else place["batches"]
    for i in range(count):
        for state in saved["fetched_at"][count - 1 - i : count - i]:  # this batch or the next one is fetched from it
            if state is not None:
                set_random_state(state)
        try:
            last = next(items)
        except StopIteration:
            raise TrainingError(
                f"The checkpoint was saved after batch {count} of epoch {place['epoch']}, and this run's data ends "
                f"after batch {i}. Go on with the data and the batch size that it was saved with."
            ) from None
    start.replayed = {}
    start.epoch = saved["start"]
    return last


def _have_rest(resume: ExactResume, trainer: Any, rest: dict[str, Any], last: Any) -> None:
    """Call the hooks that were still to come when the checkpoint was saved."""
    module, index = trainer.lightning_module, trainer.fit_loop.epoch_loop.batch_idx
    args: tuple[Any, ...] = ()
    if rest["hook"] == "on_validation_end":
        trainer.validating = True
    elif last is None or not rest["is_whole"]:  # not whole: no checkpoint can hold the outputs
        names = [
            name for name, one in named(trainer) if name in rest["of"] and getattr(one, "_resume", 0) is not resume
        ]
        if names:
            rank_zero_warn(
                f"Not exactly the run that was interrupted: the checkpoint was saved before on_train_batch_end of "
                f"{listed(names)} was called for batch {index}, whose batch or outputs cannot be had again, so it is "
                "not called for it."
            )
        return
    else:
        batch = private.moved_batch(trainer, last[0])
        private.logging_begins(trainer, batch)
        args = (move_data_to_device(rest["outputs"], module.device), batch, index)
    if rest["torn"]:
        rank_zero_warn(
            f"Not exactly the run that was interrupted: it ended in {rest['hook']} of {rest['torn']}, which is called "
            f"again for batch {index}. What it had done already is done twice."
        )
    set_random_state(rest["random"])
    have_round(trainer, rest["hook"], rest["of"], *args)
    trainer.training = True
    if args:
        private.logging_ends(trainer)


def _say_what_is_not_exact(resume: ExactResume, trainer: Any, saved: dict[str, Any]) -> None:
    place, loader = saved["place"], private.combined_loader(trainer.fit_loop)
    loaders = list(loader.flattened) if loader is not None else []
    inside = place["kind"] == "inside" and place["batches"] > 0
    if inside and place["of"] != trainer.num_training_batches:
        rank_zero_warn(
            f"Not exactly the run that was interrupted: its epochs had {place['of']} batches, this run's have "
            f"{trainer.num_training_batches}. It goes on after the first {place['batches']} of them."
        )
    streams = [x for x in loaders if isinstance(getattr(x, "dataset", None), IterableDataset)]
    if inside and any(not hasattr(x, "load_state_dict") for x in streams):
        rank_zero_warn(
            "Resuming in mid-epoch, but an IterableDataset has no position to go back to: it is read again from "
            f"its start past the {place['batches']} batches that were seen, which is exact only if it gives the "
            "same rows each time. Use a stateful loader (torchdata's StatefulDataLoader) to go there at once."
        )
    for x in loaders:
        if getattr(x, "persistent_workers", False) and place["total"] and (names := resume.own.unreadable(x)):
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
            f"Not exactly the run that was interrupted: the checkpoint was saved in the middle of {where}, in which "
            "weights or schedules had changed already. Take an earlier checkpoint for the same run."
        )
    if saved["unread"]:
        rank_zero_warn(
            f"The checkpoint was saved in the middle of {where}, from whose start this run goes on. What "
            f"on_save_checkpoint of {listed(saved['unread'])} wrote into it is of the middle: where that had changed "
            "since the start, this is not exactly the run that was interrupted."
        )


def tensors(metrics: dict[str, Any], module: Any = None) -> dict[str, Tensor]:
    device = "cpu" if module is None else module.device
    return {name: value.detach().to(device) for name, value in metrics.items() if isinstance(value, Tensor)}
