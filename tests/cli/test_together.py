"""`hydra/launcher=together`: jobs that differ in their adapters alone share a run, and leave what other jobs leave."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lightning_lora.cli.composition import rehearsal, with_model_names, with_pluses
from lightning_lora.cli.grouping import Job, described, grouped, numbers, shared, unshareable
from lightning_lora.cli.settings import checked
from lightning_lora.cli.train import Settings
from tests.cli.conftest import THEIRS

TOGETHER = "hydra/launcher=together"


def job(number: int, *overrides: str) -> Job:
    """The job that has these overrides."""
    with rehearsal("train", with_pluses("train", with_model_names(list(overrides)))) as config:
        settings = checked(config, Settings)
        common = shared(OmegaConf.to_container(config, resolve=False), settings)
    return Job(number, overrides, settings, common, unshareable(settings))


# Which jobs share a run.


@pytest.mark.parametrize(
    "differing",
    [
        ["lora.rank=4", "lora.rank=8"],
        ["optimizer.lr=1e-3", "optimizer.lr=2e-3"],
        ["lora.alpha=4", "lora=dora", "lora.target_modules=[q_proj]", "lora=gaussian"],
    ],
)
def test_jobs_that_differ_in_what_an_adapter_owns_share_a_run(differing):
    assert len(grouped([job(n, one) for n, one in enumerate(differing)])) == 1


ANYTHING_ELSE = ["seed=1", "trainer.max_steps=5", "data.batch_size=4", "model.dtype=bfloat16", "optimizer=sgd"]
ANYTHING_ELSE += [
    "scheduler=cosine",
    "optimizer.weight_decay=0.1",
    "monitor=val_perplexity",
    "callbacks=early_stopping",
    "lora.dropout=0.1",  # the random numbers of a step, after which the run goes on, depend on it
]


@pytest.mark.slow
def test_jobs_that_differ_in_anything_else_have_runs_of_their_own():
    groups = grouped(
        [job(n, *given) for n, given in enumerate([["lora.rank=4"], [], *([one] for one in ANYTHING_ELSE)])]
    )
    assert [[one.number for one in group] for group in groups] == [
        [0, 1],
        *([n + 2] for n in range(len(ANYTHING_ELSE))),
    ]


def test_a_setting_that_refers_to_the_rank_is_no_adapters_own():
    ranks = [job(n, f"lora.rank={rank}", "data.batch_size=${lora.rank}") for n, rank in enumerate((2, 4))]
    assert len(grouped(ranks)) == 2
    assert "no other job has data.batch_size=2" in described(grouped(ranks))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["lora=none"], "no LoRACallback"),
        (["adapter=user/it"], "adapter= is the start of one run"),
        (["ckpt_path=it.ckpt"], "ckpt_path= is the start of one run"),
        (["lora=plus"], "callbacks.lora.lora_plus_ratio is for one adapter"),
        (["callbacks.push.repo_id=user/it"], "callbacks.push.repo_id is the place of one adapter"),
        (["+callbacks.rates._target_=lightning.pytorch.callbacks.LearningRateMonitor"], "several adapters as one"),
        (["logger=wandb"], "logger.wandb"),
        (["trainer=ddp", "trainer.devices=2"], "only runs on one device"),
        (["callbacks.checkpoint.every_n_train_steps=5"], "callbacks.checkpoint.every_n_train_steps"),
    ],
)
def test_a_job_that_no_other_can_share_says_why(given, said):
    reason = job(0, *given).alone
    assert reason is not None
    assert said in reason


def test_the_plan_names_the_jobs_of_each_run_and_why_others_are_alone():
    jobs: list[Any] = [Job(n, (), {}, {"seed": seed}) for n, seed in enumerate([0, 0, 0, 1, 0, 2, 2])]
    jobs.append(Job(7, (), alone="it has no adapters"))
    assert described(grouped(jobs)).splitlines() == [
        "jobs 0-2, 4: 4 adapters, trained together on one base",
        "job 3: trained alone, since no other job has seed=1",
        "jobs 5-6: 2 adapters, trained together on one base",
        "job 7: trained alone, since it has no adapters",
    ]
    assert numbers([jobs[n] for n in (1, 3, 4, 6)]) == "1, 3-4, 6"


# What is refused before anything is trained.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.batch_size=8,16"], "job 1: no other job has data.batch_size=16"),
        (["lora=none", "task.width=8,9"], "job 0: it has no LoRACallback"),
        (["lora.rank=4"], "got one job alone"),
        (["lora.rank=1,2", "hydra.launcher.wave=0"], "wave"),
        (["lora.rank=1,2", "hydra.launcher.resume=perhaps"], "resume"),
    ],
)
def test_a_sweep_with_nothing_to_train_together_is_refused_and_leaves_no_folder(cli, arguments, said):
    assert said in cli.error("train", *THEIRS, "-m", TOGETHER, *arguments)


def test_the_launcher_is_for_train_alone(cli):
    assert "is for lightning-lora train" in cli.error("pull", "-m", TOGETHER, "repo_id=a/b", "local_dir=x,y")
    assert not Path("runs").exists()


# What a shared run leaves, beside what each of its jobs leaves alone.

SWEEP = ["-m", "lora.rank=1,2", "optimizer.lr=0.01,0.03"]


def results(folder: Path) -> dict[str, Any]:
    """results.json of a job, but for what tells how it was trained."""
    found = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "best_checkpoint", "together")}


def rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, numbers as numbers, without the time that a job took."""
    found = csv.DictReader(file.read_text().splitlines())
    return [{k: number(v) for k, v in row.items() if k != "seconds"} for row in found]


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def about(row: dict[str, Any]) -> dict[str, Any]:
    """Adapters in one forward are summed in another order than alone: float32's rounding, over a few steps."""
    return {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for k, v in row.items()}


def files(sweep: Path, but: str = "*.ckpt") -> set[str]:
    found = [path for path in sweep.rglob("*") if path.is_file() and not path.match(but)]
    return {path.relative_to(sweep).as_posix() for path in found}


def assert_same_sweep(together: Path, alone: Path, jobs: int = 4) -> None:
    assert files(together) == files(alone)
    assert rows(together / "results.csv") == [about(row) for row in rows(alone / "results.csv")]
    for job in map(str, range(jobs)):
        a, b = together / job, alone / job
        assert json.loads((a / "results.json").read_text())["together"] == list(range(jobs))
        theirs = results(b)
        for key in ("before", "after"):
            theirs[key] = about(theirs[key])
        assert results(a) == theirs
        assert rows(a / "metrics.csv") == [about(row) for row in rows(b / "metrics.csv")]
        assert (a / "hparams.yaml").read_text() == (b / "hparams.yaml").read_text()
        for folder in {path.parent.relative_to(a) for path in a.rglob("adapter_model.safetensors")}:
            ours, own = (load_file(one / folder / "adapter_model.safetensors") for one in (a, b))
            torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
            assert (a / folder / "adapter_config.json").read_text() == (b / folder / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    "given",
    [
        ["trainer.max_epochs=3"],
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                [
                    "trainer.max_steps=6",
                    "trainer.max_epochs=-1",
                    "evaluate_before=false",
                    "data._target_=standin.Shuffled",
                ],
                ["callbacks=early_stopping", "callbacks.early_stopping.patience=1", "optimizer.lr=0.01,0.9"],
                ["callbacks.checkpoint=null", "scheduler=cosine", "lora.dropout=0.5"],
            )
        ),
    ],
)
def test_jobs_of_a_shared_run_leave_what_each_leaves_alone(cli, given):
    sweep = [o for o in SWEEP if not any(g.partition("=")[0] == o.partition("=")[0] for g in given)]
    assert cli.train(*sweep, *given, "hydra.sweep.dir=alone") == 0
    assert cli.train(*sweep, *given, "hydra.sweep.dir=together", TOGETHER) == 0, cli.err
    assert "4 adapters, trained together on one base" in cli.out
    assert_same_sweep(Path("together"), Path("alone"))


@pytest.mark.slow
def test_jobs_whose_adapters_share_forwards_leave_what_each_leaves_alone(cli):
    given = [*SWEEP, "trainer.log_every_n_steps=3", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"]
    assert cli.train(*given, "hydra.sweep.dir=alone") == 0
    assert cli.train(*given, "hydra.sweep.dir=together", TOGETHER, "hydra.launcher.wave=4") == 0, cli.err
    assert_same_sweep(Path("together"), Path("alone"))


@pytest.mark.slow
def test_what_a_module_logs_for_an_epoch_alone_is_not_given_for_a_step(cli):
    """Our own tasks log the mean over the epoch by a name of its own."""
    texts = ["task=causal_lm", "data=stdlib_source", "trainer.max_steps=1", "trainer.limit_val_batches=1"]
    assert (
        cli(
            "train",
            "-m",
            *texts,
            "trainer=cpu",
            "data.batch_size=1",
            "trainer.log_every_n_steps=1",
            "lora.rank=1,2",
            TOGETHER,
        )
        == 0
    ), cli.err
    logged = rows(cli.folder / "0" / "metrics.csv")
    assert any(row["train_loss"] for row in logged)
    assert all("train_loss_epoch" not in row for row in logged)


@pytest.mark.slow
def test_a_shared_run_that_was_stopped_goes_on_as_if_it_had_not_been(cli, monkeypatch):
    rates = "optimizer.lr=0.01,0.9"  # with the second, the best adapter is the first epoch's
    sweep = ["-m", "lora.rank=1,2", rates, "task._target_=standin.Terminated", "task.at=5"]
    assert cli.train(*sweep, "hydra.sweep.dir=together", TOGETHER) == 143
    said = cli.out.strip().splitlines()[-1]
    assert said.endswith("hydra.sweep.dir=together hydra.launcher.resume=true")
    command = shlex.split(said.partition("lightning-lora ")[2])
    monkeypatch.setattr("os.kill", lambda *_: None)
    for was, other, said in (
        ("lora.rank=1,2", "lora.rank=1,3", "0.ckpt is of these jobs"),  # the first job is the same
        (rates, "optimizer.lr=0.02,0.9", "overrides.yaml is of a job with other settings"),
    ):
        assert cli(*(other if given == was else given for given in command)) == 2, "it would count as trained with that"
        assert said in cli.err
    assert cli.train(*sweep, "hydra.sweep.dir=alone") == 0
    assert cli(*command) == 0
    assert "step 4 " not in cli.out, "what was trained is not trained again"
    assert_same_sweep(Path("together"), Path("alone"))
    before = {path: path.stat().st_mtime_ns for path in Path("together").glob("*/adapter/*")}
    assert cli(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("together").glob("*/adapter/*")} == before
    assert cli.out.count("is done") == 4
    shutil.rmtree("together/3/.hydra")  # killed when all had results, and before Hydra ran the last job
    assert cli(*command) == 0
    assert_same_sweep(Path("together"), Path("alone"))
    assert cli(*command, "lora.alpha=3") == 2
    assert "of a job with other settings" in cli.err


def test_jobs_that_cannot_share_a_run_after_all_are_trained_one_after_another_and_say_why(cli):
    assert cli.train("-m", "lora.target_modules=[net.0],[nothing]", TOGETHER) == 2
    assert "jobs 0-1 are trained one after another: Adapter 'job1': target_modules: the entry 'nothing'" in cli.out
    table = rows(cli.folder / "results.csv")
    assert [bool(row["error"]) for row in table] == [False, True]


@pytest.mark.slow
def test_a_shared_run_that_fails_is_an_error_of_each_of_its_jobs_and_the_others_run(cli):
    assert cli.train("-m", "task._target_=standin.Failing", "task.at=3,99", "lora.rank=1,2", TOGETHER) == 2
    table = rows(cli.folder / "results.csv")
    assert [bool(row["error"]) for row in table] == [False, False, True, True]
    assert all("no more" in row["error"] for row in table[2:])
