"""One optimizer step is the mean over all that its micro-batches hold, in every process: as if they were one batch.

Lightning adds up the gradients of micro-batches divided by their number, and DDP divides by the number of processes. Of
losses that are means over tokens, that is a mean of means: a token of a short answer counts more than one of a long.
Here each micro-batch's loss counts by its tokens (or rows) in the backward, and before the step the gradients are
divided by those of the window.
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
    """A LightningModule whose training_step returns `self.weighed(loss, count)`: `loss` is a mean over `count` things.

    With one micro-batch in one process nothing changes. It holds for automatic optimization, for windows that an
    epoch's end cuts short, and for each process's own count. Callbacks find the gradients as the optimizer does, from
    `on_before_optimizer_step` on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weight: int | None = None
        """Of the micro-batch between its training_step and its backward."""
        self._window: int | None = None
        """Of the micro-batches whose gradients are there and not divided yet, in this process."""
        self._before: int | None = None
        """Of those before the running micro-batch, from whose start a run resumed in its middle goes on."""
        self._resumed: int | None = None

    def weighed(self, loss: Tensor, count: int) -> Tensor:
        """`loss`, the mean over `count` tokens or rows of this micro-batch, which count alike within the step."""
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
        """Make the sum of gradients that Lightning and DDP have divided already the mean over the window."""
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
        self._divide()  # where the last training_step returned None, and so had no backward

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
