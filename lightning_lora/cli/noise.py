"""Silences what other packages say on every run and a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning_lora

POINTLESS = (
    r".*(Experiment logs|Checkpoint) directory .* exists and is not empty",  # a used folder: see going_on
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
