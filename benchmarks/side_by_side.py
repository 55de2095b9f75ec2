"""What every benchmark here shares: contenders timed in turn, memory measured in processes of their own, and a report.

    times = in_turn({"limit": step_of(base), "ours": step_of(ours)}, rounds=20)
    report = Report("step", "A training step", settings=settings(seed=0, dtype="bfloat16"))
    report.table("Llama-like", comparison(times, against="limit"))
    report.write()

Machines are shared and clocks drift, so nothing is compared with a number of another run: in each round every
contender is called once, a ratio is taken within the round, and the median of the ratios is given with their 20th and
80th percentiles.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is made on the spot

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lightning-lora", "torch", "lightning", "transformers", "peft", "accelerate", "safetensors")
T = TypeVar("T")
Row = dict[str, Any]


# Time.


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    calls: int = 1,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, round by round: A B C, A B C, ...

    `calls` is how many calls a measurement spans, for what takes microseconds. `before` is run ahead of a contender's
    measurement and is not timed. `clock` may be `time.process_time`, where one thread does all the work and others use
    the machine too. The garbage collector waits, as in timeit.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    prepare = before or {}
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            for name, call in contenders.items():
                prepare.get(name, _nothing)()
                _wait()
                started = clock()
                for _ in range(calls):
                    call()
                _wait()
                if turn >= 0:
                    times[name].append((clock() - started) / calls)
            gc.collect(0)
    finally:
        if collects:
            gc.enable()
    return times


def _nothing() -> None:
    pass


def _wait() -> None:
    """Until an accelerator has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Spread:
    """A median between the 20th and the 80th percentile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        assert ordered
        return cls(*(_quantile(ordered, q) for q in (0.2, 0.5, 0.8)))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratios(times: Mapping[str, list[float]], against: str) -> dict[str, Spread]:
    """Each contender's time over that of `against`, paired within the rounds."""
    return {name: Spread.of(t / u for t, u in zip(own, times[against])) for name, own in times.items()}


def comparison(times: Mapping[str, list[float]], against: str, unit: str = "ms") -> list[Row]:
    """One row for each contender, with its time and its ratio to the time of `against`."""
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    paired = ratios(times, against)
    return [
        {
            "contender": name,
            unit: Spread.of(factor * t for t in own),
            f"x {against}": paired[name],
        }
        for name, own in times.items()
    ]


# Memory.


def saved_bytes(forward: Callable[[], T], *, apart_from: Iterable[torch.Tensor] = ()) -> tuple[T, int]:
    """What `forward` returns, and the bytes that autograd keeps for the backward pass of it.

    Memory that several saved tensors share counts once; that of `apart_from` (parameters, inputs) does not count.
    """
    known = {t.untyped_storage().data_ptr() for t in apart_from}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    return result, sum(kept.values())


def peak_bytes(call: Callable[[], object]) -> int:
    """How far memory rises above where it was while `call` runs, on the GPU if there is one.

    Freed memory that the allocator keeps hides the rise, so call this once in a process: see `in_fresh_process`.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is resident now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field_name: str) -> int:
    found = re.search(rf"{field_name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """The result of `function(*args)`, a function of a module's top level, in a process that did nothing before."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *args).result()


# Settings and results.


def arguments(description: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line that the suites share; `defaults` add numeric options of one's own. Sets threads and seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=defaults.pop("rounds", 20), help="times that each is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds, to see that it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the results are written to")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    return given


def settings(**own: Any) -> dict[str, Any]:
    """What a reader needs to repeat a run: commit, versions, processor, threads, and `own` (dtype, shapes, seed)."""
    folder = Path(__file__).parent.parent
    commit = _output_of("git", "-C", str(folder), "rev-parse", "--short", "HEAD") or "unknown"
    changed = _output_of("git", "-C", str(folder), "status", "--porcelain", "--", "lightning_lora", "benchmarks/*.py")
    return {
        "command": f"python {' '.join(['benchmarks/' + Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "commit": f"{commit}, with changes since" if changed else commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name))},
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        **own,
    }


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{found[1] if found else platform.processor()} ({platform.machine()}), {os.cpu_count()} cores"


def missing(package: str) -> str | None:
    """Why a peer cannot take part, or None if it can."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} is not there ({error})"
    return None


@dataclass
class Report:
    """Tables with what it takes to repeat them: `results/<name>.json` and `.md`."""

    name: str
    title: str
    settings: dict[str, Any]
    text: str = ""
    tables: list[tuple[str, list[Row]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Peers that were left out and why; what bounds a figure."""

    def table(self, title: str, rows: list[Row]) -> None:
        """Add a table, and print it, since a suite takes minutes."""
        self.tables.append((title, rows))
        print(f"\n{title}\n{_markdown(rows)}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"\nNote: {text}", flush=True)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write both files; returns the path of the JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.name}.json"
        tables = [{"title": title, "rows": [_plain(row) for row in rows]} for title, rows in self.tables]
        content = {"title": self.title, "settings": self.settings, "notes": self.notes, "tables": tables}
        target.write_text(json.dumps(content, indent=1) + "\n")
        target.with_suffix(".md").write_text(self.page())
        print(f"\nWritten to {target} and .md", flush=True)
        return target

    def page(self) -> str:
        parts = [f"# {self.title}", self.text.strip()]
        for title, rows in self.tables:
            parts += [f"## {title}", _markdown(rows)]
        if self.notes:
            parts += ["## Notes", "\n".join(f"- {note}" for note in self.notes)]
        parts += ["## Settings", "\n".join(f"- {name}: {value}" for name, value in self.settings.items())]
        return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(row: Row) -> Row:
    return {name: vars(value) if isinstance(value, Spread) else value for name, value in row.items()}
