"""Growing changes no output, a cut is that of the dense SVD, and what is recorded, trained and resumed follows it."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, IDS, Case, randomise, reference
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    disabled,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
    resize,
)
from lightning_lora.engine import injection_of, pairs
from lightning_lora.engine.layers import DoRA
from lightning_lora.engine.optim import lora_plus
from lightning_lora.errors import AdapterStateError, ConfigError, TrainingError

# Both are computed in float64, from the same numbers; only the order of sums differs.
SAME = {"rtol": 1e-9, "atol": 1e-10}

pytestmark = pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side is legal but wasteful")


def adapted(case: Case, rank: int = 4):
    """The model of `case` in float64, with an update of this rank (for each rank that the case has)."""
    model = case.model()
    config = case.lora_config()
    inject(model, LoRAConfig(**{**config.to_dict(), "rank": rank * config.rank // 2, "rank_pattern": {}}))
    randomise(model)
    return model.double().eval()


def output(model, case):
    x = case.input(torch.float64)
    with torch.no_grad():
        return model(x)


def products(model):
    """The dense update of each pair as a stack (blocks, out, in), by its name."""
    found = {}
    for pair in pairs(model):
        A, B = pair.module.matrices(pair.parameter)
        found[pair.name] = pair.spec.scale * (B @ A).detach().reshape(-1, B.shape[-2], A.shape[-1])
    return found


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_growing_changes_no_output(case):
    model = adapted(case)
    before = output(model, case)
    report = resize(model, rank=12)
    assert report.error == 0
    assert set(report.ranks.values()) == {12} == {pair.spec.rank for pair in pairs(model)}
    torch.testing.assert_close(output(model, case), before, **SAME)
    torch.testing.assert_close(output(model, case), output(reference(model), case), **SAME)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_cut_is_that_of_the_dense_svd_and_so_is_its_error(case):
    model = adapted(case, rank=8)
    before, starts = products(model), any("lora_A0" in name for name, _ in model.named_buffers())
    report = resize(model, rank=4)
    after = products(model)
    for pair in pairs(model):
        dense = before[pair.name]
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        each = 4 if pair.A.shape[0] > 4 else 4 // len(dense)
        best = U[..., :each] * S[..., None, :each] @ Vh[..., :each, :]
        torch.testing.assert_close(after[pair.name], best, **SAME)
        if not isinstance(pair.module, DoRA):
            assert report.modules[pair.name].error == pytest.approx(float(S[..., each:].norm() / S.norm()), abs=1e-9)
    torch.testing.assert_close(output(model, case), output(reference(model), case), **SAME)
    assert not starts or not any("lora_A0" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("aim", [{"rank": 4}, {"rank": 12}, {"energy": 0.9}])
def test_the_record_makes_the_same_model_again(case, aim):
    model = adapted(case, rank=8)
    report = resize(model, **aim)
    again = case.model()
    made = inject(again, injection_of(model).config, start=False)
    again = again.double().eval()
    load_adapter_state_dict(again, adapter_state_dict(model))
    assert torch.equal(output(again, case), output(model, case))
    assert [pair.spec for pair in pairs(again)] == [pair.spec for pair in pairs(model)]
    assert [row[:-1] for row in made.modules] == [row[:-1] for row in injection_of(model).report.modules]
    assert (made.trainable, made.frozen) == (injection_of(model).report.trainable, injection_of(model).report.frozen)
    assert report.ranks == {pair.name: pair.spec.rank for pair in pairs(model)}


# Models of their own, by closed forms.


class Two(nn.Sequential):
    """Two linear layers, in float64, adapted with rank 8; the product of each pair has rank 3."""

    def __init__(self, **fields):
        torch.manual_seed(4)
        super().__init__(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9))
        inject(self, LoRAConfig(**{"rank": 8, "alpha": 12, "target_modules": ["0", "2"], **fields}))
        self.double()
        with torch.no_grad():
            for pair in pairs(self):
                pair.A.normal_()
                pair.B.copy_(torch.randn(len(pair.B), 3).double() @ torch.randn(3, 8).double())

    def loss(self):
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12)
        return self(x).square().mean()


def factors(model):
    return [factor for pair in pairs(model) for factor in (pair.A, pair.B)]


def test_gradients_and_moments_become_those_of_the_new_factors():
    model = Two()
    optimizer = torch.optim.AdamW(factors(model), lr=0.0, amsgrad=True)
    model.loss().backward()
    optimizer.step()
    before, steps = model.loss().item(), [optimizer.state[p]["step"].clone() for p in factors(model)]
    old = [(p.detach().clone(), optimizer.state[p]["exp_avg_sq"].clone()) for p in factors(model)]
    kept = [id(p) for p in factors(model)]
    resize(model, rank=3, optimizer=optimizer)

    assert [id(p) for p in factors(model)] == kept, "an optimizer, or a hook, that holds them goes on with them"
    assert model.loss().item() == pytest.approx(before, rel=1e-12), "the products had rank 3"
    carried = [p.grad.clone() for p in factors(model)]
    model.zero_grad()
    model.loss().backward()
    for p, gradient, step in zip(factors(model), carried, steps):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-8, atol=1e-12)
        # (1 - beta1) g after one step
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * p.grad, rtol=1e-8, atol=1e-12)
        assert optimizer.state[p]["step"] == step
    for i in (0, 2):
        (A, vA), (B, vB) = old[i : i + 2]
        new_A, new_B = factors(model)[i : i + 2]
        P, Q = new_A.detach() @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ new_B.detach()
        for p, expected in ((new_A, Q.T.square() @ vA), (new_B, vB @ P.T.square())):
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], expected, rtol=1e-8, atol=1e-14)
            torch.testing.assert_close(optimizer.state[p]["max_exp_avg_sq"], expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.RMSprop])
def test_training_goes_on_after_both_ways(make):
    model = Two()
    options = {"momentum": 0.9} if make in (torch.optim.SGD, torch.optim.RMSprop) else {}
    optimizer = make(factors(model), lr=1e-3, **options)
    first = model.loss().item()
    for rank in (8, 2, 11, 5):
        resize(model, rank=rank, optimizer=optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
    assert model.loss().item() < first
    assert {tuple(t.shape) for p in factors(model) for t in optimizer.state[p].values() if t.dim()} == {
        (5, 12), (10, 5), (5, 10), (9, 5)
    }  # fmt: skip


def test_new_ranks_learn_and_have_no_moments():
    model = Two()
    optimizer = torch.optim.AdamW(factors(model), lr=1e-2)
    model.loss().backward()
    optimizer.step()
    resize(model, rank=10, optimizer=optimizer)
    A, B = factors(model)[:2]
    assert not optimizer.state[A]["exp_avg"][8:].any()
    assert not optimizer.state[B]["exp_avg_sq"][:, 8:].any()
    assert A[8:].any()
    assert not B[:, 8:].any()
    optimizer.zero_grad()
    model.loss().backward()
    optimizer.step()
    assert B[:, 8:].any()


def test_the_ratio_of_lora_plus_holds_for_the_new_factors():
    model, plain = Two(), Two()
    for one in (model, plain):
        optimizer = torch.optim.SGD(factors(one), lr=1.0)
        if one is model:
            lora_plus(optimizer, one, 4.0)
        resize(one, rank=5, optimizer=optimizer)
        start = [p.detach().clone() for p in factors(one)]
        one.zero_grad()
        one.loss().backward()
        optimizer.step()
        moved = [p.detach() - q for p, q in zip(factors(one), start)]
        for p, step, ratio in zip(factors(one), moved, (1.0, 4.0) * 2 if one is model else (1.0,) * 4):
            torch.testing.assert_close(step, -ratio * p.grad, rtol=1e-9, atol=1e-12)


def test_ranks_by_layer_keep_the_energy_or_the_error_that_was_asked_for():
    model = Two()
    spectra = {pair.name: pair.singular_values() for pair in pairs(model)}
    report = resize(copy.deepcopy(model), energy=0.9)
    for name, S in spectra.items():
        kept = S.square().cumsum(0) / S.square().sum()
        assert report.modules[name].rank == int((kept < 0.9).sum()) + 1
        assert report.modules[name].error == pytest.approx(float((1 - kept[report.ranks[name] - 1]).sqrt()), abs=1e-9)
    assert set(resize(copy.deepcopy(model), energy=1.0).ranks.values()) == {3}, "that is all that the products have"
    bounded = resize(copy.deepcopy(model), max_error=0.5)
    assert 1e-3 < bounded.largest_error <= 0.5
    with torch.no_grad():
        for pair in pairs(model.float()):
            pair.B[:, 3:] = 0  # exactly of rank 3, and cut to 3 not exactly so in float32
    with pytest.raises(ConfigError, match=r"max_error=0 cannot be kept.*float32"):
        resize(model, max_error=0.0)
    assert {pair.spec.rank for pair in pairs(model)} == {8}


def test_the_error_of_dora_is_that_of_its_adapted_weight():
    def weights(one):
        return {pair.name: pair.module.adapted_weight().detach() for pair in pairs(one)}

    model = Two(use_dora=True)
    bases = {name: model.get_submodule(name).dense_weight().detach() for name in weights(model)}
    for aim in ({"rank": 2}, {"max_error": 0.3}):
        cut = copy.deepcopy(model)
        report = resize(cut, **aim)
        for name, before in weights(model).items():
            error = (weights(cut)[name] - before).norm() / (before - bases[name]).norm()
            assert report.modules[name].error == pytest.approx(float(error), rel=1e-6)
            assert error <= aim.get("max_error", 9)
            m = model.get_submodule(name).lora_magnitude_vector
            torch.testing.assert_close(weights(cut)[name].norm(dim=1), m.detach(), rtol=1e-9, atol=0)
        assert "DoRA: the magnitudes stay" in str(report)


def test_an_untrained_pair_stays_one_that_can_learn():
    for fields in ({}, {"init": "orthogonal"}, {"init": "pissa"}, {"freeze_a": True}):
        model = nn.Sequential(nn.Linear(12, 10))
        inject(model, LoRAConfig(rank=8, target_modules=["0"], **fields))
        x = torch.randn(3, 12)
        before = model(x)  # its graph is kept, and knows the old shapes
        assert resize(model, rank=3).error == 0
        # What was zero by cancelling products is zero by zeros now.
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
        model(x).square().sum().backward()
        assert model[0].lora_B.grad.abs().amin() > 0
        assert injection_of(model).config.init != "pissa", "the frozen start is gone"


def test_merging_removing_and_disabling_are_right_after_it():
    model, x = Two(), torch.randn(3, 12, dtype=torch.float64)
    with disabled(model):
        base = model(x)
    resize(model, rank=2)
    adapted = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), adapted, **SAME)
    with disabled(model):
        assert torch.equal(model(x), base)
    other = copy.deepcopy(model)
    merge(other)
    torch.testing.assert_close(other(x), adapted, **SAME)
    remove(model)
    assert torch.equal(model(x), base)


def test_compiled_code_sees_the_new_rank():
    model, x = Two(), torch.randn(3, 12, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager")
    for rank in (8, 2, 9):
        resize(model, rank=rank)
        torch.testing.assert_close(compiled(x), model(x), **SAME)


def test_what_cannot_be_is_refused_and_nothing_changes():
    model = Two()
    before = {name: t.clone() for name, t in adapter_state_dict(model).items()}
    model.loss().backward()

    def refused(error, match, given=model, **aim):
        with pytest.raises(error, match=match):
            resize(given, **aim)
        now = adapter_state_dict(model)
        assert all(torch.equal(now[name], t) for name, t in before.items())
        assert {pair.spec.rank for pair in pairs(model)} == {8} == {injection_of(model).config.rank}

    refused(ConfigError, "Give one of rank, energy and max_error; none was given")
    refused(ConfigError, "rank and energy was given", rank=2, energy=0.5)
    refused(ConfigError, "rank is a whole number from 1 on", rank=0)
    refused(ConfigError, "energy is a share above 0 and at most 1", energy=0)
    refused(ConfigError, "max_error is a finite number of at least 0", max_error=-1)
    refused(AdapterStateError, "has no adapters", given=nn.Linear(2, 2), rank=2)
    refused(AdapterStateError, "as a part of a larger module", given=model[0], rank=2)
    for make in (torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adamax):
        optimizer = make(factors(model), lr=0.0)
        if make is not torch.optim.LBFGS:
            optimizer.step()
            before = {name: t.clone() for name, t in adapter_state_dict(model).items()}
        refused(TrainingError, make.__name__, rank=2, optimizer=optimizer)
    with merged(model), pytest.raises(AdapterStateError, match="is merged"):
        resize(model, rank=2)
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    refused(AdapterStateError, "DistributedDataParallel", given=wrapped, rank=2)
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    inject(grouped, LoRAConfig(rank=4, target_modules=["0"]))
    refused(ConfigError, "rank=3 is no multiple of 2, the groups of the convolution '0'", given=grouped, rank=3)
    with torch.no_grad():
        model[0].lora_A[0, 0] = before["0.lora_A"][0, 0] = torch.inf
    refused(AdapterStateError, "holds values that are not finite", rank=2)


def test_an_optimizer_that_was_not_given_raises_in_its_next_step():
    model = Two()
    optimizer = torch.optim.AdamW(factors(model), lr=1e-3)
    model.loss().backward()
    optimizer.step()
    resize(model, rank=2)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
