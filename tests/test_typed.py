"""A type checker, and so an editor, sees what is wrong with a user's file."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.training.starting import FurtherFields

FILE = """\
import torch
from lightning_lora import AdapterBank, HubPush, LoRACallback, LoRAConfig, inject, load_adapter, merged

LoRACallback(rank="eight", alfa=16)
LoRACallback(rank=8, alpha=16, target_modules=["q_proj"], use_dora=True, rank_pattern={"q_proj": 4})
LoRACallback(freeze_a="yes")
LoRACallback(LoRAConfig(rank=8), push=HubPush("user/name"))
LoRAConfig(rank="eight")
report = inject(torch.nn.Linear(4, 4), LoRAConfig())
report.modules[0].rank.upper()
bank = AdapterBank(torch.nn.Linear(4, 4))
bank.add("legal", "folder")
bank.add(3, "folder")
with merged(torch.nn.Linear(4, 4)):
    load_adapter(torch.nn.Linear(4, 4), "folder", revison="main")
"""
WRONG = {4: 2, 6: 1, 8: 1, 10: 1, 13: 1, 15: 1}
"""Line -> errors."""


def test_the_package_says_that_it_is_typed():
    assert (Path(lightning_lora.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_a_type_checker_finds_what_is_wrong_in_a_users_file_and_nothing_else(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "theirs.py").write_text(FILE)
    # As an installed package is read: by its py.typed, without its own settings, and quietly.
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--no-error-summary",
    ]
    root = str(Path(lightning_lora.__file__).parents[1])
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), "theirs.py"],
        cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": root, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line]
    assert {line: lines.count(line) for line in sorted(set(lines))} == WRONG, done.stdout + done.stderr


def test_the_callback_names_each_field_of_a_config_once():
    spelled = inspect.signature(LoRACallback).parameters
    names = [field.name for field in fields(LoRAConfig)]
    assert [name for name in names if (name in spelled) == (name in FurtherFields.__annotations__)] == []
    assert len([name for name in names if name in spelled]) == 10


def test_what_is_spelled_reaches_the_config():
    given = {
        "rank": 3, "alpha": 5.0, "dropout": 0.5, "target_modules": ["a"], "exclude_modules": ["b"],
        "modules_to_save": ["c"], "bias": "all", "use_rslora": True, "use_dora": True, "init": "gaussian",
    }  # fmt: skip
    assert LoRACallback(**given).config == LoRAConfig(**given)
    assert LoRACallback().config == LoRAConfig()
    without = {"target_modules": None, "target_parameters": ["w"]}
    assert LoRACallback(**without).config == LoRAConfig(**without)
