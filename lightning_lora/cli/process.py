"""The process of a command: how many threads it uses, and what other packages may say in it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning_lora

# Silences what other packages say on every run and a user of the command line can do nothing about.

POINTLESS = (
    r".*(Experiment logs|Checkpoint) directory .* exists and is not empty",  # a used folder: see runs.py
    r".*isinstance\(treespec, LeafSpec\)",  # between Lightning and torch
    r".*callbacks used to create the checkpoint need to be provided",  # not to evaluate or predict
    r".*The dirpath has changed",  # a resumed run has a folder of its own
    r".*could not find the monitored key in the returned",  # a run that is not validated keeps what it ended with
    r".*does not have many workers",  # the data's own setting, right for data in memory
    r".*The number of training batches .* is smaller than the logging interval",  # epochs are logged all the same
)
LOADED = ("torchao", "torch.utils._pytree", "alembic", "bitsandbytes")
"""Loggers that complain while their modules are imported, of libraries for other processors and of each other."""
REPEATED = ("huggingface_hub", "datasets")
"""Loggers that write to the screen themselves and pass the same line on to the root logger, which writes it again."""
NOT_WITH_LORA = r".*resuming from a checkpoint that ended before the epoch ended"
"""Not so with LoRACallback, which resumes exactly."""
PACKAGE = str(Path(lightning_lora.__file__).parent)


def quieten_imports() -> None:
    """Turn off what is said while packages are imported, and tell the Hub's clients to be quiet; called before any of
    them is imported. The user's own settings of these variables hold."""
    for name in LOADED:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Why a call to the Hub failed in the end is in the error; each try before it is not worth a line.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in REPEATED:
        logging.getLogger(name).propagate = False
    if not is_terminal():  # a bar that is drawn anew hundreds of times is no line of a log
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def quieten(is_adapted: bool = True) -> None:
    """Turn off those warnings, and Lightning's hints and lists of devices; its warnings proper stay, and so does what
    this package says."""
    from lightning.pytorch.utilities import rank_zero

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for message in (*POINTLESS, *([NOT_WITH_LORA] if is_adapted else [])):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if logging.root.handlers:  # in a process of joblib's or submitit's, Lightning's own handler says all once more
        logging.getLogger("lightning").handlers.clear()
    said = logging.getLogger(rank_zero.__name__)
    said.setLevel(logging.INFO)
    if _is_ours not in said.filters:
        said.addFilter(_is_ours)


def is_terminal() -> bool:
    """Whether a person watches the screen: bars are drawn there, and only there."""
    return sys.stderr.isatty() and sys.stdout.isatty()


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line that Lightning's rank_zero_info wrote comes from this package, or is more than a hint."""
    return record.levelno > logging.INFO or record.pathname.startswith(PACKAGE)


# As many threads as there are cores to run them: torch counts the machine's, not those this container may use.

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
