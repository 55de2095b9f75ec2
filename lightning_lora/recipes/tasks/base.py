"""The base class of all tasks: it builds the model in `configure_model`, and has an optimizer, a schedule, and metrics
by stage.

The model is built late so that Lightning's contexts (dtype, device, sharding) are in force, and so that `LoRACallback`
adapts it right afterwards.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from lightning_lora.recipes.models import ModelSource
from lightning_lora.recipes.tasks.window import WeighedWindow

DEFAULT_LEARNING_RATE = 2e-4
IGNORED = -100
"""The label of a token or row that is read but not predicted; it is the one that torch's cross_entropy ignores."""

OptimizerFactory = Callable[..., optim.Optimizer]
SchedulerFactory = Callable[..., LRScheduler]


class Mean(MeanMetric):
    """A weighted mean that stays in float32 even if a Trainer's precision (bf16-true) casts everything else to 16 bits:
    from 256 on, adding 1 does not change a bfloat16 number."""

    def __init__(self) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            super().__init__()
        finally:
            torch.set_default_dtype(before)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        moved = super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)
        self._dtype = torch.float32  # torchmetrics takes the default there
        return moved


class Task(WeighedWindow, ABC):
    """One kind of training on a transformers model.

    `optimizer` takes the trainable parameters; None is AdamW. `learning_rate` is the optimizer's `lr`: a value given
    here overrides the one in `optimizer`, and Lightning's learning-rate finder sets it. `scheduler` takes the optimizer
    and is stepped after every optimizer step. If it has an argument `num_training_steps` (as transformers' schedules
    do) that was not given, it is filled in from the trainer. A ReduceLROnPlateau is stepped after every validation, by
    `val_loss`.

    The gradient of an optimizer step is the mean over all tokens (or rows) of its micro-batches, in all processes:
    accumulation, DDP and one large batch agree. A task of your own gets this if training_step returns
    `self.weighed(loss, count)`, where `loss` is the mean over `count` tokens or rows. Otherwise every micro-batch
    counts the same, whatever its size.

    A checkpoint does not hold these arguments. Give them again: `load_from_checkpoint(path, model=ModelSource(...))`.
    """

    task_type: ClassVar[str | None] = None
    """PEFT's name for the task in adapter_config.json; None where PEFT has none."""
    auto_class: ClassVar[str]
    """transformers' `AutoModelFor...` that has the right head."""

    def __init__(
        self,
        model: ModelSource,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        learning_rate: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.source = model
        self.model: PreTrainedModel | None = None
        self.eval_metrics = nn.ModuleDict()
        self.gradient_checkpointing = gradient_checkpointing
        self._optimizer = optimizer or optim.AdamW
        self._scheduler = scheduler
        if learning_rate is None and isinstance(optimizer, partial):
            learning_rate = optimizer.keywords.get("lr")
        elif learning_rate is None and optimizer is None:
            learning_rate = DEFAULT_LEARNING_RATE
        self.learning_rate = learning_rate

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """Load the model with the head that the task needs, and make the metrics."""

    @property
    def head_modules(self) -> list[str]:
        """New modules with random weights, which must be trained whole: for LoRAConfig's `modules_to_save`."""
        return []

    def configure_model(self) -> None:
        """Build the model, once: Lightning calls this for each of fit, validate, test and predict."""
        if self.model is not None:
            return
        model = self.build_model()
        if self.gradient_checkpointing:
            # The newer name; transformers drops the older one in version 6.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        # from_pretrained returns the model in evaluation mode, and Lightning trains in the mode that it finds.
        self.model = model.train()

    def configure_optimizers(self) -> Any:
        """The optimizer over the parameters that are trainable now, with the schedule if there is one."""
        rate: dict[str, Any] = {} if self.learning_rate is None else {"lr": self.learning_rate}
        optimizer = self._optimizer([p for p in self.parameters() if p.requires_grad], **rate)
        if self._scheduler is None:
            return optimizer
        parameters = inspect.signature(self._scheduler).parameters
        if "num_training_steps" in parameters and parameters["num_training_steps"].default is inspect.Parameter.empty:
            scheduler = self._scheduler(optimizer, num_training_steps=int(self.trainer.estimated_stepping_batches))
        else:
            scheduler = self._scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            schedule = {"scheduler": scheduler, "interval": "epoch", "monitor": "val_loss"}
        else:
            schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def log_training(self, loss: Tensor, weight: int) -> None:
        """Log `train_loss` at each step and its mean over the epoch, each batch counting `weight`."""
        loss = loss.detach()
        self.log("train_loss", loss, prog_bar=True, batch_size=weight)
        self.log("train_loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    def log_evaluation(self, stage: str, **update: Any) -> None:
        """Update the metrics of `stage` ("val" or "test"), each with the arguments that it knows, and log them."""
        metrics = self.eval_metrics[stage]
        assert isinstance(metrics, MetricCollection)
        metrics.update(**update)
        # The metrics gather their own state over processes when they are computed.
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val")


def lengths_for_flash(position_ids: Tensor) -> dict[str, Any]:
    """Arguments of flash attention for rows that hold several examples each; an example starts where `position_ids` is
    0.

    Without them, transformers gives flash attention the borders only for a batch of one row; in a larger batch, every
    example of a row sees those before it. Other kinds of attention do not read them.
    """
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
    both = {"cu_seq_lens": starts, "max_length": int(longest)}
    return {f"{name}_{of}": value for name, value in both.items() for of in "qk"}
