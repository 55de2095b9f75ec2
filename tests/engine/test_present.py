"""Adapters that a model has already, of whatever library: nothing is adapted a second time."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    merged,
    remove,
    save_adapter,
)
from lightning_lora.engine.inits import INITS, init, pissa
from lightning_lora.errors import AdapterStateError, ConfigError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


class Holder(nn.Module):
    """A base in a module, as a LightningModule holds one, beside what trains."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.student = part, net()


METHODS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(target_modules=["0"], r=2),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=["0"], total_step=10),
    "IA3": peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "LoHa": peft.LoHaConfig(target_modules=["0"]),
    "LoKr": peft.LoKrConfig(target_modules=["0"]),
    "OFT": peft.OFTConfig(target_modules=["0"], oft_block_size=4, r=0),
    "VeRA": peft.VeraConfig(target_modules=["0"]),
}


def state(model: nn.Module) -> list[tuple[str, type[nn.Module], list[tuple[str, int, bool]]]]:
    return [
        (name, type(m), [(n, id(p), p.requires_grad) for n, p in m.named_parameters(recurse=False)])
        for name, m in model.named_modules()
    ]


def check_refused(model: nn.Module, match: str, **fields: Any) -> None:
    before = state(model)
    with pytest.raises(AdapterStateError, match=match):
        inject(model, LoRAConfig(rank=2, **fields))
    assert state(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{}, {"target_modules": ["0"]}, {"target_modules": ["student.2"]}], ids=str)
def test_a_peft_model_inside_is_not_adapted_a_second_time(method: str, fields: dict[str, Any]) -> None:
    check_refused(Holder(peft.get_peft_model(net(), METHODS[method])), "of PEFT already.*load_adapter", **fields)


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["2"]}], ids=str)
def test_what_peft_adapted_without_a_model_around_it_is_known_too(fields: dict[str, Any]) -> None:
    model = net()
    peft.inject_adapter_in_model(METHODS["LoRA"], model)
    check_refused(model, "of PEFT already, at '0'.*merge_and_unload", **fields)


def test_a_frozen_peft_model_is_what_inference_gives_and_is_refused_as_well(tmp_path) -> None:
    plain = net()
    inject(plain, LoRAConfig(rank=2, target_modules=["0"]))
    folder = save_adapter(plain, tmp_path / "ours")
    frozen = peft.PeftModel.from_pretrained(net(), folder)
    assert not any(p.requires_grad for p in frozen.parameters())
    check_refused(frozen, "of PEFT already, at its root")
    with pytest.raises(AdapterStateError, match="of PEFT already"):
        load_adapter(frozen, folder)
    with pytest.raises(AdapterStateError, match="of PEFT already"):
        AdapterBank(frozen)
    with pytest.raises(AdapterStateError, match="of PEFT already"):
        AdapterBank.from_folders(frozen, {"ours": folder})


@pytest.mark.parametrize(
    "fields", [{"target_modules": r"student\.[02]"}, {"exclude_modules": r"part\..*|student\.4"}], ids=str
)
def test_a_frozen_teacher_with_peft_adapters_stays_where_others_are_named(fields: dict[str, Any]) -> None:
    model = Holder(peft.get_peft_model(net(), METHODS["LoRA"]).requires_grad_(False))
    report = inject(model, LoRAConfig(rank=2, **fields))
    assert [m.name for m in report.modules] == ["student.0", "student.2"]


class OwnParameters(nn.Linear):
    """As loralib's and LitGPT's layers."""

    def __init__(self) -> None:
        super().__init__(8, 16)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(16, 2))


class OwnChildren(nn.Linear):
    def __init__(self, down: str, up: str) -> None:
        super().__init__(8, 16)
        self.add_module(down, nn.Linear(8, 2, bias=False))
        self.add_module(up, nn.Linear(2, 16, bias=False))


class OneAdapterOfSeveral(nn.Linear):
    """As the adapters library's, which holds them by name."""

    def __init__(self) -> None:
        super().__init__(8, 16)
        self.loras = nn.ModuleDict({"task": OwnParameters()})


@pytest.mark.parametrize(
    "layer",
    [
        OwnParameters,
        lambda: OwnChildren("lora_a", "lora_b"),  # torchtune
        lambda: OwnChildren("lora_down", "lora_up"),  # kohya
        lambda: OwnChildren("adapter_down", "adapter_up"),
        OneAdapterOfSeveral,
    ],
)
def test_adapters_of_other_libraries_are_known_by_their_parameters(layer: Any) -> None:
    check_refused(nn.Sequential(layer(), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)), "of another library")


def test_such_a_layer_is_known_under_each_of_its_names() -> None:
    model = nn.ModuleDict({"a": OwnParameters(), "b": nn.Linear(16, 16), "c": nn.Linear(16, 2)})
    model["again"] = model["a"]
    check_refused(model, "of another library .* at 'a'")


def test_a_name_that_only_resembles_one_is_nobodys_adapter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), OwnChildren("explora_head", "lora_gate"), nn.Linear(16, 2))
    assert len(inject(model, LoRAConfig(rank=2)).modules) == 4


def test_ours_are_not_adapted_again_from_outside_or_inside() -> None:
    inner = net()
    inject(inner, LoRAConfig(rank=2))
    check_refused(Holder(inner), "has adapters already")
    check_refused(inner[:2], "has adapters already")
    with merged(inner):
        check_refused(Holder(inner), r"'part' in it. is merged")
        with pytest.raises(AdapterStateError, match=r"'part' in it. is merged"):
            AdapterBank(Holder(inner))


def test_what_a_bank_serves_is_not_adapted_nor_served_twice(tmp_path) -> None:
    plain = net()
    inject(plain, LoRAConfig(rank=2))
    folder = save_adapter(plain, tmp_path / "ours")
    served = net()
    bank = AdapterBank(served, target_modules=["0"])
    for model in (served, Holder(served), served[:2]):
        check_refused(model, "A bank serves .* already: call bank.close")
    with pytest.raises(AdapterStateError, match="A bank serves 0 already"):
        load_adapter(served, folder)
    bank.close()
    inject(served, LoRAConfig(rank=2))


# Initialisers.


def test_an_initialiser_of_ones_own_does_not_take_the_name_of_a_built_in() -> None:
    def pissa(rank: int, d_in: int) -> torch.Tensor:
        return torch.zeros(rank, d_in)

    with pytest.raises(ConfigError, match=r"'pissa' already.*lightning_lora.*@init\(replace=True\)"):
        init(pissa)
    assert INITS["pissa"].function is not pissa


def test_one_that_is_meant_to_replaces_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INITS, "pissa", INITS["pissa"])  # put back after the test
    own: dict[str, Any] = {"init": init, "Tensor": torch.Tensor, "torch": torch, "__name__": "__main__"}
    exec("@init(replace=True)\ndef pissa(rank: int, d_in: int) -> Tensor: return torch.ones(rank, d_in)", own)
    assert INITS["pissa"].function is own["pissa"] is not pissa


def test_a_cell_that_defines_an_initialiser_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INITS, "tiny", INITS["kaiming"])  # taken out again after the test
    notebook: dict[str, Any] = {"init": init, "Tensor": torch.Tensor, "torch": torch, "__name__": "__main__"}
    for size in (1.0, 2.0):
        exec(f"@init\ndef tiny(rank: int, d_in: int) -> Tensor: return torch.full((rank, d_in), {size})", notebook)
        model = net()
        inject(model, LoRAConfig(rank=2, target_modules=["0"], init="tiny"))
        assert model[0].lora_A.eq(size).all()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="'tiny' already, of __main__"):
        exec("@init\ndef tiny(rank: int) -> Tensor: ...", {**notebook, "__name__": "another"})


USES: dict[str, Any] = {
    "inject": inject,
    "remove": remove,
    "merge": merge,
    "merged": lambda model: merged(model).__enter__(),
    "adapter_state_dict": adapter_state_dict,
    "save_adapter": lambda model: save_adapter(model, "never-written"),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_that_is_merged_for_a_while_says_so_whatever_is_asked_of_it(use: str) -> None:
    model = net()
    inject(model, LoRAConfig(rank=2))
    with merged(model):
        before = state(model)
        with pytest.raises(AdapterStateError, match="is merged: leave"):
            USES[use](model)
        assert state(model) == before
    assert adapter_state_dict(model)
