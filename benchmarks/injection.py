"""Putting adapters into a model, and taking them out, beside PEFT; and importing the package.

python benchmarks/injection.py
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import Report, Row, arguments, comparison, in_turn, settings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import ALL_LINEAR

from lightning_lora import LoRAConfig, inject, remove

RANK = 8


def model_of(layers: int, device: str = "cpu") -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))


def injecting(base: nn.Module, rounds: int) -> list[Row]:
    """Each measurement has a fresh copy of the base, made before."""
    fresh: dict[str, Any] = {}
    ours, theirs = LoRAConfig(rank=RANK), LoraConfig(r=RANK, target_modules=list(ALL_LINEAR))

    def copied(name: str) -> Callable[[], None]:
        return lambda: fresh.update({name: copy.deepcopy(base)})

    def removal() -> None:
        fresh["remove"] = copy.deepcopy(base)
        inject(fresh["remove"], ours)

    times = in_turn(
        {
            "inject": lambda: inject(fresh["ours"], ours),
            "PEFT, get_peft_model": lambda: get_peft_model(fresh["theirs"], theirs),
            "remove": lambda: remove(fresh["remove"]),
        },
        rounds=rounds,
        warmup=1,
        before={"inject": copied("ours"), "PEFT, get_peft_model": copied("theirs"), "remove": removal},
    )
    return comparison(times, against="inject")


def importing(rounds: int) -> list[Row]:
    """Seconds until a new interpreter has imported a module, timed inside of it."""

    def seconds(*modules: str) -> float:
        code = f"import time; t = time.perf_counter(); import {', '.join(modules)}; print(time.perf_counter() - t)"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    times: dict[str, list[float]] = {
        "torch": [],
        "torch, lightning_lora": [],
        "torch, lightning_lora.engine": [],
        "peft": [],
    }
    for _ in range(rounds):
        for name, own in times.items():
            own.append(seconds(*name.split(", ")))
    return comparison(times, against="torch")


def main() -> None:
    given = arguments(__doc__, rounds=10)
    report = Report(
        "injection",
        "Injection, removal and import",
        settings(seed=given.seed, rounds=given.rounds, rank=RANK, dtype="float32", hidden=64),
    )
    for layers in (1,) if given.quick else (32, 286):
        base = model_of(layers)
        report.table(f"A Llama-like model of {7 * layers} linear layers", injecting(base, given.rounds))
    if not given.quick:
        report.table("Importing in a new interpreter", importing(given.rounds))
    report.write(given.results)


if __name__ == "__main__":
    main()
