"""Tasks: LightningModules around transformers' models, one class per kind of task."""

from __future__ import annotations

from lightning_lora.recipes.tasks.base import Task
from lightning_lora.recipes.tasks.causal_lm import CausalLM
from lightning_lora.recipes.tasks.classification import ImageClassification, SequenceClassification

__all__ = ["CausalLM", "ImageClassification", "SequenceClassification", "Task"]
