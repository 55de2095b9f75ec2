"""What an inspection found, layer by layer, as data and as a table."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.engine.low_rank import effective_rank, quarter_shares, stable_rank
from lightning_lora.engine.report import aligned
from lightning_lora.page import number


@dataclass(frozen=True)
class AgainstBase:
    """One update beside the weight W that it changes."""

    norm: float
    """||W||, a Frobenius norm, as all norms here."""
    strength: float
    """||U^T W V||, where U and V are the directions of the update: how strong the base is along them."""
    by_chance: float
    """What `strength` would be along as many random directions: r ||W|| / sqrt(out * in)."""
    kept: float
    """The share of the update that is left when W + dW is rounded to the precision of W; 1 where that has 32 bits."""
    intruders: int | None
    """How many of the ten first singular vectors of W + dW resemble none of W's (arXiv:2410.21228); None where they
    were not counted."""


@dataclass(frozen=True)
class AgainstOther:
    """One update beside the other adapter's update of the same layer."""

    cosine: float
    """The cosine between the two updates as vectors: 1 the same direction, 0 unrelated, -1 opposite."""
    inputs: tuple[float, ...]
    """phi(i, i) for the i first directions that both read (arXiv:2106.09685, section 7.2), i from 1 on."""
    outputs: tuple[float, ...]
    """The same for the directions that both write."""


@dataclass(frozen=True)
class InspectedLayer:
    """The update dW = s B A of one layer, or of one parameter."""

    shape: tuple[int, int]
    """(out, in), as the matrix to which B A is added."""
    rank: int
    scale: float
    singular_values: tuple[float, ...]
    """Those of dW, the largest first."""
    base: AgainstBase | None = None
    other: AgainstOther | None = None

    @property
    def _S(self) -> Tensor:
        return torch.tensor(self.singular_values, dtype=torch.float64)

    @property
    def norm(self) -> float:
        """||dW||."""
        return float(self._S.norm())

    @property
    def effective_rank(self) -> float:
        """How many directions the update uses (`lightning_lora.engine.effective_rank`)."""
        return effective_rank(self._S)

    @property
    def stable_rank(self) -> float:
        """The same, counting only large ones (`lightning_lora.engine.stable_rank`)."""
        return stable_rank(self._S)

    @property
    def energy_top_quarter(self) -> float:
        """The share of ||dW||^2 in the largest quarter of the directions."""
        return float(quarter_shares(self._S)[0])

    @property
    def energy_last_quarter(self) -> float:
        """The share of ||dW||^2 in the smallest quarter of the directions."""
        return float(quarter_shares(self._S)[1])

    @property
    def relative_norm(self) -> float | None:
        """||dW|| / ||W||; None without a base."""
        return self.norm / self.base.norm if self.base is not None and self.base.norm else None

    @property
    def amplification(self) -> float | None:
        """||dW|| / ||U^T W V||: how much stronger the update is than the base along the update's own directions (Hu et
        al. 2021, arXiv:2106.09685, section 7.3); None without a base, and for an update of zero."""
        return self.norm / self.base.strength if self.norm and self.base is not None and self.base.strength else None

    @property
    def alignment(self) -> float | None:
        """How much stronger the base is along the update's directions than along random ones; None as above."""
        return self.base.strength / self.base.by_chance if self.norm and self.base and self.base.by_chance else None


Column = tuple[str, Callable[[InspectedLayer], float | None]]
"""The name of a number, and how to get it of a layer."""

COLUMNS: tuple[Column, ...] = (
    ("effective rank", lambda layer: layer.effective_rank),
    ("stable rank", lambda layer: layer.stable_rank),
    ("in top 1/4", lambda layer: layer.energy_top_quarter),
    ("in last 1/4", lambda layer: layer.energy_last_quarter),
    ("|dW|", lambda layer: layer.norm),
    ("|dW| / |W|", lambda layer: layer.relative_norm),
    ("amplification", lambda layer: layer.amplification),
    ("alignment", lambda layer: layer.alignment),
    ("kept", lambda layer: None if layer.base is None else layer.base.kept),
    ("intruders", lambda layer: None if layer.base is None else layer.base.intruders),
    ("cosine", lambda layer: None if layer.other is None else layer.other.cosine),
    ("shared inputs", lambda layer: None if layer.other is None else layer.other.inputs[-1]),
    ("shared outputs", lambda layer: None if layer.other is None else layer.other.outputs[-1]),
)


@dataclass(frozen=True)
class Inspection:
    """What `inspect_adapter` found. `str()` is a table, one row for the layers of one kind: the median of each number
    (smallest to largest)."""

    adapter: str
    other: str | None
    base: str | None
    layers: Mapping[str, InspectedLayer]
    """By the name of the module, in the order of the layers."""
    odd: tuple[str, ...]
    """What a reader should look at: updates that are zero, directions that are not used, rounding that swallows."""
    notes: tuple[str, ...]
    """What was not looked at."""
    dtype: str | None = None
    """The precision of the base's weights."""
    folder: Path | None = None
    """Where the adapter lies; None for a model that holds it."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The numbers that at least one layer has."""
        return tuple(c for c in COLUMNS if any(c[1](layer) is not None for layer in self.layers.values()))

    @property
    def kinds(self) -> dict[str, dict[int | None, str]]:
        """The layers by their kind: the name with "*" for the first number in it -> that number -> the whole name."""
        found: dict[str, dict[int | None, str]] = {}
        for name in self.layers:
            numbered = re.search(r"(?<![^.])\d+(?![^.])", name)
            kind = name if numbered is None else f"{name[: numbered.start()]}*{name[numbered.end() :]}"
            found.setdefault(kind, {})[None if numbered is None else int(numbered[0])] = name
        return found

    def __repr__(self) -> str:
        return f"InspectionReport({self.adapter!r}, {len(self.layers)} layers, {len(self.odd)} oddities)"

    def __str__(self) -> str:
        compared = "" if self.other is None else f" beside {self.other}"
        lines = [f"{self.adapter}{compared}{'' if self.base is None else f', on {self.base}'}"]
        for columns in (COLUMNS[:5], COLUMNS[5:10], COLUMNS[10:]):
            lines += self._table([column for column in columns if column in self.columns])
        lines += [f"odd: {text}" for text in self.odd] or ["nothing odd was found"]
        return "\n".join([*lines, *(f"note: {text}" for text in self.notes)])

    def _table(self, columns: Sequence[Column]) -> list[str]:
        if not columns:
            return []
        names = short_names(list(self.kinds))
        rows = [["layer", "number", "rank", *(name for name, _ in columns)]]
        for kind, members in self.kinds.items():
            own = [self.layers[name] for name in members.values()]
            ranks = sorted({layer.rank for layer in own})
            cells = [names[kind], str(len(own)), f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"]
            rows.append([*cells, *(spread([of(layer) for layer in own]) for _, of in columns)])
        return [*aligned(rows, right=range(1, len(rows[0]))), ""]


def spread(values: Sequence[float | None]) -> str:
    """The median of `values`, with the smallest and the largest."""
    found = sorted(value for value in values if value is not None and math.isfinite(value))
    if not found:
        return "-"
    low, middle, high = (number(v, digits=2) for v in (found[0], statistics.median(found), found[-1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """The shortest ending by which each of the dotted `kinds` is told from the others."""
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (e for e in endings if sum(f".{other}".endswith(f".{e}") for other in kinds) == 1 and e != "*")
        short[kind] = next(alone, kind) or "(root)"
    return short
