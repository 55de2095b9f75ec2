"""Hundreds of adapters of mixed kinds in one bank, served by threads while others come, go, wait on disk and return.

    python -m tests.hub.bank_churn --minutes 5

Every row of every batch is compared with the adapter alone, which is a plain float64 model made by the formulas. At the
end it says how much memory grew.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lightning_lora.engine.bank import LayerFactors
from lightning_lora.errors import BankError
from lightning_lora.hub.bank import AdapterBank

RANKS = (1, 2, 3, 4)
INPUTS = 8
LAYERS = ("embed", "conv", "wide", "narrow")


class Small(nn.Module):
    """One of each kind of layer that a bank serves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T) of tokens -> (N, T, 5)
        x = self.conv(self.embed(x).mT).mT
        return self.narrow(torch.tanh(self.wide(x)))


def random_adapter(base: Small, seed: int) -> tuple[dict[str, LayerFactors], nn.Module]:
    """An adapter of some rank, kind, precision and targets; and the same alone, in float64, by the formulas."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    names = draw.sample(LAYERS, draw.randint(1, len(LAYERS)))
    rank, dtype = draw.choice(RANKS), draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    kind = draw.choice(["plain", "plain", "dora", "bias"])
    alone = copy.deepcopy(base).double()
    factors = {}
    for name in names:
        layer, exact = base.get_submodule(name), alone.get_submodule(name)
        W = exact.weight.mT if name == "embed" else exact.weight.flatten(1)  # (out, n)
        A, B = (torch.randn(s, generator=generator).mul(0.4).to(dtype) for s in ((rank, W.shape[1]), (len(W), rank)))
        scale = draw.choice([0.5, 1.0, 2.0])
        changed = W + scale * B.double() @ A.double()
        magnitude = bias = None
        if kind == "dora":
            magnitude = torch.rand(len(W), generator=generator) + 0.5
            changed = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
        elif kind == "bias" and name in ("conv", "wide"):
            bias = torch.randn(len(W), generator=generator)
            exact.bias += scale * bias
        exact.weight.copy_(changed.mT if name == "embed" else changed.view(exact.weight.shape))
        if isinstance(layer, nn.Conv1d):
            A, B = A.view(rank, *layer.weight.shape[1:]), B[..., None]
        factors[name] = LayerFactors(A, B, scale, magnitude, bias)
    return factors, alone


@dataclass
class Outcome:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    growth: int = 0
    """Bytes of memory that were added after the first fifth of the time."""


class Churn:
    def __init__(self, adapters: int, disk: Path, capacity: int = 24, host_capacity: int = 60) -> None:
        torch.manual_seed(0)
        self.base = Small().eval()
        self.inputs = torch.randint(0, 20, (INPUTS, 7))
        self.factors, self.exact = {}, {None: self.base(self.inputs).double()}
        for seed in range(adapters):
            self.factors[f"a{seed}"], alone = random_adapter(self.base, seed)
            self.exact[f"a{seed}"] = alone(self.inputs)
        self.bank = AdapterBank(
            self.base,
            capacity,
            max_rank=max(RANKS),
            target_modules=list(LAYERS),
            host_capacity=host_capacity,
            disk=disk,
        )
        for name, values in self.factors.items():
            self.bank.put(name, values)
        self.names = list(self.factors)
        self.volatile = self.names[::3]
        self.outcome = Outcome()
        self.lock = threading.Lock()

    def run(self, seconds: float = 0.0, servers: int = 4, least: dict[str, int] | None = None) -> Outcome:
        """For so many seconds, and until the counts are `least`, or something is wrong."""
        until = time.monotonic() + seconds

        def goes_on() -> bool:
            is_short = any(self.outcome.counts[what] < count for what, count in (least or {}).items())
            return (time.monotonic() < until or is_short) and not self.outcome.wrong

        jobs = [*[self.serve] * servers, self.come_and_go, self.fetch]
        threads = [threading.Thread(target=self._guarded, args=(job, goes_on, i)) for i, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        process = psutil.Process()
        time.sleep(seconds / 5)
        before = process.memory_info().rss
        for thread in threads:
            thread.join()
        self.outcome.growth = process.memory_info().rss - before
        self.settled()
        return self.outcome

    def _guarded(self, job: Callable[[random.Random], None], goes_on: Callable[[], bool], seed: int) -> None:
        draw = random.Random(seed)
        with torch.inference_mode():
            while goes_on():
                try:
                    job(draw)
                except BankError as error:
                    # Another thread took it out, or more are in use than there are slots: both are said, none is wrong.
                    self._count("refused: " + ("gone" if "has no adapter" in str(error) else "full"))
                except Exception as error:
                    self.outcome.wrong.append(f"{job.__name__}: {error!r}")

    def _count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.outcome.counts[what] += by

    def serve(self, draw: random.Random) -> None:
        """A batch or two, with one adapter for all rows or one for each, by beams or not."""
        if draw.random() < 0.4:
            name = draw.choice(self.names)
            rows, names, beams = torch.arange(INPUTS), [name] * INPUTS, 1
            use = self.bank.use(name)
        else:
            rows = torch.randperm(INPUTS)[: draw.randint(1, INPUTS)]
            few = draw.sample(self.names, draw.randint(1, 5))
            names, beams = [draw.choice([*few, None]) for _ in rows], draw.choice([1, 1, 2])
            use = self.bank.use(names, layout="repeated")
        with use:
            for _ in range(draw.randint(1, 3)):
                found = self.base(self.inputs[rows].repeat_interleave(beams, 0)).double()
                for row, name, output in zip(rows, names, found.view(len(rows), beams, *found.shape[1:])):
                    exact = self.exact[name][row].expand_as(output)
                    if not torch.allclose(output, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max())):
                        self.outcome.wrong.append(f"{name} is {float((output - exact).abs().max()):.2g} off")
                self._count("rows", len(rows) * beams)

    def come_and_go(self, draw: random.Random) -> None:
        """One goes and comes back, or is replaced."""
        name = draw.choice(self.volatile)
        replace = draw.random() < 0.5
        if not replace and name in self.bank:
            self.bank.remove(name)
        self.bank.put(name, self.factors[name], replace=replace)
        self._count("came and went")

    def fetch(self, draw: random.Random) -> None:
        self.bank.prefetch(*draw.sample(self.names, 3)).result()
        self._count("prefetched", 3)

    def settled(self) -> None:
        """Every slot, row in memory and file is accounted for."""
        bank, slots = self.bank, self.bank._slots
        assert not slots.busy()
        assert len(slots._free) + len(bank.resident) == bank.capacity
        assert len(set(slots._free)) == len(slots._free)
        waiting = set(bank.names) - set(bank.resident)
        in_memory, on_disk = set(slots.store._rows), set(slots.store._written)
        assert waiting <= in_memory | on_disk <= set(bank.names)
        assert not slots.slab.data[-1].any(), "the row of the bare base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--adapters", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as disk, torch.no_grad():
        outcome = Churn(given.adapters, Path(disk)).run(60 * given.minutes)
    print(*(f"{count:>12,} {what}" for what, count in sorted(outcome.counts.items())), sep="\n")
    print(f"{outcome.growth / 2**20:>12.1f} MiB more memory than after the first fifth of the time")
    print("\n".join(outcome.wrong) or f"{'none':>12} wrong")


if __name__ == "__main__":
    main()
