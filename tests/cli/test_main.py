from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

import lightning_lora
from lightning_lora.cli import launch
from lightning_lora.cli.commands import COMMANDS, docstring, suggestions
from lightning_lora.cli.composition import composed, with_finished_run, with_pluses
from lightning_lora.cli.settings import build, literal


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
    assert len(cli.out.splitlines()) == len(COMMANDS) + 4


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
        ("lightning-lora push ", {"repo_id=", "message="}, {"trainer=", "lora=", "callbacks="}),
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


def test_settings_are_read_from_folders_as_plain_hydra_does(cli):
    """The settings of an earlier run, a file of one's own, and one's own folder beside a search path."""
    Path("mine/lora").mkdir(parents=True)
    Path("theirs/lora").mkdir(parents=True)
    Path("mine/ours.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    for folder, rank in (("mine", 3), ("theirs", 5)):
        Path(folder, "lora", f"{folder}.yaml").write_text(f"defaults: [default]\nrank: {rank}\n")
    given = ["--config-dir", "mine", f"hydra.searchpath=[file://{Path('theirs').absolute()}]"]
    for option, rank in (("mine", 3), ("theirs", 5)):
        assert composed("train", launch.flags_first([*given, f"lora={option}"])).config.lora.rank == rank
    own = launch.flags_first(["--config-dir", "mine", "seed=8", "--config-name", "ours"])
    assert own[-1] == "seed=8"
    assert composed("train", own[:-1]).config.seed == 7
    assert composed("train", own).config.seed == 8
    OmegaConf.save(OmegaConf.create({"seed": 9}), "config.yaml")
    for flags in (["--config-path", "."], ["--config-path=."], ["-cp", "."]):
        assert composed("train", launch.flags_first([*flags, "--config-name", "config"])).config.seed == 9


def test_a_node_may_say_how_hydra_builds_it_and_a_text_may_hold_what_looks_like_a_reference(cli):
    texts = ["a${b}", r"a\${b}", r"a\\${b}", "$", r"\d+$"]
    node = {"_target_": "builtins.dict", "inner": {"texts": texts}}
    assert build({"node": node}, "node") == {"inner": {"texts": texts}}
    as_hydras = build({"node": {**node, "_convert_": "none"}}, "node")
    assert isinstance(as_hydras["inner"], DictConfig)
    assert OmegaConf.to_container(OmegaConf.create({"texts": literal(texts)}), resolve=True) == {"texts": texts}
    assert with_pluses("train", ["lora._convert_=all"]) == ["++lora._convert_=all"]


def test_a_value_that_needs_quotes_is_shown_with_them(cli):
    assert cli.train(r"lora.target_modules=.*\.(q|v)_proj$") == 2
    (command,) = [line for line in cli.err.splitlines() if "stands in quotes" in line]
    (override,) = shlex.split(command.partition("quotes: ")[2])
    assert composed("train", [override]).config.lora.target_modules == r".*\.(q|v)_proj$"


def test_the_places_that_a_finished_run_names_are_those_from_where_it_was_started(cli, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("text")
    run = {
        "model": {"name": "base"},
        "data": {
            "tokenizer": {"name": "base"},
            "path": "data/*.txt",
            "test_path": "./data/a.txt",
            "text_column": "data",
        },
        "task": {"model": {"name": "base"}, "name": "user/of-the-hub", "other_path": "hf://data"},
        "lora": {},
    }
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(run), folder / "config.yaml")
    (folder / ".hydra").mkdir()
    hydra = OmegaConf.create({"hydra": {"runtime": {"cwd": str(tmp_path)}}})
    OmegaConf.save(hydra, folder / ".hydra" / "hydra.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    name, _ = with_finished_run("evaluate", ["run=../run"])
    config = composed(name, []).config
    assert config.model.name == str(tmp_path / "base")
    assert config.data.tokenizer == config.model == config.task.model
    assert Path(config.data.path) == tmp_path / "data" / "*.txt"
    assert Path(config.data.test_path) == tmp_path / "data" / "a.txt"
    assert (config.data.text_column, config.task.name, config.task.other_path) == (
        "data",
        "user/of-the-hub",
        "hf://data",
    )
