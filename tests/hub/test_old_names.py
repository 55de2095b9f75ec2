"""Adapters that were trained with an older transformers, whose modules had other names."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from lightning import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import AdapterBank, load_adapter, remove, save_adapter
from lightning_lora.errors import AdapterFormatError
from tests.hub.models import assert_same, edit_config, edit_tensors, state

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=98,
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION).to_dict(),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8).to_dict(),
        image_token_index=98,
        projection_dim=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION).to_dict(),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8).to_dict(),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {"llava": llava, "paligemma": paligemma, "gemma3": gemma3}
# What transformers 5 says -> what it said before 4.52.
OLD = {
    "model.model.language_model.": "model.language_model.model.",
    "model.model.vision_tower.": "model.vision_tower.vision_model.",
    "model.model.multi_modal_projector.": "model.multi_modal_projector.",
    "model.lm_head.": "model.language_model.lm_head.",
}
IDS = torch.randint(1, 90, (2, 6), generator=torch.Generator().manual_seed(2))


def build(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[kind]().eval()


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of the language model, and of the tower, whose outputs the test's batch without an image does not need."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        kind = {"token_type_ids": torch.zeros_like(IDS)} if "Gemma" in type(inner).__name__ else {}
        seen = inner.model.vision_tower(picture).last_hidden_state
        return [inner(input_ids=IDS, **kind).logits, seen, inner.model.multi_modal_projector(seen)]


def old_folder(kind: str, folder, **fields: Any) -> list[torch.Tensor]:
    """An adapter of PEFT's with the names of before 4.52; returns what its model puts out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        adapted = get_peft_model(build(kind), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})).eval()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape))
        adapted.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for key, t in tensors.items():
        for new, old in OLD.items():
            if key.startswith(f"base_model.{new}"):
                key = key.replace(new, old, 1)
                break
        renamed[key] = t
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, path, {"format": "pt"})
    return outputs(adapted)


def assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        # Two float32 forwards of the same few matmuls, summed in another order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


FIELDS = {
    "endings": {},
    "both towers and the head": {"target_modules": ["q_proj", "fc1", "lm_head", "down_proj"]},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    "a projector trained whole": {"modules_to_save": ["multi_modal_projector"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", FIELDS)
def test_old_names_load_as_peft_loads_them(kind, case, tmp_path):
    if "both" in case and kind != "llava":
        FIELDS[case]["target_modules"] = [
            "q_proj",
            "lm_head",
            "down_proj",
        ]  # their towers have one fc1 more
    want = old_folder(kind, tmp_path, **FIELDS[case])
    model = build(kind)
    before = state(model)
    load_adapter(model, tmp_path)
    assert_close(outputs(model), want)
    save_adapter(model, tmp_path / "today")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        if "whole" not in case and "head" not in case:  # of which PEFT does not find the old names
            assert_close(outputs(PeftModel.from_pretrained(build(kind), tmp_path).eval()), want)
        assert_close(outputs(PeftModel.from_pretrained(build(kind), tmp_path / "today").eval()), want)
    remove(model)
    assert_same(before, state(model))


def test_expressions_and_patterns_of_old_names_mean_the_modules_that_they_meant(tmp_path):
    want = old_folder(
        "llava",
        tmp_path,
        target_modules=r"model\.language_model.*q_proj",
        rank_pattern={r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={r"^model\.language_model\.layers\.1\.self_attn\.q_proj": 5},
    )
    edit_config(
        tmp_path,
        target_modules=r"language_model\.model\.layers.*q_proj",
        rank_pattern={r"^language_model\.model\.layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={r"^language_model\.model\.layers\.1\.self_attn\.q_proj": 5},
    )
    model = build("llava")
    load_adapter(model, tmp_path)
    assert_close(outputs(model), want)


def test_old_names_fit_a_bank_and_a_lightning_module(tmp_path):
    want = old_folder("llava", tmp_path)
    model = build("llava")
    bank = AdapterBank(model, target_modules=["q_proj"])
    bank.add("old", tmp_path)
    with bank.use("old"):
        assert_close(outputs(model)[:1], want[:1])

    class Task(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("llava")

        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    task = Task()
    load_adapter(task, tmp_path)
    assert_close(outputs(task.model), want)


def test_old_names_are_as_strict_as_todays(tmp_path):
    old_folder("llava", tmp_path)
    model = build("llava")
    before = state(model)
    key = "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_tensors(tmp_path, lambda t: t.pop(key))
    with pytest.raises(AdapterFormatError, match=r"missing: .*layers\.1\.self_attn\.q_proj\.lora_A"):
        load_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({key: torch.zeros(2, 8)}))
    with pytest.raises(AdapterFormatError, match=r"q_proj\.lora_A\.weight has shape \(2, 8\)"):
        load_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({key: torch.zeros(2, 16), key.replace(".1.", ".7."): torch.zeros(2, 16)}))
    with pytest.raises(AdapterFormatError, match=r"layers\.7"):
        load_adapter(model, tmp_path)
    assert_same(before, state(model))


def test_the_tables_of_transformers_4_are_read_as_it_reads_them(tmp_path):
    want = old_folder("llava", tmp_path, target_modules=r"model\.language_model.*q_proj")
    edit_config(tmp_path, target_modules=r"language_model\.model\.layers.*q_proj")
    model = build("llava")
    model._checkpoint_conversion_mapping = {
        "^language_model.model": "model.language_model",
        "^vision_tower": "model.vision_tower",
        "^multi_modal_projector": "model.multi_modal_projector",
        "^language_model.lm_head": "lm_head",
    }
    load_adapter(model, tmp_path)
    assert_close(outputs(model), want)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"].startswith("language_model")
