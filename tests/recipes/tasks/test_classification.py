"""Classifiers get a head for the data's labels, measure accuracy and F1 over the epoch, and name what they predict."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.data import TextClassificationData
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import ImageClassification, SequenceClassification
from tests.recipes.data.rows import Rows

NAMES = ["ant", "bee", "cat"]


def texts(rows: int, labels: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 259, (rows, 9))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, labels, (rows,)),
    }


def images(rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(0, 3, (rows,))}


class Data(pl.LightningDataModule):
    """The least that a data module must be."""

    def __init__(self, *batches: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.batches = list(batches)

    def setup(self, stage: str | None = None) -> None:
        self.label_names = NAMES
        self.num_labels = len(NAMES)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_accuracy_and_macro_f1_are_those_of_the_whole_epoch(bert, trainer):
    data = Data(texts(1), texts(13), texts(20))
    task = SequenceClassification(bert)
    logged = trainer().validate(task, data, verbose=False)[0]
    predicted = [row["label"] for batch in trainer().predict(task, data) for row in batch]
    actual = [NAMES[label] for batch in data.batches for label in batch["labels"]]
    pairs = list(zip(actual, predicted, strict=True))
    assert logged["val_accuracy"] == pytest.approx(sum(a == p for a, p in pairs) / len(pairs))
    # 2 TP / (2 TP + FP + FN): what was right, twice, among all that was of the class or was said to be.
    each = [2 * pairs.count((name, name)) / (actual.count(name) + predicted.count(name)) for name in NAMES]
    assert logged["val_f1"] == pytest.approx(sum(each) / len(NAMES))


@pytest.mark.parametrize(
    ("task_class", "base", "batch"),
    [
        (SequenceClassification, "bert", texts),
        (SequenceClassification, "llama", texts),
        (ImageClassification, "vit", images),
    ],
)
def test_training_learns_a_batch_by_heart(request, trainer, task_class, base, batch):
    data = Data(batch(8))
    task = task_class(request.getfixturevalue(base), learning_rate=1e-2)
    run = trainer(max_epochs=30)
    run.fit(task, data)
    assert task.model.config.num_labels == 3
    assert task.model.config.id2label == dict(enumerate(NAMES))
    assert {"train_loss", "train_loss_epoch", "val_loss", "val_f1"} <= run.callback_metrics.keys()
    assert run.callback_metrics["val_accuracy"] >= 0.75
    probabilities = trainer().predict(task, data)[0][0]["probabilities"]
    assert list(probabilities) == NAMES
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("task_class", "base", "head"),
    [
        (SequenceClassification, "bert", ["classifier"]),
        (SequenceClassification, "llama", ["score"]),
        (ImageClassification, "vit", ["classifier"]),
    ],
)
def test_the_new_head_is_known_before_and_after_the_model_is_built(request, task_class, base, head):
    task = task_class(request.getfixturevalue(base), label_names=NAMES)
    assert task.head_modules == head
    assert task.model is None
    task.configure_model()
    assert task.head_modules == head


@pytest.mark.parametrize("of_config", [None, 5])
def test_a_decoder_classifies_a_text_in_a_batch_as_alone(llama, trainer, tmp_path, of_config):
    model = llama.load("AutoModelForCausalLM")
    model.config.pad_token_id = of_config
    model.save_pretrained(tmp_path)
    llama.tokenizer().save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    task = SequenceClassification(source, label_names=NAMES)
    rows = Rows([{"text": text} for text in ("short", "a text that is longer", "x")])
    found = []
    for batch_size in (1, 3):
        data = TextClassificationData(source, rows, label_names=NAMES, batch_size=batch_size)
        said = [row["probabilities"] for batch in trainer().predict(task, data) for row in batch]
        found.append(torch.tensor([list(of_row.values()) for of_row in said]))
    # float32: sums of some dozen terms in another order; another token's score is off by 0.1 and more.
    assert torch.allclose(*found, atol=1e-5)


def test_a_checkpoint_remembers_the_labels(bert, trainer, tmp_path):
    task = SequenceClassification(bert)
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(task, Data(texts(2)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "a.ckpt", model=bert)
    assert loaded.label_names == NAMES
    assert torch.equal(loaded.model.classifier.weight, task.model.classifier.weight)


def test_labels_that_nobody_named_are_an_error_that_says_what_to_add(bert):
    with pytest.raises(ConfigError, match=r"does not know its labels.*label_names"):
        SequenceClassification(bert).configure_model()


def test_labels_in_another_order_than_the_datas_are_refused(bert, trainer):
    task = SequenceClassification(bert, label_names=NAMES[::-1])
    with pytest.raises(ConfigError, match=r"but the data has"):
        trainer().validate(task, Data(texts(2)), verbose=False)


def test_a_data_module_that_only_counts_its_labels_is_enough(bert):
    task = SequenceClassification(bert)
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(num_labels=2))
    task.configure_model()
    assert task.label_names == ["0", "1"]


def test_one_label_is_no_classification(bert):
    with pytest.raises(ConfigError, match=r"two or more labels"):
        SequenceClassification(bert, label_names=["only"]).configure_model()


def test_the_tasks_have_pefts_names():
    assert (SequenceClassification.task_type, ImageClassification.task_type) == ("SEQ_CLS", None)
