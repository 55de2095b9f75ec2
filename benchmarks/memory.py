"""Memory of a training step beside the limit and PEFT: what autograd keeps, and the peak, each in a process of its own.

    python benchmarks/memory.py

The rest above the limit is the layers' inputs, which the gradient of A needs and a frozen base does not: with A frozen
(freeze_a=True) they are not kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from contenders import Workload, limit, ours, peft_default, peft_narrow, training_step, two_products
from side_by_side import Report, Row, Spread, arguments, in_fresh_process, peak_bytes, saved_bytes, settings
from workloads import decoder

WAYS = {
    "limit": limit,
    "ours": ours,
    "ours, A frozen": functools.partial(ours, freeze_a=True),
    "PEFT": peft_default,
    "PEFT, narrow": peft_narrow,
    "two products": two_products,
}


def workload_of(options: dict[str, Any], shape: dict[str, int]) -> Workload:
    return decoder(**shape).with_(**options)


def measured(way: str, options: dict[str, Any], shape: dict[str, int]) -> tuple[int, int]:
    """Bytes kept for the backward pass, and how far a first step raises the memory of this process."""
    workload = workload_of(options, shape)
    model = WAYS[way](workload.frozen_base(), workload)
    peak = peak_bytes(training_step(model, workload))
    _, kept = saved_bytes(functools.partial(workload.loss, model), apart_from=model.parameters())
    return kept, peak


def main() -> None:
    given = arguments(__doc__, rounds=5)
    shape = {"hidden": 64, "layers": 1, "tokens": 16} if given.quick else {"hidden": 512, "layers": 6, "tokens": 256}
    name = workload_of({}, shape).name
    report = Report(
        "memory",
        "Memory of a training step",
        settings(seed=given.seed, rounds=given.rounds, shapes=name, rank=8),
        "Multiples of the limit's. Peak: how far one step, the first of its process, raises resident memory.",
    )
    ways = ("limit", "ours") if given.quick else tuple(WAYS)
    for dtype in (torch.float32,) if given.quick else (torch.bfloat16, torch.float32):
        for dropout in (0.05,) if given.quick else (0.0, 0.05):
            options = {"dtype": dtype, "dropout": dropout}
            runs: dict[str, list[tuple[int, int]]] = {way: [] for way in ways}
            for _ in range(given.rounds):
                for way, own in runs.items():
                    own.append(in_fresh_process(measured, way, options, shape))
            rows: list[Row] = []
            for way, own in runs.items():
                paired = [peak / limit_peak for (_, peak), (_, limit_peak) in zip(own, runs["limit"])]
                rows.append(
                    {
                        "contender": way,
                        "kept, MB": own[0][0] / 1e6,
                        "kept, x limit": own[0][0] / runs["limit"][0][0],
                        "peak, MB": Spread.of(peak / 1e6 for _, peak in own),
                        "peak, x limit": Spread.of(paired),
                    }
                )
            report.table(f"{str(dtype).removeprefix('torch.')}, dropout {dropout}, every linear layer", rows)
    report.write(given.results)


if __name__ == "__main__":
    main()
