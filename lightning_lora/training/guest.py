"""Trainings on a module that belongs to somebody else: it is put back as it was, and nothing is said meanwhile."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero
from torch import Tensor, nn

from lightning_lora.training.run_state import random_state, set_random_state


@contextmanager
def left_as_it_was(module: LightningModule, datamodule: LightningDataModule | None) -> Iterator[Callable[[], None]]:
    """Put `module`, its Trainer and the random generators back at the end. Gives a function that notes tensors which
    came later (layers that are built in configure_model)."""
    state = random_state()
    trainers = [(owner, _trainer_of(owner)) for owner in (module, datamodule) if owner is not None]
    parameters: dict[int, tuple[nn.Parameter, Tensor, bool]] = {}
    buffers: dict[tuple[int, str], tuple[nn.Module, str, Tensor, Tensor]] = {}
    modes: dict[nn.Module, bool] = {}

    def note() -> None:
        # A cast or a move gives a parameter another tensor. The old one, kept here, is not written to: the base is
        # frozen, and `remove` puts back what was trained whole.
        for p in module.parameters():
            parameters.setdefault(id(p), (p, p.data, p.requires_grad))
        for inner in module.modules():
            modes.setdefault(inner, inner.training)
            for name, buffer in inner.named_buffers(recurse=False):
                buffers.setdefault((id(inner), name), (inner, name, buffer, buffer.detach().clone()))

    note()
    try:
        yield note
    finally:
        with torch.no_grad():
            for p, data, requires_grad in parameters.values():
                p.data = data
                p.requires_grad_(requires_grad)
            for inner, name, buffer, before in buffers.values():
                inner._buffers[name] = buffer
                if not buffer.equal(before):
                    buffer.copy_(before)
        for inner, mode in modes.items():
            inner.training = mode
        for owner, trainer in trainers:
            owner.trainer = trainer
        set_random_state(state)


def _trainer_of(owner: Any) -> Any:
    try:
        return owner.trainer
    except RuntimeError:  # a module without one
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning and the callback say at the start and the end of every run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", rank_zero.__name__)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():  # exact resumption is the callback's work
            warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def seed_all(seed: int) -> None:
    """Seed as Lightning's seed_everything does, without its environment variables."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
