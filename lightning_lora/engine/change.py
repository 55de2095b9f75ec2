"""What becomes of a pair of a model when it gets another rank: its factors, its frozen start, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig, scale_of
from lightning_lora.engine.cut import Aim, ResizedModule, alpha_for, in_each_block, resized, together
from lightning_lora.engine.inits import INITS, kaiming
from lightning_lora.engine.layers import DoRA, Pair
from lightning_lora.engine.layers.fresh import drawing_on
from lightning_lora.engine.layers.pair import START, AdapterSpec, as_blocks, from_blocks
from lightning_lora.engine.layers.reads import forget
from lightning_lora.engine.low_rank import product_norm
from lightning_lora.errors import AdapterStateError


@dataclass(eq=False)
class Change:
    """What becomes of a pair: its new spec, factors and frozen start."""

    pair: Pair
    kind: str
    """"same", "grown", "sliced" (an untrained pair: the first ranks are kept) or "cut"."""
    spec: AdapterSpec
    A: Tensor
    B: Tensor
    error: float
    size: float
    start: dict[str, Tensor] = field(default_factory=dict)
    """The new frozen start, by the names of its buffers."""

    def __post_init__(self) -> None:
        self.parameters: tuple[nn.Parameter, nn.Parameter] = (self.pair.A, self.pair.B)
        self.was_A, self.was_B = self.pair.A.data, self.pair.B.data

    def apply(self) -> None:
        """Set the new factors, with their gradients, the frozen start and the spec."""
        if self.kind == "same":
            return
        module, own = self.pair.module, self.pair.module.lora
        for p, value in zip(self.parameters, (self.A, self.B)):
            gradient, p.grad = p.grad, None
            moved = None if gradient is None else self.moved(gradient, p)
            _set(p, value)
            p.grad = moved
        module._buffers.update(self.start)
        each = {**own.parameters, self.pair.parameter: self.spec}
        module.__dict__["lora"] = replace(own, parameters=each) if own.parameters else self.spec
        forget(module)

    def drop_start(self) -> None:
        module, names = self.pair.module, {name + self.pair.suffix for name in START}
        for name in names & module._buffers.keys():
            del module._buffers[name]
        module.__dict__["lora_names"] = tuple(name for name in module.lora_names if name not in names)

    @cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """P (n, r', r) and Q (n, r, r'), with A' = P A and B' = B Q in each block, in float64.

        A pair with a frozen start is cut with that start, which P and Q cannot reach: they come as near as they can."""
        A, B = as_blocks(self.was_A.double(), self.was_B.double(), self.pair.spec.rank)
        new_A, new_B = as_blocks(self.A.double(), self.B.double(), self.spec.rank)
        if self.kind == "cut":
            return new_A @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ new_B
        P = torch.eye(new_A.shape[1], A.shape[1], dtype=A.dtype, device=A.device).expand(len(A), -1, -1)
        return P, P.mT

    def moved(self, t: Tensor, p: nn.Parameter, *, is_square: bool = False) -> Tensor:
        """What was gathered from gradients of `p`, A or B, in the new shape of `p`; `is_square` says from squares."""
        P, Q = (M.square() for M in self.maps) if is_square else self.maps
        rank, is_A = self.pair.spec.rank, p is self.parameters[0]
        A, B = as_blocks(t if is_A else self.was_A, self.was_B if is_A else t, rank)
        A, B = (Q.mT @ A.double(), B[..., :1]) if is_A else (A[:, :1], B.double() @ P.mT)
        return from_blocks(A, B, self.was_A, self.was_B, rank)[not is_A].to(t.dtype).contiguous()

    def report(self) -> ResizedModule:
        before, after = (sum(t.numel() for t in pair) for pair in ((self.was_A, self.was_B), (self.A, self.B)))
        return ResizedModule(self.pair.spec.rank, self.spec.rank, self.error, self.size, before, after)


def _set(p: nn.Parameter, value: Tensor) -> None:
    """Give `p` another value, of another shape.

    A graph that is still alive, of outputs that were kept, holds the node that accumulates p's gradient, which knows
    the old shape. torch makes another node only where the dtype changes, so it does for a moment. DDP has hooks on that
    node, so among several processes it stays: better torch's error about the shape than gradients that are not summed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        p.data = value.new_empty(0, dtype=torch.float64 if value.dtype != torch.float64 else torch.float32)
    p.data = value


def changes_of(config: LoRAConfig, own: list[Pair], aim: Aim) -> list[Change]:
    """What becomes of each pair of a part. Nothing is changed yet."""
    groups = together(pair.name for pair in own)
    most: dict[str, int] = {}
    for pair in own if aim.rank is None else ():
        had = as_blocks(pair.A.data, pair.B.data, pair.spec.rank)[0].shape[1]  # a frozen start has as many more
        most[groups[pair.name]] = max(most.get(groups[pair.name], 1), min(had, aim.rank_in(*_whole(pair))))
    changes = []
    for pair in own:
        if aim.rank is None:
            each = most[groups[pair.name]]
        else:
            each = in_each_block(aim.rank, pair.name, pair.A, pair.B, pair.spec.rank)
        change = _change(config, pair, each)
        if isinstance(pair.module, DoRA):
            change = _of_dora(config, change, each, aim)
        changes.append(change)
    return changes


def _whole(pair: Pair) -> tuple[Tensor, Tensor]:
    """The blocks of the whole update: with a frozen start, [B - B0, B0] [A; A - A0]."""
    A, B = as_blocks(pair.A.data, pair.B.data, pair.spec.rank)
    if (start := _start_blocks(pair)) is None:
        return A, B
    A0, B0 = start
    return torch.cat([A, A - A0], dim=1), torch.cat([B - B0, B0], dim=2)


def _start_blocks(pair: Pair) -> tuple[Tensor, Tensor] | None:
    """The blocks of the frozen start, if there is one."""
    A0, B0 = (pair.module._buffers.get(name + pair.suffix) for name in START)
    return None if A0 is None or B0 is None else as_blocks(A0, B0, pair.spec.rank)


def _change(config: LoRAConfig, pair: Pair, each: int) -> Change:
    """`pair` with `each` ranks in each of its blocks."""
    spec, like = pair.spec, (pair.A.data, pair.B.data)
    A, B = as_blocks(like[0], like[1], spec.rank)
    whole_A, whole_B = _whole(pair)
    size = abs(spec.scale) * product_norm(whole_B, whole_A)
    had = A.shape[1]
    if each == had:
        return Change(pair, "same", spec, *like, error=0.0, size=size)
    rank = spec.rank // had * each
    alpha = alpha_for(spec.scale, rank, rank_stabilised=config.use_rslora)
    new = replace(spec, rank=rank, alpha=alpha, scale=scale_of(alpha, rank, rank_stabilised=config.use_rslora))
    had_start = _start_blocks(pair)
    error = 0.0
    if each > had:
        kind, (A, B) = "grown", _grown(config, pair, A, B, each)
        padded = [resized(*had_start, each)] if had_start else []
        start = [t for r in padded for t in from_blocks(r.A, r.B, *like, spec.rank)]
    else:
        is_zero = had_start is None and not (bool(A.any()) and bool(B.any()))
        found = resized(whole_A, whole_B, each).to(A.dtype, B.dtype)
        kind, A, B, error = "sliced" if is_zero else "cut", found.A, found.B, found.error
        start = [torch.zeros_like(t) for t in from_blocks(A, B, *like, spec.rank)] if had_start else []
    # `contiguous` may leave strides of dimensions of size 1 as they are, by which convolutions choose a kernel.
    A, B = (t.clone(memory_format=torch.contiguous_format) for t in from_blocks(A, B, *like, spec.rank))
    if (A.shape, B.shape) != type(pair.module).shapes_of(pair.module, pair.parameter, rank):
        raise AdapterStateError(
            f"The geometry of {pair.name!r} ({type(pair.module).__name__}) lays A and B out in a way of its own, so "
            "they cannot be given another rank."
        )
    kept = {name + pair.suffix: t.contiguous() for name, t in zip(START, start)}
    return Change(pair, kind, new, A, B, error=error, size=size, start=kept)


def _grown(config: LoRAConfig, pair: Pair, A: Tensor, B: Tensor, each: int) -> tuple[Tensor, Tensor]:
    """Blocks with more ranks, in which further rows of A start as in a fresh pair, and B is zero; or, where B is drawn
    (embeddings), the other way round."""
    had, d_in = A.shape[1:]
    padded = resized(A, B, each)
    A, B = padded.A.clone(), padded.B.clone()
    init = INITS[config.init]
    draws: Callable[..., Any] = init.function if init.gives == "Tensor" and not init.computes else kaiming
    wants = init.wants if draws is not kaiming else ("rank", "d_in")
    numbers = {"rank": each, "scale": pair.spec.scale, "d_in": d_in, "d_out": pair.B.shape[0]}
    with drawing_on(A.device):
        if pair.module.draws_b and not config.freeze_a:
            B[..., had:] = torch.randn(B[..., had:].shape).to(B.dtype)
        else:
            for block in A:
                block[had:] = draws(**{name: numbers[name] for name in wants})[had:].to(A.dtype)
    return A, B


def _of_dora(config: LoRAConfig, change: Change, each: int, aim: Aim) -> Change:
    """`change`, with the error of the adapted weight m (W + s B A) / ||W + s B A||; with more ranks than `each` where
    that error is larger than was allowed."""
    pair = change.pair
    before, base = (_numbers(pair.module, read, pair.parameter) for read in ("adapted_weight", "dense_weight"))
    size = float((before - base).norm())
    while True:
        error = 0.0
        if change.kind == "cut":
            with _tried(change):
                after = _numbers(pair.module, "adapted_weight", pair.parameter)
            error = float((after - before).norm()) / (size or 1.0)
        change.error, change.size = error, size
        if aim.limit is None or error <= aim.limit or change.kind == "same":
            return change
        each += 1
        change = _change(config, pair, each)


def _numbers(module: Any, read: str, parameter: str) -> Tensor:
    weight: Tensor = getattr(module, read)(parameter)
    return weight.double()


@contextmanager
def _tried(change: Change) -> Iterator[None]:
    """Inside, the pair is as `change` says; afterwards as before."""
    module = change.pair.module
    spec, buffers = module.lora, dict(module._buffers)
    gradients = [p.grad for p in change.parameters]
    for p in change.parameters:
        p.grad = None
    try:
        change.apply()
        yield
    finally:
        for p, data, gradient in zip(change.parameters, (change.was_A, change.was_B), gradients):
            _set(p, data)
            p.grad = gradient
        module._buffers.update(buffers)
        module.__dict__["lora"] = spec
        forget(module)
