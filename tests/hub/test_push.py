"""Pushing: the files of an adapter alone, once, whatever goes wrong; errors that say what to do."""

from __future__ import annotations

import json
import socket
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import no_hang
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file
from torch import nn

from lightning_lora import Card, LoRAConfig, inject, push_adapter, save_adapter
from lightning_lora.errors import (
    AdapterFormatError,
    ConfigError,
    HubAccessError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
)
from lightning_lora.hub import client as calls
from lightning_lora.hub.push import DryRun
from tests.hub.models import edit_config, edit_tensors
from tests.hub_server import HubServer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # httpx, of the client's way to upload
    # Connections on which the server hangs are left to themselves.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
REPO = "user/adapter"

# Every request of a push, in the order of the push.
CHECKS = [
    ("GET", "/api/whoami-v2"),
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/user/adapter$"),
    ("GET", "/auth-check/write"),
    ("POST", "/api/validate-yaml"),
]
STEPS = [
    ("GET", "/revision/main"),
    ("GET", "/resolve/.*/README.md"),
    ("POST", "/preupload/main"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/verify"),
    ("POST", "/commit/main"),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither we nor the client wait between tries."""
    monkeypatch.setattr(calls, "WAITS", (0.01,) * 5)
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "adapter")


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inject(model, LoRAConfig(rank=2, alpha=4))
    with torch.no_grad():
        model[0].lora_B.normal_()
    return model


def titles(hub: HubServer, revision: str = "main") -> list[str]:
    """From the oldest to the newest, without the one that made the repository; checks that each has one parent."""
    commits = hub.commits(REPO, revision)
    for commit, parent in zip(commits, [*commits[1:], None]):
        assert commit.parent == (parent and parent.oid)
    return [commit.title for commit in reversed(commits)][1:]


# What is pushed.


def test_the_adapter_and_nothing_else_is_pushed_into_a_private_repository(hub: HubServer, folder: Path) -> None:
    for name in ("secret.txt", "optimizer.pt", "model.safetensors", ".env"):
        (folder / name).write_bytes(b"not for others")
    commit = push_adapter(folder, REPO, message="The first")
    assert list(hub.files(REPO)) == FILES
    assert hub.repo(REPO).private
    assert hub.files(REPO)["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert titles(hub) == ["The first"]
    assert commit.oid == hub.commits(REPO)[0].oid
    assert commit.commit_url == f"{hub.endpoint}/{REPO}/commit/{commit.oid}"


def test_it_is_public_only_where_that_is_asked_for(hub: HubServer, folder: Path) -> None:
    push_adapter(folder, REPO, private=False)
    assert not hub.repo(REPO).private


def test_a_model_is_pushed_like_its_folder(hub: HubServer, tmp_path: Path) -> None:
    model = adapted()
    push_adapter(model, REPO)
    saved = save_adapter(model, tmp_path / "saved")
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(hub.files(REPO)["adapter_model.safetensors"])
    mine, theirs = load_file(saved / "adapter_model.safetensors"), load_file(pushed)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_name_without_an_account_means_that_of_the_token(hub: HubServer, folder: Path) -> None:
    push_adapter(folder, "adapter")
    assert titles(hub) == ["LoRA adapter of rank 2"]


def test_the_same_push_again_is_no_second_commit(hub: HubServer, folder: Path) -> None:
    first = push_adapter(folder, REPO, card=Card(metrics={"val_loss": 0.5}), tag="v1")
    second = push_adapter(folder, REPO, card=Card(metrics={"val_loss": 0.5}), tag="v1")
    assert first.oid == second.oid == hub.repo(REPO).tags["v1"]
    assert len(titles(hub)) == 1


def test_a_dry_run_shows_files_and_card_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "within", None)
    plan = push_adapter(folder, REPO, card=Card(metrics={"val_loss": 0.25}), dry_run=True)
    assert isinstance(plan, DryRun)
    assert sorted(plan.files) == FILES
    text = str(plan)
    assert "| rank | 2 |" in text
    assert "val_loss" in text
    assert all(f"{size:,}  {name}" in text for name, size in plan.files.items())


def test_a_branch_is_made_and_main_is_left_alone(hub: HubServer, folder: Path) -> None:
    push_adapter(folder, REPO, branch="experiment")
    assert titles(hub) == []
    assert len(titles(hub, "experiment")) == 1


def test_a_pull_request_leaves_main_alone(hub: HubServer, folder: Path) -> None:
    commit = push_adapter(folder, REPO, create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert titles(hub) == []
    assert list(hub.files(REPO, "refs/pr/1")) == FILES


def test_a_tag_of_another_commit_is_not_moved(hub: HubServer, folder: Path) -> None:
    first = push_adapter(folder, REPO, tag="v1")
    with pytest.raises(HubError, match="has the tag 'v1' already"):
        push_adapter(adapted(seed=1), REPO, tag="v1")
    assert hub.repo(REPO).tags["v1"] == first.oid


# What is not.


def test_base_weights_are_refused(hub: HubServer, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"base_model.model.0.weight": torch.zeros(8, 6)}))
    with pytest.raises(AdapterFormatError, match=r"base_model\.model\.0\.weight"):
        push_adapter(folder, REPO)
    assert not hub.requests


def test_weights_of_the_base_that_peft_copies_into_its_files_are_refused(hub: HubServer, folder: Path) -> None:
    key = "base_model.model.embed_tokens.base_layer.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(8, 6)}))
    with pytest.raises(AdapterFormatError, match=r"no adapter's: .*embed_tokens"):
        push_adapter(folder, REPO)
    assert not hub.requests


def test_an_adapter_that_cannot_be_loaded_is_refused(hub: HubServer, folder: Path) -> None:
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    with pytest.raises(AdapterFormatError, match="not finite"):
        push_adapter(folder, REPO)
    assert not hub.requests


def test_a_local_path_of_the_base_stays_at_home(hub: HubServer, folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="/home/ann/secret-project/base")
    push_adapter(folder, REPO)
    assert not any(b"secret-project" in content for content in hub.files(REPO).values())
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"repo_id": ""}, "repo_id"),
        ({"timeout": 0}, "timeout"),
        ({"branch": "dev", "create_pr": True}, "pull request"),
        ({"branch": ""}, "branch"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        push_adapter("there-is-no-such-folder", **{"repo_id": REPO, **settings})


# Who may.


def test_a_wrong_token_is_final_at_once(hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubAccessError, match=r"status 401.*hf auth login"):
        push_adapter(folder, REPO, token="hf_wrong")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("answer", [None, [], {}])
def test_an_answer_that_no_hub_gives_is_an_error_of_ours(monkeypatch, folder: Path, answer: object) -> None:
    monkeypatch.setattr(calls.Api, "whoami", lambda self: answer)
    with pytest.raises(HubError, match="should not while asking whose the token is"):
        push_adapter(folder, REPO)


def test_no_token_at_all_says_how_to_get_one(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubAccessError, match=r"no token.*hf auth login.*HF_TOKEN"):
        push_adapter(folder, REPO)


def test_a_token_that_only_reads_is_found_out_before_anything_is_uploaded(hub: HubServer, folder: Path) -> None:
    hub.create_repo(REPO)
    with pytest.raises(HubAccessError, match=r"status 403.*write access"):
        push_adapter(folder, REPO, token=hub.read_token)
    assert not hub.requested("/preupload/")


def test_the_repository_of_somebody_else_is_found_out_too(hub: HubServer, folder: Path) -> None:
    hub.create_repo("stranger/adapter")
    with pytest.raises(HubAccessError):
        push_adapter(folder, "stranger/adapter")
    hub.create_repo("stranger/hidden", private=True)
    with pytest.raises((HubAccessError, HubNotFoundError)):
        push_adapter(folder, "stranger/hidden")
    assert not hub.requested("/preupload/")


def test_permission_that_is_lost_in_between_is_final_at_once(hub: HubServer, folder: Path) -> None:
    fault = hub.fail(403, path="/commit/", times=9)
    with pytest.raises(HubAccessError, match="403"):
        push_adapter(folder, REPO)
    assert fault.hits == 1


def test_an_error_never_shows_the_token(hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubAccessError) as caught:
        push_adapter(folder, REPO, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)


def test_a_card_that_the_hub_refuses_says_why(hub: HubServer, folder: Path) -> None:
    hub.fail(400, path="/api/validate-yaml")
    with pytest.raises(HubError, match="refuses the card"):
        push_adapter(folder, REPO)
    assert not hub.requested("/preupload/")


def test_a_file_that_the_repository_ignores_is_said_and_nothing_is_committed(hub: HubServer, folder: Path) -> None:
    hub.create_repo(REPO, files={".gitignore": b"*.ckpt\n*.safetensors\n"})
    with pytest.raises(HubError, match=r"has a \.gitignore that keeps adapter_model\.safetensors out"):
        push_adapter(folder, REPO)
    assert titles(hub) == ["somebody's commit"]


def test_a_base_that_the_hub_would_refuse_is_left_out_of_the_card(hub: HubServer, folder: Path) -> None:
    push_adapter(folder, REPO, card=Card(front_matter={"base_model": "/home/ann/base", "license": "mit"}))
    assert b"license: mit" in hub.files(REPO)["README.md"]
    assert b"base_model" not in hub.files(REPO)["README.md"]


# What goes wrong on the way.


FAULTS = [(kind, *step) for kind in ("reset", "lost_response", 503, 429) for step in CHECKS + STEPS]
FAULTS += [("reset_upload", *step) for step in CHECKS + STEPS if step[0] != "GET"]


@pytest.mark.parametrize(("kind", "method", "path"), FAULTS)
def test_a_fault_at_any_request_still_makes_exactly_one_commit(
    hub: HubServer, folder: Path, kind: Any, method: str, path: str
) -> None:
    fault = hub.fail(kind, method=method, path=path)
    commit = push_adapter(folder, REPO, message="once")
    assert fault.hits == 1
    assert titles(hub) == ["once"]
    assert commit.oid == hub.commits(REPO)[0].oid
    assert list(hub.files(REPO)) == FILES


@pytest.mark.parametrize("runs", [2, 4])
def test_runs_of_faults_are_outlasted(hub: HubServer, folder: Path, runs: int) -> None:
    hub.fail(500, path="/commit/", times=runs)
    hub.fail(429, path="/commit/", times=1, retry_after=0.01)
    push_adapter(folder, REPO, message="once")
    assert titles(hub) == ["once"]


def test_a_server_that_stays_broken_is_given_up(hub: HubServer, folder: Path) -> None:
    fault = hub.fail(503, path="/commit/", times=99)
    with pytest.raises(HubUnavailableError, match="status 503 while committing"):
        push_adapter(folder, REPO)
    assert fault.hits == 6
    assert titles(hub) == []


def patiently(hub: HubServer, push: Callable[[float], None]) -> None:
    """`push(timeout)` into an empty Hub, with a longer timeout where a busy machine was too slow for a short one."""
    for timeout in (2, 10, 50):
        try:
            push(timeout)
            break
        except HubUnavailableError:
            if timeout == 50:
                raise
        hub.faults.clear()
        hub.repositories.clear()


@pytest.mark.parametrize(("method", "path"), STEPS)
def test_a_request_that_hangs_is_asked_again(hub: HubServer, folder: Path, method: str, path: str) -> None:
    def push(timeout: float) -> None:
        fault = hub.fail("hang", method=method, path=path)
        push_adapter(folder, REPO, message="once", timeout=timeout)
        assert fault.hits == 1
        assert titles(hub) == ["once"]

    patiently(hub, push)


@pytest.mark.parametrize(("method", "path"), CHECKS)
def test_a_hub_that_hangs_before_the_push_is_an_error_in_time(
    hub: HubServer, folder: Path, method: str, path: str
) -> None:
    hub.fail("hang", method=method, path=path, times=99)
    with no_hang(), pytest.raises(HubUnavailableError, match=r"did not answer within -?(0\.[0-3]|[\d.]+e-)"):
        push_adapter(folder, REPO, timeout=0.3)
    assert not hub.requested("/preupload/")


def test_an_answer_that_comes_after_its_timeout_is_found_in_the_history(hub: HubServer, folder: Path) -> None:
    def push(timeout: float) -> None:
        hub.fail("drip", method="POST", path="/commit/", seconds=timeout / 20)
        push_adapter(folder, REPO, message="once", timeout=timeout)
        assert titles(hub) == ["once"]

    patiently(hub, push)


@pytest.mark.parametrize("kind", ["stale", "lost_response"])
def test_somebody_elses_commit_in_between_is_kept(hub: HubServer, folder: Path, kind: str) -> None:
    hub.fail("stale", method="POST", path="/commit/")
    if kind == "lost_response":
        hub.fail("lost_response", method="POST", path="/commit/")
    push_adapter(folder, REPO, message="once")
    assert titles(hub) == ["somebody's commit", "once"]
    assert "NOTES.md" in hub.files(REPO)


def test_a_lost_answer_is_found_on_a_hub_that_lists_only_trees(hub: HubServer, folder: Path) -> None:
    hub.fail(404, path="/paths-info/", times=99)
    hub.fail("lost_response", path="/commit/")
    push_adapter(folder, REPO, message="once")
    assert titles(hub) == ["once"]


def test_a_lost_answer_is_found_below_somebody_elses_commit(hub: HubServer, folder: Path) -> None:
    hub.fail("lost_response", method="POST", path="/commit/")
    hub.fail("stale", method="GET", path="/revision/main", after=1)
    push_adapter(folder, REPO, message="once")
    assert titles(hub) == ["once", "somebody's commit"]


def test_a_lost_answer_does_not_open_a_second_pull_request(hub: HubServer, folder: Path) -> None:
    hub.fail("lost_response", method="POST", path="/commit/")
    commit = push_adapter(folder, REPO, create_pr=True, message="once")
    assert list(hub.repo(REPO).pull_requests) == [1]
    assert commit.pr_revision == "refs/pr/1"
    assert commit.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"


def test_without_a_network_it_says_so_in_time(folder: Path, hub: HubServer) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(HubUnavailableError, match="could not be reached"):
        push_adapter(folder, REPO, endpoint=nobody, timeout=2)


def test_offline_is_no_fault_of_the_network(folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push_adapter(folder, REPO)


# The user's own text.


def test_text_and_metadata_of_the_users_own_survive_the_next_push(hub: HubServer, folder: Path) -> None:
    push_adapter(folder, REPO, card=Card(metrics={"val_loss": 0.5}))
    card = hub.files(REPO)["README.md"].decode()
    edited = card.replace("---\nlibrary_name", "---\nlicense: mit\nlibrary_name", 1).replace(
        "<!-- lightning_lora writes", "Read this first.\n\n<!-- lightning_lora writes"
    )
    hub.commit(REPO, {"README.md": (edited + "\n## Limits\n\nIt only knows Latin.\n").encode()})
    push_adapter(adapted(seed=1), REPO, card=Card(metrics={"val_loss": 0.25}))
    card = hub.files(REPO)["README.md"].decode()
    assert "license: mit" in card
    assert card.index("Read this first.") < card.index("| rank | 2 |") < card.index("It only knows Latin.")
    assert "| val_loss | 0.25 |" in card
    assert "0.5" not in card
    assert card.count("It only knows Latin.") == card.count("| rank | 2 |") == 1


def test_text_in_the_folder_is_pushed_and_does_not_replace_that_on_the_hub(hub: HubServer, folder: Path) -> None:
    hub.create_repo(REPO, files={"README.md": b"---\nlicense: mit\n---\nWritten on the Hub.\n"})
    with (folder / "README.md").open("a") as file:
        file.write("\nWritten in the folder.\n")
    for _ in range(2):
        push_adapter(folder, REPO)
        card = hub.files(REPO)["README.md"].decode()
        assert card.count("Written on the Hub.") == card.count("Written in the folder.") == 1
        assert card.count("| rank | 2 |") == 1


# Over Xet.


@pytest.fixture
def xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)


@pytest.mark.usefixtures("xet")
@pytest.mark.parametrize("kind", [None, "reset", "lost_response"])
def test_over_xet_it_is_one_commit_too(hub: HubServer, folder: Path, kind: str | None) -> None:
    if kind is not None:
        hub.fail(kind, method="POST", path="/commit/main")
    push_adapter(folder, REPO, message="once")
    assert hub.requested("/xorbs/")
    assert titles(hub) == ["once"]
    assert hub.files(REPO)["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("xet")
@pytest.mark.parametrize("kind", [404, "hang"])
def test_where_xet_does_not_work_it_goes_over_lfs(hub: HubServer, folder: Path, kind: Any) -> None:
    def push(timeout: float) -> None:
        hub.fail(kind, path="/xet-write-token/", times=999)
        push_adapter(folder, REPO, message="once", timeout=timeout)
        assert hub.requested("/lfs/", "PUT")
        assert titles(hub) == ["once"]

    patiently(hub, push)


@pytest.mark.parametrize("was_private", [True, False])
def test_pushing_to_a_repository_that_is_public_already_is_said(
    hub: HubServer, folder: Path, caplog: pytest.LogCaptureFixture, was_private: bool
) -> None:
    hub.create_repo(REPO, private=was_private)
    push_adapter(folder, REPO)
    assert ("was public before: everybody can read what is pushed there" in caplog.text) == (not was_private)
