"""The jobs of a sweep that share a run: each keeps its own loggers, best adapter and metrics, as if it ran alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from lightning_lora.cli.grouping import Job
from lightning_lora.cli.results import shown
from lightning_lora.cli.runs import EarlierMetrics, settings_for_loggers
from lightning_lora.cli.settings import build, build_each, target
from lightning_lora.engine import LoRAConfig, adapter_state_dict
from lightning_lora.errors import ConfigError
from lightning_lora.files import remove_folder
from lightning_lora.hub import adapter_root
from lightning_lora.hub.adapters import save_tensors
from lightning_lora.page import written
from lightning_lora.training.checkpoint_file import read_checkpoint
from lightning_lora.training.lightning_private import last_save, set_last_save
from lightning_lora.training.loggers import log_run, optimizer_settings
from lightning_lora.training.many import MultiLoRACallback
from lightning_lora.training.strategy import adapter_folder


class Member:
    """One job of a shared run. `name` is the name of its adapter."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.name = job, job.settings, f"job{job.number}"
        self.folder = Path(self.settings["run_dir"])
        self.config: LoRAConfig = build(self.settings, _place_of_config(self.settings))
        self.lr = (self.settings["optimizer"] or {}).get("lr")
        self.loggers: list[Any] = build_each(self.settings, "logger")
        nodes = self.settings["callbacks"] or {}
        savers = [name for name, node in nodes.items() if node and target(node["_target_"]) is ModelCheckpoint]
        # A Trainer without any makes one of its own.
        self.savers = [build(self.settings, f"callbacks.{name}") for name in savers] or [ModelCheckpoint()]
        self.earlier = EarlierMetrics(self.folder)
        self.metrics: dict[str, float] = {}
        """Those of the last validation."""
        self.best: str | None = None
        """The path of the best adapter's checkpoint, as a run of its own would have it."""
        self.after: dict[str, float] = {}
        """The metrics of that adapter."""
        self.steps: int | None = None
        """The number of steps after which it stopped early; None while it trains."""

    def state(self) -> dict[str, Any]:
        return {
            "savers": [saver.state_dict() for saver in self.savers],
            "last_saves": [last_save(saver) for saver in self.savers],
            "overrides": list(self.job.overrides),
            **{name: getattr(self, name) for name in _STATE},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        for saver, own, last in zip(self.savers, state["savers"], state["last_saves"], strict=True):
            saver.load_state_dict(own)
            set_last_save(saver, *last)
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("metrics", "best", "after", "steps")


def _place_of_config(settings: Mapping[str, Any]) -> str:
    return next(f"callbacks.{name}.config" for name, node in settings["callbacks"].items() if node and "config" in node)


class Members(Checkpoint):
    """Has each job save, log and remember what its own run would have. Lightning calls it after all callbacks that are
    no Checkpoint; the run's own ModelCheckpoint comes after it, so that a checkpoint knows what was saved."""

    def __init__(self, members: Sequence[Member], adapters: MultiLoRACallback, *, prints: bool) -> None:
        self._members, self._adapters, self._prints = members, adapters, prints

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for member in self._members:
            for saver in member.savers:
                saver.setup(as_seen(trainer, member), pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        of_run = optimizer_settings(trainer)
        for member in self._members:
            own = {**of_run, "lr": member.lr} if member.lr is not None else of_run
            plus = {"lora_plus_ratio": None, "product_decay": None}
            view = as_seen(trainer, member)
            log_run(view, pl_module, member.config, own, settings_for_loggers(member.settings), **plus)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for member in self._members:
            member.earlier.on_train_start(as_seen(trainer, member), pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._tell("on_validation_end", trainer, pl_module, validated=True)
        if self._prints:
            monitor = self._members[0].settings["monitor"]
            values = (f"{m.job.number}: {written(m.metrics.get(monitor))}" for m in self._members if m.steps is None)
            print(f"step {trainer.global_step:,}  {monitor} of job  {'  '.join(values)}", flush=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell("on_train_end", trainer, pl_module)

    def _tell(self, hook: str, trainer: Trainer, pl_module: LightningModule, *, validated: bool = False) -> None:
        """Call `hook` of what each job saves with, as its own Trainer would."""
        strategy: Any = trainer.strategy
        watch = strategy.lora.watch
        if watch is not None:
            watch.check(pl_module)
        for member in self._members:
            if member.steps is not None:
                continue
            if validated:
                member.metrics = self._adapters.metrics[member.name]
                _check_monitored(member)
            view = as_seen(trainer, member)
            for saver in member.savers:
                getattr(saver, hook)(view, pl_module)
            if (best := member.savers[0].best_model_path or None) != member.best:
                member.best, member.after = best, member.metrics
            if member.name in self._adapters.stopped:
                member.steps = trainer.global_step

    # What a checkpoint of the run holds of the jobs.

    def state_dict(self) -> dict[str, Any]:
        return {member.name: member.state() for member in self._members}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member in self._members:
            member.load(state_dict[member.name])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {}
        for member in self._members:
            own: dict[str, Any] = {}
            checkpoint[_KEY][member.name] = own
            member.earlier.on_save_checkpoint(as_seen(trainer, member), pl_module, own)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for member in self._members:
            member.earlier.on_load_checkpoint(as_seen(trainer, member), pl_module, checkpoint[_KEY][member.name])


_KEY = "lightning_lora_jobs"


def check_same_jobs(checkpoint: Path, jobs: Sequence[Job]) -> None:
    """Raise ConfigError unless the checkpoint is of a run of these jobs, with these settings; CheckpointError where it
    is damaged."""
    saved = read_checkpoint(checkpoint, torch.load)["callbacks"][Members.__qualname__]
    there = {name: own["overrides"] for name, own in saved.items()}
    if there != {f"job{job.number}": list(job.overrides) for job in jobs}:
        of = "\n  ".join(f"{name}: {' '.join(overrides)}" for name, overrides in there.items())
        raise ConfigError(
            f"hydra.launcher.resume: {shown(checkpoint)} is of these jobs:\n  {of}\nRepeat the command of the sweep "
            "that was interrupted."
        )


def _check_monitored(member: Member) -> None:
    """Raise ConfigError where a callback chooses by a metric that validation does not give for each adapter."""
    for saver in member.savers:
        if saver.monitor is not None and saver.monitor not in member.metrics:
            raise ConfigError(
                f"The best checkpoint is chosen by {saver.monitor}, and validation gives each adapter only "
                f"{', '.join(member.metrics)}. Choose one of these, or leave out hydra/launcher=together."
            )


# The Trainer as the callbacks of one job see it.


class _View:
    """`whole`, but for the attributes `own`."""

    def __init__(self, whole: Any, **own: Any) -> None:
        self.__dict__.update(own, _whole=whole)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def as_seen(trainer: Trainer, member: Member) -> Any:
    """`trainer` with the metrics, loggers and checkpoints of one job. Its checkpoints are adapter folders: what the run
    resumes from is one for all jobs."""
    return _View(
        trainer,
        callback_metrics={name: torch.tensor(value) for name, value in member.metrics.items()},
        loggers=member.loggers,
        default_root_dir=member.settings["trainer"].get("default_root_dir", trainer.default_root_dir),
        # The run's checkpoint counts as the job's own: what the job logged before it goes on.
        ckpt_path=None if trainer.ckpt_path is None else str(member.folder / "checkpoints" / "shared.ckpt"),
        save_checkpoint=lambda path, *_: save(trainer, member, path),
        strategy=_View(trainer.strategy, remove_checkpoint=lambda path: remove_folder(adapter_folder(str(path)))),
    )


def save(trainer: Trainer, member: Member, checkpoint_path: str) -> None:
    """Write the adapter of a job as it is now, to the folder that belongs to a checkpoint of this path."""
    strategy: Any = trainer.strategy
    module = trainer.lightning_module
    metadata = {"step": str(trainer.global_step), "epoch": str(trainer.current_epoch)}
    with strategy.pack.several.using(member.name):
        tensors, base = adapter_state_dict(module), strategy._base(module, *adapter_root(module))
        save_tensors(module, adapter_folder(checkpoint_path), tensors, base, metadata=metadata)


class EachOwnLogger(Logger):
    """The logger of a shared run: it gives each job's loggers what was logged for its adapter, by its plain name. The
    means over all adapters, which Lightning logs besides, are of no job."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        self._members = members
        self.trainer: Trainer | None = None

    @property
    def name(self) -> str:
        return "together"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Each job logs its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        parts = {m.name: _part(metrics, m.name) for m in self._members}
        if not any(parts.values()) and "epoch" not in metrics:  # which Lightning adds to what it logs
            raise ConfigError(
                f"{', '.join(metrics)}: the module logs by its logger itself, and it is not known for which adapter. "
                "Use self.log, or leave out hydra/launcher=together."
            )
        epoch = metrics.get("epoch", None if self.trainer is None else self.trainer.current_epoch)
        for member in self._members:
            for logger in member.loggers if parts[member.name] else ():
                logger.log_metrics({**parts[member.name], "epoch": epoch}, step)

    def save(self) -> None:
        for logger in self._all():
            logger.save()

    def finalize(self, status: str) -> None:
        for logger in self._all():
            logger.finalize(status)

    def _all(self) -> list[Any]:
        return [logger for member in self._members for logger in member.loggers]


def _part(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    return {key.removesuffix(f"/{name}"): value for key, value in metrics.items() if key.endswith(f"/{name}")}
