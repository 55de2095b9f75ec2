"""The results of a run, for people and programs: text tables, results.json and metrics.csv."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.files import written_beside
from lightning_lora.page import written

# Aligned text tables: numbers to the right, words to the left.


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """`rows` as lines of text under their `columns` (by default every key, in the order first seen)."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
    cells = [[written(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    right = [any(isinstance(row.get(c), (int, float)) for row in rows) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, cells)])


RESULTS = "results.json"
METRICS = "metrics.csv"
CONFIG = "config.yaml"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` whole or not at all. JSON has no NaN and no infinity: they become null."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in a metrics.csv: metric -> (step, value), in the order of logging, without values not logged."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(float(row["step"])), float(value)))
    return curves


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of the run in `folder`; none where it has no metrics.csv, or another program's."""
    try:
        return read_metrics(folder / METRICS)
    except (OSError, ValueError, KeyError):
        return {}


def shown(path: Path) -> str:
    """`path` as a user would type it: relative to the current folder if it lies below it."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def metrics_of(trainer: Any) -> dict[str, float]:
    """The metrics that `trainer` logged last, as plain numbers, without those of training."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if not name.startswith("train_")}
