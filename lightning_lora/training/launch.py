"""Adapt the model in the process that launches others, before it does.

With ddp_spawn, ddp_fork and ddp_notebook the Trainer's hooks run in child processes only. The parent's module would
stay without adapters, and Lightning, which loads the trained weights back into it without strictness, would drop them
silently. It offers no hook in the parent, so its launcher's `launch` is wrapped, once.
"""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher


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
        result = original(self, function, *args, trainer=trainer, **kwargs)
        for callback in ours:
            callback.after_launch(trainer)
        return result

    launch.adapts_before = True  # type: ignore[attr-defined]
    _MultiProcessingLauncher.launch = launch  # type: ignore[method-assign]
