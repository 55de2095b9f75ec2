"""Runs that are killed at random and resumed, beside the run that was not.

python kills.py [KILLS] [SEED] [NAME...]    kills runs of all settings, or of those named, and prints what differs
"""

from __future__ import annotations

import functools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_lora import LoRACallback, adapter_state_dict
from training.lit import data, net, trainer

EPOCHS, BATCHES = 3, 6


class Killed(Exception):  # noqa: N818
    pass


class Rows(Dataset):  # type: ignore[type-arg]
    """Rows that are augmented at random, by each of the global generators."""

    def __init__(self, augment: bool = True) -> None:
        self.rows, self.augment = data(4 * BATCHES), augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        if self.augment:
            x = x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.randn())
        return x, y


class OwnGenerators(Rows):
    """Augmented by generators that the dataset keeps."""

    def __init__(self) -> None:
        super().__init__(augment=False)
        self.g, self.r, self.n = torch.Generator().manual_seed(1), random.Random(2), np.random.default_rng(3)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn((), generator=self.g) + 0.1 * self.r.random() + float(self.n.normal()), y


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = Rows()
        for index in torch.randperm(len(rows)).tolist():
            yield rows[index]


class StateStream(IterableDataset):  # type: ignore[type-arg]
    """A stream that knows its place."""

    def __init__(self) -> None:
        self.at = self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows, generator = Rows(), torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        while self.at < len(rows):
            self.at += 1
            yield rows[order[self.at - 1]]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


class Counting(Sampler[int]):
    """A sampler that seeds each epoch by a count of its own."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(4 * BATCHES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        self.epoch += 1
        yield from order

    def __len__(self) -> int:
        return 4 * BATCHES


class Epochs(Counting):
    """A sampler that Lightning tells the epoch, as DistributedSampler."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(4 * BATCHES, generator=torch.Generator().manual_seed(self.epoch)).tolist()


class WithState(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": [self.epoch]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (self.epoch,) = state["epoch"]


class Unsized(Sampler[list[int]]):
    """A batch sampler without a length: the last batch is known only once it was asked for one more."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(4 * BATCHES).tolist()
        yield from (order[i : i + 4] for i in range(0, 4 * BATCHES, 4))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(Rows(), 4, shuffle=True),
    "generator": lambda: DataLoader(Rows(), 4, shuffle=True, generator=seeded()),
    "sampler's generator": lambda: DataLoader(Rows(), 4, sampler=RandomSampler(Rows(), generator=seeded())),
    "replacement": lambda: DataLoader(
        Rows(), 4, sampler=RandomSampler(Rows(), replacement=True, num_samples=24, generator=seeded())
    ),
    "weighted": lambda: DataLoader(
        Rows(), 4, sampler=WeightedRandomSampler([1.0] * 12 + [2.0] * 12, 24, True, seeded())
    ),
    "counting sampler": lambda: DataLoader(Rows(), 4, sampler=Counting()),
    "sampler with set_epoch": lambda: DataLoader(Rows(), 4, sampler=Epochs()),
    "sampler with state": lambda: DataLoader(Rows(), 4, sampler=WithState()),
    "own generators": lambda: DataLoader(OwnGenerators(), 4, shuffle=True),
    "unsized": lambda: DataLoader(Rows(), batch_sampler=Unsized()),
    "stream": lambda: DataLoader(Stream(), 4),
    "stateful": lambda: StatefulDataLoader(Rows(), 4, shuffle=True),
    "stateful, generator": lambda: StatefulDataLoader(Rows(), 4, shuffle=True, generator=seeded()),
    "two": lambda: CombinedLoader(
        [DataLoader(Rows(), 4, shuffle=True, generator=seeded()), DataLoader(data(12), 6, shuffle=True)],
        "max_size_cycle",
    ),
    "workers": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2),
    "workers, generator": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=1, generator=seeded()),
    "persistent": lambda: DataLoader(Rows(), 4, shuffle=True, num_workers=2, persistent_workers=True),
    "stateful, workers": lambda: StatefulDataLoader(Rows(), 4, shuffle=True, num_workers=2),
    "stateful, persistent": lambda: StatefulDataLoader(Rows(), 4, shuffle=True, num_workers=2, persistent_workers=True),
    "stateful, stream": lambda: StatefulDataLoader(StateStream(), 4),
    "stateful, stream without a state": lambda: StatefulDataLoader(Stream(), 4),
    "stateful, unsized": lambda: StatefulDataLoader(Rows(), batch_sampler=Unsized()),
    "persistent, generator": lambda: DataLoader(
        Rows(), 4, shuffle=True, num_workers=1, persistent_workers=True, generator=seeded()
    ),
}


VALIDATION: dict[str, Callable[[], Any]] = {
    "rows": lambda: DataLoader(data(12), 4),
    "generator": lambda: DataLoader(Rows(), 4, shuffle=True, generator=seeded()),
    "persistent": lambda: DataLoader(Rows(), 4, num_workers=1, persistent_workers=True),
    "counting": lambda: DataLoader(data(4 * BATCHES), 4, sampler=Counting()),
}


class Lit(pl.LightningModule):
    """Dropout, noise from a generator of its own, a buffer that counts, metrics of whole epochs, hooks that draw."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.net = net()
        self.noise = seeded()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("ends", torch.zeros(()))
        self.mean = MeanMetric()
        self.log_: dict[Any, Any] = {}
        self.automatic_optimization = setting.optimizers == "one"

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch[0], (list, tuple)):
            return sum(self.loss(part) for part in batch)  # type: ignore[return-value]
        return F.cross_entropy(self.net(batch[0] + 0.1 * torch.randn((), generator=self.noise)), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen += 1
        self.mean(loss.detach())
        self.log("train_loss", loss, on_epoch=True, on_step=True, batch_size=4)
        self.log("mean", self.mean, on_epoch=True)
        rates = [group["lr"] for o in self.trainer.optimizers for group in o.param_groups]
        self.log_["step", self.current_epoch, batch_idx] = (loss.item(), self.seen.item(), self.ends.item(), *rates)
        if self.automatic_optimization:
            return loss
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(loss / 2)
        for i, optimizer in enumerate(optimizers):
            if (batch_idx + i) % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        return None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        first = batch[0][0] if isinstance(batch[0], (list, tuple)) else batch[0]
        self.ends.mul_(0.5).add_(first.sum() + batch_idx + (outputs["loss"].detach() if outputs else 0))
        torch.rand(2), random.random(), np.random.rand()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + 0.01 * torch.rand(()))

    def on_validation_epoch_end(self) -> None:
        torch.rand(1)

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.ends += 1

    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        torch.rand(1)

    def on_train_epoch_end(self) -> None:
        torch.rand(1)
        self.ends += 1
        metrics = self.trainer.callback_metrics
        self.log_["epoch", self.current_epoch] = tuple(
            metrics[k].item() for k in ("train_loss_epoch", "mean", "val_loss") if k in metrics
        )

    def configure_optimizers(self) -> Any:
        if self.setting.optimizers == "two":
            return [torch.optim.AdamW(self.net[0].parameters(), 1e-2), torch.optim.SGD(self.net[3].parameters(), 1e-2)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.setting.schedule == "cosine":
            return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 20), "interval": "step"}]
        if self.setting.schedule:
            interval, monitor = self.setting.schedule.split()
            plateau = ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.05)
            return [optimizer], [{"scheduler": plateau, "interval": interval, "monitor": monitor}]
        return optimizer


@dataclass
class Setting:
    loader: str = "shuffle"
    saver: dict[str, Any] = field(default_factory=lambda: {"every_n_train_steps": 1})
    optimizers: str = "one"
    schedule: str = ""
    stopping: dict[str, Any] | None = None
    by_hand: tuple[str, ...] = ()
    """Hooks in which the Trainer's save_checkpoint is called, at every third call."""
    by_hand_first: bool = False
    """Whether that callback comes before all others, which then have not had the hook."""
    on_exception: bool = False
    windows: dict[int, int] | None = None
    validation: str = "rows"
    average: bool = False
    grow: tuple[dict[str, int], ...] = ()
    """Limits of earlier runs, each of which ends before the next one goes on from its last checkpoint."""
    trainer: dict[str, Any] = field(default_factory=dict)


TIME: dict[str, Any] = {"train_time_interval": timedelta(seconds=0)}
HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip
SETTINGS: dict[str, Setting] = {
    **{f"loader: {name}": Setting(name, trainer={"accumulate_grad_batches": 2}) for name in LOADERS},
    **{f"by hand: {name}, exceptions": Setting(name, by_hand=HOOKS, on_exception=True) for name in list(LOADERS)[:14]},
    "window and validation": Setting(trainer={"accumulate_grad_batches": 4, "val_check_interval": 3}),
    "validation saves": Setting(saver={}, trainer={"accumulate_grad_batches": 4, "val_check_interval": 3}),
    "time": Setting(saver=TIME, trainer={"accumulate_grad_batches": 4}),
    "exceptions": Setting(on_exception=True, trainer={"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "by hand": Setting(by_hand=HOOKS, trainer={"accumulate_grad_batches": 4, "val_check_interval": 2}),
    "by hand, first": Setting(
        by_hand=HOOKS,
        by_hand_first=True,
        on_exception=True,
        schedule="epoch val_loss",
        stopping={"monitor": "val_loss", "patience": 9, "min_delta": 0.02},
        trainer={"accumulate_grad_batches": 4, "val_check_interval": 2},
    ),
    "windows by epoch": Setting(by_hand=HOOKS[:8], windows={0: 4, 1: 3, 2: 2}),
    "every other step": Setting(saver={"every_n_train_steps": 2}),
    "an epoch's steps": Setting(saver={"every_n_train_steps": BATCHES}),
    "every third of 5 steps": Setting(saver={"every_n_train_steps": 3}, trainer={"limit_train_batches": 5}),
    "epochs": Setting(saver={"every_n_epochs": 1}),
    "epochs, at their end": Setting(saver={"every_n_epochs": 1, "save_on_train_epoch_end": True}),
    "best": Setting(saver={"monitor": "val_loss", "save_top_k": 2, "save_last": True}),
    "best of training": Setting(
        saver={"monitor": "train_loss_epoch", "save_top_k": 2, "save_on_train_epoch_end": True}
    ),
    "no validation": Setting(trainer={"limit_val_batches": 0, "accumulate_grad_batches": 4}),
    "validation across epochs": Setting(trainer={"val_check_interval": 4, "check_val_every_n_epoch": None}),
    "validation every other epoch": Setting(trainer={"check_val_every_n_epoch": 2}),
    "cosine": Setting(schedule="cosine", trainer={"accumulate_grad_batches": 2}),
    "plateau by epoch": Setting(schedule="epoch val_loss", by_hand=("on_train_epoch_start", "on_after_backward")),
    "plateau by epoch, validation saves": Setting(saver={}, schedule="epoch val_loss"),
    "plateau by epoch, epoch saves": Setting(saver={"save_on_train_epoch_end": True}, schedule="epoch val_loss"),
    "plateau of training": Setting(schedule="epoch train_loss_epoch", on_exception=True),
    "plateau by step": Setting(schedule="step train_loss_step", trainer={"accumulate_grad_batches": 2}),
    "plateau by step of validation": Setting(saver={}, schedule="step val_loss", trainer={"val_check_interval": 1}),
    "early stopping": Setting(stopping={"monitor": "val_loss", "patience": 1, "min_delta": 0.02}),
    "early stopping, validation saves": Setting(
        saver={}, stopping={"monitor": "val_loss", "patience": 1, "min_delta": 0.02}, trainer={"val_check_interval": 2}
    ),
    "early stopping on training": Setting(
        stopping={"monitor": "train_loss_epoch", "patience": 1, "min_delta": 0.05, "check_on_train_epoch_end": True}
    ),
    "manual": Setting(
        optimizers="manual", by_hand=("on_train_batch_end", "on_train_batch_start", "on_before_backward")
    ),
    "manual, exceptions, validation": Setting(
        optimizers="manual", on_exception=True, trainer={"val_check_interval": 2}
    ),
    "two optimizers": Setting(optimizers="two", saver={}, by_hand=("on_train_batch_end", "on_validation_end")),
    "two optimizers, time": Setting(optimizers="two", saver=TIME, by_hand=("on_train_batch_start",)),
    "max_steps": Setting(grow=({"max_steps": 4}, {"max_steps": 9}), trainer={"max_steps": 14}),
    "max_steps in windows": Setting(
        grow=({"max_steps": 1}, {"max_steps": 3}), trainer={"accumulate_grad_batches": 4, "max_steps": 5}
    ),
    "max_steps, metrics of whole epochs": Setting(
        saver={}, schedule="epoch train_loss_epoch", grow=({"max_steps": 8},), by_hand=("on_train_end",)
    ),
    "max_steps, then epochs": Setting(grow=({"max_steps": 8},), trainer={}),
    "max_steps in the last epoch": Setting(saver=TIME, grow=({"max_steps": 4, "max_epochs": 1},)),
    "stopped in an epoch": Setting(grow=({"stop_at": 8},), trainer={"accumulate_grad_batches": 4}),
    "stopped in an epoch, validation saves": Setting(saver={}, grow=({"stop_at": 8},)),
    "two optimizers across epochs": Setting(
        optimizers="two", by_hand=("on_train_epoch_start", "on_train_batch_end"), trainer={"limit_val_batches": 0}
    ),
    "validation: generator": Setting(
        schedule="epoch val_loss", validation="generator", by_hand=HOOKS, trainer={"val_check_interval": 3}
    ),
    "validation: persistent": Setting(schedule="epoch val_loss", validation="persistent"),
    "average": Setting(average=True, by_hand=HOOKS[3:8], trainer={"accumulate_grad_batches": 2}),
    "more epochs": Setting(grow=({"max_epochs": 1}, {"max_epochs": 2}), trainer={"accumulate_grad_batches": 4}),
    "more epochs, generator": Setting("generator", saver={}, grow=({"max_epochs": 1}, {"max_epochs": 2})),
    "max_steps, generator": Setting("generator", grow=({"max_steps": 8},), by_hand=("on_train_end",)),
    "max_steps, two loaders": Setting(
        "two", saver={"save_last": True}, grow=({"max_steps": 8},), by_hand=("on_train_end",)
    ),
    "reloaded": Setting(trainer={"reload_dataloaders_every_n_epochs": 1, "accumulate_grad_batches": 4}),
    "reloaded, generator": Setting("generator", trainer={"reload_dataloaders_every_n_epochs": 2}),
    "bf16": Setting(trainer={"precision": "bf16-mixed", "accumulate_grad_batches": 4}, by_hand=HOOKS),
}


class Stopper(Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.fit_loop.total_batch_idx + 1 >= self.after


class ByHand(Callback):
    def __init__(self, folder: Path, hooks: tuple[str, ...]) -> None:
        self.folder, self.calls = folder, 0
        for hook in hooks:
            setattr(self, hook, self.save if hook != "on_train_end" else self.save_at_end)

    def save(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self.calls += 1
        if (self.calls % 3 == 0 and not trainer.sanity_checking and trainer.training) or trainer.validating:
            trainer.save_checkpoint(self.folder / f"by-hand-{random_name()}.ckpt")

    def save_at_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"by-hand-{random_name()}.ckpt")


class Killer(Callback):
    """Raises at the given call of any hook."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0
        for hook in HOOKS:
            setattr(self, hook, self.count)

    def count(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed


class Counts(Callback):
    """Has a state that every hook changes."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        for hook in HOOKS[1:]:
            setattr(self, hook, functools.partial(self.count, hook))

    def count(self, hook: str, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if not trainer.sanity_checking:
            self.calls[hook] = self.calls.get(hook, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return self.calls

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state


NAMES = iter(range(10**9))


def random_name() -> str:
    return f"{next(NAMES):09}"


def fit(setting: Setting, folder: Path, at: int | None = None, ckpt: Path | None = None, **limits: Any) -> Any:
    """The module, the Trainer, how many calls of hooks there were, and whether the run was killed."""
    pl.seed_everything(1 if ckpt is None else 99, verbose=False)
    module, killer = Lit(setting), Killer(at)
    saver = ModelCheckpoint(folder, **{"filename": "{step}-{epoch}", "save_top_k": -1, **setting.saver})
    callbacks: list[Callback] = [LoRACallback(rank=2, dropout=0.1, save_adapter=False), saver, killer, Counts()]
    if setting.by_hand:
        callbacks.insert(0 if setting.by_hand_first else len(callbacks), ByHand(folder, setting.by_hand))
    if setting.on_exception:
        callbacks.append(OnExceptionCheckpoint(folder, f"exception-{random_name()}"))
    if setting.stopping:
        callbacks.append(EarlyStopping(**setting.stopping))
    if setting.windows:
        callbacks.append(GradientAccumulationScheduler(setting.windows))
    if "stop_at" in limits:
        callbacks.append(Stopper(limits.pop("stop_at")))
    if setting.average:
        callbacks.append(EMAWeightAveraging(decay=0.5))
    run = trainer(*callbacks, **{"max_epochs": EPOCHS, **setting.trainer, **limits})
    module.train_dataloader = LOADERS[setting.loader]  # type: ignore[method-assign]
    module.val_dataloader = VALIDATION[setting.validation]  # type: ignore[method-assign]
    try:
        run.fit(module, ckpt_path=ckpt)
    except Killed:
        return module, run, killer.calls, True
    return module, run, killer.calls, False


def end(module: Lit, run: pl.Trainer) -> dict[str, Any]:
    """What two runs have to agree in when they end."""
    state: dict[str, Any] = {}
    for i, optimizer in enumerate(run.optimizers):
        for j, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {i} {j} {name}": value for name, value in values.items() if isinstance(value, Tensor)}
    stopping = run.early_stopping_callback
    (counts,) = (c for c in run.callbacks if isinstance(c, Counts))  # type: ignore[attr-defined]
    return {
        **adapter_state_dict(module),
        **state,
        **({} if module.setting.average else {"seen": module.seen, "ends": module.ends}),
        **{f"calls of {hook}": torch.tensor(number) for hook, number in counts.calls.items()},
        "global_step": torch.tensor(run.global_step),
        "waited": torch.tensor(stopping.wait_count if stopping else 0),
        "stepped": torch.tensor(run.fit_loop.epoch_loop._batches_that_stepped),
    }


def check(setting: Setting, chance: random.Random, kills: int, folder: Path) -> list[str]:
    """Kill a run so many times, resume it each time from one of its checkpoints; what differs from the whole run."""
    whole, whole_run, calls, _ = fit(setting, folder / "whole")
    expected, wrong = end(whole, whole_run), []
    own, ckpt, killed, story = folder / "killed", None, 0, []
    phases = [*setting.grow, {}]
    share = -(-kills // len(phases))
    while True:
        limits = phases[0]
        at = chance.randrange(1, calls + 1) if killed < share else None
        if ckpt is not None and at is not None:
            at = 1 + at % max(2, calls // 3)
        module, run, _, was_killed = fit(setting, own, at, ckpt, **limits)
        killed += was_killed
        differ = [k for k, v in module.log_.items() if k[0] == "step" and whole.log_.get(k) != v]
        wrong += [f"{story} then {k}: {module.log_[k]} is not {whole.log_.get(k)}" for k in differ]
        if not limits and not was_killed:
            epochs = [k for k, v in module.log_.items() if k[0] == "epoch" and whole.log_.get(k) != v]
            wrong += [f"{story} then {k}: {module.log_[k]} is not {whole.log_.get(k)}" for k in epochs]
        if wrong:
            return wrong
        if not was_killed:
            if not limits:
                break
            phases.pop(0)
            killed = 0
        saved = sorted(own.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if not saved:
            ckpt = None
            continue
        newest = chance.random() < 0.7 or not was_killed
        ckpt = saved[-1] if newest else chance.choice(saved)
        story.append(f"{f'killed at call {at}' if was_killed else f'ended by {limits}'}, resumed from {ckpt.name}")
    return [f"{story}: {difference}" for difference in differences(end(module, run), expected)]


def differences(last: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    absent = torch.zeros(0)
    return [f"{k} {last.get(k)} {v}" for k, v in expected.items() if not torch.equal(v, last.get(k, absent))]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    kills, seed, *names = sys.argv[1:] or ["3"]
    for name in names or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                wrong = check(SETTINGS[name], random.Random(f"{seed} {name}"), int(kills), Path(folder))
            except Exception as error:
                import traceback

                traceback.print_exc()
                wrong = [repr(error)]
        print(f"{name}: {len(wrong)} differ {wrong[:1]}", flush=True)
