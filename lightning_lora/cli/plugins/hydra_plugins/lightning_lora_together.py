"""`hydra/launcher=together` for `lightning-lora train -m`, as Hydra sees it: what it does is in cli/together.py.

Hydra takes launchers from a package called hydra_plugins alone; cli/launch.py puts this one on the path.
"""

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
