"""Loading, using, evicting and folding adapters with 1 to 1,000 of them loaded, beside PEFT.

    python benchmarks/bank.py
    python benchmarks/bank.py --quick

A Llama-like model (hidden 256, 12 layers, float32) with random weights, PEFT folders of rank 8 on all of its 84 linear
layers. PEFT stops at 100 loaded, where one more takes it more than a second.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mixed_batches import TARGETS
from peft import LoraConfig, get_peft_model
from side_by_side import Report, Row, Spread, arguments, in_turn, settings
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import AdapterBank

RANK = 8


def model_of(layers: int, width: int = 256) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000, num_attention_heads=8)).eval()


def peft_folders(base: nn.Module, place: Path, count: int) -> list[Path]:
    """`count` folders that PEFT wrote, each with values of its own."""
    config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    adapted: Any = get_peft_model(copy.deepcopy(base), config)
    folders = []
    for i in range(count):
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.02)
        adapted.save_pretrained(place / f"a{i}")
        folders.append(place / f"a{i}")
    return folders


def timed(call: Callable[[], object]) -> float:
    """Processor time, in which others who use the machine do not show; one thread does all the work."""
    started = time.process_time()
    call()
    return time.process_time() - started


class Many:
    """Adds adapters one after the other to a bank and to PEFT, and measures at some counts."""

    def __init__(self, base: nn.Module, folders: list[Path], counts: list[int], most_of_peft: int, rounds: int) -> None:
        self.folders, self.counts, self.most_of_peft, self.rounds = folders, counts, most_of_peft, rounds
        self.served = copy.deepcopy(base)
        self.bank = AdapterBank(self.served, max(counts) + 8, max_rank=RANK)
        self.peft: Any = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=RANK, target_modules=TARGETS), adapter_name="p0"
        ).eval()
        self.loaded = 1
        self.bank.add("b0", folders[0])
        self.few = AdapterBank(copy.deepcopy(base), 8, max_rank=RANK)
        self.few.add("b0", folders[0])

    def folder(self, i: int) -> Path:
        return self.folders[i % len(self.folders)]

    def fill(self, count: int) -> None:
        """Up to `count` loaded in both (PEFT: up to its most)."""
        for i in range(self.loaded, count):
            self.bank.add(f"b{i}", self.folder(i))
            if i < self.most_of_peft:
                self.peft.load_adapter(self.folder(i), adapter_name=f"p{i}")
        self.loaded = max(self.loaded, count)

    def load(self) -> dict[str, list[float]]:
        """Seconds to load one more into a bank that has one, into this one and into PEFT, in turn; it goes again."""
        times: dict[str, list[float]] = {"few": [], "bank": [], "peft": []}
        takes_part = self.loaded <= self.most_of_peft
        for turn in range(-1, self.rounds):
            folder = self.folder(self.loaded + turn + 1)
            gc.collect()
            gc.disable()
            (folder / "adapter_model.safetensors").read_bytes()
            banks = {"few": self.few, "bank": self.bank}
            # In turn the first of the two, since the second finds the file in the processor's caches.
            order = ("few", "bank") if turn % 2 else ("bank", "few")
            added = {name: timed(partial(banks[name].add, "one more", folder)) for name in order}
            theirs = timed(partial(self.peft.load_adapter, folder, "more")) if takes_part else 0.0
            gc.enable()
            self.few.remove("one more")
            self.bank.remove("one more")
            if takes_part:
                self.peft.delete_adapter("more")
            if turn >= 0:
                times["few"].append(added["few"])
                times["bank"].append(added["bank"])
                times["peft"] += [theirs] if takes_part else []
        return times

    def activate(self) -> dict[str, list[float]]:
        """Seconds to use another adapter than before."""
        place = {"bank": 0, "peft": 0}

        def ours() -> None:
            place["bank"] += 1
            with self.bank.use(f"b{place['bank'] % self.loaded}"):
                pass

        def theirs() -> None:
            place["peft"] += 1
            self.peft.set_adapter(f"p{place['peft'] % min(self.loaded, self.most_of_peft)}")

        times = in_turn({"bank": ours}, rounds=self.rounds, calls=1000, clock=time.process_time)
        return {**times, "peft": in_turn({"peft": theirs}, rounds=self.rounds, clock=time.process_time)["peft"]}


def by_count(report: Report, many: Many) -> None:
    rows: list[Row] = []
    for count in many.counts:
        many.fill(count)
        load, activate = many.load(), many.activate()
        row: Row = {
            "loaded": count,
            "load a PEFT folder, ms": Spread.of(1e3 * t for t in load["bank"]),
            "x with 1 loaded": Spread.of(b / a for a, b in zip(load["few"], load["bank"])),
            "use another, us": Spread.of(1e6 * t for t in activate["bank"]),
        }
        if count <= many.most_of_peft:
            row["PEFT load_adapter, ms"] = Spread.of(1e3 * t for t in load["peft"])
            row["PEFT set_adapter, us"] = Spread.of(1e6 * t for t in activate["peft"])
        rows.append(row)
    report.table("By how many are loaded: 84 modules", rows)


def by_layers(report: Report, place: Path, layers: list[int], rounds: int) -> None:
    rows = []
    for count in layers:
        base = model_of(count, width=64)
        folders = peft_folders(base, place / str(count), 2)
        bank = AdapterBank(base, 8, max_rank=RANK)
        for i, folder in enumerate(folders):
            bank.add(f"b{i}", folder)
        turn = [0]

        def use(bank: AdapterBank = bank, turn: list[int] = turn) -> None:
            turn[0] += 1
            with bank.use(f"b{turn[0] % 2}"):
                pass

        times = in_turn({"use": use}, rounds=rounds, calls=1000, clock=time.process_time)
        rows.append({"modules": 7 * count, "use another, us": Spread.of(1e6 * t for t in times["use"])})
    report.table("By how many modules the model has", rows)


def tiers(report: Report, base: nn.Module, folders: list[Path], rounds: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as disk:
        for title, own in (("memory", {}), ("disk", {"host_capacity": 0, "disk": disk})):
            bank = AdapterBank(copy.deepcopy(base), 2, max_rank=RANK, **own)
            for i in range(4):
                bank.add(f"b{i}", folders[i % len(folders)])
            times = []
            for turn in range(4 * (rounds + 1)):
                use = bank.use(f"b{turn % 4}")  # of four the one that was longest unused, so never in a slot
                times.append(timed(use.__enter__))
                use.__exit__()
            rows.append({"waits in": title, "use it, ms": Spread.of(1e3 * t for t in times[4:])})
            del bank
    report.table("An adapter that has no slot: another leaves its own, this one comes back", rows)


def folding(report: Report, many: Many, rounds: int) -> None:
    times: dict[str, list[float]] = {"fold": [], "unfold": [], "merge": [], "unmerge": []}
    many.peft.set_adapter("p0")
    for _ in range(rounds + 1):
        folded = many.bank.folded("b0")
        times["fold"].append(timed(folded.__enter__))
        times["unfold"].append(timed(lambda folded=folded: folded.__exit__(None, None, None)))
        times["merge"].append(timed(many.peft.merge_adapter))
        times["unmerge"].append(timed(many.peft.unmerge_adapter))
    spread = {name: Spread.of(1e3 * t for t in own[1:]) for name, own in times.items()}
    theirs = f"PEFT, {min(many.loaded, many.most_of_peft)} loaded"
    rows = [
        {"": "in", "bank": spread["fold"], theirs: spread["merge"]},
        {"": "out", "bank": spread["unfold"], theirs: spread["unmerge"]},
    ]
    report.table("One adapter into the base's weights and out again, ms", rows)


def main() -> None:
    given = arguments(__doc__, rounds=15)
    base = model_of(1 if given.quick else 12)
    report = Report(
        "bank",
        "A bank of adapters: loading, using, evicting, folding",
        settings(
            seed=given.seed,
            rounds=given.rounds,
            clock="processor time",
            dtype="float32",
            model="Llama-like, hidden 256, intermediate 512, 12 layers, random weights",
            adapters=f"PEFT folders of rank {RANK} on {', '.join(TARGETS)}",
        ),
        text=(
            "Medians, and 20th and 80th percentiles. Loading is from a folder in the page cache to an adapter that can "
            "be used, with every check that `AdapterBank.add` makes. `use another` is entering and leaving "
            "`with bank.use(name)`, each time another adapter."
        ),
    )
    with tempfile.TemporaryDirectory() as place:
        folders = peft_folders(base, Path(place), 2 if given.quick else 24)
        counts, most = ([1, 2], 2) if given.quick else ([1, 10, 100, 500, 1000], 100)
        many = Many(base, folders, counts, most, given.rounds)
        by_count(report, many)
        by_layers(report, Path(place) / "layers", [1] if given.quick else [12, 48], given.rounds)
        tiers(report, base, folders, given.rounds)
        folding(report, many, given.rounds)
    report.write(given.results)


if __name__ == "__main__":
    main()
