"""The pytest fixture `hub`: a Hub on loopback, to which huggingface_hub in this process is pointed.

Write `pytest_plugins = ["tests.hub_server.plugin"]` into the root conftest.py, or import `hub` into a conftest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub_server.server import HubServer


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running `HubServer`. huggingface_hub talks to it, with the token of its first user, online, and keeps its cache
    in a folder of this test's own. Uploads go over LFS; with the fixture `xet` as well, over Xet."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    home = tmp_path_factory.mktemp("hf_home")
    with HubServer() as server:
        for name, value in server.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # huggingface_hub read the environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        close_session()
        yield server
        close_session()


@pytest.fixture
def xet(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload to `hub` over Xet; the test is skipped where hf_xet is not installed."""
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
