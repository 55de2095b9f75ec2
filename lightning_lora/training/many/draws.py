"""Random numbers that a packed step draws once for all adapters, so that each sees what it would see alone.

Dropout of the base, noise, mixup and the like draw for the rows of a batch. While a packed step runs, the functions of
torch that draw are replaced: a draw for K n rows draws for n and repeats. What draws in another way (numpy, in place)
is not reached; the guard sees the difference. Which draws are for rows is what it saw, of two adapters: with more of
them, a size that has nothing to do with rows may be a multiple of K n by chance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.errors import TrainingError

_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
_LIKE = ("rand_like", "randn_like", "randint_like", "bernoulli")
_SIZED = ("rand", "randn")


@contextmanager
def common_draws(copies: int, rows: int, are_of_rows: list[bool]) -> Iterator[Callable[[], Any]]:
    """Inside, what this thread draws for `copies` times `rows` rows is the same for each copy. Gives a context in which
    draws are torch's own.

    `are_of_rows` says of each draw of a step, in their order, whether it is for rows; where it is empty, it is noted
    there. Raises TrainingError for a draw of which the size says otherwise.
    """
    here, state = threading.get_ident(), {"inside": False}
    noted: list[bool] = []

    def fits(size: Any) -> bool:
        noted.append(len(size) > 0 and size[0] > 0 and size[0] % (copies * rows) == 0)
        if len(noted) <= len(are_of_rows) and noted[-1] is not are_of_rows[len(noted) - 1]:
            raise TrainingError(
                f"Random numbers of size {tuple(size)} are drawn in a step of {copies} adapters and {rows} rows, and "
                "it is not known whether they are drawn for the rows. Set wave=1: one forward for each adapter."
            )
        return noted[-1]

    def dropout(own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        p = args[0] if args else kwargs.get("p", 0.5)
        trains = args[1] if len(args) > 1 else kwargs.get("training", kwargs.get("train", True))
        if not (p and trains and fits(x.shape)):
            return own(x, *args, **kwargs)
        # Dropout multiplies: what it makes of ones is the factor of each element.
        factor = _again(own(torch.ones_like(x[: x.shape[0] // copies]), p, True), copies)
        is_in_place = args[2] if len(args) > 2 else kwargs.get("inplace", False)
        return x.mul_(factor) if is_in_place else x * factor

    def attention(own: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drops = args[1] if len(args) > 1 else kwargs.get("dropout_p", 0.0)
        if not (drops and fits(query.shape)):
            return own(query, key, value, *args, **kwargs)
        before, parts = _state(query), []
        for i in range(copies):
            _set_state(query, before)
            each = [_chunk(v, i, copies, query) for v in (query, key, value, *args)]
            parts.append(own(*each, **{k: _chunk(v, i, copies, query) for k, v in kwargs.items()}))
        return torch.cat(parts)

    def like(own: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not fits(x.shape):
            return own(x, *args, **kwargs)
        return _again(own(x[: x.shape[0] // copies], *args, **kwargs), copies)

    def sized(own: Any, *args: Any, **kwargs: Any) -> Tensor:
        at = next((i for i, a in enumerate(args) if isinstance(a, (tuple, list, torch.Size))), None)
        size = kwargs.get("size", args if at is None else args[at])
        if kwargs.get("out") is not None or not all(isinstance(n, int) for n in size) or not fits(size):
            return own(*args, **kwargs)
        small = (size[0] // copies, *size[1:])
        if "size" in kwargs:
            return _again(own(*args, **{**kwargs, "size": small}), copies)
        given = small if at is None else (*args[:at], small, *args[at + 1 :])
        return _again(own(*given, **kwargs), copies)

    def randint(own: Any, *args: Any, **kwargs: Any) -> Tensor:
        has_size = "size" in kwargs or any(isinstance(a, (tuple, list, torch.Size)) for a in args)
        return sized(own, *args, **kwargs) if has_size else own(*args, **kwargs)

    def permutation(own: Any, n: int, *args: Any, **kwargs: Any) -> Tensor:
        if not fits((n,)):
            return own(n, *args, **kwargs)
        one = own(n // copies, *args, **kwargs)
        return torch.cat([one + i * (n // copies) for i in range(copies)])

    ways: list[tuple[Any, str, Any]] = [(F, name, dropout) for name in _DROPOUTS]
    ways += [(torch, "dropout", dropout), (F, "scaled_dot_product_attention", attention)]
    ways += [(torch, name, like) for name in _LIKE] + [(torch, name, sized) for name in _SIZED]
    ways += [(torch, "randint", randint), (torch, "randperm", permutation)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in ways]

    def replaced(own: Any, way: Any) -> Any:
        def drawing(*args: Any, **kwargs: Any) -> Any:
            if state["inside"] or threading.get_ident() != here:
                return own(*args, **kwargs)
            state["inside"] = True
            try:
                return way(own, *args, **kwargs)
            finally:
                state["inside"] = False

        return drawing

    @contextmanager
    def own_draws() -> Iterator[None]:
        outer, state["inside"] = state["inside"], True
        try:
            yield
        finally:
            state["inside"] = outer

    try:
        for (owner, name, way), (_, _, own) in zip(ways, before):
            setattr(owner, name, replaced(own, way))
        yield own_draws
        are_of_rows[:] = are_of_rows or noted
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


def _again(one: Tensor, copies: int) -> Tensor:
    return one.repeat(copies, *[1] * (one.dim() - 1))


def _chunk(value: Any, i: int, copies: int, query: Tensor) -> Any:
    """The part of a copy. What has not the dimensions and rows of `query`, as a mask for all rows, is not divided."""
    if isinstance(value, Tensor) and value.dim() == query.dim() and value.shape[0] == query.shape[0]:
        return value.chunk(copies)[i]
    return value


def _state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _set_state(x: Tensor, state: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.set_rng_state(state, x.device)
    else:
        torch.set_rng_state(state)
