"""The page of several runs has the numbers of its table, each at the place that its axis gives it."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from lightning_lora.page import line_chart, written
from lightning_lora.page.comparison import Run, comparison
from tests.page.strict import Strict


def page(runs: list[Run], **options: Any) -> tuple[str, Strict]:
    rows = [{**run.settings, "val_loss": run.value, "parameters": run.parameters} for run in runs]
    text = comparison("Runs", "Some runs.", runs, rows, metric="val_loss", **options).html()
    return text, Strict(text)


def of_rates(values: dict[float, float]) -> list[Run]:
    return [Run(f"job {i}", {"optimizer.lr": lr}, value) for i, (lr, value) in enumerate(values.items())]


def test_the_table_has_the_numbers_of_the_runs_as_they_are_printed():
    runs = [Run("a", {"lora": "<dora>", "lora.rank": 8}, 1.23456, parameters=12345), Run("b", {"lora.rank": 4}, 2.0)]
    _, found = page(runs)
    assert found.tables[0] == [
        ["lora", "lora.rank", "val_loss", "parameters"],
        ["<dora>", "8", "1.235", "12,345"],
        ["", "4", "2", ""],
    ]


def test_the_page_says_what_its_columns_and_the_bare_base_mean():
    text, _ = page(of_rates({1e-4: 2.0, 1e-3: 1.0}), base=3.0)
    for words in ("optimizer.lr: the learning rate", "parameters: how many", "val_loss: what the runs are compared by"):
        assert f"<li>{words}" in text
    assert "lower is better" in text
    assert "<li>bare base: the model without an adapter" in text
    text, _ = page(of_rates({1e-4: 2.0, 1e-3: 1.0}), mode="max")
    assert "higher is better" in text
    assert "bare base" not in text


def test_a_learning_rate_has_a_logarithmic_axis_and_each_value_its_place():
    _, found = page(of_rates({1e-4: 2.0, 1e-3: 1.0, 1e-2: 1.5}))
    (x0, y0), (x1, y1), (x2, y2) = found.points[:3]
    # A factor of ten is one distance. Places are written with one decimal, so a difference is off by 0.1 at most.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.21)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(0.5, abs=0.01)


def test_several_seeds_are_one_point_with_a_bar_from_the_smallest_to_the_largest():
    values = {1: (1.0, 1.5, 1.1), 2: (0.5, 0.9, 0.7)}
    runs = [
        Run(f"{rank}/{s}", {"lora.rank": rank, "seed": s}, v) for rank, own in values.items() for s, v in enumerate(own)
    ]
    text, found = page(runs)
    assert found.tables[1] == [
        ["runs", "lora.rank", "val_loss, mean", "smallest", "largest", "number"],
        ["val_loss", "1", "1.2", "1", "1.5", "3"],
        ["val_loss", "2", "0.7", "0.5", "0.9", "3"],
    ]
    line, *bars = re.findall(r'<polyline points="([^"]*)"/>', text)[:3]
    (_, y1), (_, y2) = (map(float, point.split(",")) for point in line.split())
    pixels = (y1 - y2) / (1.2 - 0.7)  # for one unit of the axis
    for bar, centre, own in zip(bars, (y1, y2), values.values(), strict=True):
        (x_low, low), (x_high, high) = (map(float, point.split(",")) for point in bar.split())
        mean = sum(own) / 3
        assert x_low == x_high
        assert low - centre == pytest.approx((min(own) - mean) * pixels, abs=0.2)
        assert high - centre == pytest.approx((max(own) - mean) * pixels, abs=0.2)
    assert "val_loss against seed" not in text


def test_runs_that_differ_in_one_setting_share_a_line_for_each_value_of_the_others():
    runs = [Run("r", {"lora.rank": r, "optimizer.lr": lr}, r * lr) for r, lr in product((4, 8), (0.1, 0.2, 0.3))]
    _, found = page(runs)
    against_rank, against_rate = found.tables[1], found.tables[2]
    assert [row[:2] for row in against_rank[1:3]] == [["lr 0.1", "4"], ["lr 0.1", "8"]]
    assert {row[0] for row in against_rate[1:]} == {"rank 4", "rank 8"}
    assert all(float(row[2]) == pytest.approx(int(row[0][-1]) * float(row[1])) for row in against_rate[1:])


def test_many_combinations_are_points_without_lines():
    runs = [Run("r", {"lora.rank": r, "optimizer.lr": 10**-r, "lora.dropout": r / 10}, 1 / r) for r in range(1, 9)]
    text, found = page(runs)
    assert "Point chart of val_loss over lora.rank" in text
    assert len(found.points) >= 3 * 8
    assert "<polyline" not in text


def test_a_setting_that_is_no_number_has_its_words_below_the_axis():
    runs = [Run(name, {"lora": name}, value) for name, value in (("rslora", 2.0), ("dora", 1.0), ("a" * 30, 3.0))]
    text, found = page(runs)
    assert [row[1] for row in found.tables[1][1:]] == ["a" * 30, "dora", "rslora"]
    (x0, _), (x1, _), (x2, _) = found.points[:3]
    assert x0 < x1 < x2
    assert ">dora</text>" in text
    assert f">{'a' * 15}\u2026</text>" in text


def test_a_setting_of_very_many_words_is_said_to_be_left_out_and_one_run_has_no_charts():
    text, _ = page([Run(f"job {i}", {"run_name": f"name {i}"}, float(i)) for i in range(20)])
    assert "val_loss against run_name is not drawn, since it has 20 values" in text
    text, _ = page([Run("job 0", {}, 1.0, seconds=3.0)])
    assert "depends on" not in text


def test_what_failed_or_diverged_is_named_with_its_settings_and_its_reason():
    runs = of_rates({0.1: 1.0, 0.2: 2.0})
    runs += [Run("job 2", {"optimizer.lr": 0.3}, None, error="it <broke>"), Run("job 3", {"optimizer.lr": 9.0}, None)]
    text, _ = page(runs)
    assert "2 of 4 have no result" in text
    assert "job 2 (optimizer.lr=0.3): it &lt;broke&gt;" in text
    assert "job 3 (optimizer.lr=9): its val_loss is not finite" in text


def test_all_may_have_failed():
    text, _ = page([Run("job 0", {}, None, error="no")])
    assert "1 of 1" in text
    assert "<svg" not in text


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_far_worse_than_the_base_is_left_out_of_the_charts_by_name(mode):
    sign = 1 if mode == "min" else -1
    text, found = page(of_rates({0.1: sign * 1.0, 0.2: sign * 1.2, 0.4: sign * 1e6}), mode=mode, base=sign * 1.4)
    assert "far worse: job 2." in text
    assert [row[1] for row in found.tables[1][1:]] == ["0.1", "0.2"]
    assert ">bare base</text>" in text


def test_a_base_that_is_far_away_is_said_and_not_drawn():
    text, _ = page(of_rates({0.1: 1.0, 0.2: 1.01}), base=7.5)
    assert "The bare base has 7.5." in text
    assert ">bare base</text>" not in text


def test_the_curves_are_those_of_the_best():
    runs = [Run(f"job {i}", {"lora.rank": i}, 1.0 + i, curve=[(0, 9.0), (10, 1.0 + i)]) for i in range(8)]
    text, found = page(runs)
    assert "Of 8 runs the best 6." in text
    assert found.tables[-1][0] == ["step", *(f"job {i}" for i in range(8))]
    assert found.tables[-1][2] == ["10", *(str(i + 1) for i in range(8))]


def test_ticks_have_the_digits_that_tell_them_apart():
    svg = line_chart({"a": [(0, 2.0581), (1, 2.0612)]}, title="t", x="x", y="y")
    ticks = re.findall(r'text-anchor="end">([\d.]+)<', svg)
    assert len(ticks) == len({*ticks}) > 2


def test_written_numbers_stay_short():
    assert [written(v) for v in (None, True, 12345, 1234.56, 0.000123456, 1e38, "a")] == [
        "", "True", "12,345", "1,234.6", "0.0001235", "1e+38", "a",
    ]  # fmt: skip
