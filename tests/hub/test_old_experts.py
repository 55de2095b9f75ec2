"""Adapters of experts that were modules of their own, for models in which they are stacks."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import AdapterBank, load_adapter, remove, save_adapter
from lightning_lora.errors import AdapterFormatError
from tests.hub.models import assert_same, edit_tensors, output, state
from tests.hub.test_old_names import TEXT

E, R = 3, 2
IDS = torch.randint(1, 90, (2, 6), generator=torch.Generator().manual_seed(2))
# Two float32 forwards of the same few matmuls, summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=E))


def qwen3() -> nn.Module:
    sizes = {"num_experts": E, "moe_intermediate_size": 8, "num_experts_per_tok": 2, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TEXT, **sizes))


# How the model was called, and what its experts' parts and their stack were.
MODELS: dict[str, tuple[Any, str, tuple[str, str], str]] = {
    "mixtral": (mixtral, "block_sparse_moe", ("w1", "w3"), "w2"),
    "qwen3": (qwen3, "mlp", ("gate_proj", "up_proj"), "down_proj"),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind][0]().eval()


def old_folder(kind: str, folder, parts: list[str], **fields: Any) -> nn.Module:
    """An adapter with a pair for each part of each expert, and the model with W + s B A in place of each W."""
    _, block, up, down = MODELS[kind]
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "peft_version": "0.13.0", "target_modules": parts, **fields}
    model = build(kind)
    tensors: dict[str, Tensor] = {}
    torch.manual_seed(4)

    def update(old: str, W: Tensor) -> None:
        last = old.rpartition(".")[2]
        rank = config.get("rank_pattern", {}).get(last, R)
        alpha = config.get("alpha_pattern", {}).get(last, 6)
        A, B = torch.randn(rank, W.shape[1]) * 0.3, torch.randn(W.shape[0], rank) * 0.3
        tensors[f"base_model.model.{old}.lora_A.weight"] = A
        tensors[f"base_model.model.{old}.lora_B.weight"] = B
        W += alpha / (rank**0.5 if config.get("use_rslora") else rank) * B @ A

    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            where = f"model.layers.{i}"
            if "q_proj" in parts:
                update(f"{where}.self_attn.q_proj", layer.self_attn.q_proj.weight)
            if "gate" in parts:
                update(f"{where}.{block}.gate", layer.mlp.gate.weight)
            for e in range(E):
                stack, half = layer.mlp.experts.gate_up_proj[e], layer.mlp.experts.gate_up_proj.shape[1] // 2
                for part, W in ((up[0], stack[:half]), (up[1], stack[half:]), (down, layer.mlp.experts.down_proj[e])):
                    if part in parts:
                        update(f"{where}.{block}.experts.{e}.{part}", W)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def cases(kind: str) -> dict[str, tuple[list[str], dict[str, Any]]]:
    _, _, up, down = MODELS[kind]
    return {
        "all": (["q_proj", *up, down], {}),
        "all and the router": (["q_proj", "gate", *up, down], {}),
        "experts alone": ([*up, down], {}),
        "down alone": ([down], {}),
        "half of a stack": (["q_proj", up[1]], {}),
        "ranks and alphas": (["q_proj", *up, down], {"rank_pattern": {up[0]: 3}, "alpha_pattern": {up[1]: 2, down: 5}}),
        "rslora": (["q_proj", *up, down], {"use_rslora": True}),
    }


@pytest.mark.parametrize("case", cases("mixtral"))
@pytest.mark.parametrize("kind", MODELS)
def test_experts_of_their_own_load_into_their_stack(kind, case, tmp_path):
    parts, fields = cases(kind)[case]
    want = output(old_folder(kind, tmp_path / "old", parts, **fields), IDS)
    model = build(kind)
    before = state(model)
    load_adapter(model, tmp_path / "old")
    torch.testing.assert_close(output(model, IDS), want, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, tmp_path / "today")
        if case in ("all", "experts alone", "down alone"):  # PEFT doubles no pattern, and refuses a half
            theirs = PeftModel.from_pretrained(build(kind), tmp_path / "old").eval()
            torch.testing.assert_close(output(theirs, IDS), want, **CLOSE)
    again = build(kind)
    load_adapter(again, tmp_path / "today")
    torch.testing.assert_close(output(again, IDS), want, **CLOSE)
    remove(model)
    assert_same(before, state(model))


WRONG = {
    "an expert less": (lambda k: ".experts.1.w1.lora_A" not in k, r"lacks .*experts\.1\.w1\.lora_A"),
    "no pair of one expert": (lambda k: ".experts.1." not in k, "every expert needs a pair"),
    "no factor of one kind": (lambda k: not ("w2" in k and "lora_B" in k), "lacks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_experts_that_are_not_whole_are_refused_by_name(case, tmp_path):
    keep, match = WRONG[case]
    old_folder("mixtral", tmp_path, ["w1", "w3", "w2"])
    edit_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if not keep(key)])
    model = build("mixtral")
    before = state(model)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(model, tmp_path)
    assert_same(before, state(model))


def test_an_expert_that_there_is_not_and_a_variant_that_no_stack_has_are_refused(tmp_path):
    old_folder("mixtral", tmp_path, ["w2"])
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.w2.lora_{}.weight"
    edit_tensors(tmp_path, lambda t: t.update({key.format(7, f): t[key.format(0, f)].clone() for f in "AB"}))
    with pytest.raises(AdapterFormatError, match="every expert needs a pair"):
        load_adapter(build("mixtral"), tmp_path)
    old_folder("mixtral", tmp_path, ["w2"], use_dora=True)
    m = key.format(0, "A").replace("lora_A.weight", "lora_magnitude_vector")
    edit_tensors(tmp_path, lambda t: t.update({m: torch.ones(16)}))
    with pytest.raises(AdapterFormatError, match=r"has .*lora_magnitude_vector.*plain pair"):
        load_adapter(build("mixtral"), tmp_path)


def test_a_bank_says_that_it_serves_no_stacks(tmp_path):
    old_folder("mixtral", tmp_path, ["q_proj", "w2"])
    assert load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="use load_adapter for this one"):
        AdapterBank(build("mixtral"), target_modules=["q_proj"]).add("it", tmp_path)
