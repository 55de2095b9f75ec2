"""One run that trains the adapters of several jobs on one base, and leaves for each what a run of its own would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
from omegaconf import OmegaConf

from lightning_lora.cli import train
from lightning_lora.cli.explain import explain
from lightning_lora.cli.grouping import Job, numbers
from lightning_lora.cli.members import EachOwnLogger, Member, Members, as_seen, check_same_jobs, save
from lightning_lora.cli.process import quieten, use_available_cores
from lightning_lora.cli.results import CONFIG, METRICS
from lightning_lora.cli.runs import Lines, MeasuredEnd, SeededStart, shows_progress
from lightning_lora.cli.settings import build, literal, target, task_and_data
from lightning_lora.training.many import MultiLoRACallback


class SharedRun:
    """The run of `jobs`, which differ in what an adapter owns alone. `folder` is the sweep's."""

    def __init__(self, jobs: Sequence[Job], folder: Path, *, wave: int | None, resume: bool) -> None:
        self._jobs, self._wave = jobs, wave
        self._checkpoint = folder.absolute() / "together" / f"{jobs[0].number}.ckpt"
        self._goes_on = resume and self._checkpoint.is_file()
        if self._goes_on:
            check_same_jobs(self._checkpoint, jobs)
        self._has_stepped = False
        self._results: dict[str, dict[str, Any]] = {}
        self._failure: Exception | None = None
        self._is_refused = False

    def results(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The results of the job with these `settings`. The first call trains all jobs; if that is refused before the
        first step, each is trained alone."""
        if not self._results and not self._is_refused and self._failure is None:
            self._try()
        if self._is_refused:
            return train.train(settings)
        if self._failure is not None:
            raise self._failure
        return self._results[settings["run_dir"]]

    def _try(self) -> None:
        try:
            self._train()
        except Exception as error:
            if self._has_stepped or self._goes_on:
                self._failure = error
                return
            self._is_refused = True
            for job in self._jobs:
                (Path(job.settings["run_dir"]) / METRICS).unlink(missing_ok=True)
            why = explain(error) or f"{type(error).__name__}: {error}"
            print(f"\njobs {numbers(self._jobs)} are trained one after another: {why}\n", flush=True)

    def _train(self) -> None:
        settings = self._jobs[0].settings
        quieten()
        use_available_cores()
        for job in self._jobs:
            train.make_folder(job.settings)
            train.check_optimizer(job.settings)
        train.seed(settings)
        task, data = task_and_data(settings)
        for job in self._jobs:
            train.train_new_heads(job.settings, task)
        members = [Member(job) for job in self._jobs]
        adapters = self._adapters(members)
        callbacks, bars = shows_progress(
            settings, [adapters, *_judging(settings), MeasuredEnd(), SeededStart(settings["seed"])]
        )
        plain = [callback for callback in callbacks if not isinstance(callback, Lines)]
        jobs = Members(members, adapters, prints=len(plain) < len(callbacks))
        saver = ModelCheckpoint(
            dirpath=self._checkpoint.parent,
            filename=self._checkpoint.stem,
            save_on_exception=True,
            enable_version_counter=False,
        )
        logger = EachOwnLogger(members)
        trainer = build(settings, "trainer", callbacks=[*plain, jobs, saver], logger=[logger], **bars)
        logger.trainer = trainer
        for member in members:
            OmegaConf.save(OmegaConf.create(literal(member.settings)), member.folder / CONFIG)
            member.earlier.set_aside(as_seen(trainer, member))

        logs, trainer.enable_autolog_hparams = trainer.enable_autolog_hparams, False
        if settings["evaluate_before"]:
            train.validate(trainer, task, data, None)
            for member in members:
                member.earlier.before = adapters.metrics[member.name]
        trainer.enable_autolog_hparams = logs
        if trainer.received_sigterm:
            raise SystemExit(train.TERMINATED)
        train.check_monitor(settings, task, members[0].earlier.before)
        train.seed(settings)
        started = time.perf_counter()
        try:
            trainer.fit(task, data, ckpt_path=str(self._checkpoint) if self._goes_on else None)
        except SystemExit:
            if trainer.interrupted:
                raise SystemExit(train.TERMINATED if trainer.received_sigterm else train.INTERRUPTED) from None
            raise
        finally:
            self._has_stepped = trainer.global_step > 0
        if trainer.received_sigterm:
            raise SystemExit(train.TERMINATED)
        seconds = (time.perf_counter() - started) / len(members)
        several = trainer.strategy.pack.several
        for member in members:
            if member.best is None:
                member.best = str(member.folder / "checkpoints" / f"end-step{trainer.global_step}.ckpt")
                member.after = member.metrics
                save(trainer, member, member.best)
            with several.using(member.name):  # the module is what it would be in a run of its own
                self._results[member.settings["run_dir"]] = train.write_results(
                    member.settings,
                    task,
                    best_checkpoint=member.best,
                    overrides=member.job.overrides,
                    before=member.earlier.before,
                    after=member.after,
                    steps=trainer.global_step if member.steps is None else member.steps,
                    seconds=seconds,
                    together=[job.number for job in self._jobs],
                )

    def _adapters(self, members: Sequence[Member]) -> MultiLoRACallback:
        is_shared = len({member.lr for member in members}) == 1
        given = {m.name: m.config.to_dict() | ({} if is_shared else {"lr": m.lr}) for m in members}
        every = self._jobs[0].settings["trainer"].get("log_every_n_steps") or 50  # Lightning's own default
        return MultiLoRACallback(given, wave=self._wave, log_every_n_steps=every, save_adapter=False)


def _judging(settings: dict[str, Any]) -> list[Any]:
    """The callbacks that a shared run has from the settings of its jobs, beside those that save."""
    nodes = {name: node for name, node in settings["callbacks"].items() if node}
    kinds: dict[str, Any] = {name: target(node["_target_"]) for name, node in nodes.items()}
    kept = [name for name, kind in kinds.items() if kind is EarlyStopping or issubclass(kind, ProgressBar)]
    return [build(settings, f"callbacks.{name}") for name in kept]
