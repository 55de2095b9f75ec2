"""Watches a run while it trains: the base stays as it is, each adapter gets a gradient, and nothing else trains.

A checkpoint holds only the adapter, which fits the base that the run began with. Yet frozen weights can be written to:
by the module's own forward (an embedding with max_norm, a codebook that follows its inputs), by a callback
(ModelPruning), or by a hook that clips weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_lora.engine import injections
from lightning_lora.engine.layers import adapters, pairs
from lightning_lora.engine.shown import base_parameter
from lightning_lora.engine.state import adapter_tensors, base_parameters, check_same_base, describe_base
from lightning_lora.engine.tree import Tree, is_average
from lightning_lora.engine.witness import marks_of
from lightning_lora.errors import BaseMismatchError, TrainingError, listed
from lightning_lora.training.lightning_private import average_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class BaseWatch:
    """Notes the base of a module when training starts, and checks it later. It keeps no reference to the module."""

    def __init__(self, module: nn.Module, *, is_error: bool) -> None:
        """A change of the base raises if `is_error`; else it is warned of, once."""
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
        """Raise TrainingError where the base has changed, naming the weights that were written to.

        The whole base is read only if a sample of it, or torch's count of writes, says that it may have changed.
        Averaging callbacks swap weights in and out without changing one of the base's.
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
        # A write that leaves a tensor as it was raises its count, too: name those whose sample differs, if any do.
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


class TrainedWatch:
    """Checks which adapters of a module take part in training, and that nothing else does."""

    def __init__(self, module: LightningModule) -> None:
        """Called when the module has been adapted."""
        self.trains = {name for name, t in adapter_tensors(module).items() if t.requires_grad}
        self.waiting: dict[str, Any] | None = None
        """The adapters that got no gradient yet, by name; None once they have been reported."""
        self.has_heard = False
        self.held = 0
        """How many tensors the optimizers hold."""

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Called when training starts. Raises TrainingError where a callback that finetunes has frozen the adapters
        meanwhile."""
        frozen = [name for name, t in adapter_tensors(module).items() if name in self.trains and not t.requires_grad]
        finetuning = [type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning)]  # type: ignore[attr-defined]
        if frozen and finetuning:
            raise TrainingError(
                f"{listed(finetuning)} has frozen {listed(frozen, 4)} after the model was adapted, so they would not "
                "train; later it would train weights of the base, which are not saved with an adapter. Leave it out: "
                "LoRACallback freezes the base by itself. Name what is to be trained whole in modules_to_save."
            )
        self.waiting = {pair.name: pair for pair in pairs(module)}
        self.has_heard, self.held = False, 0

    def before_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Raises TrainingError where an optimizer got parameters of the base."""
        held = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if held != self.held:
            _check_only_adapters(trainer.optimizers, module)
            self.held = held

    def after_backward(self) -> None:
        self.has_heard = True
        if self.waiting:
            self.waiting = {name: p for name, p in self.waiting.items() if p.A.grad is None and p.B.grad is None}

    def after_batch(self, module: LightningModule) -> None:
        """After the first batch, warn of adapters that do not train and of weights of the base that require grad."""
        if self.waiting is None or not self.has_heard:  # a training_step returned None
            return
        unused, self.waiting = self.waiting, None
        if unused:
            rank_zero_warn(
                f"{len(unused)} adapters received no gradient in the first batch: {listed(unused)}. Their layers are "
                "not called, or their outputs do not reach the loss, so they will not train. Leave them out with "
                "exclude_modules if that is meant."
            )
        if awake := unfrozen(module):
            rank_zero_warn(
                f"{listed(awake)} was frozen, and requires grad again: something unfroze it when training started. No "
                "optimizer holds it, so it does not train, but its gradients take time and memory."
            )


def _check_only_adapters(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Raise TrainingError for a parameter of the base that an optimizer got after `setup_optimizers`."""
    names = {id(p): name for name, p in Tree.of(module).parameters}
    saved = {id(t) for t in adapter_tensors(module).values()}
    given = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    held = (id(base_parameter(p)) for p in given)
    lost = [names[key] for key in held if key in names and key not in saved]
    if lost:
        raise TrainingError(
            f"{listed(lost)} came into an optimizer while training went on, but not into the adapter: it would be "
            "trained, and not saved. Take out what unfreezes it (a BackboneFinetuning callback, for example), or name "
            "its module in modules_to_save."
        )


def unfrozen(module: nn.Module) -> list[str]:
    """The names of parameters of the base that require grad."""
    saved = {id(t) for t in adapter_tensors(module).values()}
    return [name for name, p in Tree.of(module).parameters if p.requires_grad and id(p) not in saved]


def averaging(trainer: Trainer) -> list[Any]:
    """The callbacks of `trainer` that average weights."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def adapt_averages(trainer: Trainer, module: LightningModule) -> None:
    """Let Lightning's averaging callbacks copy `module` with its adapters: they copy it in their own setup, which may
    have run before. Raises TrainingError for one that would change frozen statistics of the base."""
    frozen = [name for _, injection in injections(module) for name in injection.frozen_norms]
    for callback in averaging(trainer):
        if frozen and isinstance(callback, StochasticWeightAveraging):
            raise TrainingError(
                "StochasticWeightAveraging estimates the statistics of batch norms anew, and those of "
                f"{listed(frozen)} are frozen with the base: it would reset them. Use WeightAveraging or "
                "EMAWeightAveraging, or name the norms in modules_to_save."
            )
        average = average_of(callback)
        if average is not None and next(adapters(average), None) is None:
            callback.setup(trainer, module, "fit")


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
    """The shape, type and values in a mark, without the place in memory and the count of writes."""
    return mark[2:] if isinstance(mark, tuple) else mark
