"""The result of `advise`: what was measured, what is recommended, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.report import aligned
from lightning_lora.training.trials import Candidate, Cut, mean


@dataclass(frozen=True)
class Advice:
    """What `advise` measured, and what it recommends; `str()` gives tables and sentences."""

    config: LoRAConfig
    """What to adapt, and how."""
    lr: float
    """The learning rate of the module's optimizer."""
    lora_plus_ratio: float | None
    candidates: tuple[Candidate, ...]
    """All that were trained."""
    cuts: tuple[tuple[Cut, ...], ...]
    """The trained adapter cut by SVD: for each cut, one measurement for each seed."""
    whole: tuple[float, ...]
    """The metric of that adapter before it was cut, for each seed."""
    base: float
    """The metric of the bare base."""
    spread: float | None
    """The largest metric less the smallest, over the seeds of the best candidate (at least 0.1 % of it); None if it has
    one seed."""
    monitor: str
    mode: str
    """"min" or "max": which values of the metric are the best."""
    steps: int
    """Optimizer steps of the longest trainings."""
    own_rate: float
    """The learning rate that the module's optimizer has by itself."""
    recommended: tuple[str, ...]
    unknown: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each candidate, the longest trained and best first: a table for people and programs."""
        return [
            {
                "adapter": c.name,
                "rank": c.config.rank,
                "learning rate": c.lr,
                "trained parameters": c.parameters,
                "steps": c.steps,
                "seeds": len(c.values()),
                self.monitor: c.mean,
                "spread": c.spread,
            }
            for c in self.candidates
            if c.values()
        ]

    def cut_rows(self) -> list[dict[str, Any]]:
        """One row for each cut of the trained adapter, and how its metric changes, in percent of that before."""
        before = mean(self.whole)
        return [
            {
                "cut to": of_seeds[0].name,
                "mean rank": mean([cut.rank for cut in of_seeds]),
                "parameters": of_seeds[0].parameters,
                self.monitor: (after := mean([cut.value for cut in of_seeds])),
                "change %": 100 * (after - before) / abs(before) if before else math.nan,
            }
            for of_seeds in self.cuts
        ]

    def __str__(self) -> str:
        blocks = [_table(self.rows())]
        if self.cuts:
            blocks.append("The best adapter, cut by SVD after its training:\n\n" + _table(self.cut_rows()))
        blocks.append("\n".join(self.recommended))
        blocks.append("Not known:\n" + "\n".join(f"- {line}" for line in self.unknown))
        return "\n\n".join(blocks)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(rows[0]) if rows else []

    def written(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [[written(row[column]) for column in columns] for row in rows]
    return "\n".join(aligned([columns, *cells], right=range(1, len(columns))))
