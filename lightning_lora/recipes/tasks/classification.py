"""The base of text and image classification: a new head with one output for each label of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PreTrainedModel

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks.base import IGNORED, Mean, OptimizerFactory, SchedulerFactory, Task


class Classification(Task):
    """One label per row. The base of SequenceClassification and ImageClassification.

    Batches are dicts of the model's inputs and `labels` (rows,). Logs train_loss, val_loss, val_accuracy (share of
    rows) and val_f1 (mean over labels), and test_... The names of the labels come from the data module (its
    `label_names`, which exist after `setup`) or from `label_names` here; a checkpoint stores them.

    `predict_step` gives one dict per row: `label`, `probability`, and `probabilities` by label.
    """

    def __init__(
        self,
        model: ModelSource,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        learning_rate: float | None = None,
        gradient_checkpointing: bool = False,
        label_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler, learning_rate, gradient_checkpointing)
        label_names = None if label_names is None else [str(name) for name in label_names]
        self.save_hyperparameters("label_names", logger=False)
        self.label_names: list[str] | None = label_names

    def build_model(self) -> PreTrainedModel:
        self.label_names = names = self._find_label_names()
        self.hparams["label_names"] = names
        classes = len(names)
        self.eval_metrics = nn.ModuleDict(
            {
                stage: MetricCollection(
                    {
                        "loss": Mean(),
                        "accuracy": MulticlassAccuracy(classes, average="micro"),
                        "f1": MulticlassF1Score(classes, average="macro"),
                    },
                    prefix=f"{stage}_",
                    compute_groups=False,
                )
                for stage in ("val", "test")
            }
        )
        return self.source.load(
            self.auto_class,
            new_head=True,
            num_labels=classes,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
            # A model that was a classifier of something else gets a new head too.
            ignore_mismatched_sizes=True,
        )

    @property
    def head_modules(self) -> list[str]:
        """The modules outside of the pretrained trunk that have parameters, such as ["classifier"] or ["score"]."""
        model = self.model if self.model is not None else self.source.skeleton(self.auto_class)
        trunk = model.base_model_prefix
        return [
            name for name, child in model.named_children() if name != trunk and any(True for _ in child.parameters())
        ]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (rows, labels) of a batch. The model does not get the batch's `labels`."""
        assert self.model is not None
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self(batch).float(), batch["labels"]
        rows = int((labels != IGNORED).sum())
        loss = F.cross_entropy(logits, labels) if rows else logits.sum() * 0.0  # the mean over no rows is NaN
        self.log_training(loss, weight=rows)
        return self.weighed(loss, rows)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        names = self.label_names
        assert names is not None
        rows = self(batch).float().softmax(dim=-1).cpu()
        return [
            {
                "label": names[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": dict(zip(names, row.tolist(), strict=True)),
            }
            for row in rows
        ]

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self(batch).float(), batch["labels"]
        loss = F.cross_entropy(logits, labels)
        self.log_evaluation(stage, value=loss, weight=len(labels), preds=logits, target=labels)

    def _find_label_names(self) -> list[str]:
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        theirs = getattr(data, "label_names", None)
        if theirs is None and getattr(data, "num_labels", None) is not None:
            theirs = [str(index) for index in range(data.num_labels)]  # type: ignore[union-attr]
        if theirs is None and self.label_names is None:
            raise ConfigError(
                f"{type(self).__name__} does not know its labels. Give it label_names=[...], or a data module that has "
                "`label_names` or `num_labels` after setup()."
            )
        names = self.label_names if theirs is None else [str(name) for name in theirs]
        assert names is not None
        if self.label_names is not None and names != self.label_names:
            raise ConfigError(
                f"{type(self).__name__} was given the labels {self.label_names}, but the data has {names}, in that "
                "order. Give the data module the same label_names."
            )
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"A classifier needs two or more labels that differ; these are {names}.")
        return names


class ImageClassification(Classification):
    """Train an image classifier; batches have `pixel_values` (rows, channels, height, width). See `Classification`."""

    auto_class = "AutoModelForImageClassification"


class SequenceClassification(Classification):
    """Train a text classifier on a transformers encoder or decoder. See `Classification`."""

    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"

    def build_model(self) -> PreTrainedModel:
        model = super().build_model()
        # Decoders classify by the last token that is not padding, so they must know the data's padding token.
        model.config.get_text_config().pad_token_id = self.source.tokenizer().pad_token_id or 0
        return model
