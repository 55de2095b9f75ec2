"""Tiny models with random weights, in folders; a cache of `datasets` for each test; a Trainer that is quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForPreTraining,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from lightning_lora.recipes.models import ModelSource

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A causal language model over bytes."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(
        **SIZES, vocab_size=len(tokenizer), num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    return _saved(LlamaForCausalLM(config), tokenizer, folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """An encoder over bytes, without a classifier."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0)
    return _saved(BertForPreTraining(config), tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """An image classifier of two labels."""
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    config = ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=2)
    return _saved(ViTForImageClassification(config), processor, tmp_path_factory.mktemp("vit"))


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """A function that makes a Trainer which writes and prints nothing."""

    def make(**options: Any) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_model_summary": False,
            **quiet,
            **options,
        }
        return pl.Trainer(**options)

    return make


def _saved(model: Any, preprocessing: Any, folder: Path) -> ModelSource:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # random weights of the usual size leave the logits all but equal
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.save_pretrained(folder)
    preprocessing.save_pretrained(folder)
    return ModelSource(str(folder))
