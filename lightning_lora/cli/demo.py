"""Compare LoRA with full fine-tuning on the embedded model: a table and a picture, in under three minutes.

lightning-lora demo
lightning-lora demo trainer.max_steps=50        settings are those of lightning-lora train, for both methods
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig

from lightning_lora.cli.results import METRICS, read_metrics, shown, write_json
from lightning_lora.cli.schema import checked
from lightning_lora.cli.table import table
from lightning_lora.cli.train import Settings, train

__all__ = ["Settings", "run"]

METHODS = {"LoRA": "demo", "full fine-tuning": "demo_full"}
"""Row of the table -> the experiment in conf/ that makes it."""
METRIC = "val_perplexity"


def run(settings: dict[str, Any]) -> None:
    """Train by each method into a folder of its own below `run_dir`; print the table, write demo.json and demo.png."""
    folder = Path(settings["run_dir"])
    results: dict[str, dict[str, Any]] = {}
    for method, experiment in METHODS.items():
        print(f"\n{method}", flush=True)
        overrides = [*HydraConfig.get().overrides.task, f"experiment={experiment}", f"run_dir='{folder / experiment}'"]
        outcome = train(checked(compose("demo", overrides), Settings))
        if outcome is None:  # a process beside the first: it only helps to train
            return
        results[method] = outcome

    base = next(iter(results.values()))["before"][METRIC]
    rows: list[dict[str, Any]] = [{"method": "base, not trained", "trainable parameters": 0, METRIC: base}]
    for method, outcome in results.items():
        checkpoint = folder / METHODS[method] / outcome["best_checkpoint"]
        rows.append(
            {
                "method": method,
                "trainable parameters": outcome["trainable_parameters"],
                "checkpoint MB": round(checkpoint.stat().st_size / 1e6, 2),
                "seconds": round(outcome["seconds"], 1),
                METRIC: outcome["after"][METRIC],
            }
        )
    columns = ["method", "trainable parameters", "checkpoint MB", "seconds", METRIC]
    write_json(folder / "demo.json", {"rows": rows})
    picture = _picture(folder, base)
    print(
        f"\nPerplexity on Python source that was held back (the base learned documentation):\n\n{table(rows, columns)}"
    )
    print(f"\npicture      {shown(picture)}\nadapter      {shown(folder / METHODS['LoRA'] / 'adapter')}")


def _picture(folder: Path, base: float) -> Path:
    from lightning_lora.cli.plot import plot_comparison

    curves = {method: read_metrics(folder / name / METRICS)[METRIC] for method, name in METHODS.items()}
    path = folder / "demo.png"
    plot_comparison(
        curves,
        ("base, not trained", base),
        path,
        title="Learning the standard library's source",
        y="validation perplexity",
    )
    return path
