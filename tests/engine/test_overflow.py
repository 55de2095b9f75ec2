"""Finite numbers that would overflow in a layer are refused, by every way in, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    inject,
    load_adapter_state_dict,
    start_adapters,
)
from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.engine.inits import INITS, Factors, init
from lightning_lora.engine.memory import largest, too_large
from lightning_lora.errors import AdapterFormatError, DataError, TargetError
from lightning_lora.hub.adapters import load_adapter, save_adapter
from lightning_lora.rewriting.combine import combine_adapters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOO_LARGE: dict[str, Callable[[dict[str, Tensor], torch.dtype], Any]] = {
    "all": lambda t, dtype: [v.fill_(1e30) for v in t.values()],
    "A": lambda t, dtype: t["fc.lora_A"].fill_(1e30),
    "one number of B": lambda t, dtype: t["fc.lora_B"][1, 0].fill_(-1e30),
    "their product": lambda t, dtype: [t[f"fc.lora_{f}"].fill_(largest(dtype) ** 0.5) for f in "AB"],
    "B times the scale": lambda t, dtype: [t["fc.lora_A"].fill_(0), t["fc.lora_B"].fill_(largest(dtype) / 2)],
}
every_case = pytest.mark.parametrize("case", TOO_LARGE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


class Base(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(6, 5, dtype=dtype), nn.Linear(5, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x)))


def config(**fields: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "alpha": 8, "target_modules": ["fc"], **fields})


def sane(model: nn.Module) -> dict[str, Tensor]:
    """Values larger than any that training gives: of the size of the weights themselves."""
    return {name: 0.3 * torch.randn(t.shape) for name, t in adapter_tensors(model).items()}


@every_dtype
@every_case
def test_a_state_dict_of_such_numbers_is_refused(case: str, dtype: torch.dtype):
    model = Base(dtype)
    inject(model, config())
    values = sane(model)
    load_adapter_state_dict(model, values)
    before = snapshot(model)
    TOO_LARGE[case](values, dtype)
    with pytest.raises(AdapterFormatError, match=r"too large for the model: fc has an? .*Nothing was loaded"):
        load_adapter_state_dict(model, values)
    assert_same(snapshot(model), before)


@every_dtype
@every_case
def test_a_bank_takes_none(case: str, dtype: torch.dtype):
    model, values = Base(dtype), {f"fc.lora_{f}": torch.randn(s) for f, s in (("A", (2, 6)), ("B", (5, 2)))}
    for slots in (None, torch.float32):
        bank = Bank(model, 2, max_rank=4, target_modules=["fc"], dtype=slots)
        bank.put("sane", {"fc": LayerFactors(values["fc.lora_A"], values["fc.lora_B"], 4.0)})
        wrong = {name: t.clone() for name, t in values.items()}
        TOO_LARGE[case](wrong, dtype)
        with pytest.raises(AdapterFormatError, match="finite"):
            bank.put("wrong", {"fc": LayerFactors(wrong["fc.lora_A"], wrong["fc.lora_B"], 4.0)})
        assert bank.names == ["sane"]
        bank.close()


@every_dtype
@every_case
def test_a_folder_that_holds_them_is_not_loaded(case: str, dtype: torch.dtype, tmp_path: Path):
    model = Base()
    inject(model, config())
    load_adapter_state_dict(model, sane(model))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    own = {f"fc.lora_{f}": next(t for name, t in tensors.items() if f"lora_{f}." in name) for f in "AB"}
    TOO_LARGE[case](own, dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    other = Base(dtype)
    before = snapshot(other)
    with pytest.raises(AdapterFormatError, match="too large for the model: fc"):
        load_adapter(other, tmp_path / "adapter")
    assert_same(snapshot(other), before)


def test_what_float32_holds_and_float16_does_not_is_refused_there_alone():
    for dtype, fits in ((torch.float32, True), (torch.bfloat16, True), (torch.float16, False)):
        model = Base(dtype)
        inject(model, config())
        values = {name: torch.full(t.shape, 300.0) for name, t in adapter_tensors(model).items()}
        if fits:
            load_adapter_state_dict(model, values)
        else:
            with pytest.raises(AdapterFormatError, match=r"scale \* B A .* float16 allows 6.55e\+04"):
                load_adapter_state_dict(model, values)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "fc.lora_magnitude_vector"),
        ({"lora_bias": True}, "fc.lora_B_bias"),
        ({"modules_to_save": ["head"]}, "head.weight"),
        ({"bias": "all"}, "head.bias"),
    ],
)
@every_dtype
def test_what_is_trained_besides_is_looked_at_too(fields: dict[str, Any], name: str, dtype: torch.dtype):
    model = Base(dtype)
    inject(model, config(**fields))
    values = sane(model)
    values[name] = torch.full_like(values[name], 1e30)
    before = snapshot(model)
    with pytest.raises(AdapterFormatError, match=f"{name} has 1e.30"):
        load_adapter_state_dict(model, values)
    assert_same(snapshot(model), before)


def test_a_mask_among_the_buffers_may_hold_the_lowest_number_there_is():
    model = Base()
    model.head.register_buffer("mask", torch.full((3,), torch.finfo().min))
    inject(model, config(modules_to_save=["head"]))
    load_adapter_state_dict(model, {name: t.clone() for name, t in adapter_state_dict(model).items()})


def test_trained_rows_of_tokens_are_looked_at_too():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    inject(model, LoRAConfig(rank=2, target_modules=["1"], trainable_token_indices={"0": [1]}))
    with pytest.raises(AdapterFormatError, match=r"0.lora_tokens has 1e.30"):
        load_adapter_state_dict(model, {**sane(model), "0.lora_tokens": torch.full((1, 4), 1e30)})


def test_parameters_and_stacks_of_them_are_looked_at_by_their_own_names():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float16))

    model = Experts()
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["stack"]))
    values = sane(model)
    load_adapter_state_dict(model, values)
    values["lora_B_stack"][2, 3] = 6e4
    with pytest.raises(AdapterFormatError, match="stack has"):
        load_adapter_state_dict(model, values)


@pytest.mark.parametrize("alpha", [1e30, -1e25, 1e300])
def test_a_scale_by_which_an_update_of_zero_would_not_be_zero_is_refused(alpha: float):
    model = Base()
    before = snapshot(model)
    with pytest.raises(TargetError, match="lower alpha"):
        inject(model, config(alpha=abs(alpha)))
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("size", [1e30, float("nan")])
def test_an_initialiser_that_computes_such_numbers_is_refused(size: float, monkeypatch: pytest.MonkeyPatch):
    @init
    def swollen(W: Tensor, rank: int) -> Factors:
        return Factors(A=torch.full((rank, W.shape[1]), size), B=torch.ones(W.shape[0], rank))

    @init
    def swollen_by_data(C: Tensor, rank: int) -> Factors:
        return Factors(A=size * C[:rank], B=torch.ones(5, rank))

    for name in ("swollen", "swollen_by_data"):
        monkeypatch.setitem(INITS, name, INITS.pop(name))
    model = Base()
    before = snapshot(model)
    with pytest.raises(TargetError, match="'swollen' gives 'fc' an A of up to"):
        inject(model, config(init="swollen"))
    with pytest.raises(DataError, match="what was measured"):
        inject(model, config(init="swollen_by_data"), measured={"fc": {"C": torch.eye(6)}})
    assert_same(snapshot(model), before)
    inject(model, config(init="swollen"), start=False)
    before = snapshot(model)
    with pytest.raises(TargetError, match="'swollen' gives 'fc'"):
        start_adapters(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("name", ["eva", "corda"])
def test_an_adapter_that_starts_from_data_of_such_a_size_is_finite_or_refused(name: str):
    for size in (1e-30, 1.0, 1e30):
        model, x = Base(), torch.randn(3, 6)
        expected = model(x)
        C = torch.randn(6, 6)
        try:
            inject(model, config(init=name), measured={"fc": {"C": size * (C @ C.T)}})
        except DataError:
            assert size != 1.0
        assert model(x).equal(expected)


def test_a_combination_of_such_a_size_is_not_written(tmp_path: Path):
    model = Base()
    inject(model, config())
    load_adapter_state_dict(model, sane(model))
    save_adapter(model, tmp_path / "one")
    with pytest.raises(AdapterFormatError, match="too large"):
        combine_adapters([tmp_path / "one", tmp_path / "one"], tmp_path / "both", weights=[1e30, 1])
    assert not (tmp_path / "both").exists()


@every_dtype
def test_what_is_let_through_computes_finite_weights_and_is_not_far_from_what_is_not(dtype: torch.dtype):
    """The bound of the product is at most as many times too large as rows and columns can be out of step."""
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 64.0):
        for size in (0.1, 1.0, 30.0, 1e3, 1e6, 1e12):
            A, B = size * torch.randn(16, 40), torch.randn(30, 16)
            change = scale * (B.double() @ A.double())
            if too_large(A, B, scale, dtype) is None:
                assert (change.abs() <= largest(dtype)).all()
                assert change.to(dtype).isfinite().all()
            else:
                assert max(change.abs().max(), A.abs().max(), scale * B.abs().max()) > largest(dtype) / 16
