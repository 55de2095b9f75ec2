"""The state of the global random generators: Python's, torch's, numpy's and CUDA's."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

import torch

RandomState = dict[str, Any]

_last_numpy: tuple[int, bytes, Any] | None = None
"""numpy's generator, the memory of its state, and the state as it was last read from there."""


def random_state() -> RandomState:
    """The state of every random generator in use, as values that `torch.load(weights_only=True)` accepts."""
    state: RandomState = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = _numpy_state(numpy)
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: RandomState) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    set_python_state(random, state["python"])
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None and _numpy_state(numpy) is not state["numpy"]:
        saved = state["numpy"]
        if not isinstance(saved, dict):
            algorithm, keys, *rest = saved
            saved = (algorithm, keys.numpy().astype("uint32"), *rest)
        numpy.random.set_state(saved)
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _numpy_state(numpy: Any) -> Any:
    """numpy takes 50 us to tell its state, too much after every batch: it is asked only where its memory changed."""
    global _last_numpy
    generator = numpy.random.mtrand._rand._bit_generator
    if type(generator) is not numpy.random.MT19937:
        return numpy.random.get_state()
    # 624 keys and a position. Where a second normal number is kept for the next call, that call changes neither.
    memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4)
    if _last_numpy is not None and _last_numpy[:2] == (id(generator), memory) and not _last_numpy[2][3]:
        return _last_numpy[2]
    algorithm, keys, *rest = numpy.random.get_state()
    state = (algorithm, torch.from_numpy(keys.astype("int64")), *rest)
    _last_numpy = (id(generator), memory, state)
    return state


def set_python_state(generator: Any, state: Any) -> None:
    """Put back the state of Python's `random` or of a `random.Random`, which takes tuples and no lists."""
    version, numbers, kept = state
    generator.setstate((version, tuple(numbers), kept))
