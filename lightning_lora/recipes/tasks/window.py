"""An optimizer step is the mean over all tokens (or rows) of its micro-batches, in all processes, as if they were one
batch.

Lightning divides the gradients of micro-batches by their number and adds them up, and DDP divides by the number of
processes. If each loss is a mean over tokens, the result is a mean of means: a token of a short answer counts more than
one of a long answer. Here the loss of each micro-batch is multiplied by its number of tokens (or rows) before the
backward, and the gradients are divided by the number of the whole window before the step. A window is the micro-batches
of one step.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor

from lightning_lora.training.lightning_private import is_accumulating
from lightning_lora.training.run_state import of_all_ranks

_KEY = "window_weight"


class WeighedWindow(pl.LightningModule):
    """A LightningModule whose training_step returns `self.weighed(loss, count)`; `loss` is a mean over `count` tokens
    or rows.

    With one micro-batch in one process nothing changes. It works with automatic optimization, with windows that the end
    of an epoch cuts short, and with processes whose counts differ. From `on_before_optimizer_step` on, callbacks see
    the gradients that the optimizer uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weight: int | None = None
        """Count of the micro-batch whose training_step has run and whose backward has not."""
        self._window: int | None = None
        """Count of the micro-batches whose gradients are there and not divided yet, in this process."""
        self._before: int | None = None
        """`_window` before the running micro-batch: a run that is resumed in the middle of it starts it again."""
        self._resumed: int | None = None

    def weighed(self, loss: Tensor, count: int) -> Tensor:
        """Returns `loss`, the mean over `count` tokens or rows of this micro-batch. Within the step, each of them
        counts the same."""
        self._weight, self._before = count, self._window
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        weight, self._weight = self._weight, None
        trainer = self.trainer
        alone = trainer.accumulate_grad_batches == 1 and trainer.world_size == 1
        if weight is None or alone or trainer.strategy.handles_gradient_accumulation:
            super().backward(loss, *args, **kwargs)
            return
        resumed, self._resumed = self._resumed, None
        if resumed is not None and any(p.grad is not None for p in self.parameters()):
            self._window = resumed
        super().backward(loss * weight, *args, **kwargs)
        self._window = (self._window or 0) + weight
        if not is_accumulating(trainer):
            self._divide()

    def _divide(self) -> None:
        """Turn the gradients, which Lightning and DDP have divided already, into the mean over the window."""
        if self._window is None:
            return
        own = torch.tensor(self._window, device=self.device)
        total = int(self.trainer.strategy.reduce(own, reduce_op="sum"))
        self._window = None
        if total == 0:  # nothing was predicted in it: the gradients are zero
            return
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / total
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._divide()  # does nothing unless the last training_step returned None, so that no backward ran

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._window = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        own = self._before if progress.ready > progress.processed else self._window
        interrupted = self.trainer.state.status == TrainerStatus.INTERRUPTED
        windows = of_all_ranks(own, may_be_alone=interrupted)
        if any(window is not None for window in windows):  # inside of the window, whose gradients are beside them
            checkpoint[_KEY] = windows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        windows, trainer = checkpoint.get(_KEY, [None]), self._trainer
        self._resumed = windows[trainer.global_rank % len(windows)] if trainer is not None else None
