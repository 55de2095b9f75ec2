"""Gives a pair another rank: how far it is cut, what that loses, and the report of it, for a model and for a folder.

A cut is the best approximation of B A of its rank (Eckart and Young 1936), by QR and SVD of the factors (low_rank.py):
the product is never formed. A and B share the singular values evenly. The scale of a pair stays, so alpha follows the
rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.checked import number, share, whole
from lightning_lora.engine.config import scale_of
from lightning_lora.engine.low_rank import (
    block_singular_values,
    product_change,
    product_norm,
    rank_for,
    spectrum_of_product,
)
from lightning_lora.engine.report import aligned, by_ending, overall_error
from lightning_lora.errors import ConfigError, listed


@dataclass(frozen=True)
class Aim:
    """How far to resize: to one rank, or each pair to the smallest rank that leaves out at most a share of its norm."""

    rank: int | None
    tolerance: float = 0.0
    """The share of the Frobenius norm of an update that may be left out, if there is no `rank`."""
    limit: float | None = None
    """The largest relative error that is allowed once the factors are rounded; None if any is."""
    said: str = ""
    """The aim in words."""

    @classmethod
    def of(cls, rank: int | None, energy: float | None, max_error: float | None) -> Aim:
        """The aim that one of these arguments gives. Raises ConfigError unless it is one, and valid."""
        given = {"rank": rank, "energy": energy, "max_error": max_error}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ConfigError(f"Give one of rank, energy and max_error; {' and '.join(names) or 'none'} was given.")
        if rank is not None:
            return cls(whole("rank", rank), said=f"rank {rank}")
        if energy is not None:
            kept = share("energy", energy)
            return cls(None, max(math.sqrt(1 - kept), _ROUNDING), said=f"{100 * kept:g} % of each update's energy")
        limit = number("max_error", max_error, least=0, why="it is a relative error, such as 0.01")
        return cls(None, max(limit, _ROUNDING), limit=limit, said=f"an error of at most {limit:g} in each update")

    def rank_in(self, A: Tensor, B: Tensor) -> int:
        """The rank for one block of A (n, r, in) and B (n, out, r), where no `rank` is given."""
        return min(A.shape[-2], rank_for(block_singular_values(B, A), self.tolerance))


_ROUNDING = 1e-13
"""Singular values that are smaller than this share of the norm are taken for the rounding of zeros."""


@dataclass(frozen=True)
class Resized:
    """A pair with another rank, as blocks: A (n, r', in) and B (n, out, r'); and the old ones, with r ranks."""

    A: Tensor
    B: Tensor
    old_A: Tensor  # noqa: N815
    old_B: Tensor  # noqa: N815

    @property
    def error(self) -> float:
        """||B A - B' A'||_F relative to ||B A||_F, with the rounding of what is stored; 0 if B A is just rounding."""
        size = product_norm(self.old_B, self.old_A)
        # Factors that are not zero may cancel, as those of an untrained "orthogonal" start do.
        eps = min(torch.finfo(t.dtype).eps for t in (self.old_A, self.old_B, torch.empty(0, dtype=torch.float32)))
        if size <= eps * float(self.old_A.double().norm() * self.old_B.double().norm()):
            return 0.0
        return product_change(self.old_B, self.old_A, self.B, self.A) / size

    def to(self, dtype_A: torch.dtype, dtype_B: torch.dtype) -> Resized:
        """The same, stored in these dtypes."""
        return Resized(self.A.to(dtype_A), self.B.to(dtype_B), self.old_A, self.old_B)


def resized(A: Tensor, B: Tensor, rank: int) -> Resized:
    """A and B with `rank` ranks in each block: padded with zeros, exactly; as they are; or cut, in float64.

    A block that has fewer ranks than are kept gets zeros in B, and in A directions of the size that A's rows had: they
    change nothing, and can learn when the pair is trained further."""
    missing = rank - A.shape[-2]
    if missing >= 0 or not bool(A.any()) or not bool(B.any()):  # a product of zeros loses nothing where it is sliced
        return Resized(F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)), A, B)
    spectrum = spectrum_of_product(B.double(), A.double())
    found = spectrum.cut(rank)
    S = spectrum.S[..., :rank]
    is_empty = _ROUNDING * spectrum.S.amax() >= S
    row = A.double().square().sum(-1).mean(-1, keepdim=True).sqrt()[..., None]  # (n, 1, 1)
    new_A = torch.where(is_empty[..., None], row * spectrum.Vh[..., :rank, :], found.A)
    new_B = torch.where(is_empty[..., None, :], 0.0, found.B)
    short = rank - S.shape[-1]  # the weight has a smaller side
    return Resized(F.pad(new_A, (0, 0, 0, short)), F.pad(new_B, (0, short)), A, B)


def in_each_block(rank: int, name: str, A: Tensor, B: Tensor, old: int) -> int:
    """The ranks in each block of a pair, of rank `old`, if it gets the rank `rank`. Raises ConfigError where the groups
    of a convolution cannot share them."""
    groups = 1 if A.shape[0] > old else old // B.shape[1]
    if rank % groups:
        raise ConfigError(
            f"rank={rank} is no multiple of {groups}, the groups of the convolution {name!r}. Choose another rank; or "
            "energy or max_error, which choose one for each layer."
        )
    return rank // groups


def together(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name of the group of pairs that have to keep one rank: the packed projections of an attention and its
    out_proj, which PEFT adapts as one; and one matrix of all experts of a layer, which servers stack."""
    names = set(names)
    groups = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        one = f"{parent}.in_proj_weight".lstrip(".")
        packed = last == "out_proj" and (parent if parent in names else one if one in names else None)
        groups[name] = packed or re.sub(r"((?:^|\.)experts)\.\d+\.", r"\1.*.", name)
    return groups


def alpha_for(scale: float, rank: int, *, rank_stabilised: bool) -> float:
    """The alpha with which a pair of this rank has this scale."""
    near = scale * (math.sqrt(rank) if rank_stabilised else rank)
    close = (float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((a for a in close if a and scale_of(a, rank, rank_stabilised=rank_stabilised) == scale), near)


# What was done, as data and as a table.


@dataclass(frozen=True)
class ResizedModule:
    """One pair that was resized."""

    rank_before: int
    rank: int
    error: float
    """Frobenius norm of the change of the update, relative to the update, rounding included. For DoRA with its base at
    hand: of the change of the adapted weight, relative to what the adapter changes in the weight."""
    size: float
    """Frobenius norm of the update; for DoRA with its base at hand, of what the adapter changes in the weight."""
    parameters_before: int
    """The number of elements of A and B."""
    parameters: int


@dataclass(frozen=True)
class ResizeReport:
    """What a resize did; `str()` is an aligned table with totals.

    >>> from lightning_lora.engine.cut import ResizedModule, ResizeReport
    >>> print(ResizeReport({"q": ResizedModule(8, 4, 0.02, 1.0, 160, 80)}, "rank 4"))
    resized to rank 4
    module  number  rank    largest error
    ------  ------  ------  -------------
    q            1  8 -> 4           0.02
    1 module; 160 -> 80 parameters; error: 0.02 of the update
    """

    modules: Mapping[str, ResizedModule]
    """The pairs, by the names of their modules."""
    aim: str
    """What was asked for, in words."""
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Frobenius norm of the errors of all modules together, relative to the updates."""
        return overall_error((m.error, m.size) for m in self.modules.values())

    @property
    def largest_error(self) -> float:
        """The error of the module with the largest error."""
        return max((m.error for m in self.modules.values()), default=0.0)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each pair, by name."""
        return {name: m.rank for name, m in self.modules.items()}

    def __repr__(self) -> str:
        return f"ResizeReport({self.aim!r}, {len(self.modules)} modules, error {self.error:.2g})"

    def __str__(self) -> str:
        head = ("module", "number", "rank", "largest error")
        lines = [f"resized to {self.aim}", *aligned([head, *self._rows()], right=(1, 3))]
        count = len(self.modules)
        before, after = (sum(getattr(m, n) for m in self.modules.values()) for n in ("parameters_before", "parameters"))
        error = f"{shown_error(self.error)} of the update" if self.largest_error else "none"
        lines.append(f"{count} module{'' if count == 1 else 's'}; {before:,} -> {after:,} parameters; error: {error}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _rows(self) -> list[tuple[str, ...]]:
        """One row for all modules whose names end alike and that had one rank."""
        rows: list[tuple[str, ...]] = []
        for (ending, before), members in by_ending(self.modules.items(), lambda m: m.rank_before).items():
            low, high = (end(m.rank for m in members) for end in (min, max))
            rank = f"{before} -> {low}" if low == high else f"{before} -> {low} to {high}"
            rows.append((ending, str(len(members)), rank, shown_error(max(m.error for m in members))))
        return rows


def shown_error(error: float) -> str:
    """`error` as a text; "none" where it is as small as the rounding of float64."""
    return f"{error:.2g}" if error > 1e-14 else "none"


def check_limit(aim: Aim, modules: Mapping[str, ResizedModule], how: str) -> None:
    """Raise ConfigError, which says `how` to go on, where rounding makes an error larger than was allowed, and where
    the new factors are too large for their dtype."""
    if broken := [name for name, m in modules.items() if not math.isfinite(m.error)]:
        raise ConfigError(
            f"The factors of {listed(map(repr, broken), 3)} would hold values that are not finite: they are too large "
            "for their dtype. Take float32 or bfloat16. Nothing was changed."
        )
    over = {} if aim.limit is None else {n: m.error for n, m in modules.items() if m.error > aim.limit * (1 + 1e-9)}
    over = {name: error for name, error in over.items() if error > _ROUNDING}
    if over:
        worst = max(over, key=over.__getitem__)
        raise ConfigError(
            f"max_error={aim.limit:g} cannot be kept: stored in the precision of its factors, the update of {worst!r} "
            f"is off by {over[worst]:.2g}. {how} Nothing was changed."
        )
