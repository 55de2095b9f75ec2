"""The Hub on loopback, seen through the client that it stands in for."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from hanging import no_hang
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

# The client's own use of what httpx deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ID = "user/adapter"


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# An adapter\n")
    (tmp_path / "adapter_model.safetensors").write_bytes(os.urandom(3000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("notes")
    return tmp_path


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("part_size", [None, 1000])
def test_what_is_uploaded_can_be_downloaded_again(hub, api, folder, tmp_path_factory, part_size):
    hub.part_size = part_size
    api.create_repo(ID, private=True)
    commit = api.upload_folder(repo_id=ID, folder_path=folder, commit_message="first")
    assert hub.files(ID) == contents(folder)
    assert [c.title for c in hub.commits(ID)] == ["first", "initial commit"]
    hub.page_size = 2
    there = snapshot_download(ID, local_dir=tmp_path_factory.mktemp("there"), revision=commit.oid)
    assert {path: b for path, b in contents(type(folder)(there)).items() if path in hub.files(ID)} == contents(folder)
    assert api.upload_folder(repo_id=ID, folder_path=folder).oid == commit.oid, "nothing changed, nothing is committed"


@pytest.mark.usefixtures("xet")
def test_what_is_uploaded_over_xet_is_the_same(hub, api, tmp_path):
    """In chunks that are stored as they are, compressed, and compressed by place in numbers."""
    hub.create_repo(ID)
    written = {"noise.bin": os.urandom(200_000), "zeros.bin": bytes(200_000), "card.md": b"text"}
    written["numbers.safetensors"] = save({"a": torch.randn(100, 100), "b": torch.arange(50_000)})
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    api.upload_folder(repo_id=ID, folder_path=tmp_path)
    assert hub.files(ID) == written
    assert hub.requested("/v1/xorbs/")
    assert not hub.requested("/info/lfs/")
    api.upload_folder(repo_id=ID, folder_path=tmp_path, path_in_repo="again", create_pr=True)
    assert set(hub.files(ID, "refs/pr/1")) == set(written) | {f"again/{name}" for name in written}


def test_branches_tags_pull_requests_and_history(hub, api):
    api.create_repo(ID)
    first = api.create_commit(ID, [CommitOperationAdd("a.txt", b"1")], commit_message="first", commit_description="why")
    api.create_branch(ID, branch="dev/x")
    api.create_tag(ID, tag="v1", revision=first.oid)
    api.create_commit(ID, [CommitOperationAdd("a.txt", b"2")], commit_message="on dev", revision="dev/x")
    pull = api.create_commit(ID, [CommitOperationAdd("b.txt", b"3")], commit_message="please", create_pr=True)
    api.create_commit(ID, [CommitOperationDelete("a.txt")], commit_message="gone", parent_commit=first.oid)
    refs = api.list_repo_refs(ID, include_pull_requests=True)
    assert [b.name for b in refs.branches] == ["main", "dev/x"]
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", first.oid)]
    assert pull.pr_revision == "refs/pr/1"
    assert hub.files(ID) == {}
    assert hub.files(ID, "dev/x") == {"a.txt": b"2"}
    assert hub.files(ID, "refs/pr/1") == {"a.txt": b"1", "b.txt": b"3"}
    assert [c.title for c in api.list_repo_commits(ID)] == ["gone", "first", "initial commit"]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as stale:
        api.create_commit(ID, [CommitOperationAdd("c.txt", b"")], commit_message="late", parent_commit=first.oid)
    assert stale.value.response.status_code == 412


def test_what_is_not_there_has_the_clients_own_errors(hub, api):
    hub.create_repo(ID, files={"a.txt": b"1"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/other")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(ID, revision="other")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(ID, "other.txt")


@pytest.mark.parametrize(
    ("token", "reads", "writes"),
    [
        ("token", True, True),
        ("read_token", True, False),
        ("no_access_token", False, False),
        ("stranger_token", False, False),
        (None, False, False),
    ],
)
def test_a_private_repository_is_only_there_for_those_who_may_read_it(hub, token, reads, writes):
    hub.create_repo(ID, private=True)
    api = HfApi(endpoint=hub.endpoint, token=getattr(hub, token) if token else False)
    for may, write in ((reads, False), (writes, True)):
        if may:
            api.auth_check(ID, write=write)
        else:
            with pytest.raises(HfHubHTTPError) as refused:
                api.auth_check(ID, write=write)
            assert refused.value.response.status_code in (401, 403, 404)


def test_accounts_organizations_and_gates(hub, api):
    hub.organizations["team"] = {"user": "write", "stranger": "read"}
    stranger = HfApi(endpoint=hub.endpoint, token=hub.stranger_token)
    assert api.whoami()["orgs"] == [{"type": "org", "name": "team", "roleInOrg": "write"}]
    api.create_repo("team/shared", private=True)
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_repo("team/mine")
    assert stranger.model_info("team/shared").private
    hub.create_repo(ID, gated=True, files={"a.txt": b"1"})
    assert stranger.model_info(ID).gated
    with pytest.raises(GatedRepoError):
        stranger.auth_check(ID)
    hub.repo(ID).members["stranger"] = "read"
    stranger.auth_check(ID)


def test_a_local_path_as_base_model_is_refused_in_a_card(hub, api):
    hub.create_repo(ID)
    card = CommitOperationAdd("README.md", b"---\nbase_model: /home/me/model\n---\n")
    with pytest.raises((BadRequestError, ValueError), match="base_model"):
        api.create_commit(ID, [card], commit_message="card")


def test_a_lost_response_is_a_commit_all_the_same(hub, api):
    hub.create_repo(ID)
    fault = hub.fail("lost_response", method="POST", path="/commit/")
    with pytest.raises(Exception, match=r"reset|disconnected"):
        api.create_commit(ID, [CommitOperationAdd("a.txt", b"1")], commit_message="lost")
    assert fault.hits == 1
    assert hub.commits(ID)[0].title == "lost"


@pytest.mark.parametrize("kind", ["reset", "reset_upload"])
def test_a_connection_that_is_lost_during_an_upload_commits_nothing(hub, api, kind):
    hub.create_repo(ID)
    hub.fail(kind, method="POST", path="/commit/")
    with pytest.raises(Exception, match=r"reset|disconnected|Broken pipe"):
        api.create_commit(ID, [CommitOperationAdd("a.txt", b"1" * 500_000)], commit_message="lost")
    assert hub.files(ID) == {}


def test_a_client_that_dies_in_the_middle_of_a_commit_commits_nothing(hub):
    hub.create_repo("user/adapter")
    lines = [{"key": "header", "value": {"summary": "half"}}, {"key": "file", "value": {"path": "a", "content": ""}}]
    body = "\n".join(map(json.dumps, [*lines, {"key": "file", "value": {"path": "b", "content": "AAAA"}}])).encode()
    host, port = hub.endpoint.removeprefix("http://").split(":")
    for framing in (f"Content-Length: {len(body)}\r\n\r\n", f"Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /api/models/user/adapter/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
            connection.sendall((head + framing).encode() + body[: body.rindex(b"\n") + 1])
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    assert len(hub.commits("user/adapter")) == 1


def test_somebody_elses_commit_can_come_first(hub, api):
    hub.create_repo(ID)
    head = hub.commits(ID)[0].oid
    hub.fail("stale", path="/commit/")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(ID, [CommitOperationAdd("a.txt", b"1")], commit_message="late", parent_commit=head)
    assert hub.commits(ID)[0].title == "somebody's commit"


def test_a_run_of_errors_ends_and_asks_for_patience(hub, api):
    hub.create_repo(ID)
    fault = hub.fail(429, path="/preupload/", times=2, retry_after=0)
    api.create_commit(ID, [CommitOperationAdd("a.txt", b"1")], commit_message="in the end")
    assert fault.hits == 2
    assert [r.status for r in hub.requested("/preupload/")] == [429, 429, 200]


def test_a_hang_ends_with_the_server(hub, api):
    hub.fail("hang", path="/whoami")
    with no_hang(), pytest.raises(Exception, match="timed out"):
        api_get(hub, timeout=0.2)


def api_get(hub, timeout):
    from huggingface_hub.utils import get_session

    return get_session().get(f"{hub.endpoint}/api/whoami-v2", timeout=timeout)


def test_a_flipped_bit_passes_the_client(hub, tmp_path):
    hub.create_repo(ID, files={"adapter_model.safetensors": bytes(100)})
    hub.fail("flip", path="/-/cdn/")
    folder = snapshot_download(ID, local_dir=tmp_path / "there", token=hub.token)
    assert (type(tmp_path)(folder) / "adapter_model.safetensors").read_bytes() != bytes(100)
