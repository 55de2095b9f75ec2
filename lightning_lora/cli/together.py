"""The launcher `hydra/launcher=together`: jobs of a sweep that differ in their adapters alone train in one run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_lora.checked import flag, whole
from lightning_lora.cli import train
from lightning_lora.cli.grouping import Job, described, grouped, shared, unshareable, why_alone
from lightning_lora.cli.results import RESULTS, shown, write_json
from lightning_lora.cli.settings import checked
from lightning_lora.errors import ConfigError

SOMEWHERE = "RUN"
"""The folder of every job while jobs are compared: their own differ."""


class Sweep:
    """The jobs that Hydra's sweeper wants to be run. Each has its folder, its results and its row in the table, as
    under Hydra's own launcher; hooks of Hydra's callbacks are called for each."""

    def __init__(
        self,
        context: HydraContext,
        task: TaskFunction,
        config: DictConfig,
        *,
        wave: int | None = None,
        resume: bool = False,
    ) -> None:
        if not {f.name for f in fields(train.Settings)} <= {*map(str, config)}:
            raise ConfigError("hydra/launcher=together is for lightning-lora train: nothing else trains adapters.")
        self._context, self._task, self._config = context, task, config
        self._wave = None if wave is None else whole("hydra.launcher.wave", wave)
        self._resumes = flag("hydra.launcher.resume", resume)
        self._folder = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run the jobs, numbered from `first` on; returns what each returned, in their order.

        Raises ConfigError, before anything is trained, where no two of the first jobs can share a run.
        """
        setup_globals()
        self._argv = list(sys.argv)
        configs = {n: self._composed(n, overrides) for n, overrides in enumerate(job_overrides, first)}
        jobs = [self._job(number, config) for number, config in configs.items()]
        groups = grouped(jobs)
        if first == 0 and all(len(group) == 1 for group in groups):
            self._leave_no_folder()
            raise ConfigError(_nothing_together(groups))
        for job in jobs if self._resumes else ():
            self._check_same(job)
        print(described(groups), flush=True)
        returned = {}
        for group in groups:
            are_done = all(self._is_done(job) for job in group)
            with self._shared_run(group):
                for job in group:
                    returned[job.number] = (self._done if are_done else self._run)(job, configs[job.number])
        return [returned[number] for number in configs]

    def _composed(self, number: int, overrides: Sequence[str]) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _job(self, number: int, config: DictConfig) -> Job:
        job = Job(number, list(config.hydra.overrides.task))
        with _hydra(config):
            folder = os.path.abspath(os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)))
            if config.hydra.output_subdir is not None:
                job.noted = Path(folder, config.hydra.output_subdir, "overrides.yaml")
        try:
            job.settings = _settings(config, folder)
            written: Any = OmegaConf.to_container(_own(config), resolve=False)
            job.shared = shared(written, _settings(config, SOMEWHERE))
            job.alone = unshareable(job.settings)
            if job.settings["run_dir"] == job.shared.get("run_dir"):
                job.alone = f"run_dir={job.settings['run_dir']} is no folder of its own"
        except ConfigError as error:
            job.alone = f"its settings do not fit ({str(error).splitlines()[-1].strip()})"
        return job

    @contextmanager
    def _shared_run(self, group: Sequence[Job]) -> Iterator[None]:
        """Inside, `train` trains all jobs of `group` in one run, at the first of them."""
        from lightning_lora.cli.shared_run import SharedRun

        if len(group) == 1:
            yield
            return
        run = SharedRun(group, self._folder, wave=self._wave, resume=self._resumes)
        train.shared_runs.update({job.settings["run_dir"]: run.results for job in group})
        try:
            yield
        finally:
            for job in group:
                del train.shared_runs[job.settings["run_dir"]]

    def _run(self, job: Job, config: DictConfig) -> JobReturn:
        print(f"\njob {job.number}: {' '.join(job.overrides)}", flush=True)
        if self._resumes and job.settings and job.settings["run_dir"] not in train.shared_runs:
            checkpoints = Path(job.settings["run_dir"]).glob("checkpoints/*.ckpt")
            if newest := max(checkpoints, key=lambda path: path.stat().st_mtime, default=None):
                config.ckpt_path = str(newest)
        try:
            return run_job(
                hydra_context=self._context,
                task_function=self._task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except SystemExit as exit:
            if exit.code in (train.INTERRUPTED, train.TERMINATED):
                print(f"\nThe sweep goes on with: {self._how_to_go_on()}", flush=True)
            raise

    def _how_to_go_on(self) -> str:
        own = ("hydra.sweep.dir=", "hydra.launcher.resume=")
        given = [argument for argument in self._argv[1:] if not argument.startswith(own)]
        folder = f"hydra.sweep.dir={shown(self._folder)}"
        return shlex.join([*self._argv[0].split(), *given, folder, "hydra.launcher.resume=true"])

    # A sweep that goes on: jobs that have results are not run again.

    def _is_done(self, job: Job) -> bool:
        results = Path(job.settings.get("run_dir", "")) / RESULTS
        if not self._resumes or not job.settings or not results.is_file():
            return False  # hydra.launcher.resume=false: whatever lies in the folder is of another sweep
        if job.noted is not None and not job.noted.is_file():
            return False  # the first job of a run writes the results of all, and then Hydra runs the others
        return "error" not in json.loads(results.read_text(encoding="utf-8"))

    def _check_same(self, job: Job) -> None:
        """Raise ConfigError where the job's folder is of a job with other settings: what was trained with those would
        count as trained with these."""
        results = Path(job.settings.get("run_dir", "")) / RESULTS
        if job.settings and results.is_file():
            file, found = results, json.loads(results.read_text(encoding="utf-8"))["overrides"]
        elif job.noted is not None and job.noted.is_file():
            file, found = job.noted, OmegaConf.to_container(OmegaConf.load(job.noted))
        else:
            return
        if found != list(job.overrides):
            raise ConfigError(
                f"hydra.launcher.resume: {shown(file)} is of a job with other settings: {' '.join(found)}. Repeat the "
                "command of the sweep that was interrupted."
            )

    def _done(self, job: Job, config: DictConfig) -> JobReturn:
        """What the finished `job` returned. Its results are written once more: the table is of files that are new."""
        path = Path(job.settings["run_dir"]) / RESULTS
        results = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, results)
        print(f"\njob {job.number} is done: {shown(path.parent)}", flush=True)
        value = results["after"].get(results["monitor"])
        return JobReturn(job.overrides, _own(config), config, str(path.parent), "train", JobStatus.COMPLETED, value)

    def _leave_no_folder(self) -> None:
        """Remove the sweep's folder, which Hydra has made, if there is nothing in it but Hydra's own file."""
        if [path.name for path in self._folder.iterdir()] == ["multirun.yaml"]:
            (self._folder / "multirun.yaml").unlink()
            os.removedirs(self._folder)


def _nothing_together(groups: Sequence[Sequence[Job]]) -> str:
    jobs = [job for group in groups for job in group]
    if len(jobs) == 1:
        return (
            "hydra/launcher=together got one job alone, and there is nothing to share. Vary lora.* or optimizer.lr in "
            "a sweep (-m); a sweeper that asks for one job at a time has a setting for more (Optuna: n_jobs)."
        )
    reasons = "\n  ".join(f"job {job.number}: {why_alone(job, jobs)}" for job in jobs[:8])
    return (
        "hydra/launcher=together has nothing to train together: no two jobs differ in lora.* and optimizer.lr alone.\n"
        f"  {reasons}\nLeave the launcher out to train them one after another."
    )


def _own(config: DictConfig) -> DictConfig:
    """`config` without Hydra's part, as a job sees it."""
    return OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"])


def _settings(config: DictConfig, folder: str) -> dict[str, Any]:
    """The checked settings of a job with this `folder`."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = folder
    with _hydra(config):
        return checked(_own(config), train.Settings)


@contextmanager
def _hydra(config: DictConfig) -> Iterator[None]:
    """Inside, references to Hydra's settings are those of `config`."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
