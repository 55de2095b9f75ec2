"""Labels are found, named and checked the same way for texts and for images."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import DataSource, ImageClassificationData, Splits, TextClassificationData
from lightning_lora.recipes.data.classification import names_of_labels
from lightning_lora.recipes.tasks import ImageClassification, SequenceClassification

from .rows import Rows


def labelled(*labels: object) -> list[dict]:
    return [{"text": f"text {label}", "label": label} for label in labels]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 2], ["2", "9", "10"]),
        ([True, False], ["False", "True"]),
        ([1.0, 0.0, 10.0], ["0", "1", "10"]),
        (["NA", "None"], ["NA", "None"]),
    ],
)
def test_labels_are_the_values_there_are_sorted(bert, labels, names):
    data = TextClassificationData(bert, Rows(labelled(*labels)))
    data.setup("fit")
    assert (data.label_names, data.num_labels) == (names, len(names))
    batch = next(iter(data.val_dataloader()))
    said = [int(label) if isinstance(label, float) else label for label in labels]
    assert [names[index] for index in batch["labels"]] == [str(label) for label in said]
    assert batch["input_ids"].shape == batch["attention_mask"].shape


@pytest.mark.parametrize("names", [["0", "1"], [0, 1], [0.0, 1.0]])
def test_labels_and_given_names_are_compared_by_their_value(bert, names):
    data = TextClassificationData(bert, Rows(labelled(1.0, 0.0)), label_names=names)
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1, 0]


def test_a_row_without_a_label_is_not_one_of_the_label_none(bert):
    data = TextClassificationData(bert, Rows(labelled("None", None)), label_names=["None", "x"])
    with pytest.raises(DataError, match=r"not among label_names: .none.\. Known are None, x"):
        data.setup("validate")


@pytest.mark.parametrize("seed", range(6))
def test_a_label_of_a_single_row_stays_in_training(bert, tmp_path, seed):
    path = tmp_path / "a.csv"
    labels = ["a"] * 8 + ["b"] * 8 + ["rare", "once", "seldom", "seldom"]
    path.write_text("text,label\n" + "".join(f"text {n},{label}\n" for n, label in enumerate(labels)))
    source = DataSource(str(path), validation_fraction=0.4, test_fraction=0.3, seed=seed)
    data = TextClassificationData(bert, source)
    data.setup()
    data.setup("test")
    assert data.label_names == ["a", "b", "once", "rare", "seldom"]
    assert set(data.splits.train["label"]) == set(data.label_names)
    texts = [text for part in data.splits[:3] for text in part["text"]]
    assert sorted(texts) == sorted(f"text {n}" for n in range(len(labels)))


def test_a_split_that_was_held_back_is_named(bert, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{'abc'[n % 3]}\n" for n in range(12)))
    data = TextClassificationData(bert, DataSource(str(path), validation_fraction=0.5), label_names=["a", "b"])
    with pytest.raises(
        DataError, match=r"validation data, held back from the training rows by validation_fraction=0.5, has labels"
    ):
        data.setup("validate")


def test_a_class_label_keeps_its_own_order(bert):
    rows = datasets.Dataset.from_list(
        labelled(0, 1, 1),
        features=datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}),
    )
    assert names_of_labels(rows, "label") == ["z", "a"]


def test_given_names_decide_the_order_and_predicting_needs_no_labels(bert):
    data = TextClassificationData(bert, Rows(labelled("a", "b")), label_names=["b", "a"])
    data.setup("fit")
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1, 0]
    unlabelled = TextClassificationData(bert, Rows([{"text": "?"}]), label_names=["b", "a"])
    unlabelled.setup("predict")
    assert "labels" not in next(iter(unlabelled.predict_dataloader()))


def test_pairs_of_texts_and_long_texts_are_tokenised_as_the_model_wants(bert):
    rows = [{"text": "one", "other": "two", "label": label} for label in "ab"]
    data = TextClassificationData(bert, Rows(rows), pair_column="other", max_length=6)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].shape == (2, 6)


def test_texts_are_cut_at_what_the_model_reads(bert, trainer):
    data = TextClassificationData(bert, Rows([{"text": "x" * 900, "label": label} for label in "ab"]), max_length=2000)
    data.setup("validate")
    assert next(iter(data.val_dataloader()))["input_ids"].shape == (2, 512)
    trainer().validate(SequenceClassification(bert), data, verbose=False)


def test_a_label_that_training_never_saw_is_an_error(bert):
    class Other(Rows):
        def load(self) -> Splits:
            train, other = (datasets.Dataset.from_list(labelled(*labels)) for labels in ("ab", "ac"))
            return Splits(train, other, None, other)

    with pytest.raises(
        DataError, match=r"validation data has labels that are not among label_names: c. Known are a, b"
    ):
        TextClassificationData(bert, Other([])).setup("fit")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{"text": "x", "klass": "a"}],
            "no column 'label'. Its columns are: text, klass. Say which with label_column.",
        ),
        (labelled("a", None), "rows without a label"),
        (labelled(0.5, 1.5), "must hold one label per row"),
        (labelled(["a"], ["b"]), "must hold one label per row"),
        (labelled(*range(1001)), "1001 different values"),
        ([{"text": None, "label": label} for label in "ab"], "must hold text, but there is None"),
    ],
)
def test_columns_that_are_no_labels_or_no_texts_are_refused(bert, rows, said):
    with pytest.raises(DataError, match=said):
        TextClassificationData(bert, Rows(rows)).setup("fit")


def test_names_given_twice_are_refused(bert):
    with pytest.raises(ConfigError, match=r"a name twice"):
        TextClassificationData(bert, Rows([]), label_names=["a", "a"])


def test_texts_are_trained_on_end_to_end(bert, trainer, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{'yes' * 3 if n % 2 else 'no' * 4},{n % 2}\n" for n in range(40)))
    data = TextClassificationData(bert, DataSource(str(path), validation_fraction=0.25), batch_size=8)
    task = SequenceClassification(bert, learning_rate=1e-2)
    run = trainer(max_epochs=4)
    run.fit(task, data)
    assert run.callback_metrics["val_accuracy"] == 1
    assert {row["label"] for batch in trainer().predict(task, data) for row in batch} == {"0", "1"}


def test_a_folder_of_images_by_label_is_trained_on_end_to_end(vit, trainer, tmp_path):
    for label, level in (("dark", 40), ("light", 200)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for index in range(6):
            pixels = np.full((20, 24, 3), level + index, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{index}.png")
    data = ImageClassificationData(vit, DataSource(str(tmp_path / "pictures"), validation_fraction=0.3), batch_size=4)
    task = ImageClassification(vit, learning_rate=1e-2)
    run = trainer(max_epochs=5)
    run.fit(task, data)
    assert data.label_names == ["dark", "light"]
    assert next(iter(data.val_dataloader()))["pixel_values"].shape[1:] == (3, 16, 16)
    assert run.callback_metrics["val_accuracy"] == 1
    assert len(trainer().predict(task, data)) == 3
