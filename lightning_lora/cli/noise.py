"""Silences what Lightning says on every run and a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import warnings

POINTLESS = (
    r".*Experiment logs directory .* exists and is not empty",  # the run's folder is new: it holds config.yaml
    r".*isinstance\(treespec, LeafSpec\)",  # between Lightning and torch
    r".*callbacks used to create the checkpoint need to be provided",  # not to evaluate or predict
    r".*The dirpath has changed",  # a resumed run has a folder of its own
    r".*does not have many workers",  # the data's own setting, right for data in memory
    r".*The number of training batches .* is smaller than the logging interval",  # epochs are logged all the same
)


def quieten() -> None:
    """Turn off those warnings, and Lightning's hints and lists of devices; its warnings proper stay."""
    for message in POINTLESS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
