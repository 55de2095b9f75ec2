"""Private names of Lightning by which the evaluation of each adapter is one evaluation to loggers and savers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_lora.borrowed import attribute, replace
from lightning_lora.training.lightning_private import _call_callbacks

if TYPE_CHECKING:
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop as EvaluationLoop
else:
    EvaluationLoop = object  # Python swaps classes only if their layouts agree

_EVALUATES = "evaluates each adapter of a run by itself"


@contextmanager
def metrics_held_back(trainer: Any) -> Iterator[dict[str, Any]]:
    """Inside, the loggers get no metrics of an evaluation; gives a dict that they are put into. Raises MovedError where
    Lightning gives them out elsewhere."""
    held: dict[str, Any] = {}
    connector = attribute(trainer, "_logger_connector", _EVALUATES)
    replace(connector, _EVALUATES, log_eval_end_metrics=held.update)
    try:
        yield held
    finally:
        del connector.log_eval_end_metrics


def evaluation_ends(trainer: Any, metrics: Mapping[str, Any], *, is_fit: bool) -> None:
    """Give `metrics` to the loggers, and, in a fit, call on_validation_end of the callbacks that stop or save a run.
    Raises MovedError as `metrics_held_back`."""
    connector = attribute(trainer, "_logger_connector", _EVALUATES)
    attribute(connector, "log_metrics", _EVALUATES)(dict(metrics))
    if is_fit:
        _call_callbacks(trainer, "on_validation_end", monitoring_callbacks=True)


def print_results(loop: Any, results: list[dict[str, Any]], stage: str) -> None:
    """Print the table of an evaluation. Raises MovedError where Lightning has it elsewhere."""
    attribute(loop, "_print_results", _EVALUATES)(results, stage)
