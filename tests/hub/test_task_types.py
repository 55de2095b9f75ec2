"""The task type of a folder is one under which PEFT can call the model."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lightning_lora import LoRAConfig, inject, save_adapter
from tests.hub.models import classifier, llama, shake
from tests.hub.test_old_names import gemma3, llava
from tests.tiny_transformers import t5

IDS = torch.randint(1, 30, (2, 6))
SMALL: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
HEADS: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def whisper() -> torch.nn.Module:
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8, "max_source_positions": 10}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**SMALL, **HEADS, **widths, **tokens, max_target_positions=12)
    return transformers.WhisperForConditionalGeneration(config)


def wav2vec2() -> torch.nn.Module:
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
    )
    return transformers.Wav2Vec2ForSequenceClassification(config)


def vit() -> torch.nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**vision, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


CASES: dict[str, tuple[Any, Any, str | None, str]] = {
    "whisper": (
        whisper,
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": IDS},
        None,
        "q_proj",
    ),
    "a classifier of sounds": (wav2vec2, lambda: {"input_values": torch.randn(2, 64)}, None, "q_proj"),
    "a classifier of pictures": (
        vit,
        lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
        None,
        "q_proj",
    ),
    "pictures and text": (llava, lambda: {"input_ids": IDS}, "CAUSAL_LM", "q_proj"),
    "gemma 3": (gemma3, lambda: {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}, "CAUSAL_LM", "q_proj"),
    "t5": (t5, lambda: {"input_ids": IDS, "decoder_input_ids": IDS}, "SEQ_2_SEQ_LM", "q"),
    "llama": (llama, lambda: {"input_ids": IDS}, "CAUSAL_LM", "q_proj"),
    "a classifier whose head is not trained": (classifier, lambda: {"input_ids": IDS}, None, "query"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_calls_the_model_with_the_task_type_that_is_written(case, tmp_path):
    make, inputs, task, target = CASES[case]
    torch.manual_seed(1)
    model = make().eval()
    batch = inputs()
    base = make().eval()
    base.load_state_dict(model.state_dict())
    inject(model, LoRAConfig(rank=2, target_modules=[target]))
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == task
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, folder).eval()(**batch).logits
        # Two float32 forwards of the same few matmuls, summed in another order.
        torch.testing.assert_close(theirs, model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_task_type_that_is_given_is_written(tmp_path):
    model = whisper()
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path / "adapter", task_type="SEQ_2_SEQ_LM")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
