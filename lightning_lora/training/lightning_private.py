"""The private names of Lightning that we use: each once, with the reason.

An exact resumption reads and sets counters of Lightning's loops. `check` looks for all of them when training starts,
and raises MovedError where one is gone: a counter that is set under an old name would do nothing, and the resumed run
would silently be another one. Functions used outside of an exact resumption raise MovedError by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import reduce
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torchmetrics import Metric

from lightning_lora.borrowed import PURPOSES, attribute, found, needed, replace
from lightning_lora.errors import MovedError

_LAUNCHES = "brings trained adapters back from launched processes"
_LOGS = "logs an adapter folder with its checkpoint"
_RESUMES = "makes a resumed run the run that was not interrupted"


class _Gone:
    """Stands for a class that Lightning no longer has: `check` raises MovedError before anybody uses it."""


def _of_loops(name: str, otherwise: Any = _Gone) -> Any:
    return found(f"lightning.pytorch.{name}", _RESUMES, otherwise)


_IteratorFetcher = _of_loops("loops.fetchers:_DataLoaderIterDataFetcher")
_PrefetchFetcher = _of_loops("loops.fetchers:_PrefetchDataFetcher")
_FitStage = _of_loops("loops.fit_loop:RestartStage")
_EpochStage = _of_loops("loops.training_epoch_loop:RestartStage")
_Metadata = _of_loops("trainer.connectors.logger_connector.result:_Metadata")
_ResultMetric = _of_loops("trainer.connectors.logger_connector.result:_ResultMetric")
_Sync = _of_loops("trainer.connectors.logger_connector.result:_Sync")
_call_callbacks = _of_loops("trainer.call:_call_callback_hooks")
_call_module = _of_loops("trainer.call:_call_lightning_module_hook")
for _name in ("_state_dicts", "_load_state_dicts"):
    _of_loops(f"utilities:CombinedLoader.{_name}")

_trainer_init = needed(
    "lightning.pytorch.trainer.connectors.callback_connector:_CallbackConnector.on_trainer_init", _LAUNCHES
)

_RESTART = ("_restarting", "_loaded_from_state_dict", "_resuming_from_checkpoint")
ATTRIBUTES = {
    "fit_loop": (
        *(*_RESTART, "_restart_stage", "_combined_loader", "_combined_loader_states_to_load", "_data_fetcher"),
        *("_data_source", "_last_train_dl_reload_epoch", "_should_accumulate", "on_advance_start", "on_advance_end"),
    ),
    "fit_loop.epoch_loop": (
        *(*_RESTART, "_restart_stage", "_results", "_batches_that_stepped", "_skip_next_val", "_should_accumulate"),
        *("_should_check_val_fx", "_num_ready_batches_reached", "advance", "on_advance_end"),
    ),
    "fit_loop.epoch_loop.val_loop": (*_RESTART, "_combined_loader", "reset", "_on_evaluation_end", "on_run_end"),
    "_logger_connector": (
        *("_callback_metrics", "_first_loop_iter", "on_batch_start", "on_batch_end", "should_update_logs"),
    ),
    "_checkpoint_connector": ("dump_checkpoint",),
    "strategy": ("_setup_model", "_checkpoint_io"),
    "lightning_module": ("_on_before_batch_transfer",),
}
"""Path to an object in a Trainer -> its attributes that we read or set, and its methods that ours override."""

HOOK_LOCALS = ("hook_name", "callback", "callbacks", "monitoring_callbacks", "args")
"""Local variables of the function that calls a hook of all callbacks: they tell whose hook has been called."""


def check(trainer: Any) -> None:
    """Raise MovedError if the installed Lightning lacks one of the names by which a run is resumed exactly. Called
    before our mixins are put in front of the loops."""
    for path in [path for path, purpose in PURPOSES.items() if purpose is _RESUMES]:
        if found(path, _RESUMES) is None:
            raise MovedError(path.replace(":", "."), _RESUMES)
    for where, names in ATTRIBUTES.items():
        owner = reduce(lambda one, name: attribute(one, name, _RESUMES), where.split("."), trainer)
        for name in names:
            attribute(owner, name, _RESUMES)
    known: CodeType = _call_callbacks.__code__
    for name in HOOK_LOCALS:
        if name not in (*known.co_varnames, *known.co_cellvars):
            raise MovedError(f"lightning.pytorch.trainer.call._call_callback_hooks with a local {name}", _RESUMES)


# Counters of the loops.


def forget_restart(fit_loop: Any) -> None:
    """Have the loops go on as if nothing had been loaded: with the start of an epoch."""
    epoch_loop = fit_loop.epoch_loop
    for loop in (fit_loop, epoch_loop, epoch_loop.val_loop):
        loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    fit_loop._restart_stage, epoch_loop._restart_stage = _FitStage.NONE, _EpochStage.NONE


def restart_in_epoch(fit_loop: Any) -> None:
    """Have the loop over epochs go on inside an epoch that has begun already."""
    fit_loop._restart_stage = _FitStage.RESTARTED_MID_EPOCH
    fit_loop._resuming_from_checkpoint = True  # or the epoch would start with an iterator that nobody uses


def load_loader_states(fit_loop: Any, states: list[dict[str, Any]]) -> None:
    """Load the states of stateful loaders from a checkpoint: Lightning does so only for a checkpoint in mid-epoch, and
    may have fetched a batch from other random numbers since."""
    has_to = fit_loop._combined_loader_states_to_load or is_ahead(fit_loop._data_fetcher)
    if states and has_to and fit_loop._combined_loader is not None:
        fit_loop._combined_loader._load_state_dicts(states)
        fit_loop._combined_loader_states_to_load = []
        iter(fit_loop._data_fetcher)


def set_last_reload(fit_loop: Any, epoch: int) -> None:
    """Set the epoch in which the loaders were last made anew (reload_dataloaders_every_n_epochs)."""
    fit_loop._last_train_dl_reload_epoch = epoch


def batches_that_stepped(trainer: Any) -> int:
    """The number of batches after which the optimizer has stepped; Lightning counts a batch at its end."""
    count: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return count


def set_batches_that_stepped(trainer: Any, count: int) -> None:
    """Set what `batches_that_stepped` returns."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = count


def is_accumulating(trainer: Any) -> bool:
    """True if the optimizer does not step after the present batch. Raises MovedError where Lightning does not tell."""
    return bool(attribute(trainer.fit_loop, "_should_accumulate", "weighs the batches that are accumulated")())


def skip_next_validation(trainer: Any, skips: bool) -> None:
    """Set whether the validation after the present batch is skipped, because it has run already."""
    trainer.fit_loop.epoch_loop._skip_next_val = skips


def would_validate(trainer: Any) -> bool:
    """True if a validation comes after the present batch."""
    fit_loop = trainer.fit_loop
    return bool(fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher))


def is_epoch_through(trainer: Any) -> bool:
    """True if all batches of the epoch have been trained on."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def last_save(callback: Any) -> tuple[int, str]:
    """The step at which a ModelCheckpoint last saved, and the path; (0, "") before it has. Its state has neither.
    Raises MovedError where it does not note them."""
    step = attribute(callback, "_last_global_step_saved", _RESUMES)
    return step, attribute(callback, "_last_checkpoint_saved", _RESUMES)


def set_last_save(callback: Any, step: int, path: str) -> None:
    """Set what `last_save` returns. Raises MovedError as it does."""
    replace(callback, _RESUMES, _last_global_step_saved=step, _last_checkpoint_saved=path)


# Data.


def combined_loader(loop: Any) -> Any:
    """The CombinedLoader of a loop over epochs or over a validation; None before it is made."""
    return loop._combined_loader


def loader_states(loader: CombinedLoader | None) -> list[dict[str, Any]]:
    """The states of the stateful loaders in it."""
    return [] if loader is None else loader._state_dicts()


def restart_loaders(loader: Any, wrapped: list[Any]) -> None:
    """Have the iterator of a CombinedLoader start `wrapped` in place of the loaders that end before others do.
    Raises MovedError where the iterator takes loaders from elsewhere."""
    replace(attribute(loader, "_iterator", _RESUMES), _RESUMES, iterables=wrapped)


def data_fetcher(trainer: Any) -> Any:
    """The object that fetches the training batches; None before it is made."""
    return trainer.fit_loop._data_fetcher


def iterator_given(fetcher: Any) -> Any:
    """The iterator that `fetcher` gives to a training_step which asks for it; None where training_step gets batches."""
    return fetcher.iterator_wrapper if isinstance(fetcher, _IteratorFetcher) else None


def is_ahead(fetcher: Any) -> bool:
    """True if `fetcher` holds a batch that has not been trained on: of data without a length, it fetches one more to
    know whether there is one. Raises MovedError where it keeps batches elsewhere."""
    return isinstance(fetcher, _PrefetchFetcher) and bool(attribute(fetcher, "batches", _RESUMES))


def training_loader(trainer: Any) -> Any:
    """The loader that train_dataloader of the module or the data module returns. Raises MovedError where it cannot be
    asked for."""
    return attribute(trainer.fit_loop, "_data_source", "measures a start on batches").dataloader()


def moved_batch(trainer: Any, batch: Any) -> Any:
    """`batch` in the precision and on the device in which training_step gets it. Raises MovedError where the hook
    that Lightning calls before the transfer has another name."""
    module = trainer.lightning_module
    hook = attribute(module, "_on_before_batch_transfer", "gives training_step a batch")
    return trainer.strategy.batch_to_device(hook(trainer.precision_plugin.convert_input(batch), dataloader_idx=0))


# Hooks.


class HookCall(NamedTuple):
    """A running call of a hook of all callbacks, or of the module."""

    hook: str
    by: Any
    """The callback or module whose hook runs."""
    later: list[Any]
    """Those whose hook is still to be called."""
    args: tuple[Any, ...]
    was_raised: bool
    """True if the exception that ends the run came out of this call."""


def hook_calls(trainer: Any) -> Iterator[HookCall]:
    """The running hook calls of this thread, the innermost first. They are read from Lightning's local variables."""
    module = trainer.lightning_module
    for frame, was_raised in _frames(trainer):
        known = frame.f_locals
        if frame.f_code is _call_module.__code__:
            yield HookCall(known["hook_name"], module, [], known["args"], was_raised)
        elif frame.f_code is _call_callbacks.__code__ and "callbacks" in known:
            by, turn = known.get("callback"), known["callbacks"]
            later = turn[next((i for i, c in enumerate(turn) if c is by), -1) + 1 :]
            if known["monitoring_callbacks"] is None:  # else the module has had it, or checkpoints are still to come
                later = [*later, module]
            yield HookCall(known["hook_name"], by, later, known["args"], was_raised)


def _frames(trainer: Any) -> Iterator[tuple[FrameType, bool]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, False
        frame = frame.f_back
    if trainer.state.status == TrainerStatus.INTERRUPTED:
        error = sys.exc_info()[1]
        trace = error.__traceback__ if error is not None else None
        while trace is not None:
            yield trace.tb_frame, True
            trace = trace.tb_next


def call_hook(trainer: Any, hook: str, *args: Any) -> None:
    """Call `hook` of all callbacks and of the module, as Lightning does."""
    _call_callbacks(trainer, hook, *args)
    _call_module(trainer, hook, *args)


# What was logged.


def live_callback_metrics(trainer: Any) -> dict[str, Any]:
    """The metrics that callbacks see, to read without summing over processes, or to write to."""
    metrics: dict[str, Any] = trainer._logger_connector._callback_metrics
    return metrics


def logging_begins(trainer: Any, batch: Any) -> None:
    """Tell Lightning's logging that `batch` begins."""
    trainer._logger_connector.on_batch_start(batch)


def logging_ends(trainer: Any) -> None:
    """Tell Lightning's logging that the batch has ended."""
    trainer._logger_connector.on_batch_end()


def logging_goes_on(trainer: Any) -> None:
    """Tell Lightning's logging that the next batch is not the first one of its epoch."""
    trainer._logger_connector._first_loop_iter = False


def rows_still_to_log(trainer: Any) -> int:
    """The number of rows that Lightning logs of a batch after the hooks at its end: a resumed run does not log them
    again."""
    why = "goes on with the metrics of a run"
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    connector = attribute(trainer, "_logger_connector", why)
    if batches.completed == batches.processed or not attribute(connector, "should_update_logs", why):
        return 0
    return int(bool(attribute(trainer.fit_loop.epoch_loop, "_results", why).metrics(on_step=True)["log"]))


def results(trainer: Any) -> dict[str, Any]:
    """The values that `self.log` has gathered in the running epoch, by Lightning's keys."""
    gathered: dict[str, Any] = trainer.fit_loop.epoch_loop._results
    return gathered


def restored_result(saved: dict[str, Any], value: Tensor | Metric, device: torch.device) -> Any:
    """An entry of `results`, made from what a checkpoint holds of it."""
    meta = _AnyMetadata(**saved["meta"])
    restored = meta.metric = _ResultMetric(meta, isinstance(value, Tensor))
    restored.has_reset, restored._update_count = saved["has_reset"], 1
    restored.value = value.to(device) if isinstance(value, Tensor) else value
    if saved["count"] is not None:
        restored.cumulated_batch_size = saved["count"].to(device)
    return restored


class _AnyMetadata(_Metadata):  # type: ignore[valid-type, misc]
    """How a restored value is logged, until the module logs it again with metadata of its own."""

    metric: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sync = _Sync()

    def __ne__(self, other: Any) -> bool:
        self.metric.meta = other
        return False

    __hash__ = None  # type: ignore[assignment]


# The rest of a Trainer.


def checkpoint_of(trainer: Any) -> dict[str, Any]:
    """The checkpoint that `trainer.save_checkpoint` would write. Raises MovedError where it cannot be had."""
    connector = attribute(trainer, "_checkpoint_connector", "writes the last adapter of a run")
    checkpoint: dict[str, Any] = attribute(connector, "dump_checkpoint", "writes the last adapter of a run")()
    return checkpoint


def average_of(callback: Any) -> Any:
    """The copy of the module in which a callback averages weights; None before it is made. Raises MovedError."""
    return attribute(callback, "_average_model", "averages the weights of adapters")


def data_given(trainer: Any) -> Any:
    """The loader, module or data module that the training data comes from; None where Lightning keeps it elsewhere."""
    return getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)


def logs_hyperparameters(holder: Any) -> bool:
    """True if Lightning logs the hyperparameters that `holder`, a module or a data module, has saved."""
    return bool(getattr(holder, "_log_hyperparams", False))


def logs_models(logger: Any) -> bool:
    """True if MLflow's or W&B's `logger` logs checkpoints as models. Raises MovedError where it lacks these names."""
    attribute(logger, "_scan_and_log_checkpoints", _LOGS)
    logged_models(logger)
    return bool(attribute(logger, "_log_model", _LOGS))


def logged_models(logger: Any) -> dict[str, float]:
    """The checkpoints that were logged: path -> time of the file."""
    return dict(attribute(logger, "_logged_model_time", _LOGS))


def model_name(logger: Any) -> str:
    return str(attribute(logger, "_checkpoint_name", _LOGS))


def launches_processes(launcher: Any) -> bool:
    """True if `launcher` starts processes by `multiprocessing`. Raises MovedError where that cannot be known: the
    weights that those processes train would get lost."""
    path = "lightning.pytorch.strategies.launchers.multiprocessing:_MultiProcessingLauncher"
    known = found(path, _LAUNCHES)
    if known is None and launcher is not None:
        raise MovedError(path.replace(":", "."), _LAUNCHES)
    return launcher is not None and isinstance(launcher, known)


def trainer_being_made() -> Any:
    """The Trainer whose constructor is asking a callback for its state key; None where no constructor asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _trainer_init.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"].trainer


def starts_scripts(trainer: Any) -> bool:
    """True if the run has several processes, and the running script starts the others or may do so."""
    path = "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher"
    launcher = found(path, "refuses sweeps whose jobs would start each other")
    return trainer.world_size > 1 and (launcher is None or isinstance(trainer.strategy.launcher, launcher))
