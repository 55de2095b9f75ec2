from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_lora.cli.composition import composed
from lightning_lora.cli.sweep import SweepTable, _number, write_table
from lightning_lora.page import written
from tests.page.strict import Strict


def space(**params: object) -> list[str]:
    """A file with this search space; the arguments that choose it."""
    Path("mine/experiment").mkdir(parents=True)
    text = OmegaConf.to_yaml({"hydra": {"sweeper": {"params": params}}})
    Path("mine/experiment/space.yaml").write_text(f"# @package _global_\n{text}")
    return ["-m", "--config-dir", "mine", "experiment=space"]


def test_a_sweep_writes_one_table_with_the_best_job_first(cli):
    assert cli.train("-m", "lora.rank=1,2", "optimizer.lr=0.01") == 0
    rows = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert sorted(row["lora.rank"] for row in rows) == ["1", "2"]
    assert "optimizer.lr" not in rows[0], "what was not varied is no column"
    assert float(rows[0]["val_loss"]) <= float(rows[1]["val_loss"])
    assert cli.out.count("lora.rank  val_loss") == 1
    assert "results.csv" in cli.out.splitlines()[-1]


def test_a_sweep_writes_a_page_whose_numbers_are_those_of_its_table(cli):
    assert cli.train("-m", "lora.rank=1,2", "optimizer.lr=0.01,0.001", "evaluate_before=true") == 0
    assert cli.out.splitlines()[-2] == f"Page: {cli.folder / 'results.html'}"
    text = (cli.folder / "results.html").read_text()
    page = Strict(text)
    rows = list(csv.reader((cli.folder / "results.csv").read_text().splitlines()))
    assert page.tables[0] == [rows[0], *([written(_number(cell)) for cell in row] for row in rows[1:])]
    assert {"lora.rank", "optimizer.lr", "val_loss", "parameters", "seconds"} < {*rows[0]}
    for name in ("lora.rank", "optimizer.lr", "trained parameters", "seconds"):
        assert f"<h3>val_loss against {name}</h3>" in text
    _, by_rank, *_ = page.tables
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    found = {(row[0], row[1]): row[2] for row in by_rank[1:]}
    assert found == {
        (f"lr {written(float(lr))}", rank): written(float(loss))
        for lr, rank, loss in zip(columns["optimizer.lr"], columns["lora.rank"], columns["val_loss"], strict=True)
    }
    assert "val_loss while they trained" in text


def test_a_job_that_fails_is_a_row_of_the_table_and_the_others_run(cli):
    assert cli.train("-m", "task.width=4,-1,8", "lora=none") == 2
    rows = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert "negative dimension" in rows[-1]["error"]
    page = (cli.folder / "results.html").read_text()
    assert "1 of 3 have no result" in page
    assert "job 1 (task.width=-1):" in page


def test_the_largest_metric_is_the_best_where_that_is_the_mode(tmp_path):
    for job, accuracy in enumerate([0.5, 0.9, None]):
        (tmp_path / str(job)).mkdir()
        results = {
            "overrides": [f"lora.rank={job}"], "monitor": "val_accuracy", "mode": "max",
            "after": {"val_accuracy": accuracy}, "seconds": 1.0,
        }  # fmt: skip
        (tmp_path / str(job) / "results.json").write_text(json.dumps(results))
    assert [row["folder"] for row in write_table(tmp_path)] == ["1", "0", "2"]


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({"lora.use_dora": "true,false"}, [{"lora.use_dora": "True"}, {"lora.use_dora": "False"}]),
        ({"lora.use_dora": "choice(true,false)", "optimizer.lr": 0.01}, [{"lora.use_dora": "True"}] * 2),
        ({"task.width": "8,12", "lora": "dora,default"}, [{"task.width": "12"}, {"lora": "dora"}]),
        ({"++lora.use_dora": "true,false"}, [{"lora.use_dora": "True"}]),
        ({"trainer.limit_train_batches": "range(1,3)"}, [{"trainer.limit_train_batches": "2"}]),
    ],
)
@pytest.mark.slow
def test_a_search_space_in_a_file_may_name_settings_that_no_file_lists(cli, params, rows):
    assert cli.train(*space(**params)) == 0, cli.err
    table = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert len(table) == (4 if len(params) == 2 and "lora" in params else 2)
    for key, value in (pair for row in rows for pair in row.items()):
        assert value.lower() in [row[key].lower() for row in table]


@pytest.mark.slow
def test_the_command_line_is_stronger_than_the_search_space(cli):
    assert cli.train(*space(**{"lora.use_dora": "true,false"}), "lora.use_dora=false", "task.width=8,9") == 0
    table = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert [row["task.width"] for row in table] in (["8", "9"], ["9", "8"])
    assert "lora.use_dora" not in table[0]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"lora.use_doraa": "true,false"}, "no such setting of LoRAConfig. Did you mean lora.use_dora?"),
        ({"lora.rank": "a,b"}, 'lora.rank: "a" is not of the type int'),
        ({"sedd": "1,2"}, "sedd: there is no such setting. Did you mean seed?"),
    ],
)
def test_a_search_space_is_checked_before_the_first_job(cli, params, said):
    assert cli.train(*space(**params)) == 2
    assert said in cli.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("values", ["interval(1e-4,1e-2)", "tag(log,interval(1e-4,1e-2))"])
def test_an_interval_of_a_sweeper_such_as_optunas_is_rehearsed_at_its_start(values):
    assert composed("train", ["-m", f"optimizer.lr={values}"]).config.optimizer.lr == 1e-4


def test_flags_may_stand_between_overrides(cli):
    arguments = space(**{"task.width": "8,9"})
    assert cli.train(arguments[-1], "trainer.max_epochs=1", *arguments[:-1]) == 0
    assert cli.out.count("task.width  ") == 1


def test_jobs_that_failed_in_other_processes_are_counted_by_what_they_left(tmp_path, capsys):
    for job, error in enumerate([None, "it failed", None]):
        (tmp_path / str(job)).mkdir()
        results = {"overrides": [f"lora.rank={job}"], "monitor": "val_loss", "mode": "min", "after": {"val_loss": 1.0}}
        failed = {"overrides": [f"lora.rank={job}"], "error": error}
        (tmp_path / str(job) / "results.json").write_text(json.dumps(failed if error else results))
    SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert SweepTable.failed == 1


def test_a_job_of_several_processes_is_told_what_works_under_every_launcher(cli):
    assert cli.train("-m", "task.width=4,5", "trainer.devices=2", "trainer.strategy=ddp") == 2
    assert "Use trainer.strategy=ddp_spawn, or trainer.devices=1." in cli.out


SWEEPERS = {"optuna": "direction", "nevergrad": "optim.maximize", "ax": "ax_config.experiment.minimize"}
GOOD_IS_SMALL = {"optuna": "minimize", "nevergrad": "false", "ax": "true"}
GOOD_IS_LARGE = {"optuna": "maximize", "nevergrad": "true", "ax": "false"}


def with_sweeper(name: str) -> list[str]:
    """The arguments that choose a sweeper with the settings that the plugin `name` has, and its defaults."""
    Path("mine/hydra/sweeper").mkdir(parents=True, exist_ok=True)
    node = OmegaConf.create({"_target_": "a.plugin", "params": None})
    OmegaConf.update(node, SWEEPERS[name], OmegaConf.create(f"value: {GOOD_IS_SMALL[name]}").value)
    OmegaConf.save(node, f"mine/hydra/sweeper/{name}.yaml")
    return ["-m", "--config-dir", "mine", f"hydra/sweeper={name}"]


@pytest.mark.parametrize("name", SWEEPERS)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_sweeper_is_told_by_mode_which_values_are_good(cli, name, mode):
    config = composed("train", [*with_sweeper(name), f"mode={mode}"]).config
    SweepTable().on_multirun_start(config)
    good = (GOOD_IS_SMALL if mode == "min" else GOOD_IS_LARGE)[name]
    assert str(OmegaConf.select(config.hydra.sweeper, SWEEPERS[name])).lower() == good


@pytest.mark.parametrize("name", SWEEPERS)
def test_a_sweeper_that_is_told_the_opposite_is_refused_before_the_first_job(cli, name):
    key = f"hydra.sweeper.{SWEEPERS[name]}"
    for mode, value in (("min", GOOD_IS_LARGE), ("max", GOOD_IS_SMALL)):
        assert cli.train(*with_sweeper(name), f"mode={mode}", f"{key}={value[name]}", "task.width=4,5") == 2
        assert f"mode={mode} and {key}=" in cli.err
    if name == "optuna":
        assert cli.train(*with_sweeper(name), "mode=max", f"{key}=[minimize]", "task.width=4,5") == 2
    assert not Path("runs").exists()


@pytest.mark.parametrize("subdir", ["${hydra.job.num}", "by_width/width_${task.width}"])
@pytest.mark.slow
def test_a_sweep_in_a_used_folder_has_its_own_jobs_in_its_table(cli, subdir):
    where = ["hydra.sweep.dir=runs/it/sweep", f"hydra.sweep.subdir={subdir}", "lora=none", "trainer.max_epochs=1"]
    assert cli.train("-m", *where, "task.width=4,5,6") == 0
    assert cli.train("-m", *where, "task.width=5,7") == 0
    rows = list(csv.DictReader((cli.folder / "results.csv").read_text().splitlines()))
    assert sorted(row["task.width"] for row in rows) == ["5", "7"]
    assert all((cli.folder / row["folder"] / "results.json").is_file() for row in rows)
