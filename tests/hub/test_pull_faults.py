"""Pulling over a network that breaks: what passes is survived, what does not ends in time, nothing false is kept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
import types
from typing import Any

import pytest
import torch
from hanging import PATIENCE, no_hang
from huggingface_hub import constants

from lightning_lora import pull_adapter
from lightning_lora.errors import CheckpointError, HubIntegrityError, HubNotFoundError, HubUnavailableError
from lightning_lora.hub import client as calls
from lightning_lora.hub import download
from tests.hub.models import changed_tensors

pytestmark = [
    pytest.mark.usefixtures("short_waits"),
    # Connections on which the server hangs are left to themselves.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
ID = "user/adapter"
TENSORS_URL = "/-/cdn/"
CONFIG_URL = "adapter_config.json"


@pytest.mark.parametrize("path", [TENSORS_URL, CONFIG_URL, "/revision/", "/tree/"])
@pytest.mark.parametrize("kind", ["reset", "reset_download", "truncate", "hang", 429, 500, 503])
def test_a_fault_that_passes_is_survived(hub, repository, files, kind, path, monkeypatch):
    monkeypatch.setattr(download.Remote, "_patience", 1.0 if kind == "hang" else 20.0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1 if kind == "hang" else 20)
    fault = hub.fail(kind, path=path, times=1 if kind == "hang" else 3, **({"retry_after": 0.1} if kind == 429 else {}))
    with no_hang():
        folder = pull_adapter(ID, timeout=60)
    assert fault.hits == fault.times
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("path", [TENSORS_URL, CONFIG_URL, "README.md"])
def test_a_flipped_bit_is_fetched_again(hub, repository, files, path):
    fault = hub.fail("flip", path=path)
    folder = pull_adapter(ID)
    assert fault.hits == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("path", [TENSORS_URL, CONFIG_URL, "README.md"])
def test_content_that_stays_another_is_refused_and_not_kept(hub, cached, repository, path):
    hub.fail("flip", path=path, times=100)
    with pytest.raises(HubIntegrityError, match="another checksum"):
        pull_adapter(ID)
    assert not cached(), "nothing is left that could be taken for an adapter"


@pytest.mark.parametrize("path", [TENSORS_URL, CONFIG_URL, "/revision/", "/tree/"])
@pytest.mark.parametrize("kind", ["hang", "drip", "reset", 500])
def test_a_fault_that_does_not_pass_is_waited_for_no_longer_than_told(hub, cached, repository, kind, path, monkeypatch):
    fault = hub.fail(kind, path=path, times=100, seconds=0.3 if kind == "drip" else 3600)
    waited: list[float] = []
    original = calls.within

    def within(seconds: float, *call: Any, **options: Any) -> Any:
        waited.append(seconds)
        return original(seconds, *call, **options)

    monkeypatch.setattr(calls, "within", within)
    monkeypatch.setattr(download, "within", within)
    with no_hang(), pytest.raises(HubUnavailableError):
        pull_adapter(ID, timeout=0.6)
    assert fault.hits >= 1
    assert waited
    assert max(waited) < 0.7, "what was told, and the time for so small a file"
    assert not cached()


def test_a_wait_that_is_longer_than_the_deadline_is_not_waited_for(hub, repository, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(calls, "time", types.SimpleNamespace(**{**vars(time), "sleep": slept.append}))
    hub.fail(429, path="/revision/", times=100, retry_after=600)
    with pytest.raises(HubUnavailableError, match=r"429.*600 s"):
        pull_adapter(ID, timeout=60)
    assert sum(slept) <= sum(calls.WAITS), "our own waits, not the server's"


def test_a_download_goes_on_where_it_was_cut(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what the client writes at once, else 10 MB
    large = changed_tensors(files, lambda t: t.update({"base_model.model.embed.weight": torch.randn(500_000)}))
    hub.create_repo(ID, files={**files, **large})
    fault = hub.fail("reset_download", path=TENSORS_URL, times=3)
    folder = pull_adapter(ID)
    assert (folder / "adapter_model.safetensors").read_bytes() == large["adapter_model.safetensors"]
    assert fault.hits == 3
    assert [r.status for r in hub.requested(TENSORS_URL, "GET")] == [200, 206, 206, 206]


def test_a_repository_that_goes_away_in_the_middle_is_said_and_nothing_is_kept(hub, cached, repository):
    hub.fail(404, path="adapter_model.safetensors", times=100)
    with pytest.raises(
        HubNotFoundError, match=f"does not know it .*while downloading .* of {ID} at {hub.commits(ID)[0].oid}"
    ):
        pull_adapter(ID)
    assert not cached()


def test_a_disk_that_is_full_is_not_taken_for_a_hub_that_is_away(hub, cached, repository, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match="could not be written: No space left on device"):
        pull_adapter(ID)
    assert not cached()


def test_a_hung_server_does_not_hold_the_exit(hub, repository, tmp_path):
    hub.fail("hang", path=TENSORS_URL, times=100)
    code = f"from lightning_lora import pull_adapter; pull_adapter({ID!r}, timeout=1)"
    environment = {**os.environ, **hub.environment(tmp_path)}
    # Where the thread that waits for the server held the exit, this would last until the server's hour is over.
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "HubUnavailableError" in done.stderr
