"""The state that data loaders keep themselves: where each iterator began, and their generators and counters."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    IterDataPipe,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from lightning_lora.engine.torch_private import living_iterator, numpy_seed, send_seed, shared_seed
from lightning_lora.errors import TrainingError, listed
from lightning_lora.training.lightning_private import combined_loader, loader_states, restart_loaders
from lightning_lora.training.run_state import RandomState, random_state, set_python_state, set_random_state

# A CombinedLoader that notes the random state from which each of its iterators was made.
#
# Lightning makes one iterator for each epoch, and the random state before that decides the permutation of the data.
# Afterwards the generator is advanced by exactly one draw, whatever the loader drew: that depends on workers and
# prefetching.


class LoaderStart:
    """The random states from which the iterators of the running epoch were made."""

    own: LoaderState

    def __init__(self) -> None:
        self.epoch: RandomState | None = None
        self.restarts: dict[int, RandomState] = {}
        """Of several loaders, the shorter ones start again in mid-epoch when they end. This holds the last such start
        of each loader, by its index."""
        self.first: RandomState | None = None
        """The random state from which the next iterator's first batch is fetched, where that is no epoch's first."""
        self.unfetched: list[dict[str, Any]] | None = None
        """The states of stateful loaders before the newest batch was fetched, of data without a length."""
        self.replayed: dict[int, RandomState] = {}
        """The starts to repeat while batches are skipped."""

    def now(self) -> RandomState:
        return {"global": random_state(), "own": self.own.state()}

    def set(self, state: RandomState) -> None:
        set_random_state(state["global"])
        self.own.load(state["own"])


def watch(loader: CombinedLoader, start: LoaderStart) -> None:
    """Have `loader` note in `start` the random state from which each of its iterators is made."""
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
            living = living_iterator(loader)
            if isinstance(shared_seed(living), _WorkerSeed):
                send_seed(living, None)  # or a stateful loader's state would hold it
        set_random_state(before)
        torch.empty((), dtype=torch.int64).random_()
        if start.first is not None:
            set_random_state(start.first)
        start.restarts = {}
        if len(self.flattened) > 1:
            restart_loaders(self, [_Restarting(*item, start) for item in enumerate(self.flattened)])
        return iterator

    def __next__(self: Any) -> Any:  # noqa: N807
        if sized_len(self) is None:
            self.lora_start.unfetched = loader_states(self)
        return base_class.__next__(self)

    return type(f"Watched{base_class.__name__}", (base_class,), {"__iter__": __iter__, "__next__": __next__})


class _Restarting:
    """A loader that notes its start each time it starts again in mid-epoch."""

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
    """True if the state of `loader` restores its whole place in the data.

    The state of torchdata's loader does not where worker processes draw random numbers, nor where a dataset of its own
    order or a sampler has no state: torchdata reads past so many batches then, in whatever order they come. Such a
    loader is read again like any other.
    """
    if not hasattr(loader, "load_state_dict"):
        return False
    if not isinstance(loader, DataLoader) or hasattr(loader.dataset, "state_dict"):
        return True
    by_index = loader.num_workers == 0 and not isinstance(loader.dataset, IterableDataset)
    return by_index and all(map(_has_place, (loader.sampler, loader.batch_sampler)))


def _has_place(sampler: Any) -> bool:
    """True if torchdata's loader can bring `sampler` back to its place."""
    known = isinstance(sampler, (type(None), SequentialSampler, BatchSampler)) or hasattr(sampler, "state_dict")
    return known or type(sampler).__module__.startswith("torchdata.")


def may_start_again(combined: CombinedLoader) -> bool:
    """True if a new iterator starts with the first batch; False where a loader or its dataset keeps its place."""
    for loader in combined.flattened:
        dataset = getattr(loader, "dataset", None)
        once = isinstance(dataset, IterableDataset) and hasattr(dataset, "__next__")  # it is its own iterator
        if once or knows_its_place(loader):
            return False
    return True


def seed_persistent_workers(combined: CombinedLoader) -> None:
    """Give new seeds to worker processes that live on from an earlier epoch, as new processes would get them.

    Nobody can read their random state. Unseeded, they would go on from it, which the new workers of a resumed run
    cannot do.
    """
    for loader in combined.flattened:
        _seed_workers(loader)


def _seed_workers(loader: Any) -> None:
    iterator = living_iterator(loader)
    if iterator is not None and loader.persistent_workers and not isinstance(loader.dataset, IterDataPipe):
        seed = torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item()
        send_seed(iterator, _WorkerSeed(seed), base=seed)


class _WorkerSeed:
    """Sent to each worker with the message that a new epoch begins; unpickling it there seeds the worker."""

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
    object.__setattr__(info, "seed", base_seed + info.id)  # its own __setattr__ refuses
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(numpy_seed(base_seed, info.id))


# The state of data loaders, samplers and modules that training changes: random generators and counters.
#
# `DataLoader(generator=g)`, the recipe of torch's documentation, draws from `g` alone; a sampler may count its epochs.
# Lightning's checkpoints hold none of it.

_DEPTH = 8
_LENGTH = 64
"""Longer lists and dicts hold data, not the parts of a loader."""

State = dict[str, Any]


class LoaderState:
    """The objects with a state that can be reached from loaders, each by the path of names that leads to it."""

    def __init__(self, loaders: dict[str, Any], owners: dict[str, Any]) -> None:
        """`loaders` are searched deeply, `owners` (modules and callbacks) only for what they hold directly."""
        self.found: dict[str, Any] = {}
        seen: set[int] = set()
        for name, loader in loaders.items():
            for path, value in _reached(loader, name, _DEPTH, seen):
                if _is_generator(value) or isinstance(value, (Sampler, Dataset)):
                    self.found[path] = value
        for name, owner in owners.items():
            for path, value in _held(owner, name):
                if _is_generator(value) and id(value) not in seen:
                    seen.add(id(value))
                    self.found[path] = value
        self.counters = {path: _plain(value) for path, value in self.found.items() if not _is_generator(value)}

    def count_from(self, earlier: LoaderState) -> None:
        """Take counters for changed where they are others than in `earlier`, of the same loaders."""
        for path, counters in earlier.counters.items():
            if self.found.get(path) is earlier.found[path]:
                self.counters[path] = counters

    def state(self) -> State:
        """The states, as values that `torch.load(weights_only=True)` accepts."""
        state: State = {}
        for path, value in self.found.items():
            if _is_generator(value):
                state[path] = _generator_state(value)
            else:
                start = self.counters[path]
                changed = {k: v for k, v in _plain(value).items() if k not in start or start[k] != v}
                if changed:
                    state[path] = changed
        return state

    def load(self, state: State) -> None:
        """Put back what `state` returned."""
        for path, saved in state.items():
            value = self.found.get(path)
            if value is None:
                continue
            if _is_generator(value):
                _set_generator_state(value, saved)
            else:
                value.__dict__.update(saved)

    def say_what_is_absent(self, state: State) -> None:
        absent = [path for path in state if path not in self.found]
        if absent:
            rank_zero_warn(
                f"The checkpoint holds the state of {listed(absent)}, which this run does not have: its data or random "
                "numbers are other ones than those of the run that was interrupted."
            )

    def seeds(self) -> dict[str, int]:
        """The seeds of samplers that draw each epoch's order from one: DistributedSampler, and those like it."""
        seeds = {p: getattr(value, "seed", None) for p, value in self.found.items() if isinstance(value, Sampler)}
        return {path: seed for path, seed in seeds.items() if type(seed) is int}

    def check_seeds(self, saved: dict[str, int]) -> None:
        """Raise TrainingError where this run would draw another order of the data than the checkpoint's did."""
        own = self.seeds()
        other = [path for path, seed in saved.items() if path in own and own[path] != seed]
        if other:
            path = other[0]
            raise TrainingError(
                f"The checkpoint's run drew the order of its data with seed {saved[path]}, this run draws it with "
                f"{own[path]} ({path}): it would see other batches. Call lightning.seed_everything({saved[path]}) "
                "before the Trainer is made, or give the sampler that seed."
            )

    def unreadable(self, loader: Any) -> list[str]:
        """The names of generators of `loader`'s dataset, of which each worker process has a copy."""
        inside = {id(value) for _, value in _reached(getattr(loader, "dataset", None), "", _DEPTH, set())}
        return [path for path, value in self.found.items() if _is_generator(value) and id(value) in inside]


def state_of(trainer: Trainer) -> LoaderState:
    """The state that the loaders, the modules and the callbacks of `trainer` keep themselves."""
    loops = {"train": trainer.fit_loop, "validation": trainer.fit_loop.epoch_loop.val_loop}
    combined = {name: combined_loader(loop) for name, loop in loops.items()}
    loaders = {
        f"{name} loader {i}": loader
        for name, several in combined.items()
        if several is not None
        for i, loader in enumerate(several.flattened)
    }
    owners: dict[str, Any] = {type(c).__name__: c for c in trainer.callbacks}  # type: ignore[attr-defined]
    owners["module"] = trainer.lightning_module
    if trainer.datamodule is not None:  # type: ignore[attr-defined]
        owners["datamodule"] = trainer.datamodule  # type: ignore[attr-defined]
    return LoaderState(loaders, owners)


def _reached(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if depth == 0 or id(value) in seen or not _is_searched(value):
        return
    seen.add(id(value))
    yield path, value
    if _is_generator(value):
        return
    for name, inner in _parts(value):
        yield from _reached(inner, f"{path}.{name}", depth - 1, seen)


def _is_searched(value: Any) -> bool:
    if value is None or isinstance(value, (type, types.ModuleType, Tensor, nn.Module, str, bytes, int, float)):
        return False
    return (
        _is_generator(value)
        or isinstance(value, (list, tuple, dict, functools.partial, types.FunctionType, types.MethodType))
        or hasattr(value, "__dict__")
    )


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        return value.items() if len(value) <= _LENGTH else ()
    if isinstance(value, (list, tuple)):
        return ((str(i), inner) for i, inner in enumerate(value)) if len(value) <= _LENGTH else ()
    if isinstance(value, functools.partial):
        return (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    if isinstance(value, types.MethodType):
        return (("self", value.__self__),)
    if isinstance(value, types.FunctionType):
        return zip(value.__code__.co_freevars, (_content(cell) for cell in value.__closure__ or ()), strict=True)
    # A running iterator will be made anew, and its worker processes must not be searched.
    return [(name, inner) for name, inner in vars(value).items() if name not in ("_iterator", "trainer", "_trainer")]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _held(owner: Any, path: str) -> Iterator[tuple[str, Any]]:
    owners = owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]
    for name, part in owners:
        for key, value in vars(part).items():
            where = ".".join(filter(None, (path, name, key)))
            yield where, value
            if type(value) in (dict, list, tuple):
                yield from ((f"{where}.{place}", inner) for place, inner in _parts(value))


def _plain(value: Any) -> dict[str, Any]:
    # Not its state_dict: loading that would go on in mid-epoch, but the epoch has to start as it did before.
    return {k: v for k, v in vars(value).items() if type(v) in (int, float, bool, str, type(None))}


def _is_generator(value: Any) -> bool:
    if isinstance(value, (torch.Generator, random.Random)):
        return not isinstance(value, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return _without_arrays(generator.bit_generator.state)
    return _without_arrays(generator.get_state(legacy=False))


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        set_python_state(generator, state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _with_arrays(state)
    else:
        generator.set_state(_with_arrays(state))


def _without_arrays(state: Any) -> Any:
    """`torch.load(weights_only=True)` accepts no numpy array; a list of integers stands for one."""
    if isinstance(state, dict):
        return {key: _without_arrays(value) for key, value in state.items()}
    return {"array": state.tolist(), "dtype": str(state.dtype)} if hasattr(state, "dtype") else state


def _with_arrays(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"array", "dtype"}:
        return sys.modules["numpy"].asarray(state["array"], dtype=state["dtype"])
    return {key: _with_arrays(value) for key, value in state.items()}
