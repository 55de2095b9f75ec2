"""Saving and loading folders in PEFT's format, and merging, beside PEFT with 1, 10 and 100 adapters loaded.

    python benchmarks/folders.py

A model here holds one adapter, so its figures know no count. For many adapters on one base see bank.py. Our folders
say of which base an adapter is, PEFT's do not: for that a base is read when it is first seen, or was changed.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import Report, Row, arguments, comparison, in_turn, settings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import ALL_LINEAR

from lightning_lora import LoRAConfig, inject, load_adapter, merged, remove, save_adapter
from lightning_lora.engine import adapters

Calls = Mapping[str, Callable[[], object]]

RANK = 8
CHECKED, FIRST = "ours, base checked", "ours, base read"


def model_of(layers: int, hidden: int = 256) -> nn.Module:
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, vocab_size=1000)).eval()


def adapted(base: nn.Module) -> tuple[nn.Module, Any]:
    """Two copies of `base`, by us and by PEFT."""
    ours = copy.deepcopy(base)
    inject(ours, LoRAConfig(rank=RANK, target_modules=list(ALL_LINEAR)))
    return ours, get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules=list(ALL_LINEAR)))


def merging(ours: nn.Module, theirs: Any) -> Calls:
    def merge_ours() -> None:
        with merged(ours):
            pass

    def merge_theirs() -> None:
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    return {"ours": merge_ours, "PEFT": merge_theirs}


def measured(base: nn.Module, counts: list[int], rounds: int, place: Path) -> dict[str, list[Row]]:
    ours, theirs = adapted(base)
    empty = copy.deepcopy(base)
    theirs.save_pretrained(place / "given")
    save_adapter(ours, place / "checked")
    tables: dict[str, list[Row]] = {}
    loaded = 1

    def empty_ours() -> None:
        if any(True for _ in adapters(empty)):
            remove(empty)

    @torch.no_grad()
    def forget(model: nn.Module) -> None:
        model.lm_head.weight.mul_(1)  # written to, so the base is read again

    def empty_theirs() -> None:
        if "more" in theirs.peft_config:
            theirs.delete_adapter("more")

    calls: dict[str, tuple[Calls, Calls]] = {
        "Save": (
            {
                "ours": lambda: save_adapter(ours, place / "ours"),
                FIRST: lambda: save_adapter(ours, place / "first"),
                "PEFT": lambda: theirs.save_pretrained(place / "theirs", selected_adapters=["default"]),
            },
            {
                "ours": lambda: shutil.rmtree(place / "ours", ignore_errors=True),
                FIRST: lambda: (shutil.rmtree(place / "first", ignore_errors=True), forget(ours)),
            },
        ),
        "Load into a model that has none": (
            {
                "ours": lambda: load_adapter(empty, place / "given"),
                CHECKED: lambda: load_adapter(empty, place / "checked"),
                FIRST: lambda: load_adapter(empty, place / "checked"),
                "PEFT": lambda: theirs.load_adapter(place / "given", "more"),
            },
            {
                "ours": empty_ours,
                CHECKED: empty_ours,
                FIRST: lambda: (empty_ours(), forget(empty)),
                "PEFT": empty_theirs,
            },
        ),
        "Merge, and undo it": (merging(ours, theirs), {}),
    }
    for count in counts:
        for i in range(loaded, count):
            theirs.load_adapter(place / "given", adapter_name=f"a{i}")
        loaded = count
        for title, (contenders, before) in calls.items():
            times = in_turn(contenders, rounds=rounds, before=before)
            empty_theirs()
            rows = comparison(times, against="ours")
            tables.setdefault(title, []).extend({"loaded in PEFT": count, **row} for row in rows)
    return tables


def main() -> None:
    given = arguments(__doc__, rounds=10)
    torch.manual_seed(given.seed)
    base = model_of(1 if given.quick else 12)
    counts = [1, 2] if given.quick else [1, 10, 100]
    report = Report(
        "folders",
        "Saving, loading and merging an adapter",
        settings(seed=given.seed, rounds=given.rounds, rank=RANK, dtype="float32", hidden=256, layers=12),
    )
    with tempfile.TemporaryDirectory() as place:
        for title, rows in measured(base, counts, given.rounds, Path(place)).items():
            report.table(title, rows)
    wide = model_of(1, 64) if given.quick else model_of(4, 1024)
    times = in_turn(merging(*adapted(wide)), rounds=given.rounds)
    report.table("Merge, and undo it, hidden 1024, 4 layers", comparison(times, against="ours"))
    report.write(given.results)


if __name__ == "__main__":
    main()
