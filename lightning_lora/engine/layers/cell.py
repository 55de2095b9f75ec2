"""A cell is one layer's part of a bank: it holds the layer's factors for all slots, and adds updates to its output.

It holds views of the slab: A (slots, rank, in), and B (slots, rank, out), which is transposed so that both products
read contiguous memory. gain and shift (slots, out) are zero except for DoRA and a bias of B. B and shift include the
scale.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_lora.engine.forwards import begins_as_an_input
from lightning_lora.engine.layers.base import geometry_of, has_own_forward
from lightning_lora.engine.layers.dora import gains, output_norms
from lightning_lora.engine.swap import name_of_input
from lightning_lora.engine.weights import can_be_dense, dense, is_quantized
from lightning_lora.errors import AdapterFormatError, AdapterStateError, TargetError

_KEYS = itertools.count()

Factors = tuple[Tensor, ...]
Copied = Callable[[Tensor, Tensor], Tensor]
"""(slots, *shape), and the index of n slots -> (n, *shape), contiguous."""


@dataclass(frozen=True)
class LayerFactors:
    """One layer's part of an adapter, in the shapes that the layer's geometry gives to A and B."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    """DoRA's m, one number for each output."""
    bias: Tensor | None = None
    """The bias of B, one number for each output."""

    @property
    def is_affine(self) -> bool:
        """True if it also changes outputs by a gain (DoRA) or a shift (a bias of B)."""
        return self.magnitude is not None or self.bias is not None


class Hidden(NamedTuple):
    """Why the rows cannot be found in a layer's input, in words that follow the layer's name."""

    always: str | None = None
    where_flat: str | None = None
    """A reason that holds only for inputs with no dimensions but positions and features."""


NOT_HIDDEN = Hidden()


FEW_POSITIONS = 4
"""Rows are grouped by adapter for at most so many positions (tokens) a row, as in decoding. With more positions the
gather costs more than it saves."""


class Groups:
    """Groups rows by adapter; each group is padded to the size of the largest."""

    def __init__(self, index: Tensor, order: Tensor, back: Tensor) -> None:
        self.index = index
        """The slot of each group."""
        self._order, self._back = order, back

    @staticmethod
    def of(slots: list[int], device: torch.device) -> Groups | None:
        """The groups of rows that have these slots. None if each row has an adapter of its own, or if padding would
        cost more than grouping saves."""
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            members.setdefault(slot, []).append(row)
        longest = max(map(len, members.values()))
        if len(members) == len(slots) or len(members) * longest > 2 * len(slots):
            return None
        order: list[int] = []
        back = [0] * len(slots)
        for rows in members.values():
            for place, row in enumerate(rows):
                back[row] = len(order) + place
            order += rows + rows[:1] * (longest - len(rows))
        index, at, where = (torch.tensor(values, device=device) for values in (list(members), order, back))
        return Groups(index, at, where)

    def gathered(self, x: Tensor) -> Tensor:
        """(rows, positions, n) -> (groups, longest * positions, n)"""
        return x.index_select(0, self._order).view(len(self.index), -1, x.shape[-1])

    def scattered(self, update: Tensor) -> Tensor:
        """Undo `gathered`: (groups, longest * positions, n) -> (rows, positions, n)"""
        return update.view(len(self._order), -1, update.shape[-1]).index_select(0, self._back)


class OwnAdapters(Protocol):
    """What a cell asks of a batch in which each row has an adapter of its own."""

    count: int
    index: Tensor
    """The slot of each row."""

    def groups(self, positions: int) -> Groups | None:
        """The grouping of rows that have the same adapter, if it saves time for so many positions; else None."""

    def factors(self, cell: Cell, dtype: torch.dtype, groups: Groups | None = None) -> Factors:
        """A and B of each row, or of each group, as `cell.many` gives them."""


class Cell:
    """One layer's part of a bank."""

    kinds: ClassVar[dict[type, type[Cell]]] = {}
    """Geometry -> the class of cells that serves its layers."""
    A: Tensor
    B: Tensor
    gain: Tensor
    shift: Tensor
    hidden: Hidden = NOT_HIDDEN
    """Why the rows cannot be found in the layer's input, where the model's structure shows that."""
    served: Set[int] = frozenset()
    """The ids of all layers of the bank."""
    sequence_first: str | None = None
    """A module of the model that takes the sequence before the rows, where there is one."""

    def __init_subclass__(cls, serves: type) -> None:
        Cell.kinds[serves] = cls

    def __init__(self, name: str, module: nn.Module) -> None:
        geometry: Any = geometry_of(type(module))
        self.name, self.module, self.geometry = name, module, geometry
        cls: Any = type(module)
        self.base_class, self.input_name = cls, name_of_input(cls)
        self.groups: int = getattr(module, "groups", 1)
        self.out, _, *size = geometry.shapes(module, self.groups)[1]
        self._ones = (1,) * len(size)  # for each dimension of an output after the channels
        self._shapes_of_rank = functools.lru_cache(maxsize=64)(functools.partial(geometry.shapes, module))
        # A class's own forward may return a tensor that it keeps, or that autograd needs.
        self._may_write = not has_own_forward(type(module))
        self.computing: set[int] = set()
        """The threads in which the layer's own forward runs."""
        self.key = next(_KEYS)

    def __reduce__(self) -> Any:
        raise AdapterStateError(
            "A model that an AdapterBank serves cannot be copied or pickled: call bank.close() first."
        )

    # A class of cells overrides these. Factors come in the dtype of `base`.

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of A, B, gain and shift of one adapter in the slab."""
        raise NotImplementedError

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        """Write A and scale * B, in the geometry's shapes, into `slot`."""
        raise NotImplementedError

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """Add the update of one adapter, for all rows, to `base`, the layer's output for x."""
        raise NotImplementedError

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        """Add to `base`, the layer's output for x, the update of each row's own adapter."""
        raise NotImplementedError

    def is_batched(self, x: Tensor) -> bool:
        """True if x, the layer's input, has a first dimension that may count the rows."""
        return x.dim() > 1

    def has_rows_first(self, x: Tensor, count: int) -> bool:
        """True if the shape of x alone shows that its first dimension counts the `count` rows.

        False if another dimension has the same size and might count them. A single row needs no proof.
        """
        shape = x.shape
        if len(shape) < 2 or shape[0] != count:
            return False
        return count == 1 or (self.hidden is NOT_HIDDEN and count not in shape[1:-1])

    def hides(self, x: Tensor, is_indexed: bool) -> str | None:
        """Why the rows cannot be found in x, or None. `is_indexed`: the user has given the row of each position."""
        return self.hidden.always or (None if is_indexed or x.dim() > 2 else self.hidden.where_flat)

    def doubt(self, x: Tensor) -> str | None:
        """Why the first dimension of x may not count the rows, though it has their number; or None."""
        if x.shape[0] not in x.shape[1:-1]:
            return None
        if self.sequence_first is not None:
            return (
                f"the next dimension has the same size, and {self.sequence_first!r} takes the sequence first, "
                "so rows and positions cannot be told apart. Pad the batch to another length, or use one adapter for "
                "it."
            )
        if begins_as_an_input(x, self.module, self.served) is False:
            return "the model was called with it transposed, so its first dimension is not that of the rows."
        return None

    def one(self, slot: int, rank: int) -> Factors:
        """A and B of one adapter, in the shapes that `add_one` takes."""
        return self.A[slot, :rank], self.B[slot, :rank]

    def many(self, index: Tensor, rank: int, copied: Copied) -> Factors:
        """A and B of several adapters, copied from the slab, in the shapes that `add_rows` takes."""
        return copied(self.A[:, :rank], index), copied(self.B[:, :rank], index)

    # All cells share these.

    def problems(self, values: LayerFactors, max_rank: int) -> Iterator[str]:
        """The reasons why `values` do not fit the layer, in words."""
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
        """Write `values`, checked by `problems`, into `slot`, which holds zeros."""
        if values.bias is not None:
            copy_scaled(self.shift[slot], values.bias.flatten(), values.scale)
        if values.magnitude is None:
            self.store(slot, values.A, values.B, values.scale)
            return
        # DoRA (arXiv:2402.09353, equation 5) is g (W + s B A), g = m / ||W + s B A||. Stored: gain = g - 1, and g s B.
        A, B = (t.to(self.A.device, torch.float32) for t in (values.A, values.B))
        W = self._dense_weight(AdapterFormatError)
        change = self.geometry.from_matrix(self.module, values.scale * (B.flatten(1) @ A.flatten(1)))
        norms = output_norms(self.geometry, self.module, W + change)
        g = gains(values.magnitude.to(self.A.device, torch.float32).flatten(), norms)
        self.store(slot, A, B * g.view(-1, *(1,) * (B.dim() - 1)), values.scale)
        self.gain[slot].copy_(g - 1)

    def folded(self, slot: int) -> dict[str, nn.Parameter]:
        """The layer's parameters with the adapter added. Raises AdapterStateError if they cannot hold it."""
        if has_own_forward(self.base_class):
            raise AdapterStateError(
                f"{self.name!r} cannot be folded: a {self.base_class.__name__} has a forward of its own, which may use "
                "its weight in another way. Use the adapter unfolded, with bank.use."
            )
        own = self.module._parameters.get("weight")
        if own is not None and is_quantized(own):
            raise AdapterStateError(
                f"{self.name!r} cannot be folded: its weight is quantized, and would be rounded again. Use the adapter "
                "unfolded, with bank.use."
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
                    f"{self.name!r} cannot be folded: it has no bias to which the bias of B could be added. Use the "
                    "adapter unfolded, with bank.use."
                )
            folded["bias"] = (bias + self.shift[slot].float()).to(bias.dtype)
        return {name: nn.Parameter(value, requires_grad=False) for name, value in folded.items()}

    def affine(self, base: Tensor, at: int | Tensor) -> Tensor:
        """base + gain * (base - bias) + shift. `at` is one slot for all rows, or a tensor (rows,) of slots."""
        ones = self._ones
        bias = self.module._parameters.get("bias")
        linear = base if bias is None else base - bias.to(base.dtype).view(-1, *ones)
        gain, shift = (t[at].to(base.dtype) for t in (self.gain, self.shift))
        if gain.dim() == 1:
            return base + (gain.view(-1, *ones) * linear + shift.view(-1, *ones))
        linear = linear.reshape(gain.shape[0], -1, *linear.shape[1:])
        shape = (gain.shape[0], *(1,) * (linear.dim() - 2 - len(ones)), gain.shape[1], *ones)
        return base + (gain.view(shape) * linear + shift.view(shape)).view(base.shape)

    def _is_free(self, base: Tensor) -> bool:
        """True if the update may be added to `base` in place."""
        return self._may_write and base.is_contiguous() and not base.requires_grad

    def _dense_weight(self, error: type[Exception]) -> Tensor:
        """The layer's weight in floating point. Raises `error` if the weight cannot hold an adapter."""
        weight = self.module._parameters.get("weight")
        if weight is None or not can_be_dense(weight):
            raise error(f"{self.name!r} has a weight that cannot be dequantized: DoRA and folding need its numbers.")
        if getattr(self.module, "groups", 1) != 1:
            raise error(
                f"{self.name!r} is a convolution with groups: no weight of its shape can hold an adapter, so DoRA and "
                "folding are not possible."
            )
        return dense(self.module, weight).detach()

    def _whole(self, slot: int) -> tuple[Tensor, Tensor]:
        """A (rank, n) and B (rank, out) of one adapter."""
        return self.A[slot].flatten(1), self.B[slot]


def copy_scaled(to: Tensor, values: Tensor, scale: float) -> None:
    """Write scale * values into `to`, multiplied in the wider of the two dtypes and rounded once."""
    if scale == 1:
        to.copy_(values)
    elif values.device == to.device:
        torch.mul(values, scale, out=to) if values.dtype.itemsize >= to.dtype.itemsize else to.copy_(values).mul_(scale)
    else:
        to.copy_(values.to(to.device, torch.promote_types(values.dtype, to.dtype)) * scale)


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
