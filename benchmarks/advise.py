"""`advise` beside an exhaustive sweep, on three small tasks: how good is what it recommends, and what does it cost?

    python benchmarks/advise.py

The embedded byte-level model learns the standard library's source, pirates' chats, and which package a docstring comes
from. The sweep trains every learning rate of advise's grid at ranks 4, 8, 16 and 32 in all linear layers and in the
attention layers alone, 56 trainings, by a plain Trainer on a model and data that are ready. What is advised is trained
in the same way, and so are it and the sweep's first with seeds that neither has seen. Time is the processor's: the
tasks run beside each other, each in its own process. A sweep changes only with the training: `--kept FOLDER` keeps its
trainings there, and reads those that are there.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from side_by_side import Report, Row, arguments, settings

from lightning_lora import LoRACallback, LoRAConfig, advise, remove
from lightning_lora.recipes.data import (
    InstructionData,
    StdlibDocstrings,
    StdlibSource,
    TextClassificationData,
    TextData,
    pirate_chats,
)
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import CausalLM, SequenceClassification
from lightning_lora.training.search import around

ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
RATE, STEPS, RANKS = 1e-3, 40, (4, 8, 16, 32)
FRESH, FIRST = (101, 102, 103, 104), 3
"""The seeds that neither the sweep nor advise has seen, and how many of the sweep's best are judged by them."""
BASE = ModelSource("embedded")
OPTIMIZER = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0)
TRAINER = partial(Trainer, accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, limit_val_batches=12)

Task = Callable[[], tuple[LightningModule, LightningDataModule]]


def text() -> tuple[LightningModule, LightningDataModule]:
    source = StdlibSource(max_characters=300_000)
    return CausalLM(BASE, OPTIMIZER), TextData(tokenizer=BASE, source=source, block_size=96, batch_size=2)


def chats() -> tuple[LightningModule, LightningDataModule]:
    data = InstructionData(tokenizer=BASE, source=pirate_chats(), max_length=96, packing=False, batch_size=2)
    return CausalLM(BASE, OPTIMIZER), data


def docstrings() -> tuple[LightningModule, LightningDataModule]:
    data = TextClassificationData(
        tokenizer=BASE, source=StdlibDocstrings(), text_column="text", label_column="label", max_length=48, batch_size=4
    )
    return SequenceClassification(BASE, OPTIMIZER), data


TASKS: dict[str, Task] = {"the standard library's source": text, "chats": chats, "docstrings' packages": docstrings}


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "inference_mode": False,
}


class Trainings:
    """Trainings of one task by a plain Trainer, which is how the sweep trains and how advice is judged.

    With a `path`, what was trained before is read from there, and what is trained is added.
    """

    def __init__(self, task: LightningModule, data: LightningDataModule, steps: int, path: Path | None = None) -> None:
        self.task, self.data, self.steps, self.path = task, data, steps, path
        self.seconds: dict[str, float] = {}
        """Name and seed of a training -> its processor time."""
        self._losses: dict[str, float] = {}
        if path is not None and path.exists():
            self._losses, self.seconds = json.loads(path.read_text())

    def loss(self, config: LoRAConfig, rate: float, lora_plus_ratio: float | None = None, seed: int = 0) -> float:
        """The validation loss after a training."""
        key = f"{named(config, rate, lora_plus_ratio)}, seed {seed}"
        if key not in self._losses:
            began = time.process_time()
            self._losses[key] = self._trained(config, rate, lora_plus_ratio, seed)
            self.seconds[key] = time.process_time() - began
            if self.path is not None:
                self.path.write_text(json.dumps([self._losses, self.seconds], indent=1))
        return self._losses[key]

    def _trained(self, config: LoRAConfig, rate: float, lora_plus_ratio: float | None, seed: int) -> float:
        seed_everything(seed, verbose=False)
        task: Any = self.task
        task.learning_rate = rate
        trainer = TRAINER(
            max_epochs=-1,
            max_steps=self.steps,
            callbacks=[LoRACallback(config, lora_plus_ratio=lora_plus_ratio, save_adapter=False)],
            check_val_every_n_epoch=None,
            val_check_interval=self.steps,
            num_sanity_val_steps=0,
            **QUIET,
        )
        trainer.fit(task, self.data)
        remove(task)
        return float(trainer.callback_metrics["val_loss"])


def measured(name: str, quick: bool, kept: Path | None) -> tuple[Row, Row, list[Row]]:
    """One task, in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rates, ranks, steps = (around(RATE)[3:5], (2, 4), 8) if quick else (around(RATE), RANKS, STEPS)
    seed_everything(0, verbose=False)  # what is held back is drawn; trainings that were kept have the same
    task, data = TASKS[name]()
    trainer = TRAINER(**QUIET)
    trainer.validate(task, data, verbose=False)  # reads the data and builds the model, for both sides
    TRAINER(max_steps=1, **QUIET).fit(task, data)
    config = LoRAConfig(modules_to_save=task.head_modules or None)

    started = time.process_time()
    advice = advise(
        task,
        data,
        config=config,
        trainer=TRAINER,
        learning_rates=rates,
        max_rank=max(ranks),
        compare=["targets"],
        steps=steps,
        minutes=24 * 60,
        progress=lambda line: print(f"{name}: {line}", flush=True),
    )
    advised = time.process_time() - started
    print(f"{name}: {advice}", flush=True)

    trainings = Trainings(task, data, steps, kept and kept / f"{name}.json")
    field = {
        named(one, rate): (one, rate, None)
        for targets, rank, rate in itertools.product(("all-linear", ATTENTION), ranks, rates)
        for one in [replace(config, rank=rank, target_modules=targets)]
    }
    losses = {each: trainings.loss(*how) for each, how in field.items()}
    swept = sum(trainings.seconds[f"{each}, seed 0"] for each in losses)
    ranked = sorted(losses, key=losses.__getitem__)
    choice = (advice.config, advice.lr, advice.lora_plus_ratio)
    chosen, default = named(*choice), named(replace(config, rank=4 if quick else 8), RATE)
    losses[chosen] = trainings.loss(*choice)  # also where it has a rank from a cut, or a rate beside the grid

    first = ranked[:FIRST]
    fresh = {
        each: sum(trainings.loss(*how, seed=seed) for seed in FRESH) / len(FRESH)
        for each, how in {**{each: field[each] for each in first}, chosen: choice}.items()
    }
    best = min(first, key=fresh.__getitem__)
    row = {
        "task": name,
        "bare base": advice.base,
        "sweep's best": losses[ranked[0]],
        "what it was": ranked[0],
        "advised": losses[chosen],
        "what it is": chosen,
        "above the best %": 100 * (losses[chosen] / losses[ranked[0]] - 1),
        "settings as they come": losses[default],
        "spread over seeds": advice.spread,
        "advise, s": advised,
        "sweep, s": swept,
        "share of its time": advised / swept,
    }
    judged = {
        "task": name,
        "sweep's best": fresh[ranked[0]],
        f"best of its first {FIRST}": fresh[best],
        "what it was": best,
        "advised": fresh[chosen],
        "above the sweep's best %": 100 * (fresh[chosen] / fresh[ranked[0]] - 1),
        f"above the best of {FIRST} %": 100 * (fresh[chosen] / fresh[best] - 1),
    }
    cells = [{"adapter": key, "val_loss": loss} for key, loss in sorted(losses.items(), key=lambda kv: kv[1])]
    return row, judged, cells


def named(config: LoRAConfig, rate: float, lora_plus_ratio: float | None = None) -> str:
    targets = config.target_modules
    variants = {"rsLoRA": config.use_rslora, "DoRA": config.use_dora, "LoRA+": lora_plus_ratio is not None}
    parts = [
        "all linear" if targets == "all-linear" else "attention" if targets == ATTENTION else str(targets),
        f"rank {config.rank}",
        f"{rate:.2g}",
        *(name for name, has in variants.items() if has),
    ]
    return ", ".join(parts)


def main() -> None:
    given = arguments(__doc__, kept="")
    kept = Path(given.kept) if given.kept else None
    report = Report(
        "advise", "advise beside an exhaustive sweep", settings(steps=STEPS, ranks=RANKS), text=__doc__ or ""
    )
    with ProcessPoolExecutor(len(TASKS), multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(measured, TASKS, [given.quick] * len(TASKS), [kept] * len(TASKS)))
    report.table("Loss and time", [row for row, _, _ in found])
    report.table(f"Judged with {len(FRESH)} fresh seeds", [judged for _, judged, _ in found])
    for name, (_, _, cells) in zip(TASKS, found, strict=True):
        report.table(f"The sweep: {name}", cells[:8])
    report.note("The sweep's best is the best of 56 with one seed, so chance favours it; not so with fresh seeds.")
    report.note(
        "Of candidates that seeds do not tell apart, advise takes the cheapest within 1 % of the best in the mean."
    )
    report.write(given.results)


if __name__ == "__main__":
    main()
