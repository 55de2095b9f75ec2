"""What `save_hyperparameters` keeps of a model: a base among the arguments must not go into every checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors

_KEYS = ("hyper_parameters", "datamodule_hyper_parameters")  # Lightning's, of the module and of the data module
_PLAIN = (str, bytes, int, float, bool, type(None))


def leave_out_base(checkpoint: dict[str, Any], module: nn.Module) -> list[str]:
    """Take modules, and weights of the base of `module`, out of the hyperparameters in `checkpoint`, however deep they
    lie in dicts, lists and tuples; another object that holds one goes as a whole.

    Returns where they were among the module's own: "backbone", "parts.backbone". In a list None takes their place.
    """
    ours = {id(t) for t in adapter_tensors(module).values()}
    base = {_storage(t) for t in (*module.parameters(), *module.buffers()) if id(t) not in ours}
    left_out: list[str] = []
    for key in _KEYS:
        given = checkpoint.get(key)
        if isinstance(given, Mapping) and (places := list(_places(given, base, ()))):
            checkpoint[key] = _without(given, set(places), ())
            if key == _KEYS[0]:
                left_out = [".".join(map(str, place)) for place in places]
    return left_out


def _places(value: Any, base: set[int], path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, _PLAIN):
        return
    if type(value) in (list, tuple):
        inside: Any = enumerate(value)
    elif isinstance(value, dict):
        inside = value.items()
    elif path:
        if _holds(value, base):
            yield path
        return
    else:
        inside = value.items()  # the hyperparameters themselves, where they are some other mapping
    for key, inner in inside:
        yield from _places(inner, base, (*path, key))


def _without(value: Any, places: set[tuple[Any, ...]], path: tuple[Any, ...]) -> Any:
    """`value` but for what lies at `places`; what holds none of them stays the object that it is."""
    if not any(place[: len(path)] == path for place in places):
        return value
    if isinstance(value, (list, tuple)):
        here = ((*path, i) for i in range(len(value)))
        return type(value)(None if p in places else _without(v, places, p) for v, p in zip(value, here))
    return {k: _without(v, places, (*path, k)) for k, v in value.items() if (*path, k) not in places}


def _holds(value: Any, base: set[int]) -> bool:
    """Whether pickling `value`, as saving it would, comes upon a module or a weight of the base."""
    found = False

    class Search(pickle.Pickler):
        def persistent_id(self, inner: Any) -> str | None:
            nonlocal found
            if isinstance(inner, nn.Module):
                found = True
                return "module"
            if isinstance(inner, Tensor):
                found = found or _storage(inner) in base
                return "tensor"
            return None

    class Nowhere:
        def write(self, content: Any) -> int:
            return len(content)

    try:
        Search(Nowhere()).dump(value)
    except Exception:  # so will saving it, which says why
        return found
    return found


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError):  # of a kind without one, or sharded
        return id(t)
