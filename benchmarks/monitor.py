"""What AdapterMonitor costs: a look at all adapters, beside the training steps that lie between two looks.

python benchmarks/monitor.py
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from contenders import Workload, ours, training_step
from lightning.pytorch.loggers import CSVLogger
from side_by_side import Report, Row, Spread, arguments, in_turn, settings
from torch import nn
from workloads import convolutional, decoder, encoder

from lightning_lora import AdapterMonitor, pairs


def main() -> None:
    given = arguments(__doc__, rounds=7)
    report = Report(
        "monitor",
        "AdapterMonitor",
        settings(seed=given.seed, rounds=given.rounds, dtype="float32"),
        "Processor time of a training step, and of one look of the monitor whose numbers for each layer go to a "
        "CSVLogger, which keeps them until it writes (median, 20th to 80th percentile). `share` is that of a look in "
        "the 50 steps between two looks, the default. The first look also computes the norm of each base weight.",
    )
    rows = []
    for workload in workloads(given.quick):
        rows.append(measured(workload, given.rounds))
        print(rows[-1], flush=True)
    report.table("A step and a look, every linear layer or convolution adapted", rows)
    report.write(given.results)


def workloads(quick: bool) -> Iterator[Workload]:
    if quick:
        yield decoder(hidden=64, layers=1, rows=1, tokens=8)
        return
    # float32: where a processor lacks bfloat16, a step in it takes thirty times as long, and a look next to nothing.
    yield decoder(hidden=128, layers=2, rows=1, tokens=64)
    yield decoder()
    yield from (decoder(hidden=576, layers=30, rows=1, tokens=64).with_(rank=rank) for rank in (8, 64))
    yield encoder()
    yield convolutional()


def measured(workload: Workload, rounds: int) -> Row:
    model = ours(workload.frozen_base(), workload)
    step = training_step(model, workload)
    gradients = {}
    workload.loss(model).backward()
    for p in model.parameters():
        gradients[p] = p.grad

    def give_gradients() -> None:
        for p, gradient in gradients.items():
            p.grad = gradient

    def drop_gradients() -> None:
        model.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        monitor = AdapterMonitor()
        look = looking(model, monitor, CSVLogger(folder))
        first = in_turn({"first": look}, rounds=1, warmup=0, before={"first": give_gradients})["first"]
        times = in_turn(
            {"step": step, "look": look},
            rounds=rounds,
            warmup=1,
            clock=time.process_time,  # one thread does all the work
            before={"step": drop_gradients, "look": give_gradients},
        )
    share = [100 * look / (monitor.every_n_steps * step) for look, step in zip(times["look"], times["step"])]
    return {
        "workload": workload.name,
        "rank": workload.rank,
        "pairs": len(list(pairs(model))),
        "step, ms": Spread.of(1e3 * t for t in times["step"]),
        "look, ms": Spread.of(1e3 * t for t in times["look"]),
        "first look, ms": 1e3 * first[0],
        "share, %": Spread.of(share),
    }


def looking(model: nn.Module, monitor: AdapterMonitor, logger: CSVLogger) -> Any:
    """The two hooks of a step at which the monitor looks, with a stand-in for the Trainer."""
    epochs = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 1e-4, "params": trained}])
    trainer: Any = SimpleNamespace(
        global_step=monitor.every_n_steps - 1,
        loggers=[logger],
        fit_loop=epochs,
        optimizers=[optimizer],
        strategy=None,
    )
    model.log = lambda *args, **kwargs: None  # type: ignore[assignment]
    monitor.on_train_start(trainer, model)  # type: ignore[arg-type]

    def look() -> None:
        monitor.on_before_optimizer_step(trainer, model, optimizer)  # type: ignore[arg-type]
        monitor.on_train_batch_end(trainer, model, None, None, 0)  # type: ignore[arg-type]

    return look


if __name__ == "__main__":
    main()
