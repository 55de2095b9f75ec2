"""An activated adapter in an adapter folder, in both directions with PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_transformers import llama

from lightning_lora import AdapterBank, LoRAConfig, export_adapter, inject, load_adapter, save_adapter
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import AdapterFormatError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # of PEFT
IDS = torch.tensor([[9, 8, 5, 6, 1, 2], [9, 8, 7, 4, 3, 5]])


@torch.no_grad()
def test_its_tokens_get_into_the_folder_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = llama().eval()
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 6]))
    for tensor in adapter_state_dict(model).values():
        tensor.normal_()
    expected = model(IDS).logits
    folder = save_adapter(model, tmp_path / "ours")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["alora_invocation_tokens"], config["task_type"]) == ([5, 6], "CAUSAL_LM")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    assert loaded(IDS).logits.equal(expected)
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_would_make_it_act_everywhere_refuses_it(tmp_path: Path) -> None:
    base: Any = llama().eval()
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6]))
    folder = save_adapter(model, tmp_path / "ours")
    assert "activated LoRA, by the tokens [5, 6]" in (folder / "README.md").read_text()
    with pytest.raises(AdapterFormatError, match="would act everywhere once it is rewritten"):
        export_adapter(folder, tmp_path / "out", consumer="vllm")
    bank = AdapterBank(base, target_modules=["q_proj"])
    with pytest.raises(AdapterFormatError, match="a bank's adapters act everywhere"):
        bank.add("one", folder)
    with pytest.raises(AdapterFormatError, match="The model acts from alora_invocation_tokens"):
        bank.add("one", model)
