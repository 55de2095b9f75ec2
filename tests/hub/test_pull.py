"""Pulling: one commit, nothing but the adapter, offline as well; and a clear error for each way of not finding it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from lightning_lora import load_adapter, pull_adapter, push_adapter, save_adapter
from lightning_lora.errors import (
    AdapterFormatError,
    CheckpointError,
    ConfigError,
    HubAccessError,
    HubNotFoundError,
    HubUnavailableError,
    LightningLoRAError,
)
from lightning_lora.hub.address import hub_address
from lightning_lora.hub.pull import pull
from tests.hub.models import Linears, by_peft, output

pytestmark = pytest.mark.usefixtures("short_waits")
ID = "user/adapter"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fresh(source):
    model = Linears()
    base = {name: t for name, t in source.state_dict().items() if "lora" not in name}
    model.load_state_dict(base)
    return model


def test_only_the_adapter_is_fetched_all_of_it_from_one_commit(hub, repository, files, tmp_path):
    hub.fail("stale", path="/tree/")  # somebody commits between the question and the download
    before = hub.commits(ID)[0].oid
    folder = pull_adapter(ID)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert folder.name == before != hub.commits(ID)[0].oid
    assert {r.path.partition("/resolve/")[2] for r in hub.requested("/resolve/")} == {f"{before}/{n}" for n in FILES}
    assert names(pull_adapter(ID, local_dir=tmp_path / "here")) == FILES


def test_the_clients_cache_and_ours_are_one(hub, repository):
    folder = pull_adapter(ID)
    assert str(folder) == snapshot_download(ID, allow_patterns=FILES, local_files_only=True)
    hub.commit(ID, {"README.md": b"# new"})
    commit = hub.commits(ID)[0].oid
    snapshot_download(ID, allow_patterns=FILES)
    assert not pull(ID, commit).fetched
    assert not pull(ID, local_files_only=True).fetched


def test_what_was_pulled_loads_and_computes_what_was_pushed(hub, repository, source):
    x = torch.randn(5, 6)
    model = fresh(source)
    load_adapter(model, ID)
    assert torch.equal(output(model, x), output(source, x))
    torch.testing.assert_close(output(by_peft(fresh(source), pull_adapter(ID)), x), output(source, x))


@pytest.mark.parametrize("revision", ["dev/x", "v1", "refs/pr/1", "commit"])
def test_every_kind_of_revision_means_its_commit(hub, repository, revision):
    repo = hub.repo(ID)
    commit = hub.commits(ID)[0].oid
    repo.branches["dev/x"] = repo.tags["v1"] = commit
    repo.pull_requests[1] = commit
    hub.commit(ID, {"README.md": b"# new"})
    assert pull_adapter(ID, commit if revision == "commit" else revision).name == commit
    assert pull_adapter(ID, "main").name == hub.commits(ID)[0].oid


def test_a_second_pull_fetches_only_what_changed(hub, repository):
    pull_adapter(ID)
    hub.commit(ID, {"README.md": b"# new"})
    hub.requests.clear()
    assert (pull_adapter(ID) / "README.md").read_bytes() == b"# new"
    assert [r.path.rpartition("/")[2] for r in hub.requested("/resolve/", "GET")] == ["README.md"]


def test_a_mirror_that_lists_only_trees_will_do(hub, repository, files):
    hub.page_size = 2
    hub.fail(404, path="/paths-info/", times=100)
    folder = pull_adapter(ID)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


# The cache, and no network.


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "no server"])
def test_what_was_pulled_before_is_there_offline(hub, repository, how, monkeypatch):
    folder = pull_adapter(ID)
    hub.stop()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "no server":
        with pytest.warns(UserWarning, match="The adapter that was pulled earlier is used"):
            assert pull_adapter(ID, timeout=2) == folder
    else:
        assert pull_adapter(ID, local_files_only=how == "local_files_only") == folder
    assert pull_adapter(ID, folder.name) == folder, "a commit never changes, so nobody needs to be asked"


def test_what_was_not_pulled_before_is_a_clear_error_offline(hub, repository, monkeypatch):
    with pytest.raises(HubUnavailableError, match=r"is not in the cache.*Pull it once online"):
        pull_adapter(ID, local_files_only=True)
    assert hub.requests == []
    hub.stop()
    with pytest.raises(HubUnavailableError, match="could not be reached"):
        pull_adapter(ID, timeout=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match=f"There is no folder '{ID}' here, nor can it be pulled"):
        load_adapter(Linears(), ID)


def test_a_cache_that_rotted_is_found_and_mended(hub, repository, files):
    folder = pull_adapter(ID)
    blob = (folder / "adapter_model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(HubUnavailableError, match="incomplete or damaged"):
        pull_adapter(ID, local_files_only=True)
    assert (pull_adapter(ID) / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    (folder / "adapter_config.json").unlink()
    with pytest.raises(HubUnavailableError, match="incomplete or damaged"):
        pull_adapter(ID, local_files_only=True)


def test_a_cache_without_links_is_verified_too(hub, repository, monkeypatch):
    def symlink(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", symlink)
    folder = pull_adapter(ID)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert pull_adapter(ID, local_files_only=True) == folder
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(HubUnavailableError, match="incomplete or damaged"):
        pull_adapter(ID, local_files_only=True)


# Who may, and what is there.


@pytest.mark.parametrize(
    ("repo_id", "revision", "token", "error", "said"),
    [
        ("user/adaptr", None, "token", HubNotFoundError, "token is that of 'user'.*Did you mean 'user/adapter'"),
        (ID, None, False, HubNotFoundError, "no such public repository.*If it is private, log in"),
        (ID, None, "stranger_token", HubNotFoundError, "this token may not see it.*token is that of 'stranger'"),
        (ID, None, "no_access_token", HubNotFoundError, "knows no such repository, or this token may not see it"),
        (ID, None, "hf_wrong", HubAccessError, "token is wrong, expired or revoked"),
        (ID, None, "hf_\n1", HubAccessError, "characters that no token has"),
        (ID, "v7", "token", HubNotFoundError, "has no such revision.*at 'v7'"),
        (ID, "0" * 40, "token", HubNotFoundError, "has no such revision.*at '000"),
        ("user/gated", None, False, HubAccessError, "is gated, and its files need a token"),
        ("user/gated", None, "stranger_token", HubAccessError, "has not been let in .*Ask for access at"),
        ("user/a/b", None, "token", ConfigError, "is not the id of a repository"),
        ("user name", None, "token", ConfigError, "is not the id of a repository"),
        (ID, "../../../x", "token", ConfigError, "revision is a branch"),
        (ID, "", "token", ConfigError, "revision is a branch"),
    ],
)
def test_each_way_of_not_finding_it_has_its_own_error(
    hub, cached, repository, files, repo_id, revision, token, error, said
):
    hub.create_repo("user/gated", gated=True, files=files)
    with pytest.raises(error, match=f"(?s){said}") as raised:
        pull_adapter(repo_id, revision, token=getattr(hub, str(token), token))
    assert raised.type is error
    assert not cached()


def test_who_was_let_in_may_pull_a_gated_adapter(hub, files):
    hub.create_repo("user/gated", gated=True, files=files).members["stranger"] = "read"
    assert names(pull_adapter("user/gated", token=hub.stranger_token)) == FILES


def test_a_public_adapter_needs_no_token_and_the_token_does_not_leave_the_hub(hub, files, tmp_path):
    hub.create_repo("user/public", files=files)
    pull_adapter("user/public", token=False)
    assert {r.token for r in hub.requests} == {None}
    hub.requests.clear()
    hub.commit("user/public", {"adapter_model.safetensors": files["adapter_model.safetensors"] + b""})
    pull_adapter("user/public", cache_dir=tmp_path)
    assert {r.token for r in hub.requested("/resolve/")} == {hub.token}
    assert {r.token for r in hub.requested("/-/cdn/")} == {None}


def test_a_folder_that_exists_is_a_folder(hub, repository, files, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    save_adapter(source, ID)
    load_adapter(fresh(source), ID)
    assert hub.requests == []
    with pytest.raises(ConfigError, match="is a folder here, which has no revision 'v1'"):
        load_adapter(fresh(source), ID, revision="v1")


@pytest.mark.parametrize("name", ["no folder", "./user/adapter", "a/b/c"])
def test_what_cannot_be_a_repository_is_a_folder_that_is_not_there(hub, name):
    with pytest.raises(AdapterFormatError, match="There is no folder"):
        load_adapter(Linears(), name)
    assert hub.requests == []


ADDRESSES = [
    "hf://user/adapter", "hf://models/user/adapter@main", "{endpoint}/user/adapter",
    "{endpoint}/user/adapter/tree/main",
    "{endpoint}/user/adapter/blob/main/adapter_config.json?download=true", " {endpoint}/user/adapter/discussions ",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_was_pasted_is_read(hub, repository, source, address):
    address = address.format(endpoint=hub.endpoint)
    commit = hub.commits(ID)[0].oid
    assert pull_adapter(address).name == commit
    load_adapter(fresh(source), address)
    with pytest.raises(ConfigError, match="datasets"):
        pull_adapter(f"{hub.endpoint}/datasets/user/adapter")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("https://huggingface.co/user/name/tree/refs%2Fpr%2F1/v2", ("user/name", "refs/pr/1", "v2")),
        ("HTTPS://www.HuggingFace.co/user/name/", ("user/name", None, None)),
        ("hf.co/user/name/blob/v1/sub/adapter_model.safetensors", ("user/name", "v1", "sub")),
        ("hf://user/name@refs/pr/1/sub", ("user/name", "refs/pr/1", "sub")),
        ("hf://user/name@v1/a/b", ("user/name", "v1", "a/b")),
        ("https://huggingface.co/user/name/commit/abc", ("user/name", "abc", None)),
        ("user/name", None),
        ("s3://user/name", None),
        ("./hf.co", None),
    ],
)
def test_what_an_address_means(text, meant):
    assert hub_address(text) == meant


def test_an_address_and_what_is_said_besides_must_agree(hub, repository):
    assert pull_adapter("hf://user/adapter@main", "main") == pull_adapter(ID)
    with pytest.raises(ConfigError, match="leave out one of the two"):
        pull_adapter("hf://user/adapter@v1", "v2")


@pytest.mark.parametrize("card", [True, False])
def test_a_cache_that_may_only_be_read_serves_what_it_holds(hub, repository, files, monkeypatch, card):
    """As it is where one account fills the cache of a cluster; PEFT fetches no card."""
    patterns = FILES if card else FILES[1:]
    folder = snapshot_download(ID, allow_patterns=patterns)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for owner, name in ((os, "symlink"), (os, "replace"), (Path, "mkdir"), (Path, "write_text"), (os, "mkdir")):
        monkeypatch.setattr(owner, name, refuse)
    pulled = pull(ID)
    assert str(pulled.folder) == folder
    assert list(pulled.files) == sorted(patterns, key=["adapter_config.json", "README.md", FILES[2]].index)
    assert not pulled.fetched
    hub.commit(ID, {"README.md": b"# new"})
    with pytest.raises(CheckpointError, match="could not be written"):
        pull(ID)


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secret\nmore", " hf_secret", "hf_sec\x00ret", "hf_s\u00e9cret"])
def test_no_error_shows_a_token(hub, repository, tmp_path, token, caplog):
    for call in (
        lambda: pull_adapter(ID, token=token),
        lambda: push_adapter(pull_adapter(ID), ID, token=token, timeout=5),
    ):
        with pytest.raises(LightningLoRAError) as raised:
            call()
        said = f"{raised.value!r}{raised.value}{raised.value.__cause__}{caplog.text}"
        assert "hf_s" not in said
        assert "oken" in str(raised.value)
