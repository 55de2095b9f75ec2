from __future__ import annotations

import pytest

from lightning_lora import LoRAConfig, inject, save_adapter
from tests.hub.models import Linears, edit_config
from tests.hub_server.plugin import hub  # noqa: F401


@pytest.fixture
def repository(hub, tmp_path):  # noqa: F811
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    folder = save_adapter(model, tmp_path / "saved")
    return hub.create_repo("user/adapter", files={path.name: path.read_bytes() for path in folder.iterdir()})


def test_pull_says_what_came_from_which_commit_and_where_it_lies(cli, repository, tmp_path):
    assert cli("pull", "repo_id=user/adapter", "local_dir=here") == 0
    commit = repository.branches["main"]
    assert f"commit       {commit}" in cli.out
    assert "adapter_model.safetensors" in cli.out
    assert "folder       here" in cli.out
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    assert cli("pull", "repo_id=user/adapter", f"revision={commit}") == 0
    assert "from the cache, and checked" in cli.out
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


def test_a_repository_that_is_not_there_is_one_screen(cli, repository):
    assert "Did you mean 'user/adapter'?" in cli.error("pull", "repo_id=user/adaptr")
    assert "repo_id: a value is missing" in cli.error("pull")
    assert "Did you mean revision?" in cli.error("pull", "repo_id=user/adapter", "revison=v1")


@pytest.mark.slow
def test_fields_of_a_later_peft_are_ignored_by_name_in_every_command(cli, hub, tmp_path):  # noqa: F811
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    folder = save_adapter(model, tmp_path / "later")
    edit_config(folder, later_config={"x": 1})
    hub.create_repo("user/later", files={path.name: path.read_bytes() for path in folder.iterdir()})
    commands = {
        "pull": ["repo_id=user/later"],
        "push": [f"adapter={folder}", "repo_id=user/name", "dry_run=true"],
        "export": [f"adapter={folder}", "output=exported", "--for", "vllm"],
        "combine": [f"adapters=[{folder}]", "weights=[1]", "output=combined"],
    }
    for command, arguments in commands.items():
        assert "ignore_fields=['later_config']" in cli.error(command, *arguments)
        assert cli(command, *arguments, "ignore_fields=[later_config]") == 0


def test_a_folder_of_a_repository_is_pulled_and_exported(cli, hub, tmp_path):  # noqa: F811
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    folder = save_adapter(model, tmp_path / "saved")
    hub.create_repo("user/many", files={f"v2/{path.name}": path.read_bytes() for path in folder.iterdir()})
    assert "subfolder='v2'" in cli.error("pull", "repo_id=user/many")
    assert cli("pull", "repo_id=user/many", "subfolder=v2", "local_dir=here") == 0
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    assert cli("export", "--for", "vllm", "adapter=user/many", "subfolder=v2", "output=out") == 0
