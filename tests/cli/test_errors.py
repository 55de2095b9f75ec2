"""What a user gets wrong is said in one screen, with the closest name, before a run's folder exists."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from lightning_lora.cli.explain import explain
from tests.cli.conftest import THEIRS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lora.rnak=4"], "lora.rnak: there is no such setting. Did you mean lora.rank?"),
        (["-m", "lora.rnak=4,8"], "Did you mean lora.rank?"),
        (["rank=4"], "rank: there is no such setting. Did you mean lora.rank?"),
        (["lroa=default"], "Did you mean lora?"),
        (["foo.bar=1"], "The top level has: adapter, callbacks,"),
        (["+lora.rnak=4"], "lora.rnak: there is no such setting of LoRAConfig. Did you mean lora.rank?"),
        (["trainer.max_epoch=4"], "Did you mean trainer.max_epochs?"),
        (["model=embeded"], "model=embeded: there is no such option. Did you mean model=embedded?"),
        (["debug=fsat"], "Did you mean debug=fast?"),
        (["lora.rank=abc"], 'lora.rank: "abc" is not of the type int'),
        (["seed=abc"], 'seed: "abc" is not of the type int | None'),
        (["mode=maximal"], "mode: \"maximal\" is not of the type Literal['min', 'max']"),
        (["trainer.max_epochs=1.5"], "trainer.max_epochs: 1.5 is not of the type"),
        (["optimizer.lr=fast"], 'optimizer.lr: "fast" is not of the type'),
        (["optimizer.lr=null"], "Give optimizer.lr=VALUE, or leave it out with ~optimizer.lr: it is then 0.001."),
        (["optimizer._target_=standin.Unannotated", "optimizer.lr=null"], "optimizer.lr: null is no learning rate."),
        (["data.batch_size=null"], "data.batch_size: null is not of the type int."),
        (["model=pretrained"], "model.name: a value is missing. Give it with model.name=..."),
        (["data=text"], "data.source.path: a value is missing."),
        (["task=custom"], "task._target_: a value is missing."),
        (["lora.modules_to_save=head"], "is not of the type list[str] | None. Write modules_to_save=[head]."),
        (["lora=[x"], "'lora=[x' cannot be read. A setting is written key=value"),
        (["evaluate"], "'evaluate' cannot be read. A setting is written key=value"),
        (["=3"], "must be a string or a list"),
        (["model=./nothere"], "There is no folder"),
        (["lora.rank=4,8"], "add --multirun"),
        (["monitor=${lora.rnak}"], "monitor refers to lora.rnak, and there is no such setting."),
        (["~lora"], "there is no such setting. To train without adapters: lora=none."),
        (["trainer.precision=17"], "trainer.precision: 17 is none of 16, 16-mixed, 16-true, 32, 32-true, 64,"),
        (["hydra/launcher=joblb"], "Did you mean hydra/launcher=joblib (pip install hydra-joblib-launcher)?"),
        (["lora=null"], "lora=null: a group takes the name of an option. Options of lora: alora,"),
        (["experiment=null"], "Options of experiment: demo,"),
        (["lora.r=4"], "lora.r: there is no such setting. Did you mean lora.rank?"),
        (["+lora.lora_alpha=4"], "Did you mean lora.alpha?"),
        (["lora_dropout=0.1"], "Did you mean lora.dropout?"),
        (["--resolve"], "--resolve goes with --cfg"),
        (["--package", "lora"], "--package goes with --cfg"),
        (["check_base=false"], "Did you mean callbacks.lora.check_base?"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["--verbose"], "there is no flag --verbose"),
        (["--cfg"], "see --help"),
        (["hydra/launcher=joblib"], "pip install hydra-joblib-launcher"),
        (["hydra/sweeper=optuna"], "pip install hydra-optuna-sweeper"),
        (["-m", "optimizer.lr=interval(1e-4,1e-3)"], "A sweep over an interval needs a sweeper that searches"),
        (["task=sequence_classification"], "SequenceClassification does not go with TextData"),
        (["data=shapes"], "CausalLM does not go with ImageClassificationData. Choose task=image_classification"),
        (["data=stdlib_docstrings"], "Choose task=sequence_classification for these data, or data=text"),
    ],
)
def test_a_wrong_setting_is_a_one_screen_error_that_says_what_to_write(cli, arguments, said):
    assert said in cli.error("train", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task.widht=3"], "task.widht: there is no such setting. Did you mean task.width?"),
        (["+task.widht=3"], "task.widht: there is no such setting of Regression. Did you mean task.width?"),
        (["task.width=wide"], 'task.width: "wide" is not of the type int'),
        (["task.activations=[relu,1]"], "task.activations:"),
        (["task._target_=standin.Regresion"], "Did you mean standin.Regression?"),
        (["task._target_=standing.Regression"], "there is no module 'standing'"),
        (["data._target_=standin"], "standin is no class"),
    ],
)
def test_the_signature_of_a_users_own_class_is_the_schema_of_its_settings(cli, arguments, said):
    assert said in cli.error("train", *THEIRS, *arguments)


def test_all_that_is_wrong_is_said_at_once(cli):
    message = cli.error("train", "lora.rank=abc", "seed=x", "+optimizer.momentum=0.9")
    assert all(key in message for key in ("lora.rank:", "seed:", "optimizer.momentum:"))


def test_a_value_that_only_the_config_object_can_judge_is_an_error_too(cli):
    assert cli.train("lora.rank=0") == 2
    assert "rank" in cli.err
    assert "Traceback" not in cli.err


def test_a_misspelt_key_in_a_file_of_the_users_is_found(cli):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/typo.yaml").write_text("# @package _global_\ntrianer: {max_epochs: 1}\nlora: {rnak: 3}\n")
    message = cli.error("train", "--config-dir", "mine", "experiment=typo")
    assert "trianer: there is no such setting. Did you mean trainer?" in message
    assert "Did you mean lora.rank?" in message


def test_a_file_that_is_no_yaml_is_an_error_with_its_line(cli):
    Path("mine/lora").mkdir(parents=True)
    Path("mine/lora/broken.yaml").write_text("rank: [1,\nalpha: }")
    assert "line 2" in cli.error("train", "--config-dir", "mine", "lora=broken")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_an_adapter_that_is_not_there_is_an_error(cli, command):
    assert "adapter: a value is missing. Give run=FOLDER" in cli.error(command)
    assert "is not the folder of a run" in cli.error(command, "run=nowhere")


def test_a_checkpoint_that_is_not_there_is_an_error(cli):
    for command in ("evaluate", "predict"):
        assert cli(command, *THEIRS[:6], "adapter=null", "ckpt_path=nowhere.ckpt") == 2
        assert "nowhere.ckpt: there is no such checkpoint" in cli.err
    assert cli.train("ckpt_path=nowhere.ckpt") == 2
    assert "nowhere.ckpt: there is no such checkpoint" in cli.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.accelerator=quantum"], "trainer: You selected an invalid accelerator name"),
        (["trainer.strategy=fsdp"], "trainer: The strategy `fsdp` requires a GPU"),
        (["trainer.accelerator=tpu"], "trainer: Requirement 'torch_xla"),
        (["trainer.devices=-3"], "trainer: `devices` selected with `CPUAccelerator`"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["seed=-5"], "seed=-5: -5 is not in bounds"),
        (["run_dir=taken/inside"], "run_dir=taken/inside cannot be made: Not a directory"),
    ],
)
def test_a_value_that_only_its_target_can_judge_is_one_screen(cli, arguments, said):
    Path("taken").write_text("a file")
    assert cli.train(*arguments) == 2
    assert said in cli.err
    assert "Traceback" not in cli.err


def test_a_fault_in_a_users_own_class_keeps_its_traceback(cli):
    with pytest.raises(ValueError, match="no more than 100"):
        cli.train("task._target_=standin.Narrow", "task.width=101")


def test_a_metric_that_is_not_logged_is_named_before_training(cli):
    shapes = ["data=shapes", "data.source.count=30", "data.batch_size=10", "trainer=cpu", "trainer.max_epochs=1"]
    model = ["task=image_classification", "model=pretrained", "model.name=vit"]
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained("vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("vit")
    assert cli("train", *shapes, *model, "monitor=val_acuracy") == 2
    assert "monitor=val_acuracy: there is no such metric. Did you mean val_accuracy?" in cli.err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_file_that_cannot_be_written_is_named(code):
    assert explain(OSError(code, os.strerror(code), "runs/metrics.csv")) == (
        f"{os.strerror(code)}: runs/metrics.csv could not be written."
    )
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


def test_a_missing_extra_is_named(cli, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    assert cli.train("logger=wandb") == 2
    assert "pip install 'lightning-lora[wandb]'" in cli.err


def test_a_task_that_is_no_module_is_said_by_its_setting(cli):
    for where, said in (("task", "LightningModule"), ("data", "LightningDataModule")):
        assert cli.train(f"{where}._target_=os.getcwd") == 2
        assert f"{where}._target_: os.getcwd makes a str, and a {said} is needed" in cli.err


def test_a_slurm_job_that_was_asked_for_in_another_way_than_lightning_wants_is_one_line(cli, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "tune")
    assert cli.train() == 2
    assert "--ntasks-per-node=2" in cli.err
    assert "Traceback" not in cli.err
