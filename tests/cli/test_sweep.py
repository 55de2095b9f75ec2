from __future__ import annotations

import csv
import json

from lightning_lora.cli.sweep import write_table


def test_a_sweep_writes_one_table_with_the_best_job_first(cli):
    assert cli.train("-m", "lora.rank=1,2", "optimizer.lr=0.01") == 0
    rows = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert sorted(row["lora.rank"] for row in rows) == ["1", "2"]
    assert "optimizer.lr" not in rows[0], "what was not varied is no column"
    assert float(rows[0]["val_loss"]) <= float(rows[1]["val_loss"])
    assert cli.out.count("lora.rank  val_loss") == 1
    assert "results.csv" in cli.out.splitlines()[-1]


def test_a_job_that_fails_is_a_row_of_the_table_and_the_others_run(cli):
    assert cli.train("-m", "task.width=4,-1,8", "lora=none") == 2
    rows = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert "negative dimension" in rows[-1]["error"]


def test_the_largest_metric_is_the_best_where_that_is_the_mode(tmp_path):
    for job, accuracy in enumerate([0.5, 0.9, None]):
        (tmp_path / str(job)).mkdir()
        results = {
            "overrides": [f"lora.rank={job}"], "monitor": "val_accuracy", "mode": "max",
            "after": {"val_accuracy": accuracy}, "seconds": 1.0,
        }  # fmt: skip
        (tmp_path / str(job) / "results.json").write_text(json.dumps(results))
    assert [row["folder"] for row in write_table(tmp_path)] == ["1", "0", "2"]
