"""Lightning's loops, with the points at which an exact resumption notes where the run is (resume.py)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.engine.swap import swap
from lightning_lora.training.resume import ExactResume
from lightning_lora.training.rounds import only

if TYPE_CHECKING:
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop as _ValidationHost
    from lightning.pytorch.loops.fit_loop import _FitLoop as _FitHost
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop as _LoopHost
else:
    _FitHost = _LoopHost = _ValidationHost = object


class ResumedFitLoop(_FitHost):
    """Mixin in front of Lightning's loop over epochs."""

    lora_resume: ExactResume

    def on_advance_start(self) -> None:
        resume = self.lora_resume
        if resume.entry is None:
            resume.extra = resume.cut = False
            resume.begin("epoch start")
        super().on_advance_start()
        resume.amid = ""

    def on_advance_end(self) -> None:
        resume = self.lora_resume
        rest, resume.rest = resume.rest, None
        resume.end_epoch()
        with only(self.trainer, "on_train_epoch_end", rest) if rest is not None else nullcontext():
            super().on_advance_end()
        resume.amid = ""


class ResumedEpochLoop(_LoopHost):
    """Mixin in front of Lightning's loop over the batches of an epoch."""

    lora_resume: ExactResume

    def advance(self, data_fetcher: Any) -> None:
        if self.lora_resume.begin_batch(data_fetcher):
            super().advance(data_fetcher)
            self.lora_resume.amid = ""

    def on_advance_end(self, data_fetcher: Any) -> None:
        try:
            super().on_advance_end(data_fetcher)
        except SIGTERMException:  # Lightning raises it as its last act there
            self.lora_resume.ended = self.total_batch_idx + 1
            raise


class ResumedValidationLoop(_ValidationHost):
    """Mixin in front of Lightning's loop over the batches of a validation."""

    lora_resume: ExactResume
    lora_goes_on = False
    """True where a validation that began with one adapter runs for another one (many/rounds.py)."""

    def reset(self) -> None:
        if self.trainer.sanity_checking:
            self.lora_resume.begin_sanity_check(self.trainer)
        if self._is_of_training():
            before = self.lora_resume.before
            self.lora_resume.begin_validation()
            if self.lora_goes_on:
                self.lora_resume.before = before
        super().reset()

    def _on_evaluation_end(self, *args: Any, **kwargs: Any) -> None:
        if self._is_of_training():
            self.lora_resume.end_validation()
        super()._on_evaluation_end(*args, **kwargs)

    def on_run_end(self) -> Any:
        outputs = super().on_run_end()
        self.lora_resume.amid = ""
        return outputs

    def _is_of_training(self) -> bool:
        return self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking


def watch_loops(trainer: Any, resume: ExactResume) -> None:
    """Let the loops of `trainer` tell `resume` where the run is."""
    fit_loop = trainer.fit_loop
    mixins = (ResumedFitLoop, ResumedEpochLoop, ResumedValidationLoop)
    for loop, mixin in zip((fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop), mixins):
        if not hasattr(loop, "lora_resume"):
            swap(loop, "Resumed", mixin)
        loop.lora_resume = resume
