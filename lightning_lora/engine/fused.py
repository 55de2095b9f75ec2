"""Computes y = W x + b + s B A x as one step of autograd, at little more than the cost of W x alone.

With torch's own functions, the update takes four passes over tensors of the output's or the input's size: the product
with B, its scaling, the sum, and in the backward pass the sum of two gradients of x. Dropout adds a mask, a copy of x,
and as many random numbers as x has elements. This step adds products in place into memory that it has just made. For
the backward pass it keeps x, which the gradient of A needs, and H = A x. Its dropout draws the gaps between dropped
elements, so it needs one random number, and keeps one position, for each dropped element.

The version with torch's own functions is used wherever something looks into the computation: torch.compile, which fuses
it itself; torch.func's transforms; forward-mode differentiation; tracing; modes that see each operation, such as
selective activation checkpointing, which keeps results that must not change later; tensor subclasses, which define
their own operations; and layouts without strides, such as nested tensors.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_lora.engine import torch_private

_exports = getattr(torch.compiler, "is_exporting", lambda: False)


def linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """W x + b + scale * B A drop(x) for a W that is frozen; x is (..., in), W (out, in), A (rank, in), B (out, rank).

    `dropout` is the probability with which an element of x is left out of the update; 0 outside of training. A and B
    are used in x's dtype, or in that of autocast.
    """
    # If the dtypes of x and W differ and there is no autocast, F.linear raises torch's own error.
    fit = x.dtype == W.dtype or _autocast_dtype(x) is not None
    if W.requires_grad or not fit or not _can_fuse(x, W, A, B, b):
        return add_update(F.linear(x, W, b), x, A, B, scale, dropout)
    return _fused(x, None, W, b, A, B, scale, dropout)


def add_update(base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """base + scale * B A drop(x), for a layer that computes `base` from x by its own forward.

    `base` is not changed in place: the layer's backward pass, or a hook, may need it.
    """
    if not _can_fuse(x, base, A, B):
        return _plain(x, base, A, B, scale, dropout)
    return _fused(x, base, None, None, A, B, scale, dropout)


def update(x: Tensor, A: Tensor, B: Tensor, dropout: float = 0.0) -> Tensor:
    """B A drop(x) alone, for a layer that does more than add it (DoRA, for example)."""
    if not _can_fuse(x, A, B):
        return _plain_update(x, A, B, dropout)
    return _fused(x, None, None, None, A, B, 1.0, dropout)


def dropout(x: Tensor, p: float) -> Tensor:
    """drop(x) alone, for layers that do not multiply as a Linear does (convolutions)."""
    if not p or not x.is_contiguous() or not _can_fuse(x):
        return _plain_dropout(x, p)
    y: Tensor = _Dropout.apply(x, p)
    return y


def sees_every_step() -> bool:
    """True if something looks into the computation (see the top of this file): then no result may be cached or made in
    place."""
    return (
        torch.compiler.is_compiling()
        or torch_private.traces()
        or torch_private.under_transforms()
        or bool(torch_private.modes())
        or torch_private.may_be_dual()
    )


def is_symbolic() -> bool:
    """True if torch.fx traces the running code, with proxies in place of tensors."""
    return torch_private.is_fx_traced() and not torch_private.runs_under_modes() and not _exports()


def _can_fuse(x: Tensor, base: Tensor | None = None, *own: Tensor | None) -> bool:
    # This runs at each call, mostly after a large product has emptied the processor's caches: there, each function that
    # is called costs a few microseconds.
    private = torch_private
    if torch.compiler.is_compiling() or private.traces() or private.under_transforms() or private.modes():
        return False
    for t in (x, base, *own):
        if t is not None and type(t) not in _PLAIN_TENSORS:
            return False
    if private.may_be_dual():
        given = (t for t in (x, base, *own) if t is not None)
        if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
            return False
    is_strided = x.layout is torch.strided and (base is None or base.layout is torch.strided)
    return is_strided and x.dtype in _FLOATS and not x.is_nested


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TENSORS = (Tensor, nn.Parameter)


def _plain(x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
    # Not torch.add(..., alpha=scale): torch 2.13's inductor fuses it with B's product and loses the alpha.
    return base + scale * _plain_update(x, A, B, dropout).to(base.dtype)


def _plain_update(x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
    x = _plain_dropout(x, dropout)
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def _plain_dropout(x: Tensor, p: float) -> Tensor:
    if not p or not x.is_cpu or not torch.compiler.is_compiling() or _exports():
        return F.dropout(x, p) if p else x
    # For a CPU, torch 2.13 compiles F.dropout to code that takes 17 ns for each random number, forward and again
    # backward. To draw positions, as `_draw` does, takes a thirtieth of the time. No shape here depends on the numbers
    # drawn, and the mask is of bytes, since compiled code is slow to set bools.
    size, rare = x.numel(), max(min(p, 1 - p), 1e-12)
    # At least the mean size * rare plus 6 standard deviations, in integers, since `size` may be a symbol.
    count = size * math.ceil(rare * 17 / 16 * 2**16) // 2**16 + 160
    gaps = torch.rand(count, dtype=torch.float32, device="cpu").neg().log1p() * (1 / math.log1p(-rare))
    at = ((gaps.long() + 1).cumsum(0) - 1).clamp(max=size)  # positions past the end fall on one extra byte
    kept = torch.full((size + 1,), int(p <= 0.5), dtype=torch.uint8, device="cpu").index_fill(0, at, int(p > 0.5))
    return x * kept[:size].view(x.shape) * (1 / (1 - p))


def _fused(
    x: Tensor, base: Tensor | None, W: Tensor | None, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float
) -> Tensor:
    compute: Any = _Linear.apply if torch.is_grad_enabled() else _forward
    narrowed = _autocast_dtype(x)
    y: Tensor
    if narrowed is None:
        y, *_ = compute(x, base, W, b, A, B, scale, p, x.dtype)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y, *_ = compute(x, base, W, b, A, B, scale, p, narrowed)
    return y


def _forward(
    x: Tensor,
    base: Tensor | None,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output (the update, added to W x + b or to `base` if given); H = A x; and the dropped elements of x."""
    x = _in(dtype, x)
    X, dropped = _matrix(x), None
    if p:
        dropped, scale = _draw(X, p), scale / (1 - p)
    H = _narrow_product(_in(dtype, A), _without(X, dropped))
    B = _in(dtype, B)
    if W is not None:
        y = F.linear(x, _in(dtype, W), None if b is None else _in(dtype, b))
        _add_product(y if y.dim() == 2 else y.view(X.shape[0], W.shape[0]), H, B.t(), scale)
    elif base is not None and base.dtype == dtype:
        y = torch.addmm(_matrix(base), H.t(), B.t(), alpha=scale).view(base.shape)
    else:
        y = x.new_empty(X.shape[0], B.shape[0]).addmm_(H.t(), B.t(), beta=0, alpha=scale)
        y = y.view(*x.shape[:-1], B.shape[0])
        y = y if base is None else base + y.to(base.dtype)
    return y, H, dropped


class _Linear(torch.autograd.Function):
    """Returns the output and H. Inside, tensors are matrices: X (n, in), Y and G (n, out), H (rank, n).

    The gradient of B is computed transposed: a CPU multiplies narrow matrices up to eight times as fast that way. H is
    an output so that second derivatives can pass through it: x is not kept where A is frozen.

    In small layers this Python code takes as long as the products. So it tests first: a `to` or a `view` that changes
    nothing costs a third of a small product.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:  # as _forward
        y, H, dropped = _forward(*given)
        x, base, W, b, A, B, scale, p, dtype = given
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
        ctx.scale = scale / (1 - p) if p else scale
        ctx.dtype, ctx.shape = dtype, x.shape
        ctx.dtypes = x.dtype, A.dtype, B.dtype, None if base is None else base.dtype, None if b is None else b.dtype
        return _no_view(y), H

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_H: Tensor | None) -> tuple[Tensor | None, ...]:
        some = g if g is not None else grad_H
        if some is None:
            return (None,) * 9
        if _autocast_dtype(some) is None:
            return _gradients(ctx, g, grad_H)
        # The forward has chosen the dtypes; autocast would choose anew, by the settings of the backward pass.
        with torch.autocast(some.device.type, enabled=False):
            return _gradients(ctx, g, grad_H)


def _gradients(ctx: Any, g: Tensor | None, grad_H: Tensor | None) -> tuple[Tensor | None, ...]:
    # With create_graph, autograd differentiates each step here once more, the in-place ones too.
    x, W, A, B, H, dropped = ctx.saved_tensors
    needs_x, needs_base, _, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
    x_dtype, A_dtype, B_dtype, base_dtype, b_dtype = ctx.dtypes
    dtype, scale = ctx.dtype, ctx.scale
    grad_x = grad_base = grad_b = grad_A = grad_B = G = None
    if g is not None:
        G = _in(dtype, _matrix(g))
        grad_base = _in(base_dtype, g) if needs_base else None
        grad_b = _in(b_dtype, G.sum(0)) if needs_b else None
        if needs_B:
            grad_B = torch.mm(H, G).t().to(B_dtype, memory_format=torch.contiguous_format).mul_(scale)
    if needs_x or needs_A:
        if G is None:
            scale = 1.0
        else:
            # The scale is applied later, where it costs less: as a factor of the product with A, and on grad_A.
            from_y = _narrow_product(_in(dtype, B).t(), G)
            grad_H, scale = (from_y, scale) if grad_H is None else (grad_H + scale * from_y, 1.0)
        assert grad_H is not None
        if needs_x:
            through_W = None if G is None or W is None else torch.mm(G, _in(dtype, W))
            grad_X = _add_through_A(through_W, grad_H, _in(dtype, A), scale, dropped)
            grad_x = _in(x_dtype, grad_X if len(ctx.shape) == 2 else grad_X.view(ctx.shape))
        # Last, since x, kept since the forward pass, pushes G and its products out of the processor's cache.
        if needs_A:
            grad_A = _in(A_dtype, torch.mm(grad_H, _without(_in(dtype, _matrix(x)), dropped))).mul_(scale)
    return grad_x, grad_base, None, grad_b, grad_A, grad_B, None, None, None


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
    """grad + scale * grad_H^T A, in the memory of `grad`; elements where x was dropped stay as in `grad`."""
    if grad is None:
        return _without(grad_H.T @ A, dropped) * scale
    if dropped is None:
        return _add_product(grad, grad_H, A, scale)
    if dropped.dtype == torch.bool:
        return grad.add_(_without(grad_H.T @ A, dropped), alpha=scale)
    # The dropped positions are few: save their values, add everywhere in place, and put the values back.
    at = dropped.long()
    aside = grad.view(-1).index_select(0, at)
    _add_product(grad, grad_H, A, scale)
    grad.view(-1).index_copy_(0, at, aside)
    return grad


def _narrow_product(M: Tensor, X: Tensor) -> Tensor:
    """M X^T, (rank, n). In memory the rank comes first or last, whichever is faster (by up to three times)."""
    return torch.mm(X, M.t()).t() if is_rank_last(M.shape[0], X) else torch.mm(M, X.t())


def is_rank_last(rank: int, X: Tensor) -> bool:
    """True if a product of X (n, d) with a factor is faster, (n, rank), than (rank, n). The order also decides in which
    order bfloat16 is summed: to other bits, in one of some ten thousand elements."""
    return not X.is_cpu or (X.dtype == torch.bfloat16 and (rank >= 16 or has_tiles()))


@functools.lru_cache(maxsize=1)
def has_tiles() -> bool:
    """True if this processor multiplies bfloat16 in tiles (AMX).

    Tiles are filled with rows of X. At rank 8 (480 x 640) on a Xeon with AMX, the layout with the rank last takes
    25 us, with the rank first 47 us. Without tiles, the rank last takes up to 1.6 times as long below sixteen ranks.
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not have it
    return bool(capabilities.get("amx_bf16", False))


def _add_product(Y: Tensor, H: Tensor, M: Tensor, scale: float) -> Tensor:
    """Y + scale * H^T M, in Y's memory; Y is contiguous."""
    rank, n = H.shape
    width = Y.shape[1]
    if rank <= 12 and n % 8 == 0 and width % 1024 == 0 and Y.is_cpu and Y.dtype == torch.float32:
        # Rows that lie a multiple of 4 KiB apart compete for the same few lines of the first cache, and narrow products
        # take up to three times as long. Eight rows at a time avoid this.
        rows = H.t().reshape(n // 8, 8, rank)
        Y.view(n // 8, 8, width).baddbmm_(rows, M.expand(n // 8, rank, width), alpha=scale)
        return Y
    return Y.addmm_(H.t(), M, alpha=scale)


# Dropout. The dropped elements of X are given by their positions, or by a mask if that is smaller.


def _draw(X: Tensor, p: float) -> Tensor:
    """Draw the elements of X to drop, each with probability p, with the generator of X's device."""
    # On a GPU the number of positions is known only after a wait for the device. For a small X a mask is quicker than
    # the dozen calls that draw positions.
    size = X.numel()
    if size <= _FEW or not X.is_cpu:
        return torch.empty(X.shape, dtype=torch.bool, device=X.device).bernoulli_(p)
    at = _rare_positions(size, min(p, 1 - p))
    if 4 * p <= 1:  # a position takes four bytes, a mask one byte for each element
        return at.to(torch.int32) if size < 2**31 else at
    mask = torch.full((size,), p > 0.5, dtype=torch.bool, device="cpu")
    return mask.index_fill_(0, at, p <= 0.5).view(X.shape)


_FEW = 4096
"""Up to this many elements of X, a mask is drawn faster than positions."""


def _rare_positions(size: int, p: float) -> Tensor:
    """Draw positions in range(size), in order, each independently with probability p: their gaps are geometric."""
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
"""Gaps are drawn at once for the mean number of positions plus this many standard deviations."""


def _without(X: Tensor, dropped: Tensor | None) -> Tensor:
    """X with zeros at the dropped elements, in new memory; X itself if nothing was dropped."""
    if dropped is None:
        return X
    if dropped.dtype == torch.bool:
        return X.masked_fill(dropped, 0)
    return X.reshape(-1).index_fill(0, dropped.long(), 0).view(X.shape)


def _no_view(y: Tensor) -> Tensor:
    """y in the same memory, but not as a view: the next layer may change it in place (nn.ReLU(inplace=True)), which
    autograd refuses for a view that a function returns."""
    if not torch_private.is_view(y):
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _in(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts x in a product; None if it does not."""
    kind = "cpu" if x.is_cpu else x.device.type
    if not (x.is_cpu or torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
