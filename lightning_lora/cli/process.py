"""The process of a command: the number of its threads, and the messages of other packages that it shows."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning_lora

# Warnings of other packages that come with every run, and that a user of the command line cannot act on.

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
"""Loggers that warn during imports, about libraries for other processors and about each other."""
REPEATED = ("huggingface_hub", "datasets")
"""Loggers that write to the screen themselves and pass the same line on to the root logger, which writes it again."""
NOT_WITH_LORA = r".*resuming from a checkpoint that ended before the epoch ended"
"""A warning that is wrong with LoRACallback, which resumes exactly."""
PACKAGE = str(Path(lightning_lora.__file__).parent)


def quieten_imports() -> None:
    """Turn off messages during imports, and tell the Hub's clients to be quiet. Call it before any of these packages is
    imported. Environment variables that the user has set are kept."""
    for name in LOADED:
        logging.getLogger(name).setLevel(logging.ERROR)
    # The error says why a call to the Hub failed in the end; the tries before it need no message.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in REPEATED:
        logging.getLogger(name).propagate = False
    if not is_terminal():  # a bar that is redrawn hundreds of times would fill a log
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def quieten(is_adapted: bool = True) -> None:
    """Turn off the warnings above, and Lightning's hints and lists of devices. Lightning's other warnings stay, and so
    do the messages of this package."""
    from lightning.pytorch.utilities import rank_zero

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for message in (*POINTLESS, *([NOT_WITH_LORA] if is_adapted else [])):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if logging.root.handlers:  # in a process of joblib or submitit, Lightning's own handler prints all again
        logging.getLogger("lightning").handlers.clear()
    said = logging.getLogger(rank_zero.__name__)
    said.setLevel(logging.INFO)
    if _is_ours not in said.filters:
        said.addFilter(_is_ours)


def is_terminal() -> bool:
    """True if the output goes to a terminal. Progress bars are drawn only there."""
    return sys.stderr.isatty() and sys.stdout.isatty()


def _is_ours(record: logging.LogRecord) -> bool:
    """True if a line that Lightning's rank_zero_info wrote comes from this package, or is more than a hint."""
    return record.levelno > logging.INFO or record.pathname.startswith(PACKAGE)


# Use as many threads as there are cores: torch counts the cores of the machine, not those this container may use.

CGROUP = Path("/sys/fs/cgroup")


def wait_without_spinning() -> None:
    """Let waiting threads sleep, unless OMP_WAIT_POLICY says otherwise. Call it before torch is imported.

    On two cores, one of which another program used, the demo's steps took 6 s each with spinning and 0.6 s without;
    with both cores free, 0.3 s and 0.4 s.
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
    """The processor time that the container may use, in whole cores; None if it is not limited or cannot be read."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(quota) / int(period)  # "max" and -1: no limit
    except (OSError, ValueError):
        return None
    return max(1, round(cores)) if cores > 0 else None
