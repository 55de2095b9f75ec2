"""Fine-tune a model with LoRA adapters, and leave a folder with all that came of it.

lightning-lora train                                       the embedded model and data: needs no network
lightning-lora train lora.rank=16 optimizer.lr=5e-4        any setting, by its name
lightning-lora train model=pretrained model.name=ID data=text data.source.path=notes.txt
lightning-lora train data=instructions data.source.path=chats.jsonl    rows of messages, or of prompt and response
lightning-lora train task=sequence_classification data=text_classification data.source.path=rows.csv model=ID
lightning-lora train task=image_classification data=images data.source.path=FOLDER model=ID    a folder for each label
lightning-lora train -m lora.rank=4,8,16                   a sweep, with one table and one page at its end
lightning-lora train ckpt_path=RUN/checkpoints/last.ckpt   go on from a checkpoint
lightning-lora train adapter=RUN/adapter                   a new run that starts from a trained adapter
lightning-lora train task=custom task._target_=my.Task data=custom data._target_=my.Data
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from omegaconf import OmegaConf

from lightning_lora.checked import closest
from lightning_lora.cli.process import quieten, use_available_cores
from lightning_lora.cli.results import CONFIG, METRICS, RESULTS, metrics_of, read_metrics, shown, table, write_json
from lightning_lora.cli.settings import Node, build, build_each, literal, task_and_data
from lightning_lora.errors import ConfigError, listed

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

PROGRAM = "lightning-lora"
INTERRUPTED, TERMINATED = 130, 143  # the exit statuses that a shell gives for SIGINT and SIGTERM


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration; each node's own keys are those of its target."""

    model: Node
    data: Node
    task: Node
    optimizer: Node
    scheduler: Node
    trainer: Node
    callbacks: Node
    logger: Node
    lora: Node
    seed: int | None
    monitor: str
    mode: Literal["min", "max"]
    evaluate_before: bool
    adapter: str | None
    subfolder: str | None
    ignore_fields: list[str]
    ckpt_path: str | None
    run_dir: str


shared_runs: dict[str, Callable[[dict[str, Any]], dict[str, Any] | None]] = {}
"""The folder of a job that is trained in one run with others -> what trains them, in place of `train`."""


def run(settings: dict[str, Any]) -> float | None:
    """Train as `settings` say; returns the monitored metric of the best checkpoint, which a sweeper optimises.

    Raises SystemExit with status 130 where the user interrupts, and 143 on SIGTERM, after saying how to go on.
    """
    results = shared_runs.get(settings["run_dir"], train)(settings)
    folder = Path(settings["run_dir"])
    if results is not None:
        print(f"\n{_summary(results)}\n\n{_where(folder, results, settings['lora'] is not None)}")
        return results["after"].get(settings["monitor"])
    return None


def train(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Train as `settings` say, into the folder `run_dir`; returns the content of results.json (None except in process
    0)."""
    from lightning_lora import LoRACallback  # torch is slow to import
    from lightning_lora.cli.runs import (
        EarlierMetrics,
        MeasuredEnd,
        SeededStart,
        end_of,
        is_requeued,
        shows_progress,
        start_from,
        tell_loggers,
    )
    from lightning_lora.training.checkpoint import check_no_adapter_folder
    from lightning_lora.training.checkpoint_file import fetched

    quieten(is_adapted=settings["lora"] is not None)
    use_available_cores()
    checkpoint = settings["ckpt_path"]
    if checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).exists():
        raise ConfigError(f"ckpt_path={checkpoint}: there is no such checkpoint.")
    check_no_adapter_folder(checkpoint)
    if settings["adapter"] is not None:
        start_from(settings, _overrides())
    folder = make_folder(settings)
    seed(settings)
    check_optimizer(settings)
    task, data = task_and_data(settings)
    train_new_heads(settings, task)
    earlier = EarlierMetrics(folder)
    own = [SeededStart(settings["seed"]), MeasuredEnd(), earlier]
    callbacks, bars = shows_progress(settings, [*build_each(settings, "callbacks"), *own])
    tell_loggers(settings, callbacks)
    trainer: Trainer = build(settings, "trainer", callbacks=callbacks, logger=build_each(settings, "logger"), **bars)
    _check_processes(trainer)
    if trainer.is_global_zero:
        OmegaConf.save(OmegaConf.create(literal(settings)), folder / CONFIG)
    earlier.set_aside(trainer)

    measures = settings["evaluate_before"] and (checkpoint is not None or not is_requeued(trainer))
    # Settings are logged when the training starts: TensorBoard shows only the first settings that it gets.
    logs, trainer.enable_autolog_hparams = trainer.enable_autolog_hparams, False
    earlier.before = before = validate(trainer, task, data, None) if measures else {}
    trainer.enable_autolog_hparams = logs
    if trainer.received_sigterm:  # fit would forget it
        raise SystemExit(TERMINATED)
    check_monitor(settings, task, before)
    seed(settings)  # again, so that measuring the base does not change the order of the data
    started = time.perf_counter()
    try:
        # LoRACallback fetches the checkpoint by itself.
        has_one = any(isinstance(callback, LoRACallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        with nullcontext(checkpoint) if has_one else fetched(checkpoint) as path:
            trainer.fit(task, data, ckpt_path=path)
    except SystemExit:
        if trainer.interrupted:
            _say_how_to_go_on(folder, TERMINATED if trainer.received_sigterm else INTERRUPTED)
        raise
    if trainer.received_sigterm:  # in the last batch: whoever sent it does not wait for what comes after the training
        _say_how_to_go_on(folder, TERMINATED)
    seconds = time.perf_counter() - started
    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    best = best or end_of(trainer, folder)
    trainer.loggers = []  # the best checkpoint's metrics are in the log already, at the step that they belong to
    after = validate(trainer, task, data, best) if trainer.enable_validation else metrics_of(trainer)
    if not trainer.is_global_zero:
        return None
    return write_results(
        settings,
        task,
        best_checkpoint=best,
        overrides=_overrides(),
        before=earlier.before,
        after=after,
        steps=trainer.global_step,
        seconds=seconds,
    )


def write_results(
    settings: dict[str, Any],
    task: LightningModule,
    *,
    best_checkpoint: str,
    overrides: Sequence[str],
    before: dict[str, float],
    after: dict[str, float],
    steps: int,
    seconds: float,
    together: Sequence[int] = (),
) -> dict[str, Any]:
    """Write results.json, the adapter and the plot into the run's folder; returns the content of results.json.

    `together` are the numbers of the jobs that shared the run: it has one checkpoint for all of them.
    """
    from lightning_lora.engine.weights import shape_of

    folder = Path(settings["run_dir"])
    results = {
        "before": before,
        "after": after,
        "monitor": settings["monitor"],
        "mode": settings["mode"],
        "trainable_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "parameters": sum(math.prod(shape_of(p)) for p in task.parameters()),
        "steps": steps,
        "seconds": round(seconds, 2),
        "best_checkpoint": None if together else os.path.relpath(best_checkpoint, folder),
        "adapter": _keep_adapter(folder, best_checkpoint),
        "overrides": list(overrides),
        **({"together": list(together)} if together else {}),
    }
    write_json(folder / RESULTS, results)
    _plot(folder, settings)
    return results


def make_folder(settings: dict[str, Any]) -> Path:
    folder = Path(settings["run_dir"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be made: {error.strerror}.") from error
    return folder


def seed(settings: dict[str, Any]) -> None:
    from lightning.pytorch import seed_everything

    if settings["seed"] is None:
        return
    try:
        seed_everything(settings["seed"], workers=True, verbose=False)
    except ValueError as error:
        raise ConfigError(f"seed={settings['seed']}: {error}.") from error


def check_optimizer(settings: dict[str, Any]) -> None:
    """Try an optimizer of torch on a dummy weight, so that a value that is not valid is reported before the data are
    read."""
    import torch

    node = settings["optimizer"]
    if node and node.get("_partial_") and str(node.get("_target_")).startswith("torch.optim."):
        try:
            build(settings, "optimizer")([torch.nn.Parameter(torch.zeros(2, 2))])
        except ValueError as error:
            raise ConfigError(f"optimizer: {error}") from error


def check_monitor(settings: dict[str, Any], task: LightningModule, before: dict[str, float]) -> None:
    """Raises ConfigError if a task of this package logs no metric of the name in `monitor`."""
    from lightning_lora.recipes.tasks.base import Task

    known = [*before, "train_loss", "train_loss_step", "train_loss_epoch"]
    if before and isinstance(task, Task) and settings["monitor"] not in known:
        meant = closest(settings["monitor"], before, count=1)
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise ConfigError(f"monitor={settings['monitor']}: there is no such metric.{hint} There are: {listed(known)}.")


def train_new_heads(settings: dict[str, Any], task: LightningModule) -> None:
    """Have the new, random head of a task (a classifier) trained whole, unless the settings give modules_to_save."""
    heads = getattr(task, "head_modules", [])
    for callback in (settings["callbacks"] or {}).values():
        config = (callback or {}).get("config")
        if heads and isinstance(config, dict) and config.get("modules_to_save") is None:
            config["modules_to_save"] = list(heads)


def _check_processes(trainer: Trainer) -> None:
    """Raises ConfigError for a sweep whose jobs start further processes by script.

    In one process, the further processes and torch's process group outlive the first job, and the second job cannot
    have its own. In a process of a launcher (joblib, submitit), Lightning would start that launcher's worker again.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lightning_lora.training.lightning_private import starts_scripts

    sweeps = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    if sweeps and starts_scripts(trainer):
        raise ConfigError(
            f"A job of a sweep cannot start its {trainer.world_size} processes by the script that runs the sweep, "
            "under whichever launcher. Use trainer.strategy=ddp_spawn, or trainer.devices=1."
        )


def validate(
    trainer: Trainer, task: LightningModule, data: LightningDataModule, checkpoint: str | None
) -> dict[str, float]:
    trainer.validate(task, data, ckpt_path=checkpoint, verbose=False)
    return metrics_of(trainer)


def _keep_adapter(folder: Path, checkpoint: str) -> str | None:
    """Copy the adapter folder beside the best checkpoint to `folder`/adapter, where a reader looks for it."""
    beside = Path(checkpoint).with_name(f"{Path(checkpoint).stem}-adapter")
    if not beside.is_dir():
        return None
    shutil.copytree(beside, folder / "adapter", dirs_exist_ok=True)
    return "adapter"


def _plot(folder: Path, settings: dict[str, Any]) -> None:
    if not (folder / METRICS).is_file():
        return
    from lightning_lora.cli.plot import plot_training

    curves = read_metrics(folder / METRICS)
    lora = settings["lora"]
    title = f"LoRA, rank {lora['rank']}" if lora and "rank" in lora else "training"
    plot_training(curves, folder / "loss.png", title=title, monitor=settings["monitor"], mode=settings["mode"])


def _overrides() -> list[str]:
    """The user's overrides on the command line; empty if the run was not started from one."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _summary(results: dict[str, Any]) -> str:
    share = results["trainable_parameters"] / max(1, results["parameters"])
    names = sorted({*results["before"], *results["after"]})
    rows = [{"metric": n, "before": results["before"].get(n), "after": results["after"].get(n)} for n in names]
    trained = f"{results['trainable_parameters']:,} of {results['parameters']:,} parameters trained ({share:.2%})"
    spent = f"{results['steps']:,} steps, {results['seconds']:.0f} s"
    return f"{table(rows, ['metric', 'before', 'after'])}\n\n{trained}, {spent}"


def _where(folder: Path, results: dict[str, Any], adapted: bool) -> str:
    """One line for each thing that the run left, and the command that evaluates it."""
    left = [
        ("adapter", "adapter"),
        ("checkpoints", "checkpoints"),
        ("metrics", METRICS),
        ("plot", "loss.png"),
        ("results", RESULTS),
        ("settings", CONFIG),
    ]
    lines = [f"{what:<12} {shown(folder / name)}" for what, name in left if (folder / name).exists()]
    if results["adapter"] or not adapted:  # else there is nothing that the command could measure
        lines.append(f"{'evaluate':<12} {PROGRAM} evaluate run={shlex.quote(shown(folder))}")
    return "\n".join(lines)


def _say_how_to_go_on(folder: Path, status: int) -> NoReturn:
    """After a signal, print the newest checkpoint and the command that resumes from it. Exits with `status`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has turned it off
    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        print(f"\nInterrupted before the first checkpoint. The run's folder is {shown(folder)}")
        raise SystemExit(status)
    newest = f"ckpt_path={shown(checkpoints[-1])}"
    # Hydra reads "=" inside a value as the start of another setting unless the value is quoted.
    quoted = newest if newest.count("=") == 1 else newest.replace("=", "='", 1) + "'"
    overrides = [o for o in _overrides() if not o.startswith("ckpt_path=")]
    command = shlex.join([PROGRAM, "train", *overrides, quoted])
    print(f"\nInterrupted. The last checkpoint is {shown(checkpoints[-1])}\nGo on with: {command}")
    raise SystemExit(status)
