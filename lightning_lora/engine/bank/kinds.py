"""The classes of cells for the layers that a bank serves: linear layers, embeddings and convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.bank.cells import FEW_POSITIONS, Cell, Copied, Factors, OwnAdapters, copy_scaled
from lightning_lora.engine.bank.layout import NOT_HIDDEN
from lightning_lora.engine.forwards import begins_as_an_input
from lightning_lora.engine.layers import geometry_of
from lightning_lora.engine.layers.conv import ConvLoRA
from lightning_lora.engine.layers.embedding import EmbeddingLoRA
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.engine.torch_private import padded
from lightning_lora.errors import TargetError

MANY_ROWS = 16
"""With at least so many rows of x, and always in 16 bits, A x^T takes up to a third less time than x A^T."""


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
        # As a batch of one matrix, the shape of a single row: to view it otherwise takes a third of a product's time.
        A, B = factors
        shape = x.shape
        is_one = len(shape) == 3 and shape[0] == 1
        if not is_one:
            x = x.reshape(1, -1, shape[-1])
        if x.shape[1] >= MANY_ROWS or base.dtype.itemsize < 4:
            t = torch.bmm(A.mT, x.mT).mT  # the long side is last, where kernels are faster
        else:
            t = torch.bmm(x, A)
        if self._is_free(base):
            (base if is_one else base.view(1, -1, self.out)).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        # The beams and tokens of a row lie together: to the routing they are one row with more positions.
        x = x.reshape(rows.count, -1, x.shape[-1])
        groups = rows.groups(positions=x.shape[1])
        A, B = rows.factors(self, base.dtype, groups)
        if groups is not None:
            update = torch.bmm(torch.bmm(groups.gathered(x), A.transpose(1, 2)), B)
            update = groups.scattered(update).view(base.shape)
            return base.add_(update) if self._is_free(base) else base + update
        if 1 < x.shape[1] < FEW_POSITIONS:
            t = torch.bmm(x, A.mT)
        else:  # A is read as it is stored: for one position this is a matrix times a vector
            t = torch.bmm(A, x.mT).mT
        if self._is_free(base):
            base.view(rows.count, -1, self.out).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)


class EmbeddingCell(Cell, serves=EmbeddingLoRA):
    """nn.Embedding. A is stored transposed, as the base's table is: (vocabulary, rank)."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        size: int = self.geometry.shapes(self.module, rank)[0][1]
        return (size, rank), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() > 0

    def has_rows_first(self, x: Tensor, count: int) -> bool:
        shape = x.shape
        if not shape or shape[0] != count:
            return False
        return count == 1 or (self.hidden is NOT_HIDDEN and len(shape) > 1 and count not in shape[1:])

    def doubt(self, x: Tensor) -> str | None:
        # A learned table of positions gets (positions,), one of relative positions gets (positions, positions).
        is_clear = x.dim() > 1 and x.shape[0] not in x.shape[1:]
        if is_clear or begins_as_an_input(x, self.module, self.served):
            return None
        return (
            "a learned table of positions gets inputs of that shape, too, and the model was not called with this "
            "tensor itself. If it holds one entry for each row, say so with bank.rows_inside for this layer."
        )

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        self.A[slot, :, : A.shape[0]].copy_(A.T)
        copy_scaled(self.B[slot, : A.shape[0]], B.T, scale)

    def one(self, slot: int, rank: int) -> Factors:
        return self.A[slot, :, :rank], self.B[slot, :rank]

    def many(self, index: Tensor, rank: int, copied: Copied) -> Factors:
        return (copied(self.B[:, :rank], index),)  # add_rows reads only those rows of A that it looks up

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        A, B = factors
        return base + self._scaled(F.embedding(x, A) @ B)

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
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
    """nn.Conv1d, nn.Conv2d, nn.Conv3d. B is stored as a full matrix, with zeros between the base's groups."""

    module: Any

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.channels_last = len(self.module.kernel_size)  # type: ignore[misc]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        return (rank, self.module.in_channels, *self.module.kernel_size), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() == len(self.module.kernel_size) + 2

    def has_rows_first(self, x: Tensor, count: int) -> bool:
        return self.is_batched(x) and x.shape[0] == count and (count == 1 or self.hidden is NOT_HIDDEN)

    def hides(self, x: Tensor, is_indexed: bool) -> str | None:
        return self.hidden.always or (None if is_indexed else self.hidden.where_flat)

    def doubt(self, x: Tensor) -> str | None:
        return None

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

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        A, B = rows.factors(self, base.dtype)
        # The rows become groups of channels of one image, so that each is convolved with its own A.
        side = x.reshape(rows.count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        h = self._convolved(side, A.flatten(0, 1), groups=rows.count)
        h = h.unflatten(1, (rows.count, -1)).transpose(0, 1)  # (rows, each, rank, *size)
        return base + torch.einsum("ner...,nro->neo...", h, B).reshape(base.shape)

    def _convolved(self, x: Tensor, A: Tensor, groups: int = 1) -> Tensor:
        module = self.module
        x, padding = padded(module, x)
        h: Tensor = self.geometry.lora_convolve(x, A, None, module.stride, padding, module.dilation, groups)
        return h


def cell_kind(module: nn.Module, name: str) -> type[Cell]:
    """The class of cells that serves `module`. Raises TargetError if there is none."""
    geometry: Any = geometry_of(type(module))
    served = next((parent for parent in geometry.__mro__ if parent in Cell.kinds), None)
    # A subclass that overrides `update` computes something else than the cell does.
    if served is None or geometry.update is not served.update:
        raise TargetError(
            f"{name!r}: a {type(module).__name__} cannot be served by a bank. Leave it out with exclude_modules."
        )
    return Cell.kinds[served]
