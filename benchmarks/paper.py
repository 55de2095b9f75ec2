"""What the LoRA paper found in its adapters (Hu et al. 2021, arXiv:2106.09685, section 7), asked of small models.

    python benchmarks/paper.py

How much rank is needed (7.2, table 6)? Do adapters share their first directions (7.2, figures 3 and 4)? How much do
they amplify what the base already has (7.3, table 7)? The embedded byte-level model learns the standard library's
source, SmolLM2-135M learns pirates' chats. These models are a thousand times smaller than GPT-3 and more, the trainings
short, and the data small: what agrees is a hint, and what does not is no refutation. The lines below say what the
paper found, whether it agrees with the tables, and by what figures.

As in the paper, alpha is the same for all ranks, and learning rates are chosen: by the validation loss of the first
seed, for each rank of the embedded model, and for rank 8 of SmolLM2. phi(i, j) tells how much of the first i directions
of one adapter lies in the first j of the other, from 0 to 1. All figures of several layers are medians over them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer, seed_everything
from many import quiet
from side_by_side import Report, Row, arguments, settings
from torch import Tensor

from lightning_lora import LoRACallback, LoRAConfig, inspect_adapter, pairs, remove
from lightning_lora.engine.low_rank import spectrum, spectrum_of_product, subspace_similarity
from lightning_lora.errors import MissingExtraError
from lightning_lora.page import Page, heat_map, line_chart, number
from lightning_lora.recipes.data import InstructionData, StdlibSource, TextData, pirate_chats
from lightning_lora.recipes.models import ModelSource, smollm2
from lightning_lora.recipes.tasks import CausalLM

RANKS, ALPHA = (1, 2, 4, 8, 64), 16.0
SMALL, LARGE = 8, 64
"""The ranks whose directions are compared, as in figure 3."""
AMPLIFYING = (4, 64)
"""The ranks of table 7."""
TARGETS: dict[str, str | list[str]] = {"q and v": ["q_proj", "v_proj"], "all linear": "all-linear"}
KINDS = tuple(TARGETS["q and v"])
"""The layers whose adapters are looked into, as in the paper."""
SHOWN = (1, 2, 4, 8)
"""phi(i, i) is shown for these."""
GAIN, WRITES = "of the base's loss taken away, %", "dW writes"
RANKS_COMPARED, SEEDS_COMPARED = f"r = {SMALL} and r = {LARGE}", f"r = {LARGE}, two seeds"
CLEARLY = 1.2
"""A factor that is larger than this counts as more than one."""
FIRST_CHANCE, LAST_CHANCE = (f"chance at {i}" for i in (SHOWN[0], SHOWN[-1]))
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "inference_mode": False, "num_sanity_val_steps": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One base and its data. Learning rates are chosen at the ranks `tuned`; other ranks take that of the last one."""

    name: str
    make: Callable[[], tuple[CausalLM, LightningDataModule]]
    steps: int
    rates: Sequence[float]
    tuned: Sequence[int]
    seeds: Sequence[int]
    ranks: Sequence[int] = RANKS
    validation: int = 24


def embedded() -> tuple[CausalLM, LightningDataModule]:
    base = ModelSource("embedded")
    return CausalLM(base, OPTIMIZER), TextData(base, StdlibSource(max_characters=300_000), block_size=64, batch_size=4)


def pirate() -> tuple[CausalLM, LightningDataModule]:
    base = smollm2(dtype="float32")
    chats = pirate_chats(validation_fraction=0.25)
    return CausalLM(base, OPTIMIZER), InstructionData(base, chats, max_length=96, batch_size=1)


STUDIES = (
    Study("embedded", embedded, steps=60, rates=(1e-3, 3e-3, 1e-2), tuned=RANKS, seeds=(0, 1)),
    Study("SmolLM2-135M", pirate, steps=20, rates=(5e-4, 2e-3), tuned=(SMALL,), seeds=(0,)),
)
QUICK = Study("embedded", embedded, steps=2, rates=(1e-3,), tuned=(4,), seeds=(0,), ranks=(4, 8, 64), validation=1)


# Training.


@dataclass(frozen=True)
class Trained:
    """What one training came to."""

    rate: float
    loss: float
    parameters: int
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """Module -> A (r, in) and B (out, r), for the layers that are looked into."""
    moved: float
    """|A - A0| / |A0|: how far A has left its random start."""
    amplified: Mapping[str, tuple[float, ...]]
    """Module -> |dW|, |W|, and |U'WV| for directions of dW, of W, and random ones."""


class Start(Callback):
    """Keeps each A as it is before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.A = {name: A for name, (A, _) in factors_of(pl_module).items()}


def factors_of(task: CausalLM) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        pair.name: (pair.A.detach().clone(), pair.B.detach().clone())
        for pair in pairs(task.model)
        if pair.name.endswith(KINDS)
    }


class Base:
    """The base and the data of a study, and the trainings on it. A training is done once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.task, self.data = study.make()
        trainer = Trainer(limit_val_batches=study.validation, **QUIET)
        self.loss = float(trainer.validate(self.task, self.data, verbose=False)[0]["val_loss"])
        self._done: dict[tuple[str, int, float, int], Trained] = {}

    def best(self, targets: str, rank: int, seed: int) -> Trained:
        """The training at the learning rate that was chosen."""
        tuned = rank if rank in self.study.tuned else self.study.tuned[-1]
        tried = [self._trained(targets, tuned, rate, self.study.seeds[0]) for rate in self.study.rates]
        return self._trained(targets, rank, min(tried, key=lambda one: one.loss).rate, seed)

    def _trained(self, targets: str, rank: int, rate: float, seed: int) -> Trained:
        key = targets, rank, rate, seed
        if key not in self._done:
            self._done[key] = self._train(*key)
            print(
                f"{self.study.name}, {targets}, rank {rank}, {rate:g}, seed {seed}: {self._done[key].loss:.4f}",
                flush=True,
            )
        return self._done[key]

    def _train(self, targets: str, rank: int, rate: float, seed: int) -> Trained:
        task, steps = self.task, self.study.steps
        seed_everything(seed, verbose=False)
        task.learning_rate = rate
        start = Start()
        lora = LoRACallback(LoRAConfig(rank=rank, alpha=ALPHA, target_modules=TARGETS[targets]), save_adapter=False)
        trainer = Trainer(
            max_epochs=-1, max_steps=steps, gradient_clip_val=1.0, callbacks=[lora, start],
            limit_val_batches=self.study.validation, check_val_every_n_epoch=None, val_check_interval=steps, **QUIET,
        )  # fmt: skip
        trainer.fit(task, self.data)
        trained = Trained(
            rate,
            float(trainer.callback_metrics["val_loss"]),
            sum(p.numel() for p in task.parameters() if p.requires_grad),
            factors := factors_of(task),
            median(float((A - start.A[name]).norm() / start.A[name].norm()) for name, (A, _) in factors.items()),
            self._amplified(rank) if rank in AMPLIFYING and targets == "q and v" else {},
        )
        remove(task)
        return trained

    def _amplified(self, rank: int) -> dict[str, tuple[float, ...]]:
        found = {}
        for name, layer in inspect_adapter(self.task.model, intruder_limit=0).layers.items():
            assert layer.base is not None
            own = torch.linalg.svdvals(self.task.model.get_parameter(f"{name}.weight").detach())[:rank]
            found[name] = (layer.norm, layer.base.norm, layer.base.strength, float(own.norm()), layer.base.by_chance)
        return found


# What is asked of them.


def losses(base: Base) -> Iterator[Row]:
    for targets in TARGETS:
        for rank in base.study.ranks:
            runs = [base.best(targets, rank, seed) for seed in base.study.seeds]
            values = [run.loss for run in runs]
            yield {
                "adapted": targets,
                "rank": rank,
                "parameters": runs[0].parameters,
                "learning rate": runs[0].rate,
                "val_loss": mean(values),
                "least": min(values),
                "most": max(values),
                GAIN: 100 * (1 - mean(values) / base.loss),
            }


Grids = dict[tuple[str, str, str], Tensor]
"""(layers, adapters that are compared, whose directions) -> phi (i, j), the median over the layers."""


def similarities(base: Base) -> tuple[list[Row], Grids]:
    first, second = base.study.seeds[0], base.study.seeds[0] + 1
    of = partial(base.best, "q and v")
    compared = {
        RANKS_COMPARED: (of(SMALL, first), of(LARGE, first)),
        f"r = {SMALL}, two seeds": (of(SMALL, first), of(SMALL, second)),
        SEEDS_COMPARED: (of(LARGE, first), of(LARGE, second)),
    }
    rows, grids = [], {}
    for kind in KINDS:
        for pair, (one, other) in compared.items():
            names = [name for name in one.factors if name.endswith(kind)]
            found = [
                {
                    w: subspace_similarity(U, directions(*other.factors[n])[w])
                    for w, U in directions(*one.factors[n]).items()
                }
                for n in names
            ]
            for whose in found[0]:
                grid = grids[kind, pair, whose] = torch.stack([own[whose] for own in found]).median(0).values
                A, B = one.factors[names[0]]
                wide = len(B) if whose == WRITES else A.shape[1]
                row: Row = {"layers": kind, "adapters": pair, "directions": whose}
                row |= {f"phi({i}, {i})": float(grid[i - 1, i - 1]) for i in SHOWN}
                row |= {FIRST_CHANCE: SHOWN[0] / wide, LAST_CHANCE: SHOWN[-1] / wide}
                rows.append(row | {"A moved by": max(one.moved, other.moved)})
    return rows, grids


def directions(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Orthonormal columns, the strongest first. The paper compares those of A."""
    s = spectrum_of_product(B.double(), A.double())
    return {"A": spectrum(A.double()).Vh.mT, "dW reads": s.Vh.mT, WRITES: s.U}


def amplification(base: Base) -> Iterator[Row]:
    for kind in KINDS:
        for rank in AMPLIFYING:
            each = base.best("q and v", rank, base.study.seeds[0]).amplified
            own = [values for name, values in each.items() if name.endswith(kind)]
            dW, W, along_dW, along_W, random = (median(column) for column in zip(*own))
            yield {
                "layers": kind,
                "rank": rank,
                "|dW|": dW,
                "|W|": W,
                "|U'WV| of dW": along_dW,
                "of W": along_W,
                "of random": random,
                "amplification": median(one[0] / one[2] for one in own),
                "dW over random": median(one[2] / one[4] for one in own),
            }


def findings(name: str, loss: Sequence[Row], shared: Sequence[Row], amplified: Sequence[Row]) -> Iterator[str]:
    """What the paper says beside what the tables say, a line for each."""
    for targets in TARGETS:
        own = [row for row in loss if row["adapted"] == targets]
        least, best = own[0], max(own, key=lambda row: row[GAIN])
        lost, spread = least["val_loss"] - best["val_loss"], max(row["most"] - row["least"] for row in own)
        is_enough = lost <= max(spread, 0.05 * best["val_loss"] * best[GAIN] / (100 - best[GAIN]))
        chance = f"two seeds differ by up to {spread:.2g}" if spread else "there is one seed, so chance is not known"
        yield (
            f"{name}, {targets}, a very small rank is enough: {said(is_enough)}. Rank {least['rank']} takes away "
            f"{least[GAIN]:.3g} % of the base's loss, and rank {best['rank']}, the best, {best[GAIN]:.3g} %. They are "
            f"{lost:.2g} apart; {chance}. A difference counts above that of the seeds and 5 % of what is taken away."
        )
    first, last = f"phi({SHOWN[0]}, {SHOWN[0]})", f"phi({SHOWN[-1]}, {SHOWN[-1]})"
    phi = {(row["layers"], row["adapters"], row["directions"]): row for row in shared}
    for kind in KINDS:
        A, dW = (phi[kind, RANKS_COMPARED, whose] for whose in ("A", "dW reads"))
        is_shared = A[first] > 0.5
        yield (
            f"{name}, {kind}, adapters of rank {SMALL} and {LARGE} share their first direction ({first} above 0.5), "
            f"and hardly the others: {said(is_shared)}. {first} is {A[first]:.2f} for A and {dW[first]:.2f} for what "
            f"dW reads (chance: {A[FIRST_CHANCE]:.3f}); {last} is {A[last]:.2f} and {dW[last]:.2f} "
            f"(chance: {A[LAST_CHANCE]:.3f}). A has left its random start by {A['A moved by']:.2f} of its norm: "
            "the less it has, the more of its directions is chance."
        )
    q, v = (phi[kind, SEEDS_COMPARED, "A"] for kind in KINDS)
    yield (
        f"{name}, two seeds of rank {LARGE} share more directions than chance: "
        f"{said(min(q[last] / q[LAST_CHANCE], v[last] / v[LAST_CHANCE]) > CLEARLY)}; and more in {KINDS[0]} than in "
        f"{KINDS[1]}: {said(q[last] > v[last])}. {last} of A is {q[last]:.2f} and {v[last]:.2f}, where chance is "
        f"{q[LAST_CHANCE]:.3f}."
    )
    for kind in KINDS:
        small, large = (next(r for r in amplified if (r["layers"], r["rank"]) == (kind, n)) for n in AMPLIFYING)
        over, factor, second = small["dW over random"], small["amplification"], large["amplification"]
        yield (
            f"{name}, {kind}, W is stronger along dW's directions than along random ones: {said(over > CLEARLY)}, by a "
            f"factor of {over:.2f} at rank {AMPLIFYING[0]} (paper: 16). dW amplifies what W has there: "
            f"{said(factor > CLEARLY)}, by {factor:.2g} (paper: 21.5); and less at rank {AMPLIFYING[1]}: "
            f"{said(second < factor)}, by {second:.2g} (paper: 1.9). It grows with alpha and learning rate."
        )


def said(agrees: bool) -> str:
    return "agrees" if agrees else "does not agree"


def draw(page: Page, study: Study, loss: Sequence[Row], grids: Grids) -> None:
    """The section of one base: loss against rank, and phi as the paper's figures show it."""
    page.section(study.name)
    lines = {t: [(row["rank"], row["val_loss"]) for row in loss if row["adapted"] == t] for t in TARGETS}
    title = f"{study.name}: validation loss against rank"
    ticks = {float(rank): str(rank) for rank in study.ranks}
    chart = line_chart(lines, title=title, x="rank", y="validation loss", log_x=True, ticks_x=ticks)
    texts = [
        [str(row[column]) for column in ("adapted", "rank", "parameters")] + [number(row["val_loss"], 5)]
        for row in loss
    ]
    page.figure(
        title, chart, "Table 6 of the paper asks the same. Each point is the mean over the seeds.",
        columns=["adapted", "rank", "parameters", "validation loss"], rows=texts,
    )  # fmt: skip
    for (kind, pair, whose), grid in grids.items():
        title = f"{study.name}, {kind}: {pair}, {whose}"
        grid = grid[:SMALL]
        chart = heat_map(
            grid.tolist(), rows=[f"i = {i}" for i in range(1, SMALL + 1)],
            columns=[str(j) for j in range(1, grid.shape[1] + 1)], title=title, x="j", low=0, high=1,
        )  # fmt: skip
        page.figure(title, chart, "phi(i, j), as in figures 3 and 4 of the paper: 1 is a shared subspace.")


@dataclass(frozen=True)
class Asked:
    """What was found on one base."""

    loss: list[Row]
    shared: list[Row]
    amplified: list[Row]
    grids: Grids
    bare: float
    seconds: float


def asked(study: Study) -> Asked | str:
    """The trainings of one study, in a process of their own; a text says why there are none."""
    quiet()
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        base = Base(study)
    except MissingExtraError as error:
        return f"{study.name} was left out: {error}"
    loss = list(losses(base))
    shared, grids = similarities(base)
    amplified = list(amplification(base))
    return Asked(loss, shared, amplified, grids, base.loss, time.process_time() - started)


def main() -> None:
    given = arguments(__doc__)
    report = Report("paper", "The paper's findings, on small models", settings(alpha=ALPHA, optimizer="AdamW"))
    page = Page(report.title, "Section 7 of Hu et al. 2021 (arXiv:2106.09685), with charts of its kind.")
    studies = [QUICK] if given.quick else STUDIES
    with ProcessPoolExecutor(len(studies), multiprocessing.get_context("spawn")) as pool:
        answers = list(pool.map(asked, studies))
    lines: list[str] = []
    for study, answer in zip(studies, answers, strict=True):
        if isinstance(answer, str):
            report.note(answer)
            continue
        report.table(f"{study.name}: how much rank is needed (the bare base: {answer.bare:.4f})", answer.loss)
        report.table(f"{study.name}: directions that adapters share", answer.shared)
        report.table(f"{study.name}: how much is amplified", answer.amplified)
        report.settings[study.name] = (
            f"{study.steps} steps, at most {study.validation} batches of validation, learning rates "
            f"{listed(study.rates)}, seeds {listed(study.seeds)}, {answer.seconds:.0f} s of the processor"
        )
        lines += findings(study.name, answer.loss, answer.shared, answer.amplified)
        draw(page, study, answer.loss, answer.grids)
    report.text = "\n\n".join([__doc__.partition("paper.py\n\n")[2].strip(), "\n".join(f"- {line}" for line in lines)])
    report.write(given.results)
    (given.results / "paper.html").write_text(page.html(), encoding="utf-8")


def listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    main()
