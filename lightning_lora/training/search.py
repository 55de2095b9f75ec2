"""Successive halving over candidates, and the choice among those that were trained to the end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from lightning_lora.engine.tree import entry_matches
from lightning_lora.errors import ConfigError, TargetError, TrainingError
from lightning_lora.training.advice import Advice
from lightning_lora.training.trials import Candidate, Cut, Trials, mean

HALF_DECADES = (-3, -2, -1, 0, 1, 2, 3)
"""The grid of learning rates, in steps of sqrt(10) from its middle: three decades in all."""
CUTS: tuple[tuple[str, dict[str, float]], ...] = (
    ("rank / 2", {"share": 1 / 2}),
    ("rank / 4", {"share": 1 / 4}),
    ("rank / 8", {"share": 1 / 8}),
    ("energy 0.99", {"energy": 0.99}),
    ("energy 0.95", {"energy": 0.95}),
    ("energy 0.9", {"energy": 0.9}),
)
VARIANTS = {"targets": "attention only", "rslora": "rsLoRA", "dora": "DoRA", "lora_plus": "LoRA+"}
"""What can be compared -> its name in the table."""
LORA_PLUS_RATIO = 16.0
"""B's learning rate as a multiple of A's (Hayou et al. 2024, arXiv:2402.12354, section 6)."""
KEPT = 2
"""The learning rates that are trained to the end."""
LEAST_SPREAD = 0.001
"""As a share of the metric."""
WORTH_TRYING = 0.01
"""As a share of the metric: where a cut costs less than that, its rank is worth a training of its own."""


class Search:
    """What was tried so far, and the best of it."""

    def __init__(self, trials: Trials, *, sign: int, seeds: Sequence[int], progress: Callable[[str], object]) -> None:
        self.trials, self.sign, self.seeds, self.progress = trials, sign, seeds, progress
        self.all: list[Candidate] = []
        self.best: Candidate | None = None
        self.full_steps = math.nan
        self.cut_of: Candidate | None = None
        """What was cut, where anything was."""
        self.cuts: list[tuple[Cut, ...]] = []
        self.whole: tuple[float, ...] = ()
        self.left_out: list[str] = []
        self.ran_out = False

    def rates(self, grid: list[Candidate]) -> None:
        self.finalists(self.race(grid, keep=KEPT))
        if not any(math.isfinite(c.mean) for c in self.measured()):
            raise TrainingError(
                f"No candidate trained to a finite {self.trials.monitor}: give lower learning_rates than "
                f"{min(c.lr for c in grid):.2g}, and look at the data."
            )

    def variant(self, name: str, modules: Sequence[Any]) -> None:
        """Try a variant at three learning rates around the best one, and take it where that pays."""
        assert self.best is not None
        best = self.best
        config, ratio = best.config, best.lora_plus_ratio
        if name == "targets":
            names = [module.name for module in modules]
            every = [name for name, _ in self.trials.module.named_modules()]
            targets = attention_only(names, every)
            if targets is None:
                self.left_out.append("Attention layers alone: no part of the adapted layers is called attention.")
                return
            config = replace(config, target_modules=targets)
        elif name == "lora_plus":
            ratio = LORA_PLUS_RATIO
        else:
            config = replace(config, use_rslora=True) if name == "rslora" else replace(config, use_dora=True)
        # rsLoRA's scale is sqrt(rank) times as large, which acts on the update as a learning rate does.
        middle = best.lr / (math.sqrt(config.rank) if name == "rslora" else 1)
        grid = [Candidate(VARIANTS[name], config, _rounded(middle * 10 ** (half / 2)), ratio) for half in (-1, 0, 1)]
        try:
            self.finalists(sorted(self.race(grid, keep=KEPT), key=self.badness)[:1])
        except (ConfigError, TargetError) as error:  # what holds for all layers need not for these, nor with DoRA
            self.left_out.append(f"{VARIANTS[name]}: {error}")

    def ranks(self) -> None:
        """Cut the best adapter, and train the smallest rank that costs nothing."""
        assert self.best is not None
        best = self.cut_of = self.best
        self.progress(f"The adapter of rank {best.config.rank}, cut by SVD")
        self.whole = tuple(best.measured[seed][self.trials.steps] for seed in self.seeds)
        for name, how in CUTS:
            of_seeds = [self.trials.cut(best, seed, name, **how) for seed in self.seeds]
            found = tuple(cut for cut in of_seeds if cut is not None)
            if len(found) < len(of_seeds):
                self.left_out.append(f"Smaller ranks: an adapter that starts by init={best.config.init!r} is not cut.")
                return
            self.cuts.append(found)
        ranks = [max(1, int(best.config.rank * share)) for _, how in CUTS if (share := how.get("share"))]
        costless = [
            rank
            for rank, cuts in zip(ranks, self.cuts, strict=False)
            if self.cost(cuts) <= WORTH_TRYING * abs(best.mean)
        ]
        if costless and (smallest := min(costless)) < best.config.rank:
            smaller = replace(best, config=replace(best.config, rank=smallest), measured={}, reports=[])
            self.all.append(smaller)
            self.finalists([smaller])

    def race(self, field: list[Candidate], keep: int) -> list[Candidate]:
        """Train all to an eighth of the steps, the better half to a quarter, and `keep` to the end."""
        self.all += field
        seed, steps = self.seeds[0], self.trials.steps
        sizes = (len(field), max(keep, math.ceil(len(field) / 2)), keep)
        for step, size in zip((max(1, steps // 8), max(1, steps // 4), steps), sizes, strict=True):
            field = self.last(field, keep) if size == keep else sorted(field, key=self.badness)[:size]
            for candidate in field:
                self.train(candidate, seed, step)
        return field

    def last(self, field: Sequence[Candidate], count: int) -> list[Candidate]:
        """The best so far, and those with the next lower learning rates.

        Early on, a rate that is too high looks better than it is (Wu et al. 2018, arXiv:1803.02021): the second best is
        then often the next higher rate, and the best in the end the next lower one.
        """
        ranked = sorted(field, key=self.badness)
        lower = [c for c in ranked if c.lr < ranked[0].lr and math.isfinite(c.mean)]
        return list(dict.fromkeys([ranked[0], *sorted(lower, key=lambda c: -c.lr), *ranked]))[:count]

    def finalists(self, field: list[Candidate]) -> None:
        """Train `field` with every seed, and note the best so far."""
        for seed in self.seeds:
            for candidate in field:
                self.train(candidate, seed, self.trials.steps)
        self.best = self.chosen()

    def train(self, candidate: Candidate, seed: int, step: int) -> None:
        if step in candidate.measured.get(seed, {}):
            return
        value = self.trials.train(candidate, seed, step)
        what = f"{candidate.name}, rank {candidate.config.rank}, learning rate {candidate.lr:.2g}, seed {seed}"
        self.progress(f"{what}: {self.trials.monitor} {value:.4g} after {step} steps")

    def badness(self, candidate: Candidate) -> float:
        """The mean of the metric, made so that less is better; what is not finite is the worst."""
        return self.sign * candidate.mean if math.isfinite(candidate.mean) else math.inf

    @property
    def spread(self) -> float | None:
        """Of the best candidate (that of a worse one, which may be large, would make it pass for as good), and at least
        LEAST_SPREAD: two seeds may agree by chance."""
        best = min(self.measured(), key=self.badness)
        own = best.spread if math.isfinite(best.mean) else None
        return None if own is None else max(own, LEAST_SPREAD * abs(best.mean))

    def measured(self) -> list[Candidate]:
        """The candidates that were trained longest, with as many seeds as two of them have (all, but where the budget
        ended)."""
        most = max((c.steps for c in self.all), default=0)
        longest = sorted((c for c in self.all if c.steps == most), key=lambda c: -len(c.values()))
        seeds = len(longest[:2][-1].values())
        return [c for c in longest if len(c.values()) >= seeds]

    def as_good(self, a: Candidate, b: Candidate) -> bool:
        """True if `a` is not worse than `b` by more than the spread over seeds; nor, seed by seed (a seed gives both
        the same rows), by a difference that is more than chance."""
        steps = self.trials.steps
        seeds = [s for s in a.measured if steps in a.measured[s] and steps in b.measured.get(s, {})]
        differences = [a.measured[seed][steps] - b.measured[seed][steps] for seed in seeds]
        within = self.badness(a) <= self.badness(b) + (self.spread or 0)
        return within and (len(differences) < 2 or self.is_chance(differences, b.mean))

    def is_chance(self, differences: Sequence[float], value: float) -> bool:
        """True if differences from `value`, one for each seed, show no change for the worse: their mean is at most two
        of its standard errors (of two seeds: the larger difference less the smaller), or LEAST_SPREAD."""
        if not all(map(math.isfinite, [*differences, value])):
            return False
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return self.sign * mean(differences) <= max(2 * error, LEAST_SPREAD * abs(value))

    def chosen(self) -> Candidate:
        """The cheapest of those that are as good as the best; of one name and rank, the best learning rate.

        Two seeds often do not tell a loss of some percent from chance. So a lower rank, other layers and variants have
        to be near the best in their mean as well; what was asked about, LoRA of the largest rank, need not.
        """
        field = self.measured()
        best = min(field, key=self.badness)
        by_kind: dict[Any, Candidate] = {}
        for candidate in sorted(field, key=self.badness):
            by_kind.setdefault((candidate.name, candidate.config.rank), candidate)
        order = {id(c): i for i, c in enumerate(self.all)}  # what comes first is the plainer one
        first = self.all[0]
        good = [
            c
            for c in by_kind.values()
            if self.as_good(c, best)
            and ((c.name, c.config.rank) == (first.name, first.config.rank) or self.behind(c, best) <= WORTH_TRYING)
        ]
        return min([best, *good], key=lambda c: (c.parameters, order[id(c)]))

    def behind(self, a: Candidate, b: Candidate) -> float:
        """By how much `a` is worse than `b` in the mean, as a share of b's metric."""
        return (self.badness(a) - self.badness(b)) / (abs(b.mean) or 1)

    def advice(self, base: float, monitor: str, own_rate: float) -> Advice:
        best = self.chosen()
        tried = sorted(self.all, key=lambda c: (-c.steps, -len(c.values()), self.badness(c)))
        return Advice(
            config=best.config,
            lr=best.lr,
            lora_plus_ratio=best.lora_plus_ratio,
            candidates=tuple(tried),
            cuts=tuple(self.cuts),
            whole=self.whole,
            base=base,
            spread=self.spread,
            monitor=monitor,
            mode="min" if self.sign > 0 else "max",
            steps=self.trials.steps,
            own_rate=own_rate,
            recommended=tuple(self.recommended(best, base)),
            unknown=tuple(self.unknown(best)),
        )

    def recommended(self, best: Candidate, base: float) -> list[str]:
        monitor, spread = self.trials.monitor, self.spread
        what = f"{best.name} of rank {best.config.rank}, alpha {best.config.alpha:g}, learning rate {best.lr:.2g}"
        lines = [f"Recommended: {what}: {monitor} {best.mean:.4g} after {best.steps} steps, {base:.4g} before."]
        if self.badness(best) >= self.sign * base:
            lines.append("That is no better than the bare base: nothing was learned that validation shows.")
        if spread is None:
            return [*lines, "No candidate has two seeds, so it is not known which differences are more than chance."]
        lines.append(
            f"Spread over its seeds: {spread:.2g}. Two candidates are compared seed by seed; a difference of at most "
            "two of its standard errors may be chance."
        )
        for other in self.measured():
            if other is best:
                continue
            name = f"{other.name} of rank {other.config.rank} at {other.lr:.2g} ({other.mean:.4g})"
            if self.as_good(other, best) and self.as_good(best, other):
                more = other.parameters > best.parameters
                costs = f" It costs {_times(other.parameters, best.parameters)} the parameters." if more else ""
                gain = self.behind(best, other)
                if abs(gain) <= WORTH_TRYING:
                    lines.append(f"{name} is as good.{costs}")
                else:
                    seeds, how = len(other.values()), "better" if gain > 0 else "worse"
                    lines.append(
                        f"{name} is {abs(gain):.1%} {how} in the mean, which {seeds} seeds do not tell "
                        f"from chance.{costs} More seeds can tell more: seeds={2 * seeds}."
                    )
            else:
                lines.append(f"{name} is {'worse' if self.as_good(best, other) else 'better'}.")
        as_good = [
            cuts
            for cuts in self.cuts
            if cuts[0].parameters < best.parameters
            and self.cost(cuts) <= WORTH_TRYING * abs(best.mean)
            and self.is_chance([cut.value - own for cut, own in zip(cuts, self.whole, strict=True)], mean(self.whole))
        ]
        if as_good and (cut_of := self.cut_of) is not None:
            cuts = min(as_good, key=lambda cuts: cuts[0].parameters)
            lines.append(
                f"After a training of {cut_of.name} at rank {cut_of.config.rank}, cut to {cuts[0].name} (mean rank "
                f"{mean([cut.rank for cut in cuts]):.3g}), the adapter is as good "
                f"({mean([cut.value for cut in cuts]):.4g}), with "
                f"{cuts[0].parameters / cut_of.parameters:.0%} of its parameters."
            )
        return lines

    def cost(self, cuts: Sequence[Cut]) -> float:
        """The metric that a cut loses, in the mean over seeds."""
        return self.sign * (mean([cut.value for cut in cuts]) - mean(self.whole))

    def unknown(self, best: Candidate) -> list[str]:
        lines = list(self.left_out)
        if self.ran_out:
            lines.insert(0, "What the budget did not allow: the search was not ended. More minutes would end it.")
        if self.trials.steps < self.full_steps:
            whole_run = f" of {self.full_steps:,.0f}" if math.isfinite(self.full_steps) else ""
            lines.append(
                f"Longer trainings: these had {self.trials.steps}{whole_run} steps. A longer one may want a lower "
                "learning rate, and can use a higher rank."
            )
        rates = [c.lr for c in self.all if c.name == self.all[0].name]
        for edge, word in ((min(rates), "lower"), (max(rates), "higher")):
            if best.lr == edge and len(rates) > 1:
                lines.append(f"Whether a {word} learning rate is better: {edge:.2g} is at the edge of those tried.")
        lines.append(f"Ranks above {self.all[0].config.rank}, other alphas, batch sizes, schedules and data.")
        lines.append("The choice was made on the validation data, so their loss flatters it: test on others.")
        return lines


def around(lr: float) -> list[float]:
    """A grid of learning rates over three decades, `lr` in its middle.

    >>> around(1e-3)
    [3.2e-05, 0.0001, 0.00032, 0.001, 0.0032, 0.01, 0.032]
    """
    return [_rounded(lr * 10 ** (half / 2)) for half in HALF_DECADES]


def attention_only(adapted: Collection[str], every: Collection[str]) -> list[str] | None:
    """The shortest name endings that match the attention layers among `adapted` and no other module of `every`; None
    where there are none, or nothing else.

    >>> layers = ["h.0.attn.q", "h.0.attn.dense", "h.0.mlp.dense"]
    >>> attention_only(layers, layers)
    ['attn.dense', 'q']
    """
    chosen = {name for name in adapted if "attn" in name.lower() or "attention" in name.lower()}
    others = set(every) - chosen
    if not chosen or not set(adapted) - chosen:
        return None
    endings = set()
    for name in chosen:
        parts = name.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        endings.add(next((t for t in tails if not any(entry_matches(t, other) for other in others)), name))
    return sorted(endings)


def _rounded(lr: float) -> float:
    """`lr` to two digits: 0.0032."""
    return float(f"{lr:.1e}")


def _times(more: int, less: int) -> str:
    return f"{more / max(1, less):.3g} times"
