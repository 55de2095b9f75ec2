"""QLoRA as a recipe: `lightning-lora train experiment=qlora`."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

QLORA = ["experiment=qlora", "trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "lora.rank=4"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_base_in_4_bits_is_trained_saved_and_evaluated(cli, tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "base")
    (tmp_path / "notes.txt").write_text("one line of text after another, and so on.\n\n" * 30)
    data = ["data=text", f"data.source.path={tmp_path}/notes.txt", "data.block_size=32", "data.batch_size=4"]
    model = ["model=pretrained", f"model.name={tmp_path}/base"]
    assert cli("train", *QLORA, *model, *data) == 0, cli.err
    results = cli.results
    assert results["parameters"] > 4 * 64 * 64
    assert results["after"]["val_loss"] < results["before"]["val_loss"]
    saved = torch.load(cli.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in saved)
    assert cli("evaluate", f"run={cli.folder}") == 0, cli.err
    assert f"{results['after']['val_loss']:.4g}" in cli.out


def test_without_bitsandbytes_the_extra_is_named(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    from lightning_lora.cli import settings as signature

    signature.target.cache_clear()
    assert "pip install 'lightning-lora[quantized]'" in cli.error("train", *QLORA)
    signature.target.cache_clear()
