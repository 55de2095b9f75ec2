"""Chooses a learning rate, a rank and variants by short measured trainings on a user's own module and data.

First learning rates, at the largest rank in question: the field is halved while it trains (successive halving, Jamieson
and Talwalkar 2016, arXiv:1502.07943). Then variants, where asked. Then ranks, from the training that is there: its
adapter is cut by SVD, layer by layer, and each cut is validated; the smallest rank that costs next to nothing is then
trained itself.

Alpha stays as it is for every rank: with alpha / rank as the scale, the first updates of B A are as large at one rank
as at another, so one learning rate serves them all (Hu et al. 2021, arXiv:2106.09685, section 4.1).

Nothing is read from spectra: none of the rules of thumb on singular values, tried on real adapters, foretold whether
another rank would do better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_lora.checked import number, one_of, whole
from lightning_lora.engine import LoRAConfig
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.training.advice import Advice
from lightning_lora.training.search import CUTS, KEPT, VARIANTS, Search, around
from lightning_lora.training.strategy import has_adapters
from lightning_lora.training.trials import Candidate, OutOfTimeError, Probe, Trials

LEAST_STEPS = 16
"""Of the longest training: with fewer, the first halving would come after one step."""
MARGIN = 0.9
"""The share of the budget that is planned: some steps take longer than the first ones."""


def advise(
    module: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    config: LoRAConfig | None = None,
    lora_plus_ratio: float | None = None,
    product_decay: float | None = None,
    trainer: Callable[..., Trainer] = Trainer,
    monitor: str = "val_loss",
    mode: str = "min",
    learning_rates: Sequence[float] | None = None,
    max_rank: int = 32,
    compare: Collection[str] = (),
    seed: int = 0,
    seeds: int = 2,
    steps: int | None = None,
    minutes: float = 10.0,
    progress: Callable[[str], object] = print,
) -> Advice:
    """Recommend a learning rate and a rank, from short trainings of `module` on its own data.

    Every candidate is trained by the module's own training_step and optimizer, and measured by its own validation. Two
    candidates are compared seed by seed. What costs more is never recommended for a difference of at most two standard
    errors over seeds; what costs less only where its mean is at most 1 % worse besides. After the call the module has
    no adapters, its own weights, modes and Trainer; the random generators are as before.

    Args:
        module: Any LightningModule without adapters.
        datamodule: Its data; None where the module has its own loaders.
        config: What to adapt, and how; its rank is not used. None stands for LoRAConfig().
        lora_plus_ratio, product_decay: As of LoRACallback.
        trainer: Makes a Trainer: `partial(Trainer, precision="bf16-true", max_epochs=3)`. The length of that training
            is the length that is meant. Callbacks and loggers are not used.
        monitor, mode: The metric of validation to compare by, and whether the smallest ("min") or the largest ("max")
            is the best.
        learning_rates: Those to try. None tries seven around ten times the module's own, from 0.3 to 300 times it:
            adapters take about ten times the learning rate of full fine-tuning.
        max_rank: The largest rank in question.
        compare: Variants to try besides: "targets" (attention layers only), "rslora", "dora", "lora_plus".
        seed: Of the first training of each candidate.
        seeds: The number of trainings of each finalist, at least 2.
        steps: Optimizer steps of the longest trainings. None takes as many as the whole training has, or as the
            budget allows.
        minutes: The budget. What was measured until then is used.
        progress: Called with each line that tells how far it is.

    Returns:
        The advice; its text says what was measured, what follows, and what is not known.

    Raises:
        ConfigError: A value is not valid, validation does not log `monitor`, or the budget is too small for a first
            comparison.
        DataError: There are no validation data.
        TrainingError: Trainings end early, or none comes to a finite metric.
        AdapterStateError: The module has adapters already.

    Example:
        advice = advise(Lit(), data, trainer=partial(Trainer, max_epochs=3), minutes=10)
        print(advice)
        Trainer(max_epochs=3, callbacks=[LoRACallback(advice.config)]).fit(Lit(lr=advice.lr), data)
    """
    started = time.perf_counter()
    config = replace(LoRAConfig() if config is None else config, rank=whole("max_rank", max_rank))
    one_of("mode", mode, ("min", "max"))
    asked = [one_of("compare", name, VARIANTS) for name in compare]
    whole("seeds", seeds, least=2)
    number("minutes", minutes, above=0, unit="minutes")
    if steps is not None:
        whole("steps", steps)
    if learning_rates is not None and not learning_rates:
        raise ConfigError("learning_rates is empty: name at least one, or leave it out.")
    rates = [number("learning_rates", lr, above=0) for lr in learning_rates or ()]
    if has_adapters(module):
        raise AdapterStateError(
            f"{type(module).__name__} has adapters already: call lightning_lora.remove on it first."
        )
    trials = Trials(
        module, datamodule, trainer, monitor=monitor, deadline=started + 60 * minutes, product_decay=product_decay
    )
    search = Search(trials, sign=1 if mode == "min" else -1, seeds=range(seed, seed + seeds), progress=progress)
    with trials.running():
        base, validation = trials.base()
        progress(f"The bare base: {monitor} {base:.4g}")
        first = Candidate("LoRA", config, rates[0] if rates else 1e-4, lora_plus_ratio)
        probe = trials.probe(first)
        rates = rates or around(10 * probe.own_rate)
        grid = [replace(first, lr=lr, measured={}, reports=[]) for lr in sorted(set(rates))]
        plan = Plan(probe, validation, len(grid), len(asked), seeds)
        search.full_steps = probe.full_steps
        trials.steps = plan.longest(trials.deadline - time.perf_counter(), minutes) if steps is None else steps
        progress(
            f"{len(grid)} learning rates from {min(rates):.2g} to {max(rates):.2g} at rank {max_rank}, {trials.steps} "
            f"steps at most, then {', '.join([*asked, 'ranks'])}: about {plan.seconds(trials.steps) / 60:.1f} of "
            f"{minutes:g} minutes"
        )
        try:
            search.rates(grid)
            for name in asked:
                search.variant(name, first.reports[-1].modules if first.reports else ())
            search.ranks()
        except OutOfTimeError:
            search.ran_out = True
            if not any(candidate.values() for candidate in search.all):
                raise ConfigError(
                    f"minutes={minutes:g} is too short for one candidate. Give more minutes, fewer learning_rates, or "
                    "a Trainer with limit_val_batches."
                ) from None
            progress(f"The budget of {minutes:g} minutes has ended.")
    return search.advice(base, monitor, probe.own_rate)


@dataclass(frozen=True)
class Plan:
    """The cost of a search, from the first steps and the first validation."""

    probe: Probe
    validation: float
    """Seconds of one."""
    rates: int
    variants: int
    seeds: int

    def counts(self, steps: int) -> tuple[int, int, int]:
        """The optimizer steps, trainings and validations of a search whose longest trainings have `steps`."""
        eighth, quarter = max(1, steps // 8), max(1, steps // 4)

        def race(field: int, finalists: int) -> tuple[int, int]:
            keep = min(KEPT, field)
            half, more = max(keep, math.ceil(field / 2)), min(finalists, keep) * (self.seeds - 1)
            trained = field * eighth + half * (quarter - eighth) + keep * (steps - quarter) + more * steps
            return trained, field + half + keep + more

        parts = [race(self.rates, KEPT), *[race(3, 1)] * self.variants, (self.seeds * steps, self.seeds)]
        trained, trainings = (sum(column) for column in zip(*parts, strict=True))
        return trained, trainings, trainings + self.seeds * len(CUTS)

    def seconds(self, steps: int) -> float:
        trained, trainings, validations = self.counts(steps)
        return trained * self.probe.seconds + trainings * self.probe.overhead + validations * self.validation

    def longest(self, left: float, minutes: float) -> int:
        """The most steps, up to those of the whole training, for which `left` seconds suffice.

        Raises ConfigError if they suffice for less than LEAST_STEPS.
        """
        full = int(min(self.probe.full_steps, 10**6))
        low, high = 0, full
        while low < high:
            half = (low + high + 1) // 2
            low, high = (half, high) if self.seconds(half) <= MARGIN * left else (low, half - 1)
        if low < (least := min(full, LEAST_STEPS)):
            needed = minutes + (self.seconds(least) / MARGIN - left) / 60
            raise ConfigError(
                f"minutes={minutes:g} is too short: a step takes {self.probe.seconds:.2g} s and a validation "
                f"{self.validation:.2g} s, so {least} steps of each candidate, with {self.counts(least)[2]} "
                f"validations in all, take {needed:.1f} minutes. Give more minutes, fewer learning_rates, or a Trainer "
                "with fewer limit_val_batches."
            )
        return low
