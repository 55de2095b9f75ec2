"""Adapt the model in the process that launches others, before it does.

With ddp_spawn, ddp_fork and ddp_notebook the Trainer's hooks run in child processes only. The parent's module would
stay without adapters, and Lightning, which loads the trained weights back into it without strictness, would drop them
silently. It offers no hook in the parent, so its launcher's `launch` is wrapped, once.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus


def adapt_before_launch() -> None:
    """Let every LoRACallback of a Trainer act in the launching process, before and after the run."""
    original = _MultiProcessingLauncher.launch
    if hasattr(original, "adapts_before"):
        return

    @functools.wraps(original)
    def launch(self: Any, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        ours = [c for c in getattr(trainer, "callbacks", ()) if hasattr(c, "before_launch")]
        for callback in ours:
            callback.before_launch(trainer)
        if ours:
            function = functools.partial(_save_on_exception, function, trainer)
        try:
            result = original(self, function, *args, trainer=trainer, **kwargs)
        except BaseException:
            for callback in ours:
                callback.launch_failed()
            raise
        for callback in ours:
            callback.after_launch(trainer)
        return result

    launch.adapts_before = True  # type: ignore[attr-defined]
    _MultiProcessingLauncher.launch = launch  # type: ignore[method-assign]


def _save_on_exception(function: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """In a launched process, which has the weights. Lightning calls on_exception in the launching one alone."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        trainer.state.status = TrainerStatus.INTERRUPTED
        for callback in trainer.checkpoint_callbacks:
            callback.on_exception(trainer, trainer.lightning_module, error)
        raise
