"""float32 masters on a half-precision base, autocast, and casts after injection."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case, randomise
from torch import nn

from lightning_lora.engine import LoRAConfig, adapter_tensors, adapters, inject, remove

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own

every_case = pytest.mark.parametrize("case", CASES, ids=IDS)


def factor_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {getattr(module, name).dtype for _, module in adapters(model) for name in module.lora_names}


def base_dtypes(model: nn.Module) -> set[torch.dtype]:
    factors = {id(getattr(module, name)) for _, module in adapters(model) for name in module.lora_names}
    return {p.dtype for p in model.parameters() if id(p) not in factors}


@every_case
def test_a_half_precision_base_trains_float32_masters_under_autocast(case: Case):
    model = case.model()
    inject(model, case.lora_config())
    randomise(model)
    torch.manual_seed(0)  # what is dropped
    expected = model(case.input())
    with torch.autocast("cpu", torch.bfloat16):
        try:
            case.model()(case.input())
        except RuntimeError as error:  # a bfloat16 LSTM, of a oneDNN that is held to less than the processor can
            pytest.skip(f"torch itself cannot: {error}")
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(case.input())
        output.square().mean().backward()
    # bfloat16 has 8 bits: a relative error of 1/256 in each of a few products of order one.
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@every_case
def test_casting_to_bfloat16_leaves_the_masters_bit_for_bit(case: Case):
    model = case.adapted()
    before = {name: t.detach().clone() for name, t in adapter_tensors(model).items() if "lora_" in name}
    model.to(torch.bfloat16)
    assert base_dtypes(model) == {torch.bfloat16}
    assert factor_dtypes(model) == {torch.float32}
    after = adapter_tensors(model)
    assert all(after[name].equal(value) for name, value in before.items())
    output = model(case.input(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_cast_takes_gradients_of_masters_along_unrounded():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, LoRAConfig(rank=2))
    model(torch.randn(2, 4)).sum().backward()
    before = model[0].lora_B.grad.clone()
    model.half()
    assert model[0].lora_B.grad.equal(before)


@every_case
def test_casting_to_double_widens_everything(case: Case):
    model = case.adapted().double()
    assert factor_dtypes(model) == base_dtypes(model) == {torch.float64}
    model.float()
    assert factor_dtypes(model) == base_dtypes(model) == {torch.float32}


@pytest.mark.parametrize(
    ("base", "setting", "expected"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.bfloat16, "base", torch.bfloat16),
        (torch.float16, "base", torch.float16),
        (torch.float32, "base", torch.float32),
        (torch.float64, "float32", torch.float64),
    ],
)
def test_adapters_are_as_wide_as_the_setting_says(base, setting, expected):
    model = nn.Sequential(nn.Linear(4, 3)).to(base)
    inject(model, LoRAConfig(rank=2, adapter_dtype=setting))
    assert factor_dtypes(model) == {expected}
    model(torch.randn(2, 4, dtype=base)).sum().backward()
    remove(model)


def test_adapters_in_the_bases_dtype_follow_a_cast():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, LoRAConfig(rank=2, adapter_dtype="base"))
    assert factor_dtypes(model.to(torch.bfloat16)) == {torch.bfloat16}


def test_a_factor_takes_the_devices_and_dtypes_of_its_base_not_the_default_ones():
    model = nn.Sequential(nn.Linear(4, 3))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            inject(model, LoRAConfig(rank=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[0].lora_A.dtype == torch.float32
    assert model[0].lora_A.device.type == "cpu"
