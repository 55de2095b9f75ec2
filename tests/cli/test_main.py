from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lightning_lora
from lightning_lora.cli.commands import COMMANDS, docstring
from lightning_lora.cli.completion import suggestions


def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`command` in bash, where "lightning-lora" is this package's."""
    program = f'lightning-lora() {{ {sys.executable} -m lightning_lora "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(["bash", "-c", program + command], capture_output=True, text=True, env=environment)


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


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trian", "no command 'trian'. Did you mean train?"),
        ("Train", "Did you mean train?"),
        ("eval", "Did you mean evaluate?"),
        ("finetune", "Did you mean train?"),
        ("download", "Did you mean pull?"),
        ("lora.rank=4", "The command comes first: lightning-lora train lora.rank=4"),
        ("-m", "The command comes first: lightning-lora train -m"),
        ("xyzzy", "no command 'xyzzy'.\n"),
    ],
)
def test_an_unknown_command_names_the_one_that_is_meant(cli, command, said):
    assert said in cli.error(command)


@pytest.mark.parametrize("flag", ["--version", "-V", "version"])
def test_the_version_is_said(cli, flag):
    assert cli(flag) == 0
    assert cli.out == f"lightning-lora {lightning_lora.__version__}\n"


def test_the_package_itself_is_the_command_line():
    done = run("lightning-lora --version")
    assert done.stdout == f"lightning-lora {lightning_lora.__version__}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["", "train --help", "-sc install=bash"])
def test_a_reader_that_stops_early_ends_it_quietly(arguments, unbuffered):
    done = run(
        f"lightning-lora {arguments} | true; echo ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered, HYDRA_FULL_ERROR="1"
    )
    assert done.stderr == ""
    assert done.stdout in ("141\n", "0\n")


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("lightning-lora ", {"train", "push"}, set()),
        ("lightning-lora pu", {"push", "pull"}, {"train"}),
        ("lightning-lora train lora=do", {"lora=dora"}, {"lora=pissa"}),
        ("lightning-lora train lora.ra", {"lora.rank="}, set()),
        ("lightning-lora push ", {"repo_id=", "data="}, {"trainer=", "lora=", "callbacks="}),
        ("lightning-lora nothing lora", set(), {"lora="}),
    ],
)
def test_tab_completes_commands_then_groups_options_and_settings(line, some, none):
    found = set(suggestions(line))
    assert some <= found
    assert not none & found


def test_the_shell_completes_once_the_script_is_installed():
    line = 'COMP_LINE="lightning-lora train lora=do"; COMP_POINT=${#COMP_LINE}'
    script = run("lightning-lora -sc install=bash").stdout.replace("command lightning-lora", "lightning-lora")
    assert run(f"{script}\n{line}\n_lightning_lora; echo ${{COMPREPLY[@]}}").stdout == "lora=dora\n"
    assert run("lightning-lora train -sc install=bash").stdout == run("lightning-lora -sc install=bash").stdout


def test_a_shell_that_is_not_known_is_said(cli):
    assert cli("-sc", "install=tcsh") == 2
    assert "tab completion is for bash, zsh, fish" in cli.err


def test_help_of_a_command_lists_groups_options_settings_and_examples(cli):
    assert cli("train", "--help") == 0
    assert "lightning-lora train -m lora.rank=4,8,16" in cli.out
    assert "lora: alora, corda" in cli.out
    assert "  rank: 8" in cli.out


def test_help_of_a_command_lists_only_what_it_uses(cli):
    assert cli("push", "--help") == 0
    assert "repo_id: ???  # user/name" in cli.out
    assert not any(word in cli.out for word in ("lora:", "trainer", "scheduler", "adamw"))
    assert cli("evaluate", "--help") == 0
    assert "  trainer: cpu" in cli.out
    assert "experiment" not in cli.out


def test_the_configuration_can_be_shown_without_running(cli):
    assert cli("train", "--cfg", "job", "lora.rank=3") == 0
    assert "  rank: 3" in cli.out


def test_a_program_error_keeps_its_traceback(cli):
    with pytest.raises(RuntimeError, match="negative dimension"):
        cli.train("task.width=-1")
