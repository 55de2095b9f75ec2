"""`lightning-lora push`, and `callbacks.push.repo_id=` of `lightning-lora train`."""

from __future__ import annotations

import pytest

from tests.hub_server import HubServer
from tests.hub_server.plugin import hub

__all__ = ["hub"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_finished_run_is_pushed_with_its_metrics_and_its_picture(cli, hub: HubServer) -> None:
    assert cli.train() == 0
    adapter, loss = cli.folder / "adapter", cli.results["after"]["val_loss"]
    assert cli("push", f"adapter={adapter}", "repo_id=user/a", "tag=v1", "card.front_matter={license: mit}") == 0, (
        cli.err
    )
    commit = hub.commits("user/a")[0].oid
    assert commit in cli.out
    assert hub.repo("user/a").private
    assert hub.repo("user/a").tags == {"v1": commit}
    assert sorted(hub.files("user/a")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.png",
    ]
    card = hub.files("user/a")["README.md"].decode()
    assert f"{loss:.6g}" in card
    assert "license: mit" in card


def test_a_repository_that_is_public_already_is_said(cli, hub: HubServer) -> None:
    assert cli.train() == 0
    hub.create_repo("user/a", private=False)
    assert cli("push", f"adapter={cli.folder / 'adapter'}", "repo_id=user/a") == 0
    assert cli.out.startswith("user/a was public before: everybody can read what is pushed there.\n")
    assert "HTTP Request" not in cli.out + cli.err


def test_a_dry_run_shows_what_would_be_pushed_and_asks_nobody(cli, hub: HubServer) -> None:
    assert cli.train() == 0
    assert cli("push", f"adapter={cli.folder / 'adapter'}", "repo_id=user/a", "dry_run=true") == 0
    assert "nothing was pushed" in cli.out
    assert "adapter_model.safetensors" in cli.out
    assert "library_name: peft" in cli.out
    assert not hub.requests


def test_errors_say_what_to_do(cli, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "repo_id=" in cli.error("push", "adapter=somewhere")
    assert "no folder" in cli.error("push", "adapter=somewhere", "repo_id=user/a")
    assert "a/b/c" in cli.error("push", "adapter=somewhere", "repo_id=a/b/c")
    assert "Did you mean private" in cli.error("push", "adapter=somewhere", "repo_id=user/a", "privat=true")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert cli.train("callbacks.push.repo_id=user/a", "evaluate_before=false") == 2
    assert "401" in cli.err


def test_training_pushes_where_a_repository_is_given(cli, hub: HubServer) -> None:
    assert cli.train("callbacks.push.repo_id=user/a", "callbacks.push.tag_checkpoints=true") == 0, cli.err
    assert hub.commits("user/a")[0].title.startswith("Step ")
    assert "val_loss" in hub.files("user/a")["README.md"].decode()
    assert hub.repo("user/a").tags


def test_a_misspelt_setting_of_the_push_is_named(cli) -> None:
    assert "Did you mean callbacks.push.private" in cli.error("train", "callbacks.push.privat=true")
    assert "callbacks.push.private" in cli.error("train", "callbacks.push.private=maybe")


def test_no_token_gets_into_the_files_of_a_run(cli) -> None:
    assert "token" in cli.error("train", "callbacks.push.token=hf_secret")


def test_without_adapters_there_is_nothing_to_push(cli, hub: HubServer) -> None:
    assert cli.train("lora=none", "callbacks.push.repo_id=user/a", "evaluate_before=false") == 2
    assert "LoRACallback" in cli.err
