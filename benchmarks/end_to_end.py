"""The same fine-tuning to the same loss: LoRACallback, PEFT in Lightning, PEFT in transformers' Trainer, all weights.

    python benchmarks/end_to_end.py

The embedded byte-level model learns the standard library's source. Each side sees the same rows in the same order,
with AdamW at a constant rate; the three with adapters have the same rate and the same first values. Every few steps
the clock stops and the loss on rows that were held back is measured. What is compared is the training time until the
loss that every side reaches.
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from contenders import Workload, ours, peft_default
from side_by_side import Report, Row, Spread, arguments, settings
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from lightning_lora import LoRACallback
from lightning_lora.embedded import BASE
from lightning_lora.engine import adapters
from lightning_lora.recipes.data import StdlibSource

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ADAPTER_RATE, FULL_RATE = 8, 4e-3, 1e-3
TOKENS, ROWS = 256, 8


class Clock:
    """Training time, and the curve of the loss over it."""

    def __init__(self, model: nn.Module, held_back: Tensor, every: int) -> None:
        self.model, self.held_back, self.every = model, held_back, every
        self.curve: list[tuple[float, float]] = []
        self._spent, self._steps = 0.0, 0
        self._running = time.perf_counter()

    def step(self) -> None:
        """A step of the optimizer is done."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._spent += time.perf_counter() - self._running
            self.curve.append((self._spent, self.loss()))
            self._running = time.perf_counter()

    @torch.no_grad()
    def loss(self) -> float:
        self.model.eval()
        losses = [self.model(input_ids=rows, labels=rows).loss for rows in self.held_back.split(ROWS)]
        self.model.train()
        return float(torch.stack(losses).mean())

    def until(self, target: float) -> float:
        return next(seconds for seconds, loss in self.curve if loss <= target)


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        return self.model(input_ids=rows, labels=rows).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.rate, weight_decay=0.0)


class Timed(pl.Callback):
    def __init__(self, held_back: Tensor, every: int) -> None:
        self.held_back, self.every = held_back, every
        self.clock: Clock | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.clock = Clock(module.model, self.held_back, self.every)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        assert self.clock is not None
        self.clock.step()


def in_lightning(model: nn.Module, rate: float, rows: Tensor, timed: Timed, *callbacks: pl.Callback) -> Clock:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, timed],
    )
    trainer.fit(Module(model, rate), DataLoader(rows, ROWS))  # type: ignore[arg-type]
    assert timed.clock is not None
    return timed.clock


class SameStart(pl.Callback):
    """Gives the adapters the first values that the other sides have."""

    def __init__(self, given: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.given = given

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with torch.no_grad():
            for name, layer in adapters(module):
                A, B = self.given[name.removeprefix("model.")]
                layer.lora_A.copy_(A), layer.lora_B.copy_(B)


def by_us(rows: Tensor, held_back: Tensor, every: int, start: dict[str, tuple[Tensor, Tensor]]) -> Clock:
    lora = LoRACallback(rank=RANK, alpha=2 * RANK, target_modules=list(TARGETS))
    return in_lightning(base(), ADAPTER_RATE, rows, Timed(held_back, every), lora, SameStart(start))


def by_peft(rows: Tensor, held_back: Tensor, every: int) -> Clock:
    return in_lightning(peft_default(base(), workload()), ADAPTER_RATE, rows, Timed(held_back, every))


def by_full(rows: Tensor, held_back: Tensor, every: int) -> Clock:
    return in_lightning(base(), FULL_RATE, rows, Timed(held_back, every))


def by_transformers(rows: Tensor, held_back: Tensor, every: int) -> Clock:
    model = peft_default(base(), workload())
    clocks: list[Clock] = []

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clocks.append(Clock(model, held_back, every))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clocks[0].step()

    with tempfile.TemporaryDirectory() as place:
        Trainer(
            model,
            TrainingArguments(
                place,
                per_device_train_batch_size=ROWS,
                num_train_epochs=1,
                learning_rate=ADAPTER_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,
                optim="adamw_torch",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_num_workers=0,
                train_sampling_strategy="sequential",
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Ticks()],
        ).train()
    return clocks[0]


def workload() -> Workload:
    return Workload("", base, lambda model: torch.zeros(()), TARGETS, rank=RANK)


def base() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).train()


def first_values() -> dict[str, tuple[Tensor, Tensor]]:
    model = ours(base(), workload())
    return {name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in adapters(model)}


def data(steps: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, and rows that are held back, of consecutive tokens from all over the standard library's source:
    neighbours in a file are alike, and a few files in turn would teach one after the other."""
    splits = StdlibSource().load()
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def packed(texts: list[str], count: int) -> Tensor:
        tokens = torch.tensor(list(itertools.chain.from_iterable(tokenizer(text)["input_ids"] for text in texts)))
        rows = tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]

    return packed(splits.train["text"], steps * ROWS), packed(splits.validation["text"], 4 * ROWS)


def main() -> None:
    given = arguments(__doc__, rounds=3, steps=60)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    steps, every = (4, 2) if given.quick else (given.steps, 10)
    rows, held_back = data(steps)
    start = first_values()
    sides: dict[str, Callable[[], Clock]] = {
        "LoRACallback": lambda: by_us(rows, held_back, every, start),
        "PEFT in Lightning": lambda: by_peft(rows, held_back, every),
        "PEFT in transformers' Trainer": lambda: by_transformers(rows, held_back, every),
        "full fine-tuning": lambda: by_full(rows, held_back, every),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, run in sides.items():
            torch.manual_seed(given.seed)
            clocks[name].append(run())
    target = max(min(loss for _, loss in own[0].curve) for own in clocks.values())
    reached = {name: [clock.until(target) for clock in own] for name, own in clocks.items()}
    table: list[Row] = [
        {
            "side": name,
            f"seconds until {target:.3f}": Spread.of(reached[name]),
            "x LoRACallback": Spread.of(t / u for t, u in zip(reached[name], reached["LoRACallback"])),
            "seconds in all": Spread.of(clock.curve[-1][0] for clock in own),
            "loss after all": own[0].curve[-1][1],
        }
        for name, own in clocks.items()
    ]
    report = Report(
        "end_to_end",
        "The same fine-tuning to the same loss",
        settings(
            seed=given.seed,
            rounds=given.rounds,
            rank=RANK,
            dtype="float32",
            shapes=f"{steps} steps of {ROWS} x {TOKENS} tokens",
            rates=f"{ADAPTER_RATE} with adapters, {FULL_RATE} for all weights",
        ),
        __doc__.split("\n\n", 2)[2],
    )
    report.table("Training time", table)
    report.write(given.results)


if __name__ == "__main__":
    main()
