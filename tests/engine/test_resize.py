"""Growing changes no output, a cut is that of the dense SVD, and what is recorded, trained and resumed follows it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case, randomise, reference

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict
from lightning_lora.engine import injection_of, pairs
from lightning_lora.engine.layers import DoRA
from lightning_lora.engine.resize import resize

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
