"""`lightning-lora advise`: a table, a picture, settings for Hydra, and a command that trains with them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.cli.conftest import THEIRS

SHORT = [
    *THEIRS,
    "trainer.gradient_clip_val=0.5",
    "minutes=60",
    "steps=2",
    "max_rank=2",
    "learning_rates=[0.01]",
    "optimizer.lr=0.05",
]


@pytest.mark.slow
def test_the_printed_command_trains_with_what_is_advised_from_another_folder(cli, tmp_path, monkeypatch):
    assert cli("advise", *SHORT, "learning_rates=[0.01,0.1]", "lora.alpha=4") == 0, cli.err
    folder = cli.folder
    content = json.loads((folder / "advice.json").read_text())
    assert "LoRA of rank" in cli.out
    assert {row["learning rate"] for row in content["candidates"]} == {0.01, 0.1}
    assert [row["cut to"] for row in content["cuts"]][:3] == ["rank / 2", "rank / 4", "rank / 8"]
    assert (folder / "advice.png").read_bytes().startswith(b"\x89PNG")
    program, *command = shlex.split(content["command"])
    assert program == "lightning-lora"
    assert content["command"] in cli.out

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli(*command) == 0, cli.err
    used = OmegaConf.load(cli.folder / "config.yaml")
    assert used.optimizer.lr == content["lr"] in (0.01, 0.1)
    assert (used.lora.rank, used.lora.alpha) == (content["config"]["rank"], 4)
    assert used.trainer.gradient_clip_val == 0.5


@pytest.mark.slow
def test_it_is_a_difference_to_the_experiment_that_was_chosen(cli):
    own = Path("mine/experiment")
    own.mkdir(parents=True)
    (own / "short.yaml").write_text("# @package _global_\nlora: {dropout: 0.25}\ntrainer: {max_epochs: 1}\n")
    assert cli("advise", "--config-dir", "mine", "experiment=short", *SHORT) == 0, cli.err
    command = json.loads((cli.folder / "advice.json").read_text())["command"]
    assert cli(*shlex.split(command)[1:]) == 0, cli.err
    used = OmegaConf.load(cli.folder / "config.yaml")
    assert used.lora.dropout == 0.25
    assert used.trainer.max_epochs == 2  # the command line's


def test_a_task_that_takes_no_learning_rate_is_told_to_set_it(cli):
    arguments = [a.replace("standin.Regression", "standin.Narrow") for a in SHORT]
    assert cli("advise", *arguments) == 0, cli.err
    assert "in Narrow yourself: no setting gives it" in cli.out
    assert "optimizer" not in OmegaConf.load(cli.folder / "experiment/advised.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lora=none", "advise compares adapters"),
        ("adapter=somewhere", "starts every candidate anew"),
        ("minute=3", "Did you mean minutes"),
        ("monitor=val_lose", "Did you mean 'val_loss'"),
        ("compare=[lora]", "compare is one of"),
    ],
)
def test_what_cannot_be_is_said(cli, given, message):
    assert cli("advise", *SHORT, given) == 2
    assert message in cli.err
    assert "Traceback" not in cli.err
