"""A person's own chats, table and folder of images: trained, evaluated and predicted by the printed commands."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from PIL import Image
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

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def chats() -> list[str]:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    with open("chats.jsonl", "w") as file:
        for n in range(24):
            turns = [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    short = ["task.max_new_tokens=4"]
    return ["data=instructions", "data.source.path=chats.jsonl", "data.chat_template=plain", *short]


def table() -> list[str]:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    BertForPreTraining(BertConfig(**SIZES, vocab_size=len(tokenizer), pad_token_id=0)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    with open("reviews.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "sentiment"])
        rows.writerows([f"{'good' if n % 2 else 'bad'}, film {n}", "pos" if n % 2 else "neg"] for n in range(24))
    columns = ["data.text_column=review", "data.label_column=sentiment"]
    task = ["task=sequence_classification", "data=text_classification"]
    return [*task, "data.source.path=reviews.csv", *columns]


def images() -> list[str]:
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained("model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained("model")
    for label, colour in (("cats", (250, 10, 10)), ("dogs", (10, 10, 250))):
        Path("pets", label).mkdir(parents=True)
        for n in range(12):
            Image.new("RGB", (20 + n, 30), colour).save(f"pets/{label}/{n}.png")
    return ["task=image_classification", "data=images", "data.source.path=pets"]


@pytest.mark.parametrize(("files", "rows", "keys"), [
    (chats, 24, {"prompt", "text"}),
    (table, 24, {"label", "probability", "probabilities"}),
    (images, 24, {"label", "probability", "probabilities"}),
])  # fmt: skip
def test_files_of_ones_own_are_trained_evaluated_and_predicted_without_a_look_into_the_code(cli, files, rows, keys):
    random.seed(0)
    settings = ["model=pretrained", "model.name=model", *files(), "trainer=cpu", "trainer.max_epochs=4"]
    assert cli("train", *settings, "optimizer.lr=1e-2") == 0, cli.err
    assert "Traceback" not in cli.err + cli.out
    assert "warning" not in (cli.err + cli.out).lower()
    after = cli.results["after"]["val_loss"]
    assert after < cli.results["before"]["val_loss"]
    command = cli.out.strip().splitlines()[-1].split()
    assert command[:3] == ["evaluate", "lightning-lora", "evaluate"]
    assert cli(*command[2:]) == 0, cli.err
    assert f"{after:.4g}" in cli.out
    assert cli("predict", *command[3:]) == 0, cli.err
    predictions = (cli.folder / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == rows
    assert all(set(json.loads(line)) == keys for line in predictions)
