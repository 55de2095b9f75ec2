"""What `advise` measures is what plain trainings give, what it recommends follows from that, and the module stays."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRACallback, LoRAConfig, advise, inject, pairs
from lightning_lora.engine.present import injections
from lightning_lora.errors import AdapterStateError, ConfigError, DataError, TrainingError
from lightning_lora.training.search import Search, attention_only
from lightning_lora.training.trials import Candidate, Cut, OutOfTimeError, Trials

from .lit import BuiltInConfigureModel, Lit, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 1 module"),  # a frozen layer, in evaluation mode
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]
CPU = partial(pl.Trainer, accelerator="cpu", max_epochs=4)
SMALL: dict[str, Any] = {
    "trainer": CPU,
    "max_rank": 3,
    "steps": 8,
    "minutes": 60,
    "learning_rates": [0.003, 0.03],
    "progress": lambda line: None,
}


def state(module: pl.LightningModule) -> dict[str, Any]:
    """All that must be as before: tensors by name and identity, modes, random generators."""
    return {
        **{name: (id(p), p.dtype, p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()},
        **{name: (id(b), b.dtype, b.clone()) for name, b in module.named_buffers()},
        "classes": [type(inner) for inner in module.modules()],
        "modes": [inner.training for inner in module.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        own, other = (list(x.items()) if isinstance(x, dict) else x for x in (a, b))
        return len(own) == len(other) and all(map(same, own, other))
    return a == b


class Normed(Lit):
    """With a buffer of its own, which its steps change, and a frozen layer in evaluation mode."""

    def build(self, seed: int) -> None:
        super().build(seed)
        self.register_buffer("seen", torch.zeros(()))
        self.net[3].requires_grad_(False).eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_module_and_the_random_generators_are_as_before(precision):
    module = Normed()
    before = state(module)
    advise(module, **{**SMALL, "trainer": partial(CPU, precision=precision), "compare": ["rslora"]})
    assert same(before, state(module))
    assert not list(injections(module))
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


def test_a_layer_that_is_built_in_configure_model_has_no_adapter_after():
    module = BuiltInConfigureModel()
    advise(module, **SMALL)
    assert not list(injections(module))
    assert [type(layer) for layer in module.net if isinstance(layer, nn.Linear)] == [nn.Linear] * 3


def plain(lr: float, seed: int, config: LoRAConfig, **settings: Any) -> tuple[Lit, float]:
    """The validation loss of an ordinary training at that learning rate."""
    module = Lit(lr=lr)
    pl.seed_everything(seed, verbose=False)
    own = trainer(LoRACallback(config), max_steps=8, max_epochs=-1, num_sanity_val_steps=0, **settings)
    own.fit(module)
    (metrics,) = own.validate(module, verbose=False)
    return module, metrics["val_loss"]


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_a_finalist_has_the_loss_of_a_plain_training_with_its_settings(settings):
    advice = advise(Lit(), **{**SMALL, "trainer": partial(CPU, **settings)})
    finalists = [c for c in advice.candidates if len(c.values()) == 2]
    assert {c.lr for c in finalists} == {0.003, 0.03}
    for candidate in finalists:
        for seed, by_step in candidate.measured.items():
            _, loss = plain(candidate.lr, seed, candidate.config, **settings)
            # The rate is a product of two floats here, which rounds once more.
            assert by_step[8] == pytest.approx(loss, rel=1e-5)


def test_a_cut_has_the_loss_of_weights_with_the_dense_svd_of_each_update():
    config = LoRAConfig(rank=3)
    advice = advise(Lit(), **SMALL)
    top = next(c for c in advice.candidates if c.config.rank == 3 and c.measured[0].get(8) == advice.whole[0])
    half = next(cuts[0] for cuts in advice.cuts if cuts[0].name == "rank / 2")
    module, _ = plain(top.lr, 0, config)
    updates = {}
    for pair in pairs(module):
        U, S, Vh = torch.linalg.svd(pair.module.delta_weight())
        updates[pair.name] = S[0] * torch.outer(U[:, 0], Vh[0])
    bare = Lit()
    for name, update in updates.items():
        bare.get_submodule(name).weight.data += update
    (metrics,) = trainer().validate(bare, verbose=False)
    assert half.value == pytest.approx(metrics["val_loss"], rel=1e-4)
    assert set(half.rank_pattern.values()) == {1}
    assert half.rank_pattern.keys() == updates.keys()


def test_the_schedule_of_the_module_is_scaled_and_not_replaced():
    class Scheduled(Lit):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def training_step(self, batch, batch_idx):
            used.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    used: list[float] = []
    search = Trials(Scheduled(lr=0.02), None, CPU, monitor="val_loss", deadline=1e18, product_decay=None)
    search.steps = 4
    with search.running():
        for step in (2, 4):  # in two parts, the second of which goes on from a checkpoint
            search.train(Candidate("LoRA", LoRAConfig(rank=2), 0.1), 0, step)
            assert used[-1] == pytest.approx(0.1 / step)


def test_a_schedule_that_goes_by_the_metric_has_its_validations():
    class Plateau(Lit):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

        def on_train_epoch_start(self):
            rates.append(self.optimizers().param_groups[0]["lr"])

    rates: list[float] = []
    advise(Plateau(), **{**SMALL, "steps": 15, "learning_rates": [0.01]})  # epochs have 5 steps
    assert min(rates) < 0.01  # lowered, by metrics that are there


def test_variants_train_and_one_that_does_not_fit_is_told():
    class Attentive(Lit):
        def build(self, seed: int) -> None:
            self.attn = nn.Linear(8, 8)
            super().build(seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.attn(x))

    config = LoRAConfig(rank_pattern={"net.0": 2})
    both = ["targets", "rslora", "dora", "lora_plus"]
    advice = advise(Attentive(), config=config, **{**SMALL, "compare": both})
    names = {c.name for c in advice.candidates if c.values()}
    assert names == {"LoRA", "rsLoRA", "DoRA", "LoRA+"}
    assert [line for line in advice.unknown if "net.0" in line and line.startswith("attention only: ")], advice.unknown
    rslora = sorted({c.lr for c in advice.candidates if c.name == "rsLoRA"})
    assert all(b / a == pytest.approx(10**0.5, rel=0.1) for a, b in pairwise(rslora))
    advice = advise(Attentive(), **{**SMALL, "compare": ["targets"]})
    (targets,) = {str(c.config.target_modules) for c in advice.candidates if c.name == "attention only"}
    assert targets == "['attn']"


# What is recommended, with trainings whose results are given.


class Given:
    """Trainings with given results: f(candidate, seed) -> loss; time ends after `most` trainings."""

    monitor, steps, module = "val_loss", 80, nn.Module()

    def __init__(self, loss: Any, most: int = 10**9, cut_cost: float = 0.0) -> None:
        self.loss, self.most, self.cut_cost, self.trained = loss, most, cut_cost, []

    def train(self, candidate: Candidate, seed: int, step: int) -> float:
        if len(self.trained) >= self.most:
            raise OutOfTimeError
        self.trained.append((candidate.config.rank, candidate.lr, seed, step))
        candidate.measured.setdefault(seed, {})[step] = value = self.loss(candidate, seed)
        candidate.reports.append(type("Report", (), {"trainable": candidate.config.rank * 10})())
        return value

    def cut(self, candidate: Candidate, seed: int, name: str, **how: float) -> Cut:
        return Cut(name, 1.0, {}, 10, self.loss(candidate, seed) + self.cut_cost)


def searched(trials: Given, rates=(1e-4, 1e-3, 1e-2), sign: int = 1, rank: int = 16) -> Any:
    search = Search(trials, sign=sign, seeds=(0, 1), progress=lambda line: None)
    search.full_steps = 80.0
    try:
        search.rates([Candidate("LoRA", LoRAConfig(rank=rank), lr) for lr in rates])
        search.ranks()
    except OutOfTimeError:
        search.ran_out = True
    return search.advice(4.0, "val_loss", 1e-4)


def noisy(loss: float, seed: int) -> float:
    """Two seeds differ by 0.02."""
    return loss + (0.01 if seed else -0.01)


@pytest.mark.parametrize(("extra", "other_way", "rank"), [(0.015, True, 2), (0.025, True, 16), (0.015, False, 16)])
def test_a_smaller_rank_is_as_good_within_the_spread_over_seeds_and_not_where_every_seed_tells(extra, other_way, rank):
    best = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.5}

    def loss(candidate: Candidate, seed: int) -> float:
        is_small = candidate.config.rank == 2
        return noisy(best[candidate.lr] + extra * is_small, seed ^ (is_small and other_way))

    advice = searched(Given(loss))
    assert (advice.config.rank, advice.lr) == (rank, 1e-3)
    assert advice.spread == pytest.approx(0.02)
    said = "\n".join(advice.recommended)
    assert ("LoRA of rank 16 at 0.001 (2) is as good. It costs 8 times the parameters." in said) is (rank == 2)
    assert (f"LoRA of rank 2 at 0.001 ({2 + extra:g}) is worse." in said) is (rank == 16)


def test_a_worse_candidate_with_a_large_spread_does_not_pass_for_as_good():
    advice = searched(Given(lambda c, seed: 2.0 + 0.01 * seed if c.config.rank == 16 else 2.0 + 3 * seed))
    assert advice.config.rank == 16


def test_the_field_is_halved_while_it_trains():
    rates = [10.0**-i for i in range(7)]
    trials = Given(lambda c, seed: noisy(abs(c.lr - 1e-2), seed))
    searched(trials, rates)
    first_seed = [(lr, step) for rank, lr, seed, step in trials.trained if rank == 16 and seed == 0]
    assert sorted(lr for lr, step in first_seed if step == 10) == sorted(rates)
    assert sorted(lr for lr, step in first_seed if step == 20) == [1e-5, 1e-4, 1e-3, 1e-2]
    assert sorted(lr for lr, step in first_seed if step == 80) == [1e-3, 1e-2]


def test_the_next_lower_rate_is_trained_to_the_end_also_where_a_higher_one_is_ahead_early():
    early = {1e-4: 3.0, 1e-3: 2.5, 1e-2: 2.0, 1e-1: 2.2}
    trials = Given(lambda c, seed: noisy(early[c.lr], seed))
    searched(trials, list(early))
    assert sorted({lr for rank, lr, _, step in trials.trained if rank == 16 and step == 80}) == [1e-3, 1e-2]
    early[1e-3] = math.nan
    trials = Given(lambda c, seed: noisy(early[c.lr], seed))
    searched(trials, list(early))
    assert {lr for rank, lr, _, step in trials.trained if rank == 16 and step == 80} == {1e-2, 1e-4}


def test_a_lower_rank_that_is_worse_in_the_mean_is_not_taken_though_seeds_do_not_tell_it_from_chance():
    # By seed the small one is 0.1 worse and 0.04 better: its mean is 1.5 % worse, two standard errors are 7 %.
    values = {(16, 0): 2.0, (16, 1): 2.06, (2, 0): 2.1, (2, 1): 2.02}
    advice = searched(Given(lambda c, seed: values[c.config.rank, seed]), rates=[1e-3])
    assert advice.config.rank == 16
    assert (
        "LoRA of rank 2 at 0.001 (2.06) is 1.5% worse in the mean, which 2 seeds do not tell from chance. More seeds "
        "can tell more: seeds=4."
    ) in advice.recommended


def test_what_costs_more_is_not_taken_for_a_mean_that_seeds_do_not_tell_from_chance():
    search = Search(Given(None), sign=1, seeds=(0, 1), progress=lambda line: None)
    plain, variant = Candidate("LoRA", LoRAConfig(), 1e-3), Candidate("DoRA", LoRAConfig(use_dora=True), 1e-3)
    for candidate, losses, parameters in ((plain, (2.1, 2.02), 10), (variant, (2.0, 2.06), 11)):
        candidate.measured.update({seed: {80: loss} for seed, loss in enumerate(losses)})
        candidate.reports.append(type("Report", (), {"trainable": parameters})())
        search.all.append(candidate)
    assert search.chosen() is plain


@pytest.mark.parametrize(("differences", "chance"), [([3.0, 1.0], True), ([3.0, 1.1], False), ([1, 1, 1, 0.2], False)])
def test_a_difference_of_at_most_two_standard_errors_may_be_chance(differences, chance):
    # Of two values a standard error is half their distance: 2 <= 2 * 1, 2.05 > 2 * 0.95. Of these four: 0.8 > 2 * 0.2.
    assert Search(Given(None), sign=1, seeds=(0, 1), progress=str).is_chance(differences, 10.0) is chance


def test_the_largest_metric_is_the_best_where_that_is_meant_and_what_is_not_finite_is_the_worst():
    values = {1e-4: 0.5, 1e-3: 0.7, 1e-2: float("nan")}
    assert searched(Given(lambda c, seed: noisy(values[c.lr], seed)), sign=-1).lr == 1e-3


def test_where_nothing_is_learned_it_is_said():
    advice = searched(Given(lambda c, seed: noisy(5.0, seed)))
    assert any("no better than the bare base" in line for line in advice.recommended)


def test_trainings_that_all_diverge_are_an_error():
    with pytest.raises(TrainingError, match=r"lower learning_rates than 0\.0001"):
        searched(Given(lambda c, seed: float("nan")))


def test_a_cut_that_costs_much_is_not_trained():
    trials = Given(lambda c, seed: noisy(2.0, seed), cut_cost=0.5)
    advice = searched(trials)
    assert {rank for rank, *_ in trials.trained} == {16}
    assert advice.cut_rows()[0]["change %"] == pytest.approx(25)


def test_what_the_budget_did_not_allow_is_said():
    losses = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 2.5}
    for most in range(1, 11):
        advice = searched(Given(lambda c, seed: noisy(losses[c.lr], seed), most))
        assert "What the budget did not allow" in advice.unknown[0]
        if most >= 5:  # the second rung
            assert advice.lr == 1e-3
        assert (advice.spread is None) == (most < 8), most
        assert "None" not in str(advice)


def test_a_best_rate_at_the_edge_of_the_grid_is_said():
    advice = searched(Given(lambda c, seed: noisy(c.lr, seed)))
    assert any("lower learning rate" in line for line in advice.unknown)


def test_attention_layers_are_named_by_endings_that_match_nothing_else():
    bert = ["layer.0.attention.self.query", "layer.0.attention.output.dense", "layer.0.output.dense"]
    assert attention_only(bert, [*bert, "pooler.dense"]) == ["attention.output.dense", "query"]
    assert attention_only(["mlp.0", "mlp.1"], ["mlp.0", "mlp.1"]) is None
    assert attention_only(["attn.q"], ["attn.q"]) is None  # nothing to compare with


# Input that cannot be.


class Silent(Lit):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None: ...


class Empty(Lit):
    def val_dataloader(self) -> list[Any]:
        return []


class Unvalidated(Lit):
    validation_step = pl.LightningModule.validation_step


@pytest.mark.parametrize(
    ("module", "settings", "error", "message"),
    [
        (Lit, {"monitor": "val_los"}, ConfigError, "Did you mean 'val_loss'"),
        (Silent, {}, ConfigError, "It logs nothing: call self.log"),
        (Empty, {}, DataError, "no batch|there are none"),
        (Unvalidated, {}, DataError, "Give the module a validation_step"),
        (Lit, {"minutes": 1e-9, "steps": None}, ConfigError, "Give more minutes, fewer learning_rates"),
        (Lit, {"minutes": 1e-9}, ConfigError, "too short for one candidate"),
        (Lit, {"compare": ["dorra"]}, ConfigError, "Did you mean 'dora'"),
        (Lit, {"learning_rates": []}, ConfigError, "learning_rates is empty"),
        (Lit, {"learning_rates": [0.0]}, ConfigError, "above 0"),
        (Lit, {"seeds": 1}, ConfigError, "seeds"),
        (partial(Lit, lr=0.0), {"learning_rates": None}, ConfigError, "has the learning rate 0.0"),
        (Lit, {"trainer": partial(CPU, devices=2)}, ConfigError, "devices=1"),
        (Lit, {"trainer": partial(CPU, max_time={"seconds": 0})}, TrainingError, "max_time"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_do_and_changes_nothing(module, settings, error, message):
    module = module()
    before = state(module)
    with pytest.raises(error, match=message):
        advise(module, **{**SMALL, **settings})
    assert same(before, state(module))


def test_a_module_with_adapters_is_refused():
    module = Lit()
    inject(module, replace(LoRAConfig(), rank=2))
    with pytest.raises(AdapterStateError, match=r"lightning_lora\.remove"):
        advise(module, **SMALL)
