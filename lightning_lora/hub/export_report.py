"""What an export did, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning_lora.engine.report import aligned
from lightning_lora.hub.lowering import Lowered


@dataclass(frozen=True)
class ExportReport:
    """What an export did; `str()` is a table and a line for each rewrite."""

    consumer: str
    folder: Path
    modules: Mapping[str, Lowered]
    """Empty where no tensor of a pair was touched (PEFT)."""
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    """What the user has to see to."""
    size_before: int = 0
    """Bytes of the file of tensors that was read."""
    size: int = 0
    """Bytes of the one that was written."""
    size_merged: int | None = None
    """Bytes of the base, and so of the merged model; None where they are not known."""

    @property
    def error(self) -> float:
        """Frobenius norm of the change of all updates together, relative to the updates."""
        whole = math.fsum(m.size**2 for m in self.modules.values())
        return math.sqrt(math.fsum((m.error * m.size) ** 2 for m in self.modules.values()) / whole) if whole else 0.0

    @property
    def largest_error(self) -> float:
        """That of the module with the largest."""
        return max((m.error for m in self.modules.values()), default=0.0)

    def __repr__(self) -> str:
        done = f"{len(self.modules)} modules, error {self.error:.2g}"
        return f"ExportReport({self.consumer!r}, {str(self.folder)!r}, {done})"

    def __str__(self) -> str:
        lines = [f"exported for {self.consumer}"]
        if self.modules:
            head = ("module", "number", "rank", "scale", "B times", "largest error")
            lines += aligned([head, *_rows(self.modules)], right=(1, 2, 3, 4, 5))
        lines += self.changes or ("nothing had to change",)
        if self.modules:
            worst = [m.worst for m in self.modules.values() if m.worst is not None]
            off = f", an output is off by at most {max(worst):.2g} of what the adapter can change" if worst else ""
            exact = "none: every product is bit for bit the same"
            lines.append(f"error: {f'{self.error:.2g} of the update{off}' if self.largest_error else exact}")
        lines.append(self._sizes())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _sizes(self) -> str:
        line = f"size: {_megabytes(self.size)}, before {_megabytes(self.size_before)}"
        if self.size < 1.5 * self.size_before:
            return line
        merged = "no more than its base" if self.size_merged is None else _megabytes(self.size_merged)
        return f"{line}; merged into its base (lightning-lora merge) it is {merged}, and nothing beside"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"


def _rows(modules: Mapping[str, Lowered]) -> list[tuple[str, ...]]:
    """One for all modules of one ending that were treated alike."""
    groups: dict[tuple[str, ...], list[Lowered]] = {}
    for name, m in modules.items():
        rank = str(m.rank) if m.rank == m.rank_before or m.added else f"{m.rank_before} -> {m.rank}"
        scale = "zeros added" if m.added else f"{m.scale:g}" if m.worst is None else "DoRA"
        groups.setdefault((name.rpartition(".")[2] or "(root)", rank, scale, f"{m.factor:.6g}"), []).append(m)
    return [
        (ending, str(len(members)), rank, scale, factor, f"{max(m.error for m in members):.2g}")
        for (ending, rank, scale, factor), members in groups.items()
    ]
