"""Measure an adapter, or the bare base, on validation or test data.

lightning-lora evaluate run=runs/train/2025-01-31_12-00-00     a run's adapter on the data of that run
lightning-lora evaluate run=RUN data=text data.source.path=other.txt
lightning-lora evaluate adapter=FOLDER model=pretrained model.name=ID data=text data.source.path=notes.txt
lightning-lora evaluate adapter=null                           the bare base
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_lora.cli.composition import ADAPTER_MISSING
from lightning_lora.cli.results import metrics_of, shown, table, write_json
from lightning_lora.cli.settings import Applied


@dataclass(frozen=True)
class Settings(Applied):
    """The settings of a command that applies an adapter to data, and its own."""

    adapter: str | None = field(metadata={"missing": ADAPTER_MISSING})
    ckpt_path: str | None
    split: Literal["validation", "test"]


def run(settings: dict[str, Any]) -> None:
    """Measure as `settings` say, print the metrics and write them to metrics.json in `run_dir`."""
    from lightning_lora.cli.runs import trained
    from lightning_lora.training.checkpoint_file import fetched

    trainer, task, data = trained(settings)
    measure = trainer.validate if settings["split"] == "validation" else trainer.test
    with fetched(settings["ckpt_path"]) as checkpoint:
        measure(task, data, ckpt_path=checkpoint, verbose=False)
    if not trainer.is_global_zero:
        return
    metrics = metrics_of(trainer)
    path = Path(settings["run_dir"]) / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)
    print(f"\n{table([{'metric': name, 'value': value} for name, value in sorted(metrics.items())])}")
    print(f"\nmetrics      {shown(path)}")
