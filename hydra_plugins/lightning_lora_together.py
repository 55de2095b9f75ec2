"""`hydra/launcher=together` for `lightning-lora train -m`. Hydra takes launchers from the package hydra_plugins alone, and
imports all of them whenever any application starts: what the launcher does is in lightning_lora.cli.together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TogetherLauncher(Launcher):
    """Trains the jobs of a sweep that differ in their adapters alone in one run, the others one after another."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from lightning_lora.cli.together import Sweep

        self.sweep = Sweep(hydra_context, task_function, config, **self.options)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.sweep.launch(job_overrides, first=initial_job_idx)
