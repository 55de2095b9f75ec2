"""Saving and loading folders in PEFT's format, and merging, beside PEFT with 1, 10 and 100 adapters loaded.

    python benchmarks/folders.py

A model here holds one adapter, so its figures know no count. For many adapters on one base see bank.py.
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


def model_of(layers: int) -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000)).eval()


def measured(base: nn.Module, counts: list[int], rounds: int, place: Path) -> dict[str, list[Row]]:
    ours = copy.deepcopy(base)
    inject(ours, LoRAConfig(rank=RANK, target_modules=list(ALL_LINEAR)))
    empty = copy.deepcopy(base)
    theirs: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules=list(ALL_LINEAR)))
    theirs.save_pretrained(place / "given")
    tables: dict[str, list[Row]] = {}
    loaded = 1

    def merge_ours() -> None:
        with merged(ours):
            pass

    def merge_theirs() -> None:
        theirs.merge_adapter()
        theirs.unmerge_adapter()

    def empty_ours() -> None:
        if any(True for _ in adapters(empty)):
            remove(empty)

    def empty_theirs() -> None:
        if "more" in theirs.peft_config:
            theirs.delete_adapter("more")

    calls: dict[str, tuple[Calls, Calls]] = {
        "Save": (
            {
                "ours": lambda: save_adapter(ours, place / "ours"),
                "PEFT": lambda: theirs.save_pretrained(place / "theirs", selected_adapters=["default"]),
            },
            {"ours": lambda: shutil.rmtree(place / "ours", ignore_errors=True)},
        ),
        "Load into a model that has none": (
            {
                "ours": lambda: load_adapter(empty, place / "given"),
                "PEFT": lambda: theirs.load_adapter(place / "given", "more"),
            },
            {"ours": empty_ours, "PEFT": empty_theirs},
        ),
        "Merge, and undo it": ({"ours": merge_ours, "PEFT": merge_theirs}, {}),
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
    report.write(given.results)


if __name__ == "__main__":
    main()
