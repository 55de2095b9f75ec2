"""A training step (forward, backward, AdamW on the adapters) beside the limit, PEFT and two products written down.

    python benchmarks/step.py

The limit is the same base, frozen and without adapters, while gradients flow through its activations. Every side adapts
the same layers of the same base with the same values and reads the same batch. "PEFT" keeps its adapters in float32,
"PEFT, narrow" in the base's dtype (autocast_adapter_dtype=False); ours keeps float32 masters and computes in the
base's. LitGPT's layer takes part where litgpt can be imported. torchtune's cannot: version 0.6.1 needs a torchao that
PEFT refuses; its forward is that of the two products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contenders import (
    Workload,
    copies,
    limit,
    litgpt,
    ours,
    peft_default,
    peft_narrow,
    training_step,
    two_products,
)
from side_by_side import Report, Row, Spread, arguments, in_turn, missing, ratios, saved_bytes, settings
from workloads import QUERY_VALUE, convolutional, decoder, encoder


def main() -> None:
    given = arguments(__doc__)
    report = Report(
        "step",
        "A training step",
        settings(seed=given.seed, rounds=given.rounds),
        "Time of a step, as a multiple of the limit's in the same round: median (20th to 80th percentile of the "
        "rounds). The first column is the limit itself in milliseconds.",
    )
    ways: dict[str, Callable[..., Any]] = {"limit": limit, "ours": ours}
    ways |= {"PEFT": peft_default, "PEFT, narrow": peft_narrow, "two products": two_products}
    absent = missing("litgpt.lora")
    if absent is None:
        ways["LitGPT"] = litgpt
    else:
        report.note(f"LitGPT's layer was left out: {absent}. See benchmarks/README.md.")
    for title, workloads in suites(given.quick):
        rows = [measured(workload, ways, given.rounds) for workload in workloads]
        report.table(title, rows)
    report.write(given.results)


def suites(quick: bool) -> Iterator[tuple[str, list[Workload]]]:
    """Each table's title and what its rows train."""
    bf16 = torch.bfloat16
    if quick:
        small = decoder(hidden=64, layers=1, rows=1, tokens=8)
        yield small.name, [small.with_(dtype=bf16, rank=2), small.with_(rank=2, dropout=0.05)]
        few = convolutional(channels=4, rows=2, size=16)
        yield few.name, [few.with_(rank=2, dropout=0.05)]
        return
    model = decoder()
    narrow = [model.with_(dtype=bf16, rank=r, dropout=p) for r in (4, 8, 16, 64) for p in (0.0, 0.05)]
    yield f"{model.name}; bfloat16, every linear layer", narrow
    some = decoder(targets=QUERY_VALUE)
    yield f"{some.name}; bfloat16, q and v", [some.with_(dtype=bf16, dropout=p) for p in (0.0, 0.05)]
    yield (
        f"{model.name}; float32, every linear layer",
        [model.with_(rank=r, dropout=p) for r in (8, 64) for p in (0.0, 0.05)],
    )
    classifier = encoder()
    yield (
        f"{classifier.name}; every linear layer",
        [classifier.with_(dtype=dtype, dropout=p) for dtype in (bf16, torch.float32) for p in (0.0, 0.05)],
    )
    images = convolutional()
    yield f"{images.name}; float32", [images.with_(dropout=p) for p in (0.0, 0.05)]


def measured(workload: Workload, ways: dict[str, Callable[..., Any]], rounds: int) -> Row:
    """A row: how long a step takes each way, and what autograd keeps for its backward pass."""
    fitting = {name: way for name, way in ways.items() if workload.linear or name not in LINEAR_ONLY}
    models = copies(workload, fitting)
    steps = {name: training_step(model, workload) for name, model in models.items()}
    agree(workload, {name: step() for name, step in steps.items()})
    times = in_turn(steps, rounds=rounds)
    paired = ratios(times, against="limit")
    row: Row = {
        "dtype": str(workload.dtype).removeprefix("torch."),
        "rank": workload.rank,
        "dropout": workload.dropout,
        "limit, ms": Spread.of(1e3 * t for t in times["limit"]),
    }
    row |= {name: paired[name] for name in ways if name in paired and name != "limit"}
    kept = {
        name: saved_bytes(functools.partial(workload.loss, model), apart_from=model.parameters())[1]
        for name, model in models.items()
    }
    return row | {f"kept by {name}": kept[name] / kept["limit"] for name in ("ours", "PEFT", "PEFT, narrow")}


LINEAR_ONLY = ("two products", "LitGPT")


def agree(workload: Workload, losses: dict[str, torch.Tensor]) -> None:
    """Without dropout every side computes the same loss, or the times of different things would be compared."""
    adapted = {name: float(loss) for name, loss in losses.items() if name != "limit"}
    if workload.dropout == 0:
        tolerance = 1e-5 if workload.dtype == torch.float32 else 1e-2
        assert max(adapted.values()) - min(adapted.values()) < tolerance * max(adapted.values()), adapted


if __name__ == "__main__":
    main()
