"""As many threads as there are cores to run them: torch counts the machine's, not those this container may use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def wait_without_spinning() -> None:
    """Let a thread that waits for the others sleep, unless OMP_WAIT_POLICY says otherwise; before torch is imported.

    On two cores of which another program wants one, the demo's steps took 6 s each with spinning and 0.6 s without;
    with the cores free, 0.3 s and 0.4 s.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_available_cores() -> None:
    """Lower torch's number of threads to the cores available, unless OMP_NUM_THREADS says how many.

    With more threads than cores each step waits for those that are not running.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def available_cores(cgroup: Path = CGROUP) -> int:
    """The cores that this process may use: those it is bound to, or fewer where a container has a quota of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, _quota(cgroup) or bound))


def _quota(cgroup: Path) -> int | None:
    """Whole cores' worth of time that the container is given; None where it is not limited or cannot be told."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(quota) / int(period)  # "max" and -1: no limit
    except (OSError, ValueError):
        return None
    return max(1, round(cores)) if cores > 0 else None
