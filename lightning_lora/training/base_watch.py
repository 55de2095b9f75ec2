"""The base must stay as it is while an adapter trains on it: a checkpoint holds the adapter alone, and fits that base.

Frozen weights can be written to all the same: by the module's own forward (an embedding with max_norm, a codebook that
follows its inputs), by a callback (ModelPruning), by a hook that clips weights.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.engine.layers import adapters
from lightning_lora.engine.state import base_parameters, check_same_base, describe_base
from lightning_lora.engine.tree import Tree, is_average
from lightning_lora.engine.witness import marks_of
from lightning_lora.errors import BaseMismatchError, TrainingError, listed


class BaseWatch:
    """What the base of `module` was when training started. It keeps no reference to the module."""

    def __init__(self, module: nn.Module, *, is_error: bool) -> None:
        """`is_error` says whether a change is one, or is only said, once."""
        self.is_error = is_error
        self.marks = marks_of(base_parameters(module, None))
        self.description = describe_base(module)
        self.is_said = False
        self.looks = 0
        self.looks_after_step = 0

    def after_batch(self, module: nn.Module, has_stepped: bool) -> None:
        """Check after the first two batches, and the first two after which a step was taken: a module's own hooks run
        after a callback's. Later, `check` is called for what is saved."""
        self.looks += 1
        self.looks_after_step += has_stepped
        if self.looks <= 2 or 0 < self.looks_after_step <= 2:
            self.check(module)

    def check(self, module: nn.Module) -> None:
        """Raise TrainingError where the base is another one by now, naming what was written to.

        It is read as a whole only where a sample of it, or torch's count of writes, says that it may be: averaging
        callbacks swap weights in and out without changing one of the base's.
        """
        now = marks_of(base_parameters(module, None))
        if now == self.marks:
            return
        try:
            check_same_base(module, self.description)
        except BaseMismatchError:
            pass
        else:  # bitsandbytes, for one, casts biases in its layers' forward
            self.marks = now
            return
        changed = [name for name in {**self.marks, **now} if self.marks.get(name) != now.get(name)]
        # A write that leaves a tensor as it was raises its count, too: those of other samples come first.
        certain = [name for name in changed if _sample(self.marks.get(name)) != _sample(now.get(name))]
        message = (
            f"{listed(certain or changed)} of {type(module).__name__} changed while the adapter trains, though the "
            "base is frozen: its forward writes to it (max_norm, a codebook), or a callback or a hook does (pruning, "
            "clipping). A checkpoint holds the adapter alone, and would load onto no base. Name the module in "
            "modules_to_save, so that it is saved with the adapter, or keep it from being written to (max_norm=None, "
            "eval mode). With check_base=False the run goes on, and the changed base is yours to save."
        )
        if self.is_error:
            raise TrainingError(message)
        self.marks, self.description = now, describe_base(module)
        if not self.is_said:
            self.is_said = True
            rank_zero_warn(message)


def check_averages(module: nn.Module) -> None:
    """Raise TrainingError for an average of weights inside of `module` that was made before the adapters."""
    for name, wrapper in Tree.of(module).wrappers:
        if name and is_average(wrapper) and next(adapters(wrapper), None) is None:
            raise TrainingError(
                f"{name} of {type(module).__name__} averages weights ({type(wrapper).__name__}) and was made before "
                "the adapters: it would go through its own parameters and the trained ones side by side, which do not "
                "match any more. Use Lightning's EMAWeightAveraging callback, which averages the adapters; or make it "
                "in on_fit_start and keep it out of the module's children (in a list, for example)."
            )


def _sample(mark: object) -> object:
    """What a mark says of shape, type and numbers, without where they lie and how often they were written."""
    return mark[2:] if isinstance(mark, tuple) else mark
