"""Exact resumption: the random state, and the place in the data, that Lightning does not restore.

Lightning restores loops, optimizers and schedulers, but no random state, and a plain shuffled DataLoader starts a new
permutation. Here the random state is kept from two moments: just before the epoch's iterator was made (from it comes
the permutation) and when the checkpoint was saved. On resuming, the epoch's iterator is made again from the first, the
batches that were seen are skipped, and the second is put back.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils.data import IterableDataset

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

RandomState = dict[str, Any]
Restart = dict[str, Any]
"""How often a loader was started again within an epoch, and the random state when it last was."""


def random_state() -> RandomState:
    """The state of every random generator in use, as values that `torch.load(weights_only=True)` accepts."""
    state: RandomState = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        algorithm, keys, *rest = numpy.random.get_state()
        state["numpy"] = (algorithm, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: RandomState) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(_as_tuples(state["python"]))
    if "numpy" in state and "numpy" in sys.modules:
        algorithm, keys, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((algorithm, keys.numpy().astype("uint32"), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


class ExactResume:
    """The part of the callback that makes a resumed run the run that was not interrupted."""

    def __init__(self) -> None:
        self.epoch_start: RandomState | None = None
        """The random state just before the running epoch's iterator was made."""
        self.restarts: dict[int, Restart] = {}
        """The last one in the running epoch of each of several loaders, by its place among them."""
        self.replayed: dict[int, Restart] = {}
        """Those to make again while batches are skipped."""
        self.after_batch: RandomState | None = None
        self.saved: list[dict[str, Any]] | None = None
        """What a checkpoint brought, of each process, until it has been put back."""
        self.boundary: RandomState | None = None
        """The state to put back when the next epoch starts, after resuming between two."""
        self.epoch_end: RandomState | None = None
        """The state after the last whole epoch."""
        self.late: list[GradientAccumulationScheduler] = []
        """Whoever acts when an epoch starts, of which Lightning tells nobody where it resumes in the middle of one."""

    def state_dict(self) -> dict[str, Any]:
        own = {"epoch_start": self.epoch_start, "restarts": self.restarts, "now": random_state()}
        # Every process has its own generators: rank 0 saves them all.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, own)
            return {"ranks": ranks}
        return {"ranks": [own]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state["ranks"]

    def on_train_start(self, trainer: Trainer) -> None:
        """Go on where the checkpoint was saved, or start so that a later checkpoint can."""
        ranks, self.saved = self.saved, None
        self.after_batch = self.boundary = self.epoch_end = None
        self.late = []
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is None:
            return
        loaders = list(fetcher.combined_loader.flattened)
        self._watch(fetcher.combined_loader)
        stateful = all(hasattr(loader, "load_state_dict") for loader in loaders)
        streams = any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders)
        if ranks is not None and len(ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random state of {len(ranks)} processes and this run has "
                f"{trainer.world_size}: it goes on from other random numbers than the run that was interrupted."
            )
        if ranks is None:
            if not stateful and not streams:
                fetcher.iterator = _made_at_first_use(fetcher.combined_loader)
            return

        saved = ranks[trainer.global_rank % len(ranks)]
        pending = trainer.fit_loop._combined_loader_states_to_load
        if pending:  # Lightning loads the state of stateful loaders after a checkpoint in mid-epoch only
            fetcher.combined_loader._load_state_dicts(pending)
            iter(fetcher)
        seen = _batches_seen(trainer)
        if seen and streams and not stateful:
            rank_zero_warn(
                "Resuming in mid-epoch, but an IterableDataset has no position to go back to: it starts from its first "
                f"batch again though {seen} were seen. Use a stateful loader (torchdata's StatefulDataLoader) for an "
                "exact resume."
            )
        elif seen and not stateful and saved["epoch_start"] is not None:
            set_random_state(saved["epoch_start"])
            self.replayed = saved["restarts"]
            iter(fetcher)
            for _ in range(seen):  # past the fetcher, which adds what was seen to its count by itself
                next(fetcher.iterator)  # type: ignore[arg-type]
            self.replayed = {}
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if every:  # Lightning counts from the epoch of the checkpoint, not from the last one that loaded anew
            trainer.fit_loop._last_train_dl_reload_epoch = trainer.current_epoch - trainer.current_epoch % every
        set_random_state(saved["now"])
        if not seen and not streams:
            # Between two epochs: the iterator that Lightning made on loading was drawn from other random numbers, or,
            # by a stateful loader after an epoch's last batch, stands at the very end of that epoch.
            fetcher.iterator = _made_at_first_use(fetcher.combined_loader)
        if trainer.fit_loop.restarted_mid_epoch:
            # Other hooks, and Lightning when it makes up for a validation, still draw before the first batch.
            assert fetcher.iterator is not None
            fetcher.iterator = _from_state(saved["now"], fetcher.iterator)
            self.late = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
        else:
            self.boundary = saved["now"]
        self.after_batch = saved["now"]

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if self.boundary is not None:
            set_random_state(self.boundary)
            self.boundary = None
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is None or hasattr(fetcher.combined_loader, "lora_resume"):
            return
        # Loaders are made anew for each epoch, with an iterator that nobody uses. It does not count: a run that is
        # resumed here does not make it.
        if self.epoch_end is not None:
            set_random_state(self.epoch_end)
        self._watch(fetcher.combined_loader)

    def on_train_epoch_end(self) -> None:
        self.epoch_end = random_state()

    def on_train_batch_start(self, trainer: Trainer) -> None:
        while self.late:
            self.late.pop().on_train_epoch_start(trainer)

    def on_train_batch_end(self, trainer: Trainer, batch_idx: int) -> None:
        self.after_batch = random_state() if _validation_may_follow(trainer, batch_idx) else None

    def on_validation_end(self) -> None:
        # Validation draws random numbers, for its loader's seed at least. Were they to count, a run resumed from a
        # checkpoint of an epoch's last batch, after which Lightning does not validate again, would go another way.
        if self.after_batch is not None:
            set_random_state(self.after_batch)

    def _watch(self, loader: CombinedLoader) -> None:
        """Learn of the random state whenever `loader` makes an iterator."""
        if not hasattr(loader, "lora_resume"):
            loader.__class__ = _watched_class(type(loader))
        loader.lora_resume = self  # type: ignore[attr-defined]


@functools.cache
def _watched_class(base_class: type[CombinedLoader]) -> type[CombinedLoader]:
    def __iter__(self: Any) -> Any:  # noqa: N807
        self.lora_resume.epoch_start = before = random_state()
        iterator = base_class.__iter__(self)
        # How many numbers were drawn depends on the loader, on workers and prefetching, and on resuming: make it one.
        set_random_state(before)
        torch.empty((), dtype=torch.int64).random_()
        if len(self.flattened) > 1:  # the shorter ones start again when they are through, in mid-epoch
            self.lora_resume.restarts = {}
            self._iterator.iterables = [_Restarting(*item, self.lora_resume) for item in enumerate(self.flattened)]
        return iterator

    return type(f"Watched{base_class.__name__}", (base_class,), {"__iter__": __iter__})


class _Restarting:
    """A loader whose iterators are all but the first of an epoch."""

    def __init__(self, place: int, loader: Any, resume: ExactResume) -> None:
        self.place, self.loader, self.resume, self.count = place, loader, resume, 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        before = self.resume.replayed.get(self.place)
        if before is not None and before["count"] == self.count:
            set_random_state(before["state"])
        self.resume.restarts[self.place] = {"count": self.count, "state": random_state()}
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def _made_at_first_use(loader: CombinedLoader) -> Iterator[Any]:
    """An iterator of `loader`, made when its first item is asked for: after all hooks that draw random numbers."""
    yield from _items(iter(loader))


def _from_state(state: RandomState, iterator: Iterator[Any]) -> Iterator[Any]:
    """`iterator`, with the random state set to `state` when its first item is asked for."""
    set_random_state(state)
    yield from _items(iterator)


def _items(iterator: Iterator[Any]) -> Iterator[Any]:
    end = object()
    while (item := next(iterator, end)) is not end:  # a for loop would call iter() on it, and so start it anew
        yield item


def _validation_may_follow(trainer: Trainer, batch_idx: int) -> bool:
    """Not where it surely does not: numpy takes 50 us to tell its state, too much to ask after every batch."""
    every = trainer.val_check_batch
    if not isinstance(every, int) or trainer.check_val_every_n_epoch is None:
        return True
    return (batch_idx + 1) % every == 0 or trainer.is_last_batch or trainer.should_stop


def _batches_seen(trainer: Trainer) -> int:
    """Batches of the running epoch that were trained on before the checkpoint; 0 between two epochs."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if not trainer.fit_loop.restarted_mid_epoch:
        return 0
    seen = epoch_loop.batch_progress.current.completed + epoch_loop.restarted_on_train_batch_end
    return 0 if seen >= trainer.num_training_batches else seen
