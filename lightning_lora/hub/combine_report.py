"""What a combination did, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.engine.report import aligned


@dataclass(frozen=True)
class CombinedModule:
    """One module of the combination, as it was written."""

    ranks: tuple[int | None, ...]
    """Of the adapters, in their order; None where one does not adapt the module."""
    rank: int
    norm: float
    """Frobenius norm of the combination before it was cut to `rank` and rounded."""
    error: float
    """What was cut off and rounded, relative to `norm`. Exact but for the rounding, which is added on top of it."""


@dataclass(frozen=True)
class CombineReport:
    """What `combine_adapters` did; `str()` is an aligned table with totals."""

    folder: Path
    method: str
    """With its settings."""
    adapters: tuple[tuple[str, float], ...]
    """What each is called, and its weight."""
    modules: Mapping[str, CombinedModule]
    alpha: float
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Frobenius norm of the errors of all modules together, relative to the combination."""
        whole = math.fsum(m.norm**2 for m in self.modules.values())
        return math.sqrt(math.fsum((m.error * m.norm) ** 2 for m in self.modules.values()) / whole) if whole else 0.0

    @property
    def largest_error(self) -> float:
        """That of the module with the largest."""
        return max(m.error for m in self.modules.values())

    def __repr__(self) -> str:
        done = f"{self.method}, {len(self.modules)} modules, error {shown_error(self.error)}"
        return f"CombineReport({str(self.folder)!r}, {done})"

    def __str__(self) -> str:
        width = max(len(f"{weight:g}") for _, weight in self.adapters)
        lines = [f"combined by {self.method}", *(f"  {weight:>{width}g} x {name}" for name, weight in self.adapters)]
        head = ("module", "number", "ranks", "rank", "largest error")
        lines += aligned([head, *self._rows()], right=(1, 3, 4))
        count = len(self.modules)
        lines.append(f"{count} module{'' if count == 1 else 's'}; error: {shown_error(self.error)} of the combination")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _rows(self) -> list[tuple[str, ...]]:
        """One for all modules of one ending with the same ranks."""
        groups: dict[tuple[str, str, str], list[CombinedModule]] = {}
        for name, m in self.modules.items():
            ranks = " + ".join("-" if rank is None else str(rank) for rank in m.ranks)
            groups.setdefault((name.rpartition(".")[2] or "(root)", ranks, str(m.rank)), []).append(m)
        return [
            (ending, str(len(members)), ranks, rank, shown_error(max(m.error for m in members)))
            for (ending, ranks, rank), members in groups.items()
        ]


def shown_error(error: float) -> str:
    """`error` for a reader: what float64 itself loses is none."""
    return f"{error:.2g}" if error > 1e-14 else "none"
