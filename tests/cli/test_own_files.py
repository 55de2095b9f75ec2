"""A person's own chats, table and folder of images: trained, evaluated and predicted by the printed commands."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.recipes.conftest import bert, llama, vit

__all__ = ["bert", "llama", "vit"]
pytestmark = pytest.mark.slow


def chats() -> list[str]:
    with open("chats.jsonl", "w") as file:
        for n in range(24):
            turns = [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    short = ["task.max_new_tokens=4"]
    return ["data=instructions", "data.source.path=chats.jsonl", "data.chat_template=plain", *short]


def table() -> list[str]:
    with open("reviews.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["review", "sentiment"])
        rows.writerows([f"{'good' if n % 2 else 'bad'}, film {n}", "pos" if n % 2 else "neg"] for n in range(24))
    columns = ["data.text_column=review", "data.label_column=sentiment"]
    task = ["task=sequence_classification", "data=text_classification"]
    return [*task, "data.source.path=reviews.csv", *columns]


def images() -> list[str]:
    for label, colour in (("cats", (250, 10, 10)), ("dogs", (10, 10, 250))):
        Path("pets", label).mkdir(parents=True)
        for n in range(12):
            Image.new("RGB", (20 + n, 30), colour).save(f"pets/{label}/{n}.png")
    return ["task=image_classification", "data=images", "data.source.path=pets"]


@pytest.mark.parametrize(("files", "model", "rows", "keys"), [
    (chats, "llama", 24, {"prompt", "text"}),
    (table, "bert", 24, {"label", "probability", "probabilities"}),
    (images, "vit", 24, {"label", "probability", "probabilities"}),
])  # fmt: skip
def test_files_of_ones_own_are_trained_evaluated_and_predicted_without_a_look_into_the_code(
    cli, files, model, rows, keys, request
):
    random.seed(0)
    shutil.copytree(request.getfixturevalue(model).name, "model")
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
