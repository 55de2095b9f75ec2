"""What each of several processes has of its own, brought to the first one, which writes the checkpoint."""

from __future__ import annotations

import pickle
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

_PATIENCE = timedelta(seconds=5)
"""How long the first process waits, after an exception, for others that may have had none."""

_exchanges = 0


def of_all_ranks(own: Any, *, may_be_alone: bool) -> list[Any]:
    """`own` of every process, by rank. With `may_be_alone`, None for those that do not come."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [own]
    ranks: list[Any] = [None] * distributed.get_world_size()
    if may_be_alone:
        return _left_in_store(own, ranks)
    distributed.all_gather_object(ranks, own)
    return ranks


def _left_in_store(own: Any, ranks: list[Any]) -> list[Any]:
    # A call to all processes would wait for ever for one that goes on training. Each leaves its own in the store by
    # which the processes have met, and nobody but the first looks there.
    global _exchanges
    _exchanges += 1
    rank, store = distributed.get_rank(), _get_default_store()
    ranks[rank] = own
    if rank != 0:
        with suppress(RuntimeError):  # the first process has ended, and the store with it
            store.set(f"lightning_lora/{_exchanges}/{rank}", pickle.dumps(own))  # type: ignore[arg-type]
        return ranks
    for other in range(1, len(ranks)):
        key = f"lightning_lora/{_exchanges}/{other}"
        try:
            store.wait([key], _PATIENCE)
        except RuntimeError:  # torch's DistStoreError is one
            continue
        ranks[other] = pickle.loads(store.get(key))
    return ranks
