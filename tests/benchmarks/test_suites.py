"""Each benchmark runs, at tiny sizes; what it measures is no matter here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SUITES = [
    "step",
    "memory",
    "injection",
    "folders",
    "checkpoint",
    "end_to_end",
    "bank",
    "mixed_batches",
    "monitor",
    "many",
    "advise",
    "paper",
]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, known = torch.get_num_threads(), set(sys.modules)
    yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the peers
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_runs_and_writes_what_it_found(
    suite: str, benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [f"{suite}.py", "--quick", "--results", str(tmp_path)])
    importlib.import_module(suite).main()
    written = json.loads((tmp_path / f"{suite}.json").read_text())
    assert written["tables"]
    assert all(table["rows"] for table in written["tables"])
    assert written["settings"]["commit"]
    assert (tmp_path / f"{suite}.md").read_text().startswith(f"# {written['title']}")


def test_ratios_are_paired_within_rounds_and_spreads_are_percentiles(benchmarks: None):
    harness = importlib.import_module("side_by_side")
    # A machine that slows down while it measures: the ratio does not.
    times = {"one": [1.0, 2.0, 4.0], "other": [3.0, 6.0, 12.0]}
    assert vars(harness.ratios(times, against="one")["other"]) == {"low": 3.0, "median": 3.0, "high": 3.0}
    spread = harness.Spread.of(range(11))
    assert (spread.low, spread.median, spread.high) == (2.0, 5.0, 8.0)


def test_contenders_take_turns(benchmarks: None):
    harness, calls = importlib.import_module("side_by_side"), []
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = harness.in_turn(contenders, rounds=2, warmup=1, before={"b": lambda: calls.append("before b")})
    assert calls == ["a", "before b", "b"] * 3
    assert {name: len(own) for name, own in times.items()} == {"a": 2, "b": 2}


def test_saved_memory_counts_what_is_shared_once(benchmarks: None):
    harness = importlib.import_module("side_by_side")
    x, w = torch.randn(8, 4), torch.randn(4, requires_grad=True)
    _, kept = harness.saved_bytes(lambda: (x * w).sum() + (x[:2] * w).sum(), apart_from=[w])
    assert kept == x.untyped_storage().nbytes()
