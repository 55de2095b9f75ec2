"""Causal language modelling: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_lora.analysis.bits_per_byte import context_of
from lightning_lora.engine import injections
from lightning_lora.errors import ConfigError
from lightning_lora.format.transformers_private import attention_of
from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks.base import (
    IGNORED,
    Mean,
    OptimizerFactory,
    SchedulerFactory,
    Task,
    lengths_for_flash,
)


class Perplexity(Mean):
    """exp of the mean loss per token; `update(value, weight)` takes a batch's mean loss and its count of tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class CausalLM(Task):
    """Train a causal language model; `predict` continues prompts.

    Batches are dicts of `input_ids`, `labels` (the same ids, -100 where nothing is to be predicted; the model shifts
    them) and maybe `attention_mask` or `position_ids`, all (rows, tokens). A row whose positions start again holds
    several examples; a model that mixes them raises ConfigError (see `check_apart`).

    Logs train_loss, val_loss and val_perplexity (test_...). In them, every token of an epoch counts the same. In an
    optimizer step, every token of all its micro-batches and processes counts the same.

    `predict_step` gives one dict per row: `prompt` and `text`, its continuation of at most `max_new_tokens`;
    `temperature` 0 takes the likeliest token each time.
    """

    task_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        model: ModelSource,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        learning_rate: float | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, scheduler, learning_rate, gradient_checkpointing)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if not temperature >= 0:
            raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or larger.")
        self.save_hyperparameters("max_new_tokens", "temperature")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._apart = False
        """True once `check_apart` found that the model keeps packed examples apart."""

    def build_model(self) -> PreTrainedModel:
        self.eval_metrics = nn.ModuleDict(
            {
                stage: MetricCollection(
                    {"loss": Mean(), "perplexity": Perplexity()}, prefix=f"{stage}_", compute_groups=False
                )
                for stage in ("val", "test")
            }
        )
        return self.source.load(self.auto_class)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded when text is first generated."""
        return self.source.tokenizer()

    def forward(self, batch: dict[str, Any]) -> Any:
        """The model's output on a batch: `loss` (the mean over predicted tokens) and `logits`."""
        assert self.model is not None
        if not self._apart and is_packed(batch):
            check_apart(self.model, batch)
            self._apart = True
        # With a cache, transformers would not read from position_ids where one packed example ends.
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens, output = predicted_tokens(batch), self(batch)
        # The mean over no tokens is NaN. All processes need a backward, so the loss is a zero computed from the logits.
        loss = output.loss if tokens else output.logits.sum() * 0.0
        self.log_training(loss, weight=tokens)
        return self.weighed(loss, tokens)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, str]]:
        model: Any = self.model  # typed as any model; those of auto_class have generate()
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        longest, context = int(batch["attention_mask"].sum(1).max()), context_of(model.config)
        if context is not None and longest + self.max_new_tokens > context:
            raise ConfigError(
                f"A prompt of {longest} tokens and max_new_tokens={self.max_new_tokens} are more than the {context} "
                "tokens that the model can read. Lower task.max_new_tokens, or data.max_length (data.prompt_length)."
            )
        ids = model.generate(
            **prompts, max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **sampling
        )
        texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        # Decoding with skip_special_tokens would lose those of a chat template: leave out only the padding.
        rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        return [
            {"prompt": str(self.tokenizer.decode(row)), "text": text} for row, text in zip(rows, texts, strict=True)
        ]

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        tokens = predicted_tokens(batch)
        # The mean over no tokens is NaN, and would make the mean of the epoch NaN.
        loss = self(batch).loss.float() if tokens else torch.zeros((), device=self.device)
        self.log_evaluation(stage, value=loss, weight=tokens)


def predicted_tokens(batch: dict[str, Tensor]) -> int:
    """The number of predicted tokens in `labels` (rows, tokens). The first of a row is not predicted: nothing is before
    it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def is_packed(batch: Mapping[str, Any]) -> bool:
    """True if rows hold several examples: the positions start again within a row, and there is no attention mask."""
    positions = batch.get("position_ids")
    return positions is not None and batch.get("attention_mask") is None and bool((positions.diff() != 1).any())


@torch.no_grad()
def check_apart(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `model` gives an example the same output whether or not another one is before it in the
    row.

    This is tried with a few tokens of `batch`, since no attribute of the model says it: many models of transformers
    take `position_ids` but mix examples nevertheless. Dropout is off for the trial.
    """
    if any(injection.config.alora_invocation_tokens for _, injection in injections(model)):
        raise ConfigError("An activated LoRA acts from one place of a row on: it goes with packing=false alone.")
    ids = batch["input_ids"].flatten()
    first, tried, last = ids.repeat(-(-24 // len(ids)))[:24].chunk(3)
    starting = torch.arange(8, device=ids.device).repeat(2, 2)
    inputs = {"input_ids": torch.stack([torch.cat([first, tried]), torch.cat([tried, last])]), "position_ids": starting}
    if "cu_seq_lens_q" in batch:
        inputs |= lengths_for_flash(starting)
    training = {module: module.training for module in model.modules()}
    try:
        logits = model.eval()(**inputs, use_cache=False).logits.float()
    except ValueError as error:  # some layers refuse examples that they would mix
        raise ConfigError(f"{type(model).__name__} fails on packed examples (data.packing=true): {error}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    behind, alone = logits[0, 8:], logits[1, :8]
    # The change of each token's output. In every model that mixed examples, it was 10 % or more for both tokens next to
    # the border, or for most tokens. Rounding to 16 bits changes about 1 %, and may send a single token to other
    # experts.
    changes = (behind - alone).std(-1) / alone.std(-1)
    if not max(float(changes[:2].min()), float(changes.median())) <= 0.03:
        attention = attention_of(getattr(model, "config", None))
        raise ConfigError(
            f"{type(model).__name__} (attention: {attention}) lets packed examples see each other, or does not count "
            "their positions anew. Leave packing off (data.packing=false), or try another model.attn_implementation."
        )
