"""y = W x + b + s B A x as one step of autograd, at little more than the cost of W x alone.

Written with torch's own functions, the update costs four passes over tensors of the output's or the input's size (the
product with B, its scaling, the sum, and in the backward pass the sum of two gradients of x), and with dropout a mask,
a copy of x without what is dropped, and as many random numbers as x has elements. Here the products are added in place
into memory that this step has just made itself; kept for the backward pass are x, which the gradient of A needs, and
H = A x; and dropout draws the gaps between dropped elements, so that it takes as many random numbers, and keeps as many
positions, as elements are dropped.

The formulation with torch's own functions is used wherever something looks into the computation: torch.compile, whose
code generator fuses it itself and chooses what to keep; torch.func's transforms; forward-mode differentiation; tracing;
modes that see each operation, such as selective activation checkpointing, which keeps results that must not change
afterwards; tensor subclasses, whose operations are their own; and layouts other than strides, such as nested tensors.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_under_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """W x + b + scale * B A drop(x) for a W that is frozen; x is (..., in), W (out, in), A (rank, in), B (out, rank).

    `dropout` is the probability with which an element of x is left out of the update; 0 outside of training. A and B
    are used in x's dtype, or in that of autocast.
    """
    # Where the dtypes of x and W differ and autocast is not there to choose, torch says so.
    unfit = x.dtype != W.dtype and _autocast_dtype(x) is None
    if W.requires_grad or unfit or not _can_fuse(x, W, A, B, b):
        return _plain(x, F.linear(x, W, b), A, B, scale, dropout)
    if not torch.is_grad_enabled():
        return _forward(x, None, W, b, A, B, scale, dropout).y
    y: Tensor = _Linear.apply(x, None, W, b, A, B, scale, dropout)[0]
    return y


def add_update(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """base + scale * B A drop(x), for a layer that computes `base` from x in a way of its own.

    `base` is left as it is: what made it, or a hook that saw it, may need it.
    """
    if not _can_fuse(x, base, A, B):
        return _plain(x, base, A, B, scale, dropout)
    if not torch.is_grad_enabled():
        return _forward(x, base, None, None, A, B, scale, dropout).y
    y: Tensor = _Linear.apply(x, base, None, None, A, B, scale, dropout)[0]
    return y


def update(x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """B A drop(x) alone, for a layer that does more with it than add it."""
    if not _can_fuse(x, A, B):
        return _plain_update(x, A, B, dropout)
    if not torch.is_grad_enabled():
        return _forward(x, None, None, None, A, B, 1.0, dropout).y
    y: Tensor = _Linear.apply(x, None, None, None, A, B, 1.0, dropout)[0]
    return y


def dropout(x: Tensor, p: float) -> Tensor:
    """drop(x) alone, for what multiplies in another way than a Linear does."""
    if not p or not x.is_contiguous() or not _can_fuse(x):
        return F.dropout(x, p) if p else x
    y: Tensor = _Dropout.apply(x, p)
    return y


def _can_fuse(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _under_torch_func() or _modes():
        return False
    for t in tensors:
        if t is None:
            continue
        if t.layout != torch.strided or t.is_nested:
            return False
        if type(t) not in _PLAIN_TENSORS or t.is_complex() or forward_ad.unpack_dual(t).tangent is not None:
            return False
    return True


_PLAIN_TENSORS = (Tensor, nn.Parameter)


def _plain(x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    # Not torch.add(..., alpha=scale): torch 2.13's inductor fuses it with B's product and loses the alpha.
    return base + scale * _plain_update(x, A, B, dropout).to(base.dtype)


def _plain_update(x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
    x = F.dropout(x, dropout) if dropout else x
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


class _Forward(NamedTuple):
    y: Tensor
    H: Tensor
    dropped: Tensor | None
    scale: float
    """The factor on B H."""
    dtype: torch.dtype
    """What was computed in."""


def _forward(
    x: Tensor, base: Tensor | None, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> _Forward:
    """The output with what W or `base` gives, or with nothing besides."""
    dtype = _autocast_dtype(x) or x.dtype
    with _no_autocast(x):
        x = x.to(dtype)
        X = _matrix(x)
        dropped = None
        if p:
            dropped, scale = _draw(X, p), scale / (1 - p)
        H = A.to(dtype) @ _without(X, dropped).T
        if W is not None:
            y = F.linear(x, W.to(dtype), None if b is None else b.to(dtype))
            _add_product(y.view(X.shape[0], W.shape[0]), H, B.to(dtype).T, scale)
        elif base is not None and base.dtype == dtype:
            y = torch.addmm(_matrix(base), H.T, B.to(dtype).T, alpha=scale).view(base.shape)
        else:
            y = x.new_empty(X.shape[0], B.shape[0]).addmm_(H.T, B.to(dtype).T, beta=0, alpha=scale)
            y = y.view(*x.shape[:-1], B.shape[0])
            y = y if base is None else base + y.to(base.dtype)
    return _Forward(y, H, dropped, scale, dtype)


class _Linear(torch.autograd.Function):
    """The output and H. Inside, all is in matrices: X (n, in), Y and G (n, out), H (rank, n).

    H and its gradient lie with the rank first, and the gradient of B is computed as its transpose: a CPU multiplies
    narrow matrices up to eight times as fast that way round. H is an output so that the gradient of a gradient finds
    its way through it without x, which is not kept where A is frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        W: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        y, H, dropped, ctx.scale, ctx.dtype = _forward(x, base, W, b, A, B, scale, dropout)
        needs_x, _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_A else None,
            W if needs_x else None,
            A if needs_x else None,
            B if needs_x or needs_A else None,
            H if needs_B else None,
            dropped if needs_x or needs_A else None,
        )
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtypes = x.shape, [None if t is None else t.dtype for t in (x, base, b, A, B)]
        return _no_view(y), H

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_H: Tensor | None) -> tuple[Tensor | None, ...]:
        # Each step has a gradient itself where autograd asks for it (create_graph), those in place too.
        x, W, A, B, H, dropped = ctx.saved_tensors
        needs_x, needs_base, _, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
        x_dtype, base_dtype, b_dtype, A_dtype, B_dtype = ctx.dtypes
        dtype, scale = ctx.dtype, ctx.scale
        grad_x = grad_base = grad_b = grad_A = grad_B = None
        some = g if g is not None else grad_H
        if some is None:
            return (None,) * 8
        with _no_autocast(some):
            G = None if g is None else _matrix(g).to(dtype)
            if G is not None:
                assert g is not None
                grad_base = g.to(base_dtype) if needs_base else None
                grad_b = G.sum(0).to(b_dtype) if needs_b else None
                if needs_B:
                    grad_B = (H @ G).T.to(B_dtype, memory_format=torch.contiguous_format).mul_(scale)
            if needs_x or needs_A:
                if G is not None:
                    # The scale waits for products that are wider, or that can take it along.
                    from_y = B.to(dtype).T @ G.T
                    grad_H, scale = (from_y, scale) if grad_H is None else (grad_H + scale * from_y, 1.0)
                else:
                    scale = 1.0
                assert grad_H is not None
                if needs_A:
                    grad_A = (grad_H @ _without(_matrix(x).to(dtype), dropped)).to(A_dtype).mul_(scale)
                if needs_x:
                    through_W = None if G is None or W is None else G @ W.to(dtype)
                    grad_X = _add_through_A(through_W, grad_H, A.to(dtype), scale, dropped)
                    grad_x = grad_X.view(ctx.shape).to(x_dtype)
        return grad_x, grad_base, None, grad_b, grad_A, grad_B, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = _draw(x, p)
        ctx.save_for_backward(dropped)
        ctx.factor = 1 / (1 - p)
        return _no_view(_without(x, dropped).mul_(ctx.factor))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return _without(g, dropped).mul_(ctx.factor), None


def _add_through_A(grad: Tensor | None, grad_H: Tensor, A: Tensor, scale: float, dropped: Tensor | None) -> Tensor:
    """grad + scale * grad_H^T A, in the memory of `grad`; the sum is left as it was where x was dropped."""
    if grad is None:
        return _without(grad_H.T @ A, dropped) * scale
    if dropped is None:
        return _add_product(grad, grad_H, A, scale)
    if dropped.dtype == torch.bool:
        return grad.add_(_without(grad_H.T @ A, dropped), alpha=scale)
    # Positions are few: what lies there is set aside while the rest is added in place.
    at = dropped.long()
    aside = grad.view(-1).index_select(0, at)
    _add_product(grad, grad_H, A, scale)
    grad.view(-1).index_copy_(0, at, aside)
    return grad


def _add_product(Y: Tensor, H: Tensor, M: Tensor, scale: float) -> Tensor:
    """Y + scale * H^T M, in Y's memory, for a Y that is contiguous."""
    rank, n = H.shape
    width = Y.shape[1]
    if rank <= 8 and width % 1024 == 0 and n % 8 == 0 and Y.dtype == torch.float32 and Y.device.type == "cpu":
        # Rows that lie a multiple of 4 KiB apart fall on the same few places of a processor's first cache. MKL takes
        # three times as long there; eight rows at a time fit.
        blocks = n // 8
        Y.view(blocks, 8, width).baddbmm_(H.T.reshape(blocks, 8, rank), M.expand(blocks, rank, width), alpha=scale)
        return Y
    return Y.addmm_(H.T, M, alpha=scale)


# Dropout. What is dropped are the positions of elements in X, or a mask where that is smaller.


def _draw(X: Tensor, p: float) -> Tensor:
    """Which elements of X are dropped, each with probability p, by the generator of X's device."""
    if X.device.type != "cpu":
        # How many positions there are is known only when they are drawn, and a GPU should not wait for the answer.
        return torch.empty(X.shape, dtype=torch.bool, device=X.device).bernoulli_(p)
    size = X.numel()
    at = _rare_positions(size, min(p, 1 - p))
    if 4 * p <= 1:  # four bytes each, against one for each element
        return at.to(torch.int32) if size < 2**31 else at
    mask = torch.full((size,), p > 0.5, dtype=torch.bool, device="cpu")
    return mask.index_fill_(0, at, p <= 0.5).view(X.shape)


def _rare_positions(size: int, p: float) -> Tensor:
    """Positions in range(size), in order, each there with probability p on its own: gaps between them are geometric."""
    mean = size * p
    count = max(0, int(mean + _DEVIATIONS * math.sqrt(mean))) + 16
    gaps = torch.rand(count, dtype=torch.float32, device="cpu").neg_().log1p_().mul_(1 / math.log1p(-max(p, 1e-12)))
    at = gaps.long().add_(1)
    at[0] -= 1
    at.cumsum_(0)
    last = int(at[-1])
    if last < size - 1:  # once in a billion times
        return torch.cat([at, _rare_positions(size - last - 1, p).add_(last + 1)])
    return at[: int(torch.searchsorted(at, size))]


_DEVIATIONS = 6.0
"""How many standard deviations more gaps are drawn at once than are expected."""


def _without(X: Tensor, dropped: Tensor | None) -> Tensor:
    """X with zeros where it was dropped, in memory of its own; X itself if nothing was."""
    if dropped is None:
        return X
    if dropped.dtype == torch.bool:
        return X.masked_fill(dropped, 0)
    return X.reshape(-1).index_fill(0, dropped.long(), 0).view(X.shape)


def _no_view(y: Tensor) -> Tensor:
    """y in the same memory, but no view: what comes next may change it in place (nn.ReLU(inplace=True)), which autograd
    refuses for a view that a function returns."""
    if not y._is_view():
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast narrows x to in a product, if it does."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The dtypes are chosen already; autocast would choose again, and in the backward pass by what holds there."""
    return nullcontext() if _autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
