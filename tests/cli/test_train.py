from __future__ import annotations

import csv
import shlex
import signal
import subprocess
import sys
from pathlib import Path

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


def test_without_a_logger_there_is_no_plot_and_nothing_claims_one(cli):
    assert cli.train("logger=none") == 0
    assert "plot" not in cli.out
    assert not (cli.folder / "loss.png").exists()


def test_a_module_in_the_users_folder_is_found_by_the_installed_command(tmp_path):
    source = Path(__file__).with_name("standin.py").read_text()
    (tmp_path / "their_own.py").write_text(source)
    arguments = [a.replace("standin.", "their_own.") for a in THEIRS]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_lora.cli", "train", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lightning-lora evaluate run=runs/train/" in done.stdout


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


def test_an_adapter_that_is_not_there_or_is_meant_otherwise_says_so(cli):
    assert cli.train("adapter=./nothing") == 2
    assert "there is no such folder" in cli.err
    assert cli.train("lora.rank=2") == 0
    adapter = f"{cli.folder}/adapter"
    assert cli.train(f"ckpt_path={adapter}") == 2
    assert f"it as adapter={adapter}" in cli.err
    assert cli.train("lora=none", f"adapter={adapter}") == 2
    assert "is for a LoRACallback" in cli.err
