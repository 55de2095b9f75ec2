"""A layer that several adapters use at once: rows k n to (k + 1) n of its input belong to the adapter k.

The batch was repeated along its rows, once for each adapter. A Linear multiplies all rows by W at once and adds each
adapter's update to its rows; adapters of one rank are multiplied as a stack. Every other layer runs once for each
adapter, on its rows, exactly as if it had that adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.fused import is_rank_last
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.conv import ConvLoRA
from lightning_lora.engine.layers.embedding import EmbeddingLoRA
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.layers.pair import FACTORS
from lightning_lora.engine.swap import Host
from lightning_lora.errors import TrainingError


class Rows:
    """Which rows use which adapter, while a packed step runs. All layers of a model read the same one."""

    names: tuple[str, ...] = ()
    """The adapters of the step, in the order of their rows."""
    each: int = 0
    """The number of rows of one adapter."""
    own_draws: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context in which a layer that runs for one adapter alone draws random numbers."""


class Packed(Host):
    """Mixin in front of a layer's own class."""

    pack_rows: Rows
    pack_parts: Mapping[str, nn.Module]
    """Adapter -> this layer with that adapter alone: the same weights, in another object."""
    pack_name: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.pack_rows
        names = rows.names
        parts = [self.pack_parts[name] for name in names]
        for part in parts:
            part.__dict__["training"] = self.training
        if len(names) == 1:
            return parts[0].forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] % (len(names) * rows.each):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TrainingError(
                f"{self.pack_name!r} got an input of shape {shape}, whose first dimension does not count the rows of "
                f"the batch ({rows.each} for each of {len(names)} adapters)"
            )
        if len(args) == 1 and not kwargs and type(x) is Tensor and all(_is_plain(part, self) for part in parts):
            return routed(x, self, parts)
        size = x.shape[0] // len(names)
        state = torch.get_rng_state() if self.training else None
        outputs = []
        try:
            for i, (name, part) in enumerate(zip(names, parts)):
                if i and state is not None:
                    torch.set_rng_state(state)  # all adapters draw the same
                own = slice(i * size, (i + 1) * size)
                given = [_part(value, own, x.shape[0]) for value in args]
                named = {key: _part(value, own, x.shape[0]) for key, value in kwargs.items()}
                rows.names = (name,)  # for layers inside of this one
                with rows.own_draws():
                    outputs.append(part.forward(*given, **named))
        finally:
            rows.names = names
        if not all(isinstance(y, Tensor) and y.dim() and y.shape[0] == size for y in outputs):
            raise TrainingError(f"{self.pack_name!r} returns something else than one tensor of rows")
        return torch.cat(outputs)


def _part(value: Any, own: slice, count: int) -> Any:
    return value[own] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value


def why_not_packed(part: nn.Module, name: str) -> str | None:
    """Why the layer `name` cannot be packed, if it is known beforehand; `part` is the layer with one adapter."""
    if not isinstance(part, Adapter):
        return None
    if part.lora_by_weight or part.lora.parameters or part.lora_to_kernels:
        return f"the weight of {name!r} is read, so its rows cannot be told apart"
    if not isinstance(part, (LinearLoRA, ConvLoRA, EmbeddingLoRA)):
        return f"{name!r} is a layer of a kind that is not packed"
    return None


def _is_plain(part: Any, layer: nn.Module) -> bool:
    """True if the fast path computes what `part.forward` computes: W x + b + s B A x, with W and b of `layer`."""
    cls, own = type(part), part._parameters
    if any(own.get(key) is not layer._parameters.get(key) for key in ("weight", "bias")):
        return False
    if not isinstance(part, LinearLoRA):
        return cls.forward is nn.Linear.forward
    spec = part.lora
    drops = part.training and (spec.dropout or spec.rank_dropout or spec.module_dropout)
    return (
        cls.lora_is_plain
        and cls.base_class.forward is nn.Linear.forward
        and part.lora_names == FACTORS
        and type(own["weight"]) is nn.Parameter
        and not own["weight"].requires_grad
        and not drops
    )


def routed(x: Tensor, layer: nn.Module, parts: list[nn.Module]) -> Tensor:
    """W x + b, and s B A x of each part on its rows, for plain linear layers."""
    W, b = layer._parameters["weight"], layer._parameters["bias"]
    assert W is not None
    runs: list[tuple[slice, float]] = []
    factors: list[Any] = []
    at = 0
    for (rank, scale), group in groupby(parts, _rank_and_scale):
        members = list(group)
        if rank:
            runs.append((slice(at, at + len(members)), scale))
            factors += [part._parameters[name] for name in FACTORS for part in members]
        at += len(members)
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        y: Tensor = _Routed.apply(x, W, b, len(parts), runs, x.dtype, *factors)
        return y
    with torch.autocast(kind, enabled=False):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
        return _Routed.apply(x, W, b, len(parts), runs, dtype, *factors)


def _rank_and_scale(part: Any) -> tuple[int, float]:
    is_adapted = isinstance(part, LinearLoRA)
    return (part._parameters["lora_A"].shape[0], part.lora.scale) if is_adapted else (0, 0.0)


class _Routed(torch.autograd.Function):
    """X is (adapters, n, in), Y (adapters, n, out); a run of adapters of one rank has A (members, rank, in) and B
    (members, out, rank).

    In bfloat16 the layouts decide in which order a product is summed. These give the sums of one adapter alone
    (fused.py): in another order roundings add up over the layers, until the guard refuses the pack.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, count: int, runs: Any, dtype: torch.dtype, *factors: Tensor
    ) -> Tensor:
        ctx.x_dtype, x = x.dtype, x.to(dtype)
        y = F.linear(x, W.to(dtype), None if b is None else b.to(dtype))
        X, Y = x.reshape(count, -1, x.shape[-1]), y.view(count, -1, y.shape[-1])
        kept: list[Tensor] = []
        at = 0
        for where, scale in runs:
            size = where.stop - where.start
            A = torch.stack(factors[at : at + size]).to(dtype)
            B = torch.stack(factors[at + size : at + 2 * size]).to(dtype)
            at += 2 * size
            H = _narrow_products(A, X[where])
            Y[where].baddbmm_(H.mT, B.mT, alpha=scale)
            kept += [A, B, H]
        ctx.save_for_backward(x, W, *kept)
        ctx.count, ctx.runs, ctx.dtypes = count, runs, [f.dtype for f in factors]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, *kept = ctx.saved_tensors
        G, X = g.reshape(ctx.count, -1, g.shape[-1]), x.reshape(ctx.count, -1, x.shape[-1])
        through: Any = None
        if ctx.needs_input_grad[0]:
            through = torch.matmul(G.reshape(-1, G.shape[-1]), W.to(G.dtype)).view(X.shape)
        gradients: list[Tensor] = []
        for i, (where, scale) in enumerate(ctx.runs):
            A, B, H = kept[3 * i : 3 * i + 3]
            from_y = _narrow_products(B.mT, G[where])
            if through is not None:
                through[where].baddbmm_(from_y.mT, A, alpha=scale)
            at = len(gradients)
            for product in (torch.bmm(from_y, X[where]), torch.bmm(H, G[where]).mT):
                product = product.to(ctx.dtypes[at], memory_format=torch.contiguous_format)
                gradients += product.mul_(scale).unbind()
        grad_x = None if through is None else through.view(x.shape).to(ctx.x_dtype)
        return (grad_x, None, None, None, None, None, *gradients)


def _narrow_products(M: Tensor, X: Tensor) -> Tensor:
    """M X^T, (members, rank, n), summed as for each member alone."""
    return torch.bmm(X, M.mT).mT if is_rank_last(M.shape[1], X) else torch.bmm(M, X.mT)
