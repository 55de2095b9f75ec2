"""What the names in a folder are relative to, where a LightningModule holds more than the model that is trained."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn

from lightning_lora import AdapterBank, LoRAConfig, inject, load_adapter, save_adapter
from lightning_lora.errors import AdapterFormatError
from lightning_lora.hub import adapter_root
from tests.hub.models import Linears, assert_same, build, by_peft, output, peft_folder, shake, state

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# Two float32 forwards of the same few matmuls, summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Task(LightningModule):
    """A LightningModule with a model, and what `more` puts beside it."""

    def __init__(self, model: nn.Module, more: dict[str, Any]) -> None:
        super().__init__()
        for name, part in more.items():
            if name.startswith("first"):
                setattr(self, name, part)
        self.model = model
        for name, part in more.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx): ...

    def configure_optimizers(self): ...


class LearnedMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(3, 3)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


MORE = {
    "nothing": lambda kind: {},
    "a teacher": lambda kind: {"teacher": frozen(build(kind)[0])},
    "a teacher before it": lambda kind: {"first_teacher": frozen(build(kind)[0])},
    "a metric with parameters": lambda kind: {"metric": LearnedMetric()},
    "prototypes": lambda kind: {"prototypes": nn.Parameter(torch.randn(4, 3))},
    "a buffer and a loss": lambda kind: {"loss": nn.CrossEntropyLoss(weight=torch.ones(3))},
    "another model": lambda kind: {"judge": build("linears")[0]},
    "a transformers model": lambda kind: {"reward": build("classifier")[0]},
    "all of them": lambda kind: {
        "first_teacher": frozen(build(kind)[0]),
        "metric": LearnedMetric(),
        "prototypes": nn.Parameter(torch.randn(4, 3)),
        "reward": build("classifier")[0],
    },
}
TARGETS = {"linears": r"model\.fc|model\.block\.0", "llama": r"model\..*q_proj"}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("case", MORE)
def test_a_folder_fits_the_child_that_holds_all_adapters_whatever_is_beside_it(case, kind, tmp_path):
    base, x = build(kind)
    task = Task(copy.deepcopy(base), MORE[case](kind))
    inject(task, LoRAConfig(rank=2, target_modules=TARGETS[kind]))
    shake(task)
    want = output(task, x)
    assert adapter_root(task) == ("model", task.model)
    folder = save_adapter(task, tmp_path / "adapter")
    torch.testing.assert_close(output(by_peft(base, folder), x), want, **CLOSE)
    for target in (copy.deepcopy(base), Task(copy.deepcopy(base), {}), Task(copy.deepcopy(base), MORE[case](kind))):
        load_adapter(target, folder)
        assert torch.equal(output(target, x), want)
    again = save_adapter(target, tmp_path / "again")
    assert (again / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()
    bank = AdapterBank(Task(copy.deepcopy(base), MORE[case](kind)), target_modules=TARGETS[kind])
    bank.add("folder", folder)
    bank.add("model", task)
    for name in ("folder", "model"):
        with bank.use(name):
            torch.testing.assert_close(output(bank.model, x), want, **CLOSE)


@pytest.mark.parametrize("case", [case for case in MORE if "teacher" not in case and "all" not in case])
def test_an_adapter_of_pefts_loads_into_the_child_that_it_fits(case, tmp_path):
    base, x = build("llama")
    want = output(peft_folder(base, tmp_path, target_modules=["q_proj"]), x)
    task = Task(copy.deepcopy(base), MORE[case]("llama"))
    load_adapter(task, tmp_path)
    torch.testing.assert_close(output(task, x), want, **CLOSE)


def test_an_adapter_that_fits_two_parts_alike_is_refused_with_their_names(tmp_path):
    base, x = build("linears")
    want = output(peft_folder(base, tmp_path, target_modules=["fc"]), x)
    task = Task(copy.deepcopy(base), {"teacher": copy.deepcopy(base)})
    before = state(task)
    with pytest.raises(AdapterFormatError, match=r"fits several parts of this Task: model, teacher\. Pass the one"):
        load_adapter(task, tmp_path)
    assert_same(before, state(task))
    load_adapter(task.model, tmp_path)
    torch.testing.assert_close(output(task, x), want, **CLOSE)


def test_one_of_two_models_in_a_plain_module_is_not_guessed(tmp_path):
    base, x = build("llama")
    want = output(peft_folder(base, tmp_path, target_modules=["q_proj"]), x)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.reference = copy.deepcopy(base), copy.deepcopy(base)

    pair = Pair()
    with pytest.raises(AdapterFormatError, match=r"fits several parts of this Pair: policy, reference"):
        load_adapter(pair, tmp_path)
    load_adapter(pair.policy, tmp_path)
    torch.testing.assert_close(output(pair.policy, x), want, **CLOSE)
    task = Task(copy.deepcopy(base), {})
    inject(task, LoRAConfig(rank=2, target_modules=["q_proj"]))
    shake(task)
    named = nn.ModuleDict({"model": copy.deepcopy(base), "other": copy.deepcopy(base)})
    load_adapter(named, save_adapter(task, tmp_path / "named"))
    assert torch.equal(output(named["model"], x), output(task, x))


def test_a_layer_of_the_module_itself_is_not_taken_for_the_childs_of_the_same_name(tmp_path):
    base, x = build("linears")
    source = Task(copy.deepcopy(base), {"fc": nn.Linear(8, 8)})
    inject(source, LoRAConfig(rank=2, target_modules=r"model\.fc"))
    shake(source)
    target = Task(copy.deepcopy(base), {"fc": nn.Linear(8, 8)})
    load_adapter(target, save_adapter(source, tmp_path / "of the child"))
    assert torch.equal(output(target, x), output(source, x))

    own = Task(copy.deepcopy(base), {"fc": nn.Linear(8, 8)})
    fresh = copy.deepcopy(own)
    inject(own, LoRAConfig(rank=2, target_modules=r"fc"))
    shake(own)
    load_adapter(fresh, save_adapter(own, tmp_path / "its own"))
    assert torch.equal(fresh.fc.lora_B, own.fc.lora_B)
    assert not hasattr(fresh.model.fc, "lora_B")


def test_a_part_that_the_module_also_names_is_no_second_place(tmp_path):
    base, x = build("linears")
    model = copy.deepcopy(base)
    task = Task(model, {"backbone": model.block})
    inject(task, LoRAConfig(rank=2, target_modules=r"model\.block\.0"))
    shake(task)
    folder = save_adapter(task, tmp_path / "adapter")
    torch.testing.assert_close(output(by_peft(base, folder), x), output(task, x), **CLOSE)
    model = copy.deepcopy(base)
    fresh = Task(model, {"block": model.block})
    load_adapter(fresh, folder)
    assert torch.equal(output(fresh, x), output(task, x))


def test_adapters_in_two_children_keep_the_whole_names(tmp_path):
    task = Task(Linears(), {"other": Linears()})
    fresh = copy.deepcopy(task)
    inject(task, LoRAConfig(rank=2, target_modules=["fc"]))
    shake(task)
    assert adapter_root(task) == ("", task)
    load_adapter(fresh, save_adapter(task, tmp_path / "adapter"))
    assert torch.equal(fresh.other.fc.lora_B, task.other.fc.lora_B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(fresh, tmp_path / "again")
