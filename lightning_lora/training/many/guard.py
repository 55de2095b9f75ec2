"""Finds out, on the first batch, if adapters may share a forward: two of them, packed, against each alone.

Where every row is for itself, the gradients of a packed step are those of each adapter alone: times 1 for a sum over
the batch, times 1/K for a mean. A loss or a layer that lets rows meet (a batch norm in training, in-batch negatives, an
auxiliary loss over the batch) gives others. Two tests see this, each what the other may not:

- separate against packed: the gradients are compared;
- interference: with another B in the second adapter, the gradients of the first must not change.

Both are looked at again while a run goes on: a part of a loss may begin later.

At the start B is zero in both, so their rows are copies of each other, and copies hide that they meet: B is moved at
random first, and put back after. Two adapters are enough, and times 2 is exact in binary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_lora.engine.layers import pairs
from lightning_lora.engine.several import Several

MOVED = 0.05
"""How far B is moved: the update is then of 5 % of the weight's norm."""

Gradients = list[Tensor]


def judged(
    several: Several,
    two: tuple[str, str],
    alone: Callable[[str], Gradients],
    packed: Callable[[], list[Gradients]],
    *,
    is_narrow: bool,
) -> tuple[bool, str | None]:
    """Whether the loss of a step is a mean over the rows (else a sum), and why the step cannot be packed, if so.

    `is_narrow`: the step computes in 16 bits. `alone(name)` and `packed()` run the step from the same state, and return
    the gradients of an adapter's tensors (of both adapters'). Adapters are as before afterwards.
    """
    first, second = two
    with moved(several, first, 1), moved(several, second, 2):
        apart = [alone(name) for name in two]
        try:
            together = packed()
            met = _interference(several, second, packed, together[0], is_narrow)
        except Exception as error:
            return True, f"a packed step raises {type(error).__name__}: {str(error)[:300]}"
    ratios, rest = zip(*(_compared(a, b) for a, b in zip(apart, together)))
    # Measured over 27 modules: rows that are for themselves differ by at most 6e-7 (0 in 16 bits), others by 8e-4
    # (3.6e-3 in 16 bits) and more.
    bound = _bound(is_narrow)
    by = max(*rest, *(2 * min(abs(r - 0.5), abs(r - 1)) for r in ratios))
    if not by < bound:
        return True, f"the gradients of a packed step differ from those of each adapter alone (by {by:.1g})"
    return all(abs(r - 0.5) < bound for r in ratios), met


def still_apart(
    several: Several, second: str, apart: list[Gradients], packed: Callable[[], list[Gradients]], *, is_narrow: bool
) -> str | None:
    """Why two adapters, as they are now, cannot share a step, if so: looked at again while a run goes on. `apart` are
    the gradients of each alone. The bounds are wide: the sums of a trained adapter's gradients nearly cancel."""
    together = packed()
    if (met := _interference(several, second, packed, together[0], is_narrow)) is not None:
        return met
    rest = max((_compared(a, b)[1] for a, b in zip(apart, together) if any(x.any() for x in (*a, *b))), default=0.0)
    if rest < 50 * _bound(is_narrow):
        return None
    return f"the gradients of a packed step differ from those of each adapter alone (by {rest:.1g})"


def _interference(
    several: Several, second: str, packed: Callable[[], list[Gradients]], before: Gradients, is_narrow: bool
) -> str | None:
    with moved(several, second, 3):
        again = packed()[0]
    if all(torch.equal(a, b) for a, b in zip(before, again)):
        return None
    _, met = _compared(before, again)
    if met <= _bound(is_narrow) / 10:
        return None
    return f"the rows of a batch meet in the loss (an adapter changes another's gradients by {met:.1g})"


def _bound(is_narrow: bool) -> float:
    return 2e-3 if is_narrow else 1e-4


def _compared(a: Gradients, b: Gradients) -> tuple[float, float]:
    """The ratio of b to a, and what is left of b beside that, both as vectors."""
    pairs_of = [(x.double(), y.double()) for x, y in zip(a, b)]
    square = sum(float((x * x).sum()) for x, _ in pairs_of)
    if not square > 0:
        return math.nan, math.inf
    ratio = sum(float((x * y).sum()) for x, y in pairs_of) / square
    left = sum(float((y - ratio * x).square().sum()) for x, y in pairs_of)
    return ratio, math.sqrt(left / square) / max(abs(ratio), 1e-12)


@contextmanager
def moved(several: Several, name: str, seed: int) -> Iterator[None]:
    """Inside, every update of the adapter `name` is moved at random, and so is what it trains whole."""
    before: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)

    def move(tensor: Tensor, size: float) -> None:
        before.append((tensor, tensor.detach().clone()))
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * size)

    with torch.no_grad():
        with several.using(name):
            own = [(pair.A, pair.B, pair.spec.scale, _norm(pair)) for pair in pairs(several.model)]
        done = set()
        for A, B, scale, weight in own:
            still, moves = (B, A) if not bool(A.any()) else (A, B)
            done |= {id(A), id(B)}
            others = float(still.float().norm()) * math.sqrt(moves.numel() / max(1, min(moves.shape)))
            move(moves, MOVED * weight / (abs(scale) * others + 1e-12))
        for key, tensor in several.tensors(name).items():
            if id(tensor) not in done and tensor.is_floating_point() and "lora_" not in key.rpartition(".")[2]:
                move(tensor, MOVED * float(tensor.float().norm()) / math.sqrt(max(1, tensor.numel())))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in reversed(before):
                tensor.copy_(value)


def _norm(pair: object) -> float:
    weight = pair.module.dense_weight(pair.parameter)  # type: ignore[attr-defined]
    return float(weight.detach().float().norm()) if weight is not None else 1.0
