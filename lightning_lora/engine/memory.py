"""Finds tensors of a model that share memory though they are different tensors.

`decoder.weight = nn.Parameter(encoder.weight.t())` and `head.weight.data = embed.weight.data` make two parameters in
one memory: a write to one changes the other. Views of one buffer that do not overlap do not share memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.engine.tree import name_in


class Held(NamedTuple):
    """A tensor that a module of the model holds."""

    name: str
    tensor: Tensor
    is_attribute: bool
    """True if it is a plain attribute, neither a parameter nor a buffer."""


class Memory:
    """The memory of the parameters, the buffers and the other tensors that the modules of a model hold."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        located = [(span, held) for held in _held_by(modules) if (span := _span(held.tensor)) is not None]
        located.sort(key=lambda entry: entry[0][:2])
        self._near: dict[int, list[Held]] = {}
        """id(tensor) -> the tensors in the same stretch of memory, itself included: a run of overlapping extents."""
        stretch: list[Held] = []
        device, end = "", 0
        for (on, first, last), held in located:
            if on != device or first >= end:
                stretch, device, end = [], on, last
            stretch.append(held)
            self._near[id(held.tensor)] = stretch
            end = max(end, last)

    def sharing(self, tensor: Tensor) -> list[Held]:
        """The other tensors that share at least one number in memory with `tensor`.

        A buffer in which several parameters lie side by side is left out: it is only the place where they are kept."""
        near = [held for held in self._near.get(id(tensor), ()) if held.tensor is not tensor]
        return [held for held in near if overlap(held.tensor, tensor) and not self._is_a_place(held.tensor)]

    def _is_a_place(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return False
        inside = {id(h.tensor): h.tensor for h in self._near[id(tensor)] if isinstance(h.tensor, nn.Parameter)}
        return sum(overlap(tensor, p) for p in inside.values()) > 1


def overlap(a: Tensor, b: Tensor) -> bool:
    """True if two tensors share at least one number in memory."""
    span, span_b = _span(a), _span(b)
    if span is None or span_b is None:
        return False
    (on, first, last), (on_b, first_b, last_b) = span, span_b
    if on != on_b or first >= last_b or first_b >= last:
        return False
    if _is_dense(a) and _is_dense(b):
        return True
    # Divide the memory into steps that fit both layouts, mark the steps of `a`, and look for a marked step of `b`.
    start, end = min(first, first_b), max(last, last_b)
    step = math.gcd(a.element_size(), b.element_size(), first - start, first_b - start)
    taken = torch.zeros((end - start) // step, dtype=torch.bool)
    _laid_out(taken, a, (first - start) // step, step).fill_(True)
    return bool(_laid_out(taken, b, (first_b - start) // step, step).any())


def repeats(t: Tensor) -> bool:
    """True if several numbers of `t` are one number in memory, as after `expand`: then `t` cannot be written to."""
    span = _span(t)
    if span is None or _is_dense(t):
        return False
    taken = torch.zeros((span[2] - span[1]) // t.element_size(), dtype=torch.bool)
    _laid_out(taken, t, 0, t.element_size()).fill_(True)
    return int(taken.sum()) < t.numel()


def _held_by(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Held]:
    for prefix, module in modules:
        for own in (module._parameters, module._buffers):
            yield from (Held(name_in(prefix, name), t, False) for name, t in own.items() if t is not None)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            yield from (Held(name_in(prefix, name), t, True) for t in (value, *values) if isinstance(t, Tensor))


def _span(t: Tensor) -> tuple[str, int, int] | None:
    """The device, the address of the first byte, and that after the last; None if `t` has no memory of its own."""
    if t.layout is not torch.strided or t.is_meta or not t.numel():
        return None
    try:
        first = t.data_ptr()
    except RuntimeError:  # a wrapper, or a tensor that a compiler or functorch traces
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return (str(t.device), first, first + extent * t.element_size()) if first else None


def _is_dense(t: Tensor) -> bool:
    """True if `t` covers every number between its first and its last in memory, each once."""
    if t.is_contiguous():
        return True
    laid_out = sorted((stride, size) for size, stride in zip(t.shape, t.stride()) if size > 1)
    return laid_out[0][0] == 1 and all(a * n == b for (a, n), (b, _) in pairwise(laid_out))


def _laid_out(taken: Tensor, t: Tensor, start: int, step: int) -> Tensor:
    """A view of `taken` on the steps that `t` covers: several steps for each of its numbers."""
    each = t.element_size() // step
    return taken.as_strided((*t.shape, each), (*(stride * each for stride in t.stride()), 1), start)


# Finds numbers that are finite but too large: a layer that computes with them gives inf or NaN.


def largest(dtype: torch.dtype) -> float:
    """The largest absolute value that a number of an adapter may have, for a layer that computes in `dtype`.

    In float16 it is the dtype's largest number. In dtypes of a wider range it is the root of that, since outputs are
    squared in norms and multiplied by each other in attention; no training gives a weight of 2^64.
    """
    return max(torch.finfo(dtype).max ** 0.5, torch.finfo(torch.float16).max)


def largest_in(*tensors: Tensor) -> float:
    """The largest absolute value in the tensors; NaN if one of them contains NaN."""
    ends = [end for t in tensors if t.numel() for end in t.detach().aminmax()]
    return max((abs(end.item()) for end in ends), key=lambda size: (size != size, size), default=0.0)


def too_large(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, *besides: Tensor | None) -> str | None:
    """The number in A, B or scale * B A that is too large for a layer that computes in `dtype`, in words; None if all
    fit. `besides` are further tensors to check: DoRA's m and the bias of B.

    The product is not formed: no number of B A is larger than the largest norm of a row of B times the largest norm of
    a column of A (Cauchy and Schwarz). This bound also holds for each matrix of a stack, and for groups.
    """
    most, a, b = largest(dtype), largest_in(A), largest_in(B)
    sizes = {"an A": a, "a B": b, "a scale * B": abs(scale) * b}
    if not abs(scale) * a * b * A.shape[0] <= most:
        rows, columns = (t.detach().flatten(1).double().norm(dim=dim).max() for t, dim in ((B, 1), (A, 0)))
        sizes["a change scale * B A"] = abs(scale) * float(rows * columns)
    sizes["another number"] = largest_in(*(t for t in besides if t is not None))
    found = next((f"{what} of up to {size:.3g}" for what, size in sizes.items() if not size <= most), None)
    return found and f"{found}, where {str(dtype).removeprefix('torch.')} allows {most:.3g}"


def free_bytes(device: torch.device) -> int | None:
    """The bytes that can still be allocated on `device`; None if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            facts = {line.partition(":")[0]: line.split()[1] for line in file}
        return int(facts["MemAvailable"]) * 1024
    except (OSError, LookupError, ValueError):
        return None
