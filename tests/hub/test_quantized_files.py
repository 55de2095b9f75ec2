"""Adapters of a quantized base as files: PEFT computes the same on it, and they go onto the base in full precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lightning_lora import AdapterBank, LoRAConfig, inject, load_adapter, merge, save_adapter
from lightning_lora.errors import BaseMismatchError
from tests.hub.models import llama, output, shake

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KINDS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
TARGETS = ["q_proj", "up_proj", "down_proj"]
X = torch.tensor([[1, 5, 9, 3, 7]])
# The same numbers in another order, and in eval mode int8 rounds its inputs to 8 bits, now and then to the other side.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(place)
    return place


def quantized(folder: Path, kind: str) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind]).eval()


def trained(folder: Path, kind: str, variant: str) -> nn.Module:
    model = quantized(folder, kind)
    inject(model, LoRAConfig(rank=2, target_modules=TARGETS, **VARIANTS[variant]))
    shake(model)
    return model


@every_kind
@every_variant
def test_peft_computes_the_same_on_the_same_base(kind: str, variant: str, folder: Path, tmp_path: Path):
    model = trained(folder, kind, variant)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(quantized(folder, kind), tmp_path).train()
    # In training mode nothing is rearranged, and int8 computes in floating point.
    torch.testing.assert_close(output(theirs, X), output(model.train(), X), **CLOSE)


@every_kind
@every_variant
def test_what_peft_trained_on_it_loads(kind: str, variant: str, folder: Path, tmp_path: Path):
    theirs = get_peft_model(quantized(folder, kind), LoraConfig(r=2, target_modules=TARGETS, **VARIANTS[variant]))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = quantized(folder, kind)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model.train(), X), output(theirs.train(), X), **CLOSE)


@every_kind
def test_it_loads_bit_for_bit_where_it_was_trained_and_merges_in_full_precision(
    kind: str, folder: Path, tmp_path: Path
):
    model = trained(folder, kind, "dora")
    save_adapter(model, tmp_path)
    again = quantized(folder, kind)
    load_adapter(again, tmp_path)
    assert output(again.train(), X).equal(output(model.train(), X))
    full = LlamaForCausalLM.from_pretrained(folder).eval()
    load_adapter(full, tmp_path)
    expected = output(full, X)
    merge(full)
    torch.testing.assert_close(output(full, X), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, output(LlamaForCausalLM.from_pretrained(folder).eval(), X), atol=1e-2)


@every_kind
def test_another_quantized_base_is_known_by_what_is_not_quantized(kind: str, folder: Path, tmp_path: Path):
    save_adapter(trained(folder, kind, "plain"), tmp_path)
    other: Any = copy.deepcopy(quantized(folder, kind))
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(BaseMismatchError):
        load_adapter(other, tmp_path)


@every_kind
@every_variant
@torch.no_grad()
def test_a_bank_serves_it_on_a_quantized_base(kind: str, variant: str, folder: Path, tmp_path: Path):
    model = trained(folder, kind, variant)
    save_adapter(model, tmp_path)
    base = quantized(folder, kind)
    bare = output(base, X)
    bank = AdapterBank(base, capacity=2, target_modules=TARGETS)
    bank.add("a", tmp_path)
    with bank.use("a"):
        served = output(base, X)
    # bitsandbytes' kernel for 4 bits on some CPUs, which an adapted layer does not use, rounds its scales to bfloat16.
    torch.testing.assert_close(served, output(model, X), rtol=0.05, atol=0.05)
    assert (served - output(model, X)).norm() < 0.05 * (served - bare).norm()
