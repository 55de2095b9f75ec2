"""Each field of adapter_config.json with strange values: what PEFT loads we load with the same meaning, or refuse by
name. PEFT itself is asked, on a small model."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lightning_lora import load_adapter
from lightning_lora.errors import AdapterFormatError
from tests.format.test_properties import some
from tests.hub.models import assert_same, edit_config, peft_folder, state

FIELDS = sorted(field.name for field in dataclasses.fields(LoraConfig))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # two float32 forwards of the same few matmuls, summed in another order
OURS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
ABSENT: Any = ...  # edit_config deletes it
STRANGE = [ABSENT, None, True, 0, 1.5, "", "q", [], ["q"], {}, {"q": None}]
SPECIAL: dict[str, list[Any]] = {
    "r": [2.0, "2", -1, 1 << 40],
    "lora_alpha": [4, "4", -4, 1e300],
    "lora_dropout": [0.5, 1.0, -0.5],
    "target_modules": [
        ["v", "q"],
        ["q", "v", "gone"],
        "all-linear",
        r".*\.(q|v)",
        "layers",
        ["layers.0.q", "v", 1],
        "(",
    ],
    "exclude_modules": [["layers"], "layers", ["gone"], "(", ["head"], ["layers.1.q"]],
    "layers_to_transform": [[0, 1], [0], 1, [-1], ["0"], [0.0], 7],
    "layers_pattern": ["layers", "h", ["h", "layers"], "("],
    "rank_pattern": [{"gone": 7}, {"q": 2}, {"q": 3}, {".*": 2}, {"(": 2}, {"q": 2.0}, {"q": 0}, [["q", 2]]],
    "alpha_pattern": [
        {"gone": 7},
        {"q": 5},
        {"v": 5.5},
        {".*v": 1, "v": 7},
        {"^layers.0": 5},
        {"q": 1e300},
        {"q": "5"},
    ],
    "bias": ["none", "all", "lora_only", "NONE"],
    "modules_to_save": [["head"], ["gone"], ["ead"], ["q"]],
    "init_lora_weights": ["gaussian", "pissa", "eva", "gone"],
    "trainable_token_indices": [{"embed": [1, 2]}, {"embed": {"a": [1]}}, [99]],
    "target_parameters": [["layers.0.q.weight"], ["gone"]],
    "task_type": ["CAUSAL_LM", "gone"],
    "peft_type": ["lora", "LOHA"],
    "layer_replication": [[[0, 1]]],
    "peft_version": ["0.5.0", "99.0"],
    **{field: [{"beta": 0.1}] for field in ("kasa_config", "velora_config", "arrow_config", "use_bdlora")},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.v(self.q(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return Blocks().eval()


@pytest.fixture(scope="module")
def folder(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("adapter")
    peft_folder(base, folder, target_modules=["q", "v"], lora_alpha=3)
    return folder


def output(load: Callable[[nn.Module], nn.Module | None], base: nn.Module) -> Tensor:
    model = copy.deepcopy(base)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Found missing adapter keys")  # the adapter that PEFT then has is not this one
        return (load(model) or model).eval()(torch.arange(9)[None])


def check(base: nn.Module, folder: Path, changes: dict[str, Any]) -> None:
    """Load `folder`, with these fields of its config changed, here and in PEFT, and compare."""
    with tempfile.TemporaryDirectory() as place:
        where = Path(shutil.copytree(folder, Path(place, "it")))
        edit_config(where, **changes)
        config = json.loads(Path(where, "adapter_config.json").read_text())
        try:
            theirs = output(lambda model: PeftModel.from_pretrained(model, where), base)
        except Exception:
            theirs = None
        model = copy.deepcopy(base)
        before = state(model)
        try:
            ours = output(lambda _: load_adapter(model, where, check_base=False) and model, base)
        except AdapterFormatError as error:
            assert_same(before, state(model))
            said = str(error)
        else:
            said = ""
        if said:
            names = [*changes, *(OURS.get(field, field) for field in changes), "unexpected: ", "missing: ", "has shape"]
            assert any(name in said for name in names), said
        elif theirs is None:  # PEFT refuses a value that has no effect; beside another one, it may have one
            if len(changes) == 1:
                plain = output(lambda model: PeftModel.from_pretrained(model, folder), base)
                torch.testing.assert_close(ours, plain, **CLOSE)
        elif not config.get("alora_invocation_tokens"):  # PEFT has it for causal language models alone
            torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_with_a_strange_value_means_what_it_means_to_peft_or_is_refused_by_name(field, base, folder):
    for value in (*STRANGE, *SPECIAL.get(field, ())):
        try:
            check(base, folder, {field: value})
        except Exception as error:
            raise AssertionError(f"{field} is {value!r}: {error}") from error


@settings(some, max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(SPECIAL)), st.integers(0, 99), min_size=2, max_size=3))
def test_fields_with_strange_values_together_mean_what_they_mean_to_peft(base, folder, picked):
    check(base, folder, {field: SPECIAL[field][at % len(SPECIAL[field])] for field, at in picked.items()})
