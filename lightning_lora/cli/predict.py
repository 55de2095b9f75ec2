"""Write what a model with an adapter makes of each input, as lines of JSON.

lightning-lora predict run=runs/train/2025-01-31_12-00-00      a run's adapter on the data of that run
lightning-lora predict adapter=FOLDER model=pretrained model.name=ID data=text data.source.path=prompts.txt
lightning-lora predict adapter=null                            the bare base
lightning-lora predict adapter=FOLDER adapter_column=COLUMN    each row with the adapter in FOLDER that it names
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.cli.composition import ADAPTER_MISSING
from lightning_lora.cli.results import shown
from lightning_lora.cli.settings import Applied
from lightning_lora.errors import ConfigError

SHOWN, WIDTH = 3, 200
"""How many rows are shown, and how many characters of each of their values."""


@dataclass(frozen=True)
class Settings(Applied):
    """The settings of a command that applies an adapter to data, and its own."""

    adapter: str | None = field(metadata={"missing": ADAPTER_MISSING})
    adapter_column: str | None
    ckpt_path: str | None


def run(settings: dict[str, Any]) -> None:
    """Predict as `settings` say; writes predictions.jsonl to `run_dir`."""
    from lightning_lora.cli.runs import trained
    from lightning_lora.recipes.data.base import SourceData
    from lightning_lora.training.checkpoint_file import fetched

    column = settings["adapter_column"]
    if column is None:
        trainer, task, data = trained(settings)
    else:
        trainer, task, data = trained(settings, _each_by(column, settings))
        if isinstance(data, SourceData):
            data.adapter_column = column
    with fetched(settings["ckpt_path"]) as checkpoint:
        batches = trainer.predict(task, data, ckpt_path=checkpoint) or []
    # Each process predicts a share of the inputs.
    name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
    path = Path(settings["run_dir"]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    first: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for batch in batches:
            for row in rows(batch):
                line = json.dumps(row, ensure_ascii=False)
                file.write(line + "\n")
                count += 1
                if len(first) < SHOWN:
                    first.append(_short(row))
    if first and trainer.is_global_zero:
        print("\n" + "\n".join(first))
    print(f"\npredictions  {shown(path)} ({count:,} lines)")


def _short(row: Any) -> str:
    """`row` on one line. A long value loses its middle and keeps its end: the end of a prompt is the question."""
    values = row.values() if isinstance(row, dict) else [row]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    lines = [x if len(x) <= WIDTH else f"{x[: WIDTH // 4]} ... {x[-3 * WIDTH // 4 :]}" for x in lines]
    if not isinstance(row, dict):
        return lines[0]
    return "{" + ", ".join(f"{json.dumps(str(key))}: {line}" for key, line in zip(row, lines, strict=True)) + "}"


def _each_by(column: str, settings: dict[str, Any]) -> Any:
    from lightning_lora.training.adapter_column import AdapterColumn

    folder, inside = settings["adapter"], settings["subfolder"]
    if folder is None:
        raise ConfigError(f"adapter_column={column} needs adapter=FOLDER, the folder in which the adapters lie.")
    options = {name: settings[name] for name in ("check_base", "ignore_fields")}
    return AdapterColumn(Path(folder, inside or ""), column, **options)


def rows(batch: Any) -> Iterator[Any]:
    """One plain value for each input of what a `predict_step` returned: a list, a tensor, or a dict of these."""
    if isinstance(batch, dict):
        columns = {name: list(rows(column)) for name, column in batch.items()}
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
    elif hasattr(batch, "tolist"):
        plain = batch.tolist()
        yield from plain if isinstance(plain, list) else [plain]
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield item.tolist() if hasattr(item, "tolist") else item
    else:
        yield batch
