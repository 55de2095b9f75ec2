from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_lora.cli.commands import COMMANDS, docstring


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_each_command_with_the_first_line_of_its_docstring(cli, arguments):
    assert cli(*arguments) == 0
    for command in COMMANDS:
        assert f"{docstring(command).splitlines()[0]}" in cli.out
    assert len(cli.out.splitlines()) < 15


def test_listing_the_commands_imports_neither_torch_nor_hydra():
    code = (
        "import sys; from lightning_lora.cli.main import main; main([]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'hydra')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_unknown_command_names_the_closest(cli):
    assert "Did you mean train?" in cli.error("trian")


def test_help_of_a_command_lists_groups_options_settings_and_examples(cli):
    assert cli("train", "--help") == 0
    assert "lightning-lora train -m lora.rank=4,8,16" in cli.out
    assert "lora: alora, corda" in cli.out
    assert "  rank: 8" in cli.out


def test_the_configuration_can_be_shown_without_running(cli):
    assert cli("train", "--cfg", "job", "lora.rank=3") == 0
    assert "  rank: 3" in cli.out


def test_a_program_error_keeps_its_traceback(cli):
    with pytest.raises(RuntimeError, match="negative dimension"):
        cli.train("task.width=-1")
