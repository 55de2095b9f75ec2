"""What one layer does with the factors of many adapters: an update for all rows alike, and one for each row its own.

A cell holds views of the slab: A (slots, rank, in), B (slots, rank, out), which lies transposed so that both products
read it in a stretch, and gain and shift (slots, out), which are zero but for DoRA and for a bias of B. The scale is
in B and shift.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.bank.routing import FEW_POSITIONS
from lightning_lora.engine.layers import geometry_of
from lightning_lora.engine.layers.base import has_own_forward
from lightning_lora.engine.layers.conv import ConvLoRA
from lightning_lora.engine.layers.dora import gains, output_norms
from lightning_lora.engine.layers.embedding import EmbeddingLoRA
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.storage import can_be_dense, dense, is_quantized
from lightning_lora.errors import AdapterFormatError, AdapterStateError, TargetError

if TYPE_CHECKING:
    from lightning_lora.engine.bank.copies import Copies
    from lightning_lora.engine.bank.routing import Routes, Rows

CELLS: weakref.WeakValueDictionary[int, Cell] = weakref.WeakValueDictionary()
"""By key: a compiled graph holds a number, not an object."""
_KEYS = itertools.count()

MANY_ROWS = 16
"""From so many on, and always in a narrow dtype, A x^T takes up to a third less time than x A^T."""

Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerFactors:
    """One layer's part of an adapter, in the shapes that the layer's geometry gives to A and B."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    """DoRA's, one number for each output."""
    bias: Tensor | None = None
    """B's, one number for each output."""

    @property
    def is_affine(self) -> bool:
        """Whether it changes outputs by a gain or a shift, too."""
        return self.magnitude is not None or self.bias is not None


class Cell:
    """The place of one layer in a bank."""

    kinds: ClassVar[dict[type, type[Cell]]] = {}
    channels_last: ClassVar[int] = 0
    """Dimensions of an output that come after its channels."""

    A: Tensor
    B: Tensor
    gain: Tensor
    shift: Tensor
    hides_rows: str | None = None
    """Why the first dimension of its input is not that of the rows, where that is known."""

    def __init_subclass__(cls, serves: type) -> None:
        Cell.kinds[serves] = cls

    def __init__(self, name: str, module: nn.Module, routes: Routes) -> None:
        geometry: Any = geometry_of(type(module))
        self.name, self.module, self.routes, self.geometry = name, module, routes, geometry
        self.base_class = type(module)
        self.groups: int = getattr(module, "groups", 1)
        self.out: int = geometry.shapes(module, self.groups)[1][0]
        self._shapes_of_rank = functools.lru_cache(maxsize=64)(functools.partial(geometry.shapes, module))
        # A forward of its own may return what it keeps, or what autograd needs.
        self._may_write = not has_own_forward(type(module))
        self.key = next(_KEYS)
        CELLS[self.key] = self

    def __reduce__(self) -> Any:
        raise AdapterStateError(
            "A model that an AdapterBank serves cannot be copied or pickled: call bank.close() first."
        )

    # What a kind of layer defines. Factors come in the dtype of `base`.

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Of A, B, gain and shift of one adapter, as they lie in the slab."""
        raise NotImplementedError

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        """Write A and scale * B, in the geometry's shapes, into `slot`."""
        raise NotImplementedError

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """`base`, the layer's output for x, with the update of one adapter for all rows."""
        raise NotImplementedError

    def add_rows(self, base: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """The same where the rows have adapters of their own."""
        raise NotImplementedError

    def is_batched(self, x: Tensor) -> bool:
        """Whether the first dimension of x, the layer's input, is that of the rows."""
        return x.dim() > 1

    def one(self, slot: int, rank: int) -> Factors:
        """A and B of one adapter, as `add_one` takes them."""
        return self.A[slot, :rank], self.B[slot, :rank]

    def many(self, index: Tensor, rank: int, copies: Copies) -> Factors:
        """A and B of several adapters, copied from the slab, as `add_rows` takes them."""
        return copies.of(self.A[:, :rank], index), copies.of(self.B[:, :rank], index)

    # What all share.

    def problems(self, values: LayerFactors, max_rank: int) -> Iterator[str]:
        """Why `values` do not fit, in words."""
        rank = values.A.shape[0] if values.A.dim() else 0
        if not rank or rank % self.groups:
            yield f"{self.name} has an A of shape {tuple(values.A.shape)}"
            return
        if rank > max_rank:
            yield f"{self.name} has rank {rank}, and the bank has max_rank={max_rank}"
        wanted = self._shapes_of_rank(rank)
        if (values.A.shape, values.B.shape) == wanted and not values.is_affine:
            return
        for what, given, shape in zip("AB", (values.A, values.B), wanted):
            if given.shape != shape:
                yield f"{self.name} has {what} of shape {tuple(given.shape)} where the model has {tuple(shape)}"
        for what, vector in (("magnitudes", values.magnitude), ("biases of B", values.bias)):
            if vector is not None and vector.numel() != self.out:
                yield f"{self.name} has {vector.numel()} {what} for {self.out} outputs"

    def write(self, slot: int, values: LayerFactors) -> None:
        """Write an adapter's part, in which `problems` finds none, into `slot`, which holds zeros."""
        if values.bias is not None:
            copy_scaled(self.shift[slot], values.bias.flatten(), values.scale)
        if values.magnitude is None:
            self.store(slot, values.A, values.B, values.scale)
            return
        # DoRA (arXiv:2402.09353, equation 5) is g (W + s B A) with g = m / ||W + s B A||: here gain and g s B.
        A, B = (t.to(self.A.device, torch.float32) for t in (values.A, values.B))
        W = self._dense_weight(AdapterFormatError)
        change = self.geometry.from_matrix(self.module, values.scale * (B.flatten(1) @ A.flatten(1)))
        norms = output_norms(self.geometry, self.module, W + change)
        g = gains(values.magnitude.to(self.A.device, torch.float32).flatten(), norms)
        self.store(slot, A, B * g.view(-1, *(1,) * (B.dim() - 1)), values.scale)
        self.gain[slot].copy_(g - 1)

    def folded(self, slot: int) -> dict[str, nn.Parameter]:
        """The layer's parameters with the adapter in them. Raises AdapterStateError where they cannot hold it."""
        if has_own_forward(self.base_class):
            raise AdapterStateError(
                f"{self.name!r} cannot be folded: a {self.base_class.__name__} has a forward of its own, which may use "
                "its weight in another way. Use the adapter as it is."
            )
        own = self.module._parameters["weight"]
        if own is not None and is_quantized(own):
            raise AdapterStateError(
                f"{self.name!r} cannot be folded: its weight is quantized, and would be rounded again. Use the adapter "
                "as it is."
            )
        W, (A, B) = self._dense_weight(AdapterStateError), self._whole(slot)
        geometry, module = self.geometry, self.module
        with torch.autocast(W.device.type, enabled=False):
            gained = geometry.by_output(module, W.float()) * (1 + self.gain[slot].float())[:, None]
            changed = geometry.from_output(module, gained) + geometry.from_matrix(module, B.T.float() @ A.float())
        folded = {"weight": changed.to(W.dtype).contiguous()}
        if bool(self.shift[slot].any()):
            bias = module._parameters.get("bias")
            if bias is None:
                raise AdapterStateError(
                    f"{self.name!r} cannot be folded: it has no bias that could take in that of B. Use the adapter as "
                    "it is."
                )
            folded["bias"] = (bias + self.shift[slot].float()).to(bias.dtype)
        return {name: nn.Parameter(value, requires_grad=False) for name, value in folded.items()}

    def affine(self, base: Tensor, at: int | Tensor) -> Tensor:
        """base + gain * (base - bias) + shift; `at` is the slot of all rows, or (rows,) with those of each."""
        ones = (1,) * self.channels_last
        bias = self.module._parameters.get("bias")
        linear = base if bias is None else base - bias.to(base.dtype).view(-1, *ones)
        gain, shift = (t[at].to(base.dtype) for t in (self.gain, self.shift))
        if gain.dim() == 1:
            return base + (gain.view(-1, *ones) * linear + shift.view(-1, *ones))
        linear = linear.reshape(gain.shape[0], -1, *linear.shape[1:])
        shape = (gain.shape[0], *(1,) * (linear.dim() - 2 - len(ones)), gain.shape[1], *ones)
        return base + (gain.view(shape) * linear + shift.view(shape)).view(base.shape)

    def _is_free(self, base: Tensor) -> bool:
        """Whether the update may be added into `base` where it lies."""
        return self._may_write and base.is_contiguous() and not base.requires_grad

    def _dense_weight(self, error: type[Exception]) -> Tensor:
        """The layer's weight, where an adapter can be taken into it."""
        weight = self.module._parameters["weight"]
        if weight is None or not can_be_dense(weight):
            raise error(f"{self.name!r} has a weight of a kind that DoRA and folding cannot use.")
        if getattr(self.module, "groups", 1) != 1:
            raise error(f"{self.name!r} is a grouped convolution, of which no weight holds the adapter.")
        return dense(self.module, weight).detach()

    def _whole(self, slot: int) -> tuple[Tensor, Tensor]:
        """A (rank, n) and B (rank, out) of one adapter."""
        return self.A[slot].flatten(1), self.B[slot]


class LinearCell(Cell, serves=LinearLoRA):
    """nn.Linear, what derives from it, and transformers' Conv1D."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        size: int = self.geometry.shapes(self.module, rank)[0][1]
        return (rank, size), (rank, self.out), (self.out,), (self.out,)

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        self.A[slot, : A.shape[0]].copy_(A)
        copy_scaled(self.B[slot, : A.shape[0]], B.T, scale)

    def one(self, slot: int, rank: int) -> Factors:
        return self.A[slot : slot + 1, :rank].mT, self.B[slot : slot + 1, :rank]

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        # As a batch of one matrix, which is how one row comes: a view would take a third of a product's time.
        A, B = factors
        shape = x.shape
        is_one = len(shape) == 3 and shape[0] == 1
        if not is_one:
            x = x.reshape(1, -1, shape[-1])
        if x.shape[1] >= MANY_ROWS or base.dtype.itemsize < 4:
            t = torch.bmm(A.mT, x.mT).mT  # has the longer side where kernels are faster
        else:
            t = torch.bmm(x, A)
        if self._is_free(base):
            (base if is_one else base.view(1, -1, self.out)).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)

    def add_rows(self, base: Tensor, x: Tensor, rows: Rows) -> Tensor:
        # Beams, and tokens of a row, lie together: they are one row of the routing with more positions.
        x = x.reshape(rows.count, -1, x.shape[-1])
        groups = rows.groups(positions=x.shape[1])
        A, B = rows.factors(self, base.dtype, groups)
        if groups is not None:
            update = torch.bmm(torch.bmm(groups.gathered(x), A.transpose(1, 2)), B)
            update = groups.scattered(update).view(base.shape)
            return base.add_(update) if self._is_free(base) else base + update
        if 1 < x.shape[1] < FEW_POSITIONS:
            t = torch.bmm(x, A.mT)
        else:  # reads A as it lies: for one position, a matrix times a vector
            t = torch.bmm(A, x.mT).mT
        if self._is_free(base):
            base.view(rows.count, -1, self.out).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)


class EmbeddingCell(Cell, serves=EmbeddingLoRA):
    """nn.Embedding. A lies as the base's table does: (vocabulary, rank)."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        size: int = self.geometry.shapes(self.module, rank)[0][1]
        return (size, rank), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() > 0

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        self.A[slot, :, : A.shape[0]].copy_(A.T)
        copy_scaled(self.B[slot, : A.shape[0]], B.T, scale)

    def one(self, slot: int, rank: int) -> Factors:
        return self.A[slot, :, :rank], self.B[slot, :rank]

    def many(self, index: Tensor, rank: int, copies: Copies) -> Factors:
        return (copies.of(self.B[:, :rank], index),)  # of A only the rows that are looked up are read

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        A, B = factors
        return base + self._scaled(F.embedding(x, A) @ B)

    def add_rows(self, base: Tensor, x: Tensor, rows: Rows) -> Tensor:
        (B,) = rows.factors(self, base.dtype)
        ids = x.reshape(rows.count, -1)
        found = self.A[rows.index[:, None], ids, : B.shape[1]].to(B.dtype)  # (rows, positions, rank)
        return base + self._scaled(torch.bmm(found, B)).view(base.shape)

    def _scaled(self, update: Tensor) -> Tensor:
        factor = getattr(self.module, "embed_scale", None)
        return update if factor is None else (update * factor).to(update.dtype)

    def _whole(self, slot: int) -> tuple[Tensor, Tensor]:
        return self.A[slot].T, self.B[slot]


class ConvCell(Cell, serves=ConvLoRA):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d. B, which is grouped as the base is, lies as a full matrix."""

    module: Any

    def __init__(self, name: str, module: nn.Module, routes: Routes) -> None:
        super().__init__(name, module, routes)
        self.channels_last = len(self.module.kernel_size)  # type: ignore[misc]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        return (rank, self.module.in_channels, *self.module.kernel_size), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() == len(self.module.kernel_size) + 2

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        rank, groups = A.shape[0], self.module.groups
        self.A[slot, :rank].copy_(A)
        wide, tall = rank // groups, self.out // groups
        for group in range(groups):
            inner = slice(group * wide, (group + 1) * wide)
            outer = slice(group * tall, (group + 1) * tall)
            copy_scaled(self.B[slot, inner, outer], B[outer].flatten(1).T, scale)

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        A, B = factors
        h = self._convolved(x if self.is_batched(x) else x[None], A)
        return base + torch.einsum("nr...,ro->no...", h, B).view(base.shape)

    def add_rows(self, base: Tensor, x: Tensor, rows: Rows) -> Tensor:
        A, B = rows.factors(self, base.dtype)
        # The rows side by side, as groups of channels of one image: each group is convolved with its own A.
        side = x.reshape(rows.count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        h = self._convolved(side, A.flatten(0, 1), groups=rows.count)
        h = h.unflatten(1, (rows.count, -1)).transpose(0, 1)  # (rows, each, rank, *size)
        return base + torch.einsum("ner...,nro->neo...", h, B).reshape(base.shape)

    def _convolved(self, x: Tensor, A: Tensor, groups: int = 1) -> Tensor:
        module, padding = self.module, self.module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        h: Tensor = self.geometry.lora_convolve(x, A, None, module.stride, padding, module.dilation, groups)
        return h


def cell_kind(module: nn.Module, name: str) -> type[Cell]:
    """Which cell serves `module`. Raises TargetError where none does."""
    geometry: Any = geometry_of(type(module))
    served = next((parent for parent in geometry.__mro__ if parent in Cell.kinds), None)
    # A geometry that computes its update in another way than the one that it derives from is another one.
    if served is None or geometry.update is not served.update:
        raise TargetError(f"{name!r}: a {type(module).__name__} cannot be served by a bank.")
    return Cell.kinds[served]


def copy_scaled(to: Tensor, values: Tensor, scale: float) -> None:
    """scale * values, in the wider of the two precisions, rounded once."""
    if scale == 1:
        to.copy_(values)
    elif values.device == to.device:
        torch.mul(values, scale, out=to) if values.dtype.itemsize >= to.dtype.itemsize else to.copy_(values).mul_(scale)
    else:
        to.copy_(values.to(to.device, torch.promote_types(values.dtype, to.dtype)) * scale)
