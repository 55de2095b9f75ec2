"""Training beside a Hub that hangs, drips, refuses and drops: the same losses; few threads, open and temporary files.

    python -m tests.training.hub_soak --minutes 10

The Hub is a process of its own, so that what stays open in this one is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import HubPush, LoRACallback
from tests.hub_server import HubServer
from tests.hub_server.faults import Fault

from .lit import Lit, trainer

REPO = "user/run"
EACH = 0.012
"""How likely each kind of fault is, for each request."""
FAULTS: list[dict[str, Any]] = [
    {"kind": "hang", "seconds": 3600.0},
    {"kind": "drip", "seconds": 0.2},
    {"kind": "reset"},
    {"kind": "reset_upload"},
    {"kind": "reset_download"},
    {"kind": "truncate"},
    {"kind": "lost_response"},
    {"kind": "flip"},
    {"kind": "stale"},
    *({"kind": "status", "status": status} for status in (400, 413, 422, 500)),
    {"kind": "status", "status": 429, "retry_after": 86400.0},
]


class Sometimes(Fault):
    """Happens to some requests, as long as `on` is set."""

    on = threading.Event()
    draw = random.Random(5)

    def applies(self, method: str, path: str) -> bool:
        happens = self.on.is_set() and self.draw.random() < EACH
        self.hits += happens
        return happens


def serve() -> None:
    """The Hub: answers a line with the faults so far; "on" and "off" let them happen."""
    with HubServer() as hub:
        hub.faults = [Sometimes(**fault) for fault in FAULTS]
        print(json.dumps([hub.endpoint, hub.token]), flush=True)
        for line in sys.stdin:
            (Sometimes.on.set if line.strip() == "on" else Sometimes.on.clear)()
            counts: Counter[str] = Counter()
            for fault in hub.faults:
                counts[f"{fault.status}" if fault.kind == "status" else fault.kind] += fault.hits
            print(json.dumps(counts), flush=True)


class Hub:
    def __init__(self) -> None:
        command = [sys.executable, "-c", "from tests.training.hub_soak import serve; serve()"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint, self.token = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def say(self, word: str) -> dict[str, int]:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Sample:
    """What this process has at a time."""

    threads: int = 0
    files: int = 0
    temporary: int = 0
    bytes: int = 0

    @classmethod
    def now(cls) -> Sample:
        held = [path for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file()]
        sizes = [size for path in held if (size := _size(path)) is not None]
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), len(sizes), sum(sizes))

    def most(self, other: Sample) -> Sample:
        return Sample(*(max(a, b) for a, b in zip(vars(self).values(), vars(other).values())))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pushed meanwhile
        return None


@dataclass
class Outcome:
    epochs: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    pushed: int = 0
    is_same: bool = False
    """Whether the losses are those of a run that does not push, bit for bit."""
    before: Sample = field(default_factory=Sample)
    early: Sample = field(default_factory=Sample)
    """The most in the first half of the time,"""
    late: Sample = field(default_factory=Sample)
    """and in the second."""


class Soak(pl.Callback):
    """Lets the faults begin with the training, and looks at what is held after each epoch."""

    def __init__(self, hub: Hub, push: HubPush, epochs: int, seconds: float, pause: float) -> None:
        self.hub, self.push, self.epochs, self.seconds, self.pause = hub, push, epochs, seconds, pause
        self.outcome = Outcome(before=Sample.now())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        object.__setattr__(self.push, "timeout", 0.5)  # what is checked before needs more on a busy machine
        self.hub.say("on")
        self.begun = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        time.sleep(self.pause)
        outcome, past = self.outcome, time.monotonic() - self.begun
        outcome.epochs += 1
        if outcome.epochs <= self.epochs / 2 or past < self.seconds / 2:
            outcome.early = outcome.early.most(Sample.now())
        else:
            outcome.late = outcome.late.most(Sample.now())
        trainer.should_stop = outcome.epochs >= self.epochs and past >= self.seconds


def losses(callback: LoRACallback, *others: pl.Callback, epochs: int) -> torch.Tensor:
    pl.seed_everything(7, verbose=False)
    module = Lit()
    trainer(callback, *others, max_epochs=epochs, default_root_dir=tempfile.gettempdir()).fit(module)
    return torch.stack(module.losses)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def run(folder: Path, epochs: int = 0, seconds: float = 0.0, pause: float = 0.05) -> Outcome:
    """Train for at least so many epochs and seconds, with a pause of so many seconds after each epoch."""
    (folder / "tmp").mkdir()
    hub = Hub()
    try:
        with temporary_files_in(folder / "tmp"), patch.dict(os.environ, HF_TOKEN=hub.token):
            push = HubPush(REPO, endpoint=hub.endpoint, timeout_at_end=0.5)
            soak = Soak(hub, push, epochs, seconds, pause)
            saves = ModelCheckpoint(folder / "run", monitor="val_loss", save_top_k=2, save_last=True)
            callback = LoRACallback(rank=2, push=push)
            found = losses(callback, saves, soak, epochs=-1)
        outcome = soak.outcome
        outcome.faults = hub.say("off")
    finally:
        hub.end()
    outcome.pushed = len(callback.pushed)
    outcome.is_same = torch.equal(found, losses(LoRACallback(rank=2), epochs=outcome.epochs))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), seconds=60 * given.minutes, pause=0.5)
    print(*(f"{name:>10}: {value}" for name, value in vars(outcome).items()), sep="\n")


if __name__ == "__main__":
    main()
