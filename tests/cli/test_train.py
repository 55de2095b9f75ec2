from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from tests.cli.conftest import THEIRS


def metrics(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_a_run_leaves_its_settings_metrics_checkpoints_adapter_plot_and_results(cli):
    assert cli.train("lora.rank=2", "trainer.max_epochs=3") == 0
    folder = cli.folder
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["lora"]["rank"] == 2
    assert settings["callbacks"]["lora"]["config"]["rank"] == 2, "resolved: nothing refers to anything"
    rows = metrics(folder)
    assert {"step", "epoch", "train_loss", "val_loss", "val_accuracy"} <= set(rows[0])
    assert [row["step"] for row in rows if row["val_loss"]] == ["0", "3", "7", "11"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    results = cli.results
    assert results["after"]["val_loss"] < results["before"]["val_loss"]
    assert (folder / results["best_checkpoint"]).is_file()
    assert results["trainable_parameters"] < results["parameters"]
    assert results["overrides"][-1] == "trainer.max_epochs=3"


def test_the_last_lines_say_where_everything_is_and_the_command_to_evaluate_it(cli):
    assert cli.train() == 0
    said = dict(line.split(maxsplit=1) for line in cli.out.strip().splitlines()[-7:])
    command = said.pop("evaluate")
    assert list(said) == ["adapter", "checkpoints", "metrics", "plot", "results", "settings"]
    assert all(Path(place).exists() for place in said.values())
    after = cli.results["after"]["val_loss"]
    program, *arguments = shlex.split(command)
    assert program == "lightning-lora"
    assert cli(*arguments) == 0
    assert f"{after:.4g}" in cli.out


@pytest.mark.parametrize(
    "bound",
    [
        ["trainer.max_steps=2"],
        ["trainer.max_steps=2", "trainer.max_epochs=-1"],
        ["trainer.max_steps=6"],
        ["trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=5"],
        ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=5"],
        ["trainer.max_steps=2", "trainer.val_check_interval=3", "trainer.check_val_every_n_epoch=null"],
        ["trainer.max_epochs=1", "callbacks.checkpoint=null"],
        ["trainer.max_epochs=1", "trainer.limit_val_batches=0", "evaluate_before=false"],
        ["trainer.max_steps=2", "lora=none"],
    ],
)
@pytest.mark.slow
def test_a_run_that_reached_its_end_has_what_it_ended_with_wherever_that_lies(cli, bound):
    assert cli.train(*bound) == 0
    assert (cli.folder / "adapter/adapter_model.safetensors").is_file() == ("lora=none" not in bound)
    command = cli.out.strip().splitlines()[-1].removeprefix("evaluate").split()
    after = cli.results["after"]
    if cli.results["before"]:
        assert after["val_loss"] < cli.results["before"]["val_loss"]
    assert cli(*command[1:], "trainer.limit_val_batches=1.0") == 0
    assert not after or f"{after['val_loss']:.4g}" in cli.out


def test_what_a_run_of_steps_learned_last_is_measured(cli):
    assert cli.train("trainer.max_steps=6") == 0
    assert [row["step"] for row in metrics(cli.folder) if row["val_loss"]] == ["0", "3", "5"]


def test_a_run_without_an_adapter_names_no_command_that_would_be_refused(cli):
    assert cli.train("callbacks.lora.save_adapter=false") == 0
    assert "evaluate " not in cli.out


@pytest.mark.slow
def test_a_run_is_quiet_but_for_the_adapters_its_progress_and_its_results(tmp_path):
    text = "\n\n".join(f"Paragraph {number}." for number in range(60))
    (tmp_path / "notes.txt").write_text(text)
    arguments = [
        "data=text",
        "data.source.path=notes.txt",
        "trainer=cpu",
        "trainer.max_steps=1",
        "trainer.max_epochs=-1",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_lora", "train", *arguments, "data.block_size=64"],
        cwd=tmp_path, capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stderr.strip().splitlines()
    assert said[0].split() == ["module", "number", "kind", "weight", "rank", "scale", "parameters"]
    assert said[2].split()[0] == "model.model.layers.0-5.self_attn.q_proj"
    assert len(said) < 14
    assert "42 modules adapted" in said[-2]
    assert done.stdout.startswith("step 1  train_loss ")
    assert "Epoch" not in done.stdout


def test_without_lora_every_weight_is_trained_and_the_same_command_evaluates_it(cli):
    assert cli.train("lora=none") == 0
    assert cli.results["trainable_parameters"] == cli.results["parameters"]
    after = cli.results["after"]["val_loss"]
    assert cli("evaluate", f"run={cli.folder}") == 0
    assert f"{after:.4g}" in cli.out


def test_a_setting_that_no_file_lists_needs_no_plus(cli):
    assert cli.train("trainer.limit_train_batches=1", "lora.use_rslora=true", "lora=rslora", "task.width=9") == 0
    assert cli.results["steps"] == 2


def test_a_resumed_run_goes_on_from_its_checkpoint(cli):
    assert cli.train() == 0
    checkpoint = cli.folder / "checkpoints/last.ckpt"
    assert cli.train(f"ckpt_path={checkpoint}", "trainer.max_epochs=3", "hydra.run.dir=resumed") == 0
    steps = [int(row["step"]) for row in metrics(Path("resumed")) if row["train_loss"]]
    assert steps == [8, 9, 10, 11]


def test_a_run_on_which_the_user_hits_ctrl_c_says_how_to_go_on(cli):
    before = signal.getsignal(signal.SIGINT)
    assert cli.train("task._target_=standin.Interrupting") == 130
    assert signal.getsignal(signal.SIGINT) is before
    command = next(line for line in cli.out.splitlines() if line.startswith("Go on with: "))
    arguments = shlex.split(command.removeprefix("Go on with: "))[1:]
    assert cli(*arguments, "task._target_=standin.Regression") == 0


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # before the first validation
@pytest.mark.parametrize(("step", "lora"), [(0, "default"), (3, "default"), (7, "default"), (5, "none")])
@pytest.mark.slow
def test_a_run_that_gets_sigterm_leaves_a_last_checkpoint_says_how_to_go_on_and_ends_with_143(cli, step, lora):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.train("task._target_=standin.Terminated", f"task.at={step}", f"lora={lora}") == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert torch.load(cli.folder / "checkpoints/last.ckpt")["global_step"] == step + 1
    command = next(line for line in cli.out.splitlines() if line.startswith("Go on with: "))
    arguments = shlex.split(command.removeprefix("Go on with: "))[1:]
    assert cli(*arguments, "task.at=-1", "hydra.run.dir=resumed") == 0


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # before the first validation
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (5, []),
        (1, ["trainer.accumulate_grad_batches=2"]),
        (5, ["trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=3", "evaluate_before=false"]),
    ],
)
@pytest.mark.slow
def test_a_run_resumed_in_its_own_folder_has_the_metrics_of_one_that_was_not_stopped(cli, step, more):
    theirs = ["task._target_=standin.Terminated", "trainer.max_epochs=3", *more]
    assert cli.train(*theirs, "task.at=-1", "hydra.run.dir=whole") == 0
    assert cli.train(*theirs, f"task.at={step}", "hydra.run.dir=runs/it/cut") == 143
    last = "ckpt_path=runs/it/cut/checkpoints/last.ckpt"
    assert cli.train(*theirs, "task.at=-1", "hydra.run.dir=runs/it/cut", last) == 0
    assert metrics(cli.folder) == metrics(Path("whole"))
    assert cli.results["before"] == json.loads(Path("whole/results.json").read_text())["before"]
    if not more:  # from the same checkpoint again: what came after it is not there twice
        assert cli.train(*theirs, "task.at=-1", "hydra.run.dir=runs/it/cut", last) == 0
        assert metrics(cli.folder) == metrics(Path("whole"))
    assert [path.name for path in cli.folder.iterdir() if "earlier" in path.name] == []


def test_a_new_run_in_a_used_folder_says_that_it_writes_its_metrics_anew(cli):
    assert cli.train("hydra.run.dir=runs/it/one") == 0
    first = metrics(cli.folder)
    assert cli.train("hydra.run.dir=runs/it/one") == 0
    assert metrics(cli.folder) == first
    assert "it writes metrics.csv anew" in cli.out + cli.err


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.slow
def test_a_job_that_slurm_starts_again_says_what_the_base_measured_and_goes_on_with_its_metrics(cli, monkeypatch):
    slurm = {"NTASKS": "1", "JOB_NAME": "tune", "JOB_ID": "17", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    theirs = ["task._target_=standin.Requeued", "trainer.max_epochs=3"]
    assert cli.train(*theirs, "task.at=-1", "hydra.run.dir=whole") == 0
    before = json.loads(Path("whole/results.json").read_text())["before"]
    assert cli.train(*theirs, "task.at=5", "hydra.run.dir=runs/it/job") == 143
    assert list(cli.folder.glob("hpc_ckpt_*.ckpt"))
    for path in (cli.folder / "checkpoints").iterdir():  # of Slurm's checkpoint alone
        if path.is_file():
            path.unlink()
    assert cli.train(*theirs, "task.at=-1", "hydra.run.dir=runs/it/job") == 0
    assert cli.results["before"] == before
    assert cli.results["after"] != before
    assert metrics(cli.folder) == metrics(Path("whole"))


class Runs:
    """What leaves a mark when it is unpickled, as a pickle of a stranger's might do worse."""

    def __reduce__(self):
        return Path.touch, (Path("mark"),)


@pytest.mark.slow
def test_a_checkpoint_of_the_whole_model_runs_no_code_from_an_address_either(cli):
    assert cli.train("lora=none") == 0
    torch.save({**torch.load(cli.folder / "checkpoints/last.ckpt"), "extra": Runs()}, "bad.ckpt")
    torch.save(torch.load(cli.folder / "checkpoints/last.ckpt"), "good.ckpt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    commands = (
        ["train", *THEIRS, "lora=none"],
        ["evaluate", f"run={cli.folder}"],
        ["predict", f"run={cli.folder}"],
    )
    for command in commands:
        assert cli(*command, f"ckpt_path={address}/bad.ckpt", "hydra.run.dir=again") == 2
        assert "add_safe_globals" in cli.err
        assert not Path("mark").exists()
        assert cli(*command, f"ckpt_path={address}/good.ckpt", "hydra.run.dir=again") == 0
    server.shutdown()
    server.server_close()


def test_sigterm_while_the_base_is_measured_is_not_forgotten(cli):
    assert cli.train("task._target_=standin.TerminatedEarly") == 143
    assert not (cli.folder / "checkpoints").exists()


def test_evaluating_ends_with_143_too(cli):
    assert cli.train() == 0
    assert cli("evaluate", f"run={cli.folder}", "task._target_=standin.TerminatedEarly") == 143


def test_without_a_logger_there_is_no_plot_and_nothing_claims_one(cli):
    assert cli.train("logger=none") == 0
    assert "plot" not in cli.out
    assert not (cli.folder / "loss.png").exists()


@pytest.mark.slow
def test_a_module_in_the_users_folder_is_found_by_the_installed_command(tmp_path):
    source = Path(__file__).with_name("standin.py").read_text()
    (tmp_path / "their_own.py").write_text(source)
    arguments = [a.replace("standin.", "their_own.") for a in THEIRS]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_lora.cli", "train", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lightning-lora evaluate run=runs/train/" in done.stdout


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_with_the_config_that_it_has(cli):
    assert cli.train("lora.rank=2", "lora.alpha=6", "trainer.max_epochs=3") == 0
    first, before = cli.folder, cli.results
    assert cli.train(f"adapter={first}/adapter", "hydra.run.dir=runs/it/two") == 0
    assert cli.results["before"]["val_loss"] == before["after"]["val_loss"]
    assert cli.results["trainable_parameters"] == before["trainable_parameters"]
    assert cli.train(f"adapter={first}/adapter", "lora.rank=2", "hydra.run.dir=runs/it/three") == 0
    assert cli("evaluate", "run=runs/it/three") == 0
    assert cli.train(f"adapter={first}/adapter", "lora.rank=8", "hydra.run.dir=runs/it/four") == 2
    assert "rank is 2 there and 8 here" in cli.err
    assert "alpha" not in cli.err


@pytest.mark.slow
def test_an_adapter_that_is_not_there_or_is_meant_otherwise_says_so(cli):
    assert cli.train("adapter=./nothing") == 2
    assert "there is no such folder" in cli.err
    assert cli.train("lora.rank=2") == 0
    adapter = f"{cli.folder}/adapter"
    assert cli.train(f"ckpt_path={adapter}") == 2
    assert f"it as adapter={adapter}" in cli.err
    assert cli.train("lora=none", f"adapter={adapter}") == 2
    assert "is for a LoRACallback" in cli.err


def hyperparameters(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "hparams.yaml").read_text())


@pytest.mark.parametrize("more", [["lora.rank=2"], ["lora=none"], ["lora.rank=2", "evaluate_before=false"]])
def test_a_run_logs_its_settings_as_hyper_parameters_with_what_the_users_module_saves(cli, more):
    assert cli.train("task._target_=standin.Remembering", "optimizer.lr=3e-3", "task.width=16", *more) == 0
    adapter = {} if "lora=none" in more else {"lora/rank": 2, "lora/alpha": 16.0, "lora/target_modules": "all-linear"}
    assert hyperparameters(cli.folder) == adapter | {
        "width": 16,
        "task/class": "Remembering",
        "task/width": 16,
        "data/class": "Sums",
        "optimizer/class": "AdamW",
        "optimizer/lr": 3e-3,
        "optimizer/weight_decay": 0.0,
        "run/seed": 0,
    }


def test_a_run_logs_the_config_of_the_adapter_that_it_starts_from(cli):
    assert cli.train("lora.rank=2") == 0
    assert cli.train(f"adapter={cli.folder}/adapter", "hydra.run.dir=runs/it/two") == 0
    assert hyperparameters(cli.folder)["lora/rank"] == 2
