"""A batch in which every row has its own adapter, beside the bare base and beside PEFT's `adapter_names`.

    python benchmarks/mixed_batches.py
    python benchmarks/mixed_batches.py --threads 2
    python benchmarks/mixed_batches.py --quick

A Llama-like model (hidden 512, 12 layers, float32) with random weights, adapters of rank 8 on all of its 84 linear
layers. The bank holds 256 of them; PEFT holds only the 64 that are used, since its forward does not depend on the
others, and loading 256 takes it minutes. All three are given the same adapters, and must give the same outputs.

Decoding is one token for each row without a cache to attend to, which is all linear layers: the hardest case.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import Report, Spread, arguments, in_turn, ratios, settings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import AdapterBank
from lightning_lora.engine.bank import LayerFactors

RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Workload:
    rows: int
    tokens: int
    distinct: int
    goal: float | None = None
    """The most that the bank may take, times the bare base."""

    @property
    def title(self) -> str:
        what = "decode, 1 token" if self.tokens == 1 else f"prefill, {self.tokens} tokens"
        return f"{what}, {self.rows} rows, {self.distinct} adapters"

    @property
    def names(self) -> list[str]:
        return [f"a{row % self.distinct}" for row in range(self.rows)]


WORKLOADS = [
    Workload(64, 1, 64, goal=1.40),
    Workload(32, 1, 16, goal=1.40),
    Workload(16, 128, 16, goal=1.07),
    Workload(4, 128, 4),
    Workload(64, 1, 16),
    Workload(8, 1, 4),
]
ALONE = [
    Workload(1, 1, 1, goal=1.05),
    Workload(32, 1, 1, goal=1.05),
    Workload(64, 1, 1, goal=1.05),
    Workload(16, 128, 1, goal=1.05),
]


class Contenders:
    """The same base three times: bare, in a bank, in PEFT."""

    def __init__(self, quick: bool) -> None:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        if not quick:
            sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12}
        self.base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000, num_attention_heads=8)).eval()
        self.served = copy.deepcopy(self.base)
        self.bank = AdapterBank(self.served, 256, max_rank=RANK)
        config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
        self.peft: Any = get_peft_model(copy.deepcopy(self.base), config, adapter_name="a0").eval()
        used = 16 if quick else 64
        for i in range(1, used):
            self.peft.add_adapter(f"a{i}", config)
        for i in range(used if quick else 256):
            self.bank.put(f"a{i}", self._factors(f"a{i % used}"))

    def _factors(self, name: str) -> dict[str, LayerFactors]:
        layers = self.peft.base_model.model.named_modules()
        return {
            layer: LayerFactors(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
            for layer, module in layers
            if hasattr(module, "lora_A")
        }

    @property
    def bytes_per_adapter(self) -> int:
        return self.bank.plan.bytes_per_adapter

    @property
    def bytes_of_base(self) -> int:
        return sum(p.nbytes for m in self.base.modules() if isinstance(m, nn.Linear) for p in m.parameters())


def check_same(contenders: Contenders, work: Workload, ids: Tensor) -> None:
    """Raise unless the bank and PEFT compute the same."""
    with contenders.bank.use(work.names):
        ours = contenders.served(ids, use_cache=False).logits
    theirs = contenders.peft(input_ids=ids, use_cache=False, adapter_names=work.names).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def forward(model: nn.Module, ids: Tensor, **more: Any) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False, **more)


def within(bank: AdapterBank, names: Any, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with the routing entered for it alone, as a new batch does."""

    def entered() -> None:
        with bank.use(names):
            call()

    return entered


def measured(contenders: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Their times in turn: where one thread does all the work, without the time that it waited for the processor."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return in_turn(contenders, rounds=rounds, calls=calls, clock=time.process_time if is_alone else time.perf_counter)


def shown(work: Workload, ratio: Spread) -> str:
    if work.goal is None:
        return ""
    return "met" if ratio.median <= work.goal else f"missed: at most {work.goal}"


def mixed(report: Report, contenders: Contenders, workloads: list[Workload], rounds: int) -> None:
    rows = []
    for work in workloads:
        ids = torch.randint(0, 1000, (work.rows, work.tokens))
        check_same(contenders, work, ids)
        served = forward(contenders.served, ids)
        with contenders.bank.use(work.names):
            times = measured(
                {
                    "base": forward(contenders.base, ids),
                    "bank": served,
                    "new": within(contenders.bank, work.names, served),
                    "peft": forward(contenders.peft, ids, adapter_names=work.names),
                },
                rounds=rounds if work.tokens == 1 else max(3, rounds // 4),
            )
        paired = ratios(times, "base")
        ours = paired["bank"] if work.tokens == 1 else paired["new"]
        rows.append(
            {
                "workload": work.title,
                "base, ms": Spread.of(1e3 * t for t in times["base"]),
                "bank, same routing": paired["bank"],
                "bank, new routing": paired["new"],
                "PEFT adapter_names": paired["peft"],
                "goal": shown(work, ours),
            }
        )
    report.table("Each row its own adapter, x the bare base", rows)


def alone(report: Report, contenders: Contenders, workloads: list[Workload], rounds: int) -> None:
    rows = []
    contenders.peft.set_adapter("a0")
    for work in workloads:
        ids = torch.randint(0, 1000, (work.rows, work.tokens))
        served = forward(contenders.served, ids)
        times = measured(
            {
                "base": forward(contenders.base, ids),
                "bank": within(contenders.bank, "a0", served),
                "peft": forward(contenders.peft, ids),
                "names": forward(contenders.peft, ids, adapter_names=work.names),
            },
            rounds=rounds if work.tokens == 1 else max(3, rounds // 4),
        )
        with contenders.bank.folded("a0"):
            folded = measured({"base": forward(contenders.base, ids), "folded": served}, rounds=max(3, rounds // 4))
        paired = ratios(times, "base")
        rows.append(
            {
                "workload": work.title,
                "base, ms": Spread.of(1e3 * t for t in times["base"]),
                "bank": paired["bank"],
                "bank, folded": ratios(folded, "base")["folded"],
                "PEFT set_adapter": paired["peft"],
                "PEFT adapter_names": paired["names"],
                "goal": shown(work, paired["bank"]),
            }
        )
    report.table("All rows one adapter, x the bare base", rows)


def bound(report: Report, contenders: Contenders, work: Workload, rounds: int) -> None:
    """How near the decoding of rows that have an adapter each is to reading their bytes once."""
    ids = torch.randint(0, 1000, (work.rows, 1))
    gathered = torch.ones(work.distinct * contenders.bytes_per_adapter // 4)
    with contenders.bank.use(work.names):
        served = forward(contenders.served, ids)
        times = measured({"base": forward(contenders.base, ids), "bank": served, "read": gathered.sum}, rounds=rounds)
    share = Spread.of((b - a) / c for a, b, c in zip(times["base"], times["bank"], times["read"]))
    read = Spread.of(1 + c / a for a, c in zip(times["base"], times["read"]))
    report.note(
        f"{work.title}: the factors of {work.distinct} adapters are {gathered.nbytes / 2**20:.0f} MiB, the base's "
        f"weights {contenders.bytes_of_base / 2**20:.0f} MiB. Summing as many bytes, and nothing else, would take the "
        f"base to {read} times its time; what the bank takes beside the base is {share} times that sum."
    )


def one_layer(report: Report, contenders: Contenders, rounds: int) -> None:
    """What bounds one row alone: the calls of one layer, with all that they read in the processor's caches."""
    bare, served = (model.model.layers[0].self_attn.q_proj for model in (contenders.base, contenders.served))
    cell = served.bank_cell
    A, B = cell.one(0, RANK)
    x = torch.randn(1, 1, bare.in_features)
    y = torch.zeros(1, 1, bare.out_features)

    def products() -> None:
        y.baddbmm_(torch.bmm(x, A), B)

    with contenders.bank.use("a0"):
        calls = {
            "the bare layer": lambda: bare(x),
            "the layer in a bank": lambda: served(x),
            "the two products of the update": products,
        }
        times = measured(calls, rounds=rounds, calls=2000)
    rows = [{"": name, "us": Spread.of(1e6 * t for t in own)} for name, own in times.items()]
    report.table(f"One layer, one row, {bare.in_features} -> {bare.out_features}, from the processor's caches", rows)
    share = 100 * contenders.bytes_per_adapter / contenders.bytes_of_base
    report.note(
        f"One row alone: the adapter has {share:.1f} % of the base's bytes, and a forward of one row is reading bytes. "
        "The rest above 1 is the calls of the table, for each of the layers; `bank.folded` is without them."
    )


@torch.inference_mode()
def main() -> None:
    given = arguments(__doc__, rounds=40)
    contenders = Contenders(given.quick)
    report = Report(
        "mixed_batches" if given.threads == 1 else f"mixed_batches_{given.threads}_threads",
        "Mixed batches: every row its own adapter",
        settings(
            seed=given.seed,
            rounds=given.rounds,
            clock="processor time" if given.threads == 1 else "wall time",
            dtype="float32",
            model="Llama-like, hidden 512, intermediate 1376, 12 layers, 8 heads, random weights",
            adapters=f"rank {RANK} on {', '.join(TARGETS)}; 256 in the bank, 64 in PEFT",
        ),
        text=(
            "Time of a forward as a multiple of the bare base's in the same round: the median of the ratios, and their "
            "20th and 80th percentiles. `same routing` is a step of a generation that has begun; `new routing` enters "
            "`bank.use` within the measurement, so that resolving the names and copying the factors of the rows out of "
            "the slab are in it. For prefill, the goal is for the latter."
        ),
    )
    workloads = WORKLOADS[1:2] if given.quick else WORKLOADS
    mixed(report, contenders, workloads, given.rounds)
    alone(report, contenders, ALONE[:1] if given.quick else ALONE, given.rounds)
    bound(report, contenders, workloads[0], given.rounds)
    one_layer(report, contenders, given.rounds)
    report.note("No accelerator took part: this machine has none.") if not torch.cuda.is_available() else None
    report.write(given.results)


if __name__ == "__main__":
    main()
