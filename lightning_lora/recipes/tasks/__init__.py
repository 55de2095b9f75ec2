"""Tasks: LightningModules around transformers' models, one file per kind of task."""

from __future__ import annotations

from lightning_lora.recipes.tasks.base import Task
from lightning_lora.recipes.tasks.causal_lm import CausalLM
from lightning_lora.recipes.tasks.image_classification import ImageClassification
from lightning_lora.recipes.tasks.sequence_classification import SequenceClassification

__all__ = ["CausalLM", "ImageClassification", "SequenceClassification", "Task"]
