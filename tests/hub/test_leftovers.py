"""What a config of PEFT's says of modules and layers that are not adapted, or are named whole: as PEFT reads it."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    adapter_state_dict,
    combine_adapters,
    export_adapter,
    inject,
    load_adapter,
    push_adapter,
    save_adapter,
)
from lightning_lora.errors import AdapterFormatError
from lightning_lora.format.inspection import check_adapter
from tests.hub.models import build, by_peft, edit_config, output, peft_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
# Two float32 forwards of the same few matmuls, summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a whole name beside them": (
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        {},
    ),
    "a whole name in another layer": (
        {"target_modules": ["v_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        {},
    ),
    "a whole name alone": ({"target_modules": ["lm_head"], "layers_to_transform": [1]}, {}),
    "layers that there are not": ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7, 31]}, {}),
    "one layer, as a number": ({"target_modules": ["q_proj"], "layers_to_transform": 1}, {}),
    "a pattern that matches nothing": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {},
    ),
    "an entry that matches nothing": ({"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0]}, {}),
    "a rank for a module that is not adapted": ({"target_modules": ["q_proj"]}, {"rank_pattern": {"lm_head": 64}}),
    "a rank for one in a layer that is not": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"rank_pattern": {"model.layers.1.self_attn.q_proj": 64}, "alpha_pattern": {"down_proj": 3}},
    ),
    "a rank for one that there is not": ({"target_modules": ["q_proj"]}, {"rank_pattern": {"c_attn": 64}}),
}


def folder_of(case: str, folder) -> torch.Tensor:
    fields, leftovers = LAYERS[case]
    base, x = build("llama")
    adapted = peft_folder(base, folder, **fields)
    edit_config(folder, **leftovers)
    return output(adapted, x)


@pytest.mark.parametrize("case", LAYERS)
def test_they_are_read_as_peft_reads_them_wherever_a_folder_is_read(case, tmp_path):
    want = folder_of(case, tmp_path / "it")
    base, x = build("llama")
    torch.testing.assert_close(output(by_peft(base, tmp_path / "it"), x), want, **CLOSE)

    check_adapter(tmp_path / "it")
    push_adapter(tmp_path / "it", "user/name", dry_run=True)
    export_adapter(tmp_path / "it", tmp_path / "peft", consumer="peft")
    export_adapter(tmp_path / "it", tmp_path / "vllm", consumer="vllm")
    combine_adapters([tmp_path / "it"], tmp_path / "combined", weights=[1.0])
    for name in ("it", "peft", "vllm", "combined"):
        model, _ = build("llama")
        load_adapter(model, tmp_path / name)
        torch.testing.assert_close(output(model, x), want, **CLOSE)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            theirs = PeftModel.from_pretrained(build("llama")[0], tmp_path / name).eval()
        torch.testing.assert_close(output(theirs, x), want, **CLOSE)

    model, _ = build("llama")
    load_adapter(model, tmp_path / "it")
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(output(by_peft(base, tmp_path / "ours"), x), want, **CLOSE)
    bank = AdapterBank.from_folders(build("llama")[0], {"it": tmp_path / "it"})
    with bank.use("it"):
        torch.testing.assert_close(output(bank.model, x), want, **CLOSE)


@pytest.mark.parametrize("case", [case for case in LAYERS if "whole name" in case and "alone" not in case])
def test_inject_adapts_what_is_named_whole_as_peft_does(case, tmp_path):
    fields, _ = LAYERS[case]
    base, _ = build("llama")
    parameters = peft_folder(base, tmp_path, **fields).state_dict()
    theirs = {name.partition(".lora_A")[0] for name in parameters if ".lora_A" in name}
    inject(base, LoRAConfig(rank=2, **fields))
    ours = {name.rpartition(".")[0] for name in adapter_state_dict(base)}
    assert ours == {name.removeprefix("base_model.model.") for name in theirs}


def test_a_rank_of_an_adapted_module_that_the_tensors_do_not_have_is_still_refused(tmp_path):
    peft_folder(build("llama")[0], tmp_path, target_modules=["q_proj"])
    edit_config(tmp_path, rank_pattern={"layers.0.self_attn.q_proj": 64})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2
    for read in (check_adapter, lambda folder: load_adapter(build("llama")[0], folder)):
        with pytest.raises(AdapterFormatError, match=r"rank 64|has shape"):
            read(tmp_path)


def test_a_layer_that_is_missing_in_the_file_is_still_missed(tmp_path):
    peft_folder(build("llama")[0], tmp_path, target_modules=["q_proj"], layers_to_transform=[0])
    edit_config(tmp_path, layers_to_transform=[0, 1])
    with pytest.raises(AdapterFormatError, match=r"missing: .*layers\.1\.self_attn\.q_proj"):
        load_adapter(build("llama")[0], tmp_path)
