"""What a finished run leaves in its folder for people and programs: results.json, adapter/, loss.png."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.json"
METRICS = "metrics.csv"
CONFIG = "config.yaml"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` whole or not at all. JSON has no NaN and no infinity: they become null."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


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


def shown(path: Path) -> str:
    """`path` as a reader types it: relative to this folder where it lies below it."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def metrics_of(trainer: Any) -> dict[str, float]:
    """The metrics that `trainer` logged last, as plain numbers, without those of training."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if not name.startswith("train_")}
