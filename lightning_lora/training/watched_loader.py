"""A CombinedLoader that tells the random state from which each of its iterators was made.

Lightning makes one iterator for each epoch; from the random state before it comes the permutation of the data. The
state afterwards is made the same whatever the loader drew, since that depends on workers and prefetching.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, get_worker_info
from torch.utils.data._utils.worker import _generate_state

from lightning_lora.training.loader_state import LoaderState
from lightning_lora.training.randomness import RandomState, random_state, set_random_state


class LoaderStart:
    """From what the iterators of the running epoch were made."""

    own: LoaderState

    def __init__(self) -> None:
        self.epoch: RandomState | None = None
        self.restarts: dict[int, RandomState] = {}
        """Of several loaders, the shorter ones start again when they are through, in mid-epoch: the last such start of
        each, by its place among them."""
        self.replayed: dict[int, RandomState] = {}
        """The starts to make again while batches are skipped."""

    def now(self) -> RandomState:
        return {"global": random_state(), "own": self.own.state()}

    def set(self, state: RandomState) -> None:
        set_random_state(state["global"])
        self.own.load(state["own"])


def watch(loader: CombinedLoader, start: LoaderStart) -> None:
    """Have `loader` note in `start` from what each of its iterators is made."""
    if not hasattr(loader, "lora_start"):
        loader.__class__ = _watched_class(type(loader))
    loader.lora_start = start  # type: ignore[attr-defined]


def is_watched(loader: CombinedLoader) -> bool:
    return hasattr(loader, "lora_start")


def _watched_class(base_class: type[CombinedLoader]) -> type[CombinedLoader]:
    def __iter__(self: Any) -> Any:  # noqa: N807
        start: LoaderStart = self.lora_start
        start.epoch = start.now()
        before = start.epoch["global"]
        seed_persistent_workers(self)
        iterator = base_class.__iter__(self)
        for loader in self.flattened:
            if isinstance(getattr(getattr(loader, "_iterator", None), "_shared_seed", None), _WorkerSeed):
                loader._iterator._shared_seed = None  # or a stateful loader's state would hold it
        set_random_state(before)
        torch.empty((), dtype=torch.int64).random_()
        start.restarts = {}
        if len(self.flattened) > 1:
            self._iterator.iterables = [_Restarting(*item, start) for item in enumerate(self.flattened)]
        return iterator

    return type(f"Watched{base_class.__name__}", (base_class,), {"__iter__": __iter__})


class _Restarting:
    """A loader whose iterators are all but the first of an epoch."""

    def __init__(self, place: int, loader: Any, start: LoaderStart) -> None:
        self.place, self.loader, self.start, self.count = place, loader, start, 0

    def __iter__(self) -> Iterator[Any]:
        self.count += 1
        before = self.start.replayed.get(self.place)
        if before is not None and before["count"] == self.count:
            self.start.set(before)
        self.start.restarts[self.place] = {**self.start.now(), "count": self.count}
        _seed_workers(self.loader)
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def knows_its_place(loader: Any) -> bool:
    """Whether the state of `loader` brings all of its place in the data.

    That of torchdata's does not where random numbers are drawn in worker processes: it is read again like any other,
    unless its dataset has a state too.
    """
    if not hasattr(loader, "load_state_dict"):
        return False
    dataset = getattr(loader, "dataset", None)
    by_index = isinstance(loader, DataLoader) and loader.num_workers > 0 and not isinstance(dataset, IterableDataset)
    return not by_index or hasattr(dataset, "state_dict")


def may_start_again(combined: CombinedLoader) -> bool:
    """Whether another iterator of it starts with the first batch: not where one is its place in the data already."""
    for loader in combined.flattened:
        dataset = getattr(loader, "dataset", None)
        once = isinstance(dataset, IterableDataset) and hasattr(dataset, "__next__")  # it is its own iterator
        if once or knows_its_place(loader):
            return False
    return True


def seed_persistent_workers(combined: CombinedLoader) -> None:
    """Give the worker processes that go on from an earlier epoch new seeds, as new ones would get them.

    Nobody can read their random state. They would go on from it, and a resumed run's new workers would not.
    """
    for loader in combined.flattened:
        _seed_workers(loader)


def _seed_workers(loader: Any) -> None:
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and loader.persistent_workers and not isinstance(loader.dataset, IterDataPipe):
        seed = torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item()
        iterator._base_seed = seed
        iterator._shared_seed = _WorkerSeed(seed)


class _WorkerSeed:
    """It comes to each worker with the message that a new epoch begins; unpickling it there seeds the worker."""

    def __init__(self, seed: Any) -> None:
        self.seed = seed

    def __reduce__(self) -> Any:
        return (_seed_worker, (self.seed,))


def _seed_worker(base_seed: int) -> None:
    """Seed the generators of this worker process, as torch does when it starts one."""
    info: Any = get_worker_info()
    if info is None:
        return
    random.seed(base_seed + info.id)
    torch.manual_seed(base_seed + info.id)
    object.__setattr__(info, "seed", base_seed + info.id)  # its own __setattr__ lets nobody
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_generate_state(base_seed, info.id))
