"""Trains one candidate after another on a user's own module, each for some steps, and puts the module back after."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_lora.checked import closest
from lightning_lora.engine import (
    InjectionReport,
    LoRAConfig,
    adapter_state_dict,
    load_adapter_state_dict,
    pairs,
    remove,
)
from lightning_lora.engine.low_rank import spectrum_of_product
from lightning_lora.errors import ConfigError, DataError, TrainingError, listed
from lightning_lora.files import temporary_folder
from lightning_lora.training.callback import LoRACallback
from lightning_lora.training.guest import left_as_it_was, quiet, seed_all
from lightning_lora.training.strategy import has_adapters

NEVER = 10**9


def mean(values: Collection[float]) -> float:
    """NaN if there are none."""
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to train, and what was measured of it."""

    name: str
    config: LoRAConfig
    lr: float
    lora_plus_ratio: float | None = None
    measured: dict[int, dict[int, float]] = field(default_factory=dict)
    """Seed -> steps trained -> the monitored metric then."""
    reports: list[InjectionReport] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """The number of trained elements; 0 before the first training."""
        return self.reports[-1].trainable if self.reports else 0

    @property
    def steps(self) -> int:
        """The longest training so far, in optimizer steps."""
        return max((step for of_seed in self.measured.values() for step in of_seed), default=0)

    def values(self) -> list[float]:
        """The metric after the longest training, of each seed that was trained as long."""
        return [of_seed[self.steps] for of_seed in self.measured.values() if self.steps in of_seed]

    @property
    def mean(self) -> float:
        return mean(self.values())

    @property
    def spread(self) -> float | None:
        """The largest value over seeds less the smallest; None with fewer than two seeds."""
        return max(values) - min(values) if len(values := self.values()) > 1 else None


@dataclass(frozen=True)
class Cut:
    """A trained adapter, cut by SVD in every layer, and the validation of what is left."""

    name: str
    rank: float
    """The mean over the layers."""
    rank_pattern: Mapping[str, int]
    """Name of a layer -> its rank."""
    parameters: int
    """The trained elements that are left."""
    value: float
    """The monitored metric."""


class OutOfTimeError(Exception):
    """The budget ended. It never leaves `advise`."""


class Trials:
    """Trains candidates on `module` and measures them, each by the module's own training and validation steps."""

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule | None,
        trainer: Callable[..., Trainer],
        *,
        monitor: str,
        deadline: float,
        product_decay: float | None,
    ) -> None:
        self.module, self.datamodule, self.monitor, self.deadline = module, datamodule, monitor, deadline
        self.product_decay = product_decay
        self.steps = 0
        """The length of the longest training, to which schedules run."""
        self._make = trainer
        self._states: dict[tuple[Candidate, int], dict[str, Tensor]] = {}
        self._folder = Path()
        self._validates_as_given = False
        """True if a schedule of the module needs the validations that the Trainer would do by itself."""
        self._note: Callable[[], None] = lambda: None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Meanwhile candidates can be trained. After it, the module and all random generators are as before."""
        with left_as_it_was(self.module, self.datamodule) as self._note, quiet():
            self._folder = temporary_folder("advise")
            try:
                yield
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)

    def base(self) -> tuple[float, float]:
        """The metric of the bare base, and the seconds that a validation takes.

        Raises DataError where nothing can be validated, and ConfigError where the metric is not logged.
        """
        took = _Validation()
        trainer = self._trainer(callbacks=[took])
        try:
            trainer.validate(self.module, self.datamodule, verbose=False)
        except MisconfigurationException as error:
            raise DataError(
                f"advise compares validation losses, and there are none: {error} Give the module a validation_step, "
                "and the data a val_dataloader."
            ) from error
        self._note()  # layers that configure_model or setup has built
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not metrics and not sum(trainer.num_val_batches):
            raise DataError("advise compares validation losses, and the validation data have no batch.")
        if self.monitor not in metrics:
            meant = closest(self.monitor, metrics, count=1)
            hint = f" Did you mean {meant[0]!r}?" if meant else ""
            known = f"It logs {listed(metrics)}." if metrics else "It logs nothing: call self.log in validation_step."
            raise ConfigError(f"monitor={self.monitor!r}: validation logs no such metric. {known}{hint}")
        return metrics[self.monitor], took.seconds

    def probe(self, candidate: Candidate) -> Probe:
        """Train `candidate` for a few steps, only to see how long they take and how long a whole training is."""
        probe = Probe(candidate.lr)
        started = time.perf_counter()
        self._fit(candidate, self._trainer(limit_val_batches=0), probe, None)
        probe.overhead = time.perf_counter() - started - probe.seconds * probe.step
        self._validates_as_given = probe.needs_validation
        return probe

    def train(self, candidate: Candidate, seed: int, step: int) -> float:
        """Train `candidate` with `seed` up to `step` (from where its last training ended), and validate.

        Raises OutOfTimeError where the budget ends before.
        """
        done = candidate.measured.setdefault(seed, {})
        if step in done:
            return done[step]
        self._check_time()
        path = self._folder / f"{id(candidate)}-{seed}.ckpt"
        until = _Until(step, candidate.lr, self.deadline)
        trainer = self._trainer(max_steps=self.steps, max_epochs=-1)
        seed_all(seed)  # a checkpoint brings its own random state
        state = self._fit(candidate, trainer, until, path)
        if step == self.steps:
            self._states[candidate, seed] = state
        done[step] = float(trainer.callback_metrics[self.monitor])
        return done[step]

    def cut(self, candidate: Candidate, seed: int, name: str, *, share: float = 1, energy: float = 1) -> Cut | None:
        """Validate `candidate` as trained with `seed`, each layer cut to `share` of its rank and to as many directions
        as hold `energy` of its update's squared norm.

        Returns None where a layer's update cannot be cut in place (an init that starts away from zero).
        """
        cutting = _Cutting(self._states[candidate, seed], share, energy)
        self._check_time()
        trainer = self._trainer(callbacks=[self._callback(candidate), cutting])
        try:
            trainer.validate(self.module, self.datamodule, verbose=False)
        except _NotInPlaceError:
            return None
        finally:
            self._clear()
        ranks = cutting.ranks
        value = float(trainer.callback_metrics[self.monitor])
        return Cut(name, mean(ranks.values()), ranks, cutting.parameters, value)

    def _check_time(self) -> None:
        if time.perf_counter() > self.deadline:
            raise OutOfTimeError

    def _callback(self, candidate: Candidate) -> LoRACallback:
        ratio = candidate.lora_plus_ratio
        return LoRACallback(
            candidate.config, lora_plus_ratio=ratio, product_decay=self.product_decay, save_adapter=False
        )

    def _trainer(self, **settings: Any) -> Trainer:
        # Validate only where a training stops.
        never = {} if self._validates_as_given else {"check_val_every_n_epoch": None, "val_check_interval": NEVER}
        plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = self._make(
            **never, **plain, **{"callbacks": [], **settings}, enable_model_summary=False, num_sanity_val_steps=0,
            inference_mode=False,  # what a metric keeps from inference mode cannot be used in training after it
        )  # fmt: skip
        if trainer.world_size > 1:
            raise ConfigError(f"advise measures in one process, and this Trainer has {trainer.world_size}: devices=1.")
        return trainer

    def _fit(self, candidate: Candidate, trainer: Trainer, until: _Until, path: Path | None) -> dict[str, Tensor]:
        """Train; returns a copy of the adapter. With a `path`, go on from the checkpoint there, and save one."""
        callback = self._callback(candidate)
        trainer.callbacks += [callback, until]  # type: ignore[attr-defined]
        try:
            trainer.fit(self.module, self.datamodule, ckpt_path=path if path and path.exists() else None)
            if until.is_late:
                raise OutOfTimeError
            if trainer.global_step < min(until.step, 1 if path is None else until.step):
                raise TrainingError(
                    f"A training of {until.step} steps ended after {trainer.global_step}. Leave out what ends it in "
                    "the Trainer's settings or in the module (max_time, limit_train_batches=0, should_stop)."
                )
            if callback.report is not None:
                candidate.reports.append(callback.report)
            if path is not None and until.step < self.steps:
                trainer.save_checkpoint(path)
            return {name: tensor.clone() for name, tensor in adapter_state_dict(self.module).items()}
        finally:
            self._clear()

    def _clear(self) -> None:
        if has_adapters(self.module):
            remove(self.module)


class _Validation(Callback):
    """Times a validation, without what is read and built before it."""

    seconds = 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.seconds -= time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter()


class _Until(Callback):
    """Trains at the learning rate `lr`, and stops, with a validation, after the optimizer step `step`."""

    def __init__(self, step: int, lr: float, deadline: float = math.inf) -> None:
        self.step, self.lr, self.deadline = step, lr, deadline
        self.is_late = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        factor = self.lr / own_rate(trainer)
        strategy: Any = trainer.strategy
        step = strategy.optimizer_step

        # Scaled while a step runs: the schedule, whatever it is, goes on from the rate that it knows.
        def scaled(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = [(group, group["lr"], group["lr"] * factor) for group in optimizer.param_groups]
            for group, _, rate in before:
                group["lr"] = rate
            try:
                return step(optimizer, *args, **kwargs)
            finally:
                for group, own, rate in before:
                    group["lr"] = own if group["lr"] is rate else group["lr"] / factor

        strategy.optimizer_step = scaled

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            trainer.should_stop = True  # Lightning validates before it stops
        elif time.perf_counter() > self.deadline:
            trainer.should_stop = self.is_late = True


class Probe(_Until):
    """The measures of a first, short training."""

    def __init__(self, lr: float) -> None:
        super().__init__(4, lr)
        self.own_rate = self.full_steps = math.nan
        self.needs_validation = False
        """True if a schedule goes by a metric."""
        self.overhead = 0.0
        """Seconds that a training takes beside its steps."""
        self._times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.own_rate, self.full_steps = own_rate(trainer), float(trainer.estimated_stepping_batches)
        for schedule in trainer.lr_scheduler_configs:
            self.needs_validation |= schedule.reduce_on_plateau
            schedule.strict = False  # here, nothing is validated
        self._times.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        self._times += [time.perf_counter()] * (trainer.global_step - len(self._times) + 1)

    @property
    def seconds(self) -> float:
        """Of one optimizer step; the first one, which sets things up, is left out where there are more."""
        times = self._times[1:] if len(self._times) > 2 else self._times
        return (times[-1] - times[0]) / max(1, len(times) - 1)


def own_rate(trainer: Trainer) -> float:
    """The learning rate that the module gives its (first) optimizer. Raises ConfigError where it gives none."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups if group["params"]]
    rate = next((group.get("initial_lr", group.get("lr")) for group in groups), None)
    if rate is None or not float(rate) > 0:
        raise ConfigError(
            f"The optimizer of {type(trainer.lightning_module).__name__} has the learning rate {rate!r}: advise scales "
            "it, so give it one above 0."
        )
    return float(rate)


class _NotInPlaceError(Exception):
    """B A can only be cut by more ranks than the layer has."""


class _Cutting(Callback):
    """Puts a trained adapter into the module, cut, before a validation."""

    def __init__(self, state: Mapping[str, Tensor], share: float, energy: float) -> None:
        self.state, self.share, self.energy = state, share, energy
        self.ranks: dict[str, int] = {}
        self.parameters = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        load_adapter_state_dict(pl_module, self.state)
        self.parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        with torch.no_grad():
            for pair in pairs(pl_module):
                A, B = pair.module.matrices(pair.parameter)
                if B.data_ptr() != pair.B.data_ptr():  # with a frozen start, a copy of [B, -B0]
                    raise _NotInPlaceError
                whole = spectrum_of_product(B.double(), A.double())
                most = max(1, int(pair.spec.rank * self.share))
                rank = min(most, whole.rank_for(math.sqrt(1 - self.energy))) if self.energy < 1 else most
                U = whole.U[..., :rank]
                B.copy_(U @ (U.mT @ B.double()))  # U U^T B A is the cut of B A, so A and the scale may stay
                self.ranks[pair.name] = rank
                self.parameters -= (pair.A.numel() + pair.B.numel()) // pair.spec.rank * (pair.spec.rank - rank)
