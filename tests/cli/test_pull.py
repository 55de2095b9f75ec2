from __future__ import annotations

import pytest

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.testing.plugin import hub  # noqa: F401
from tests.hub.models import Linears


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
