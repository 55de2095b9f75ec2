"""A Hub that hangs, drips, refuses or asks for patience: threads, open files and temporary files stay few."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.errors import HubError, HubUnavailableError
from lightning_lora.hub import client as calls
from lightning_lora.hub.card import RunFacts
from lightning_lora.hub.repository import Destination, HubRepository
from lightning_lora.hub.staging import stage
from lightning_lora.training import push_queue as background
from lightning_lora.training.push_queue import BackgroundPusher, Job
from tests.hub_server import HubServer
from tests.processes import forked

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # httpx, of the client's way to upload
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
REPO = "user/run"


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lightning_lora hub call"]


def connections() -> int:
    """Sockets that this process has open, the server's side of them left out by counting it on both sides."""
    found = 0
    for handle in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{handle}").startswith("socket:")
        except OSError:
            continue
    return found


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


ASKED: dict[str, Callable[[HubRepository], Any]] = {
    "whoami": lambda repository: repository.call("asking", repository.api.whoami),
    "the head": lambda repository: repository.head(),
    "a card": lambda repository: repository.card_at("0" * 40),
    "the card's check": lambda repository: repository.check_card("---\n---\n"),
    "refs, which the client tries again": lambda repository: repository.pull_requests(),
}


@pytest.mark.parametrize(("kind", "seconds"), [("hang", 60), ("drip", 0.05)])
@pytest.mark.parametrize("call", ASKED)
def test_calls_to_a_hub_that_hangs_end_with_their_threads_and_connections(
    hub: HubServer, call: str, kind: str, seconds: float
) -> None:
    hub.create_repo(REPO, files={"README.md": b"a card that is long enough to drip on " * 99})
    hub.fail(kind, times=999, seconds=seconds)
    repository = HubRepository(Destination(REPO, timeout=0.1, endpoint=hub.endpoint), hub.token)
    before, open_before = len(ours()), connections()
    for _ in range(12):
        with pytest.raises(HubUnavailableError, match=r"did not answer within|still hang|is over"):
            ASKED[call](repository)
    until(lambda: len(ours()) <= before)
    # The server's ends stay open, as long as its faults say: one for each call at most.
    assert connections() - open_before <= 12


def test_what_ends_in_no_way_is_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_LEFT", [])  # without those of other tests
    ends = threading.Event()
    for _ in range(calls._MOST_LEFT):
        with pytest.raises(HubUnavailableError, match="did not answer within"):
            calls.within(0.02, "waiting", ends.wait, 60)
    count = len(ours())
    for _ in range(20):
        with pytest.raises(HubUnavailableError, match="earlier calls to the Hub still hang"):
            calls.within(0.02, "waiting", ends.wait, 60)
    assert len(ours()) == count
    ends.set()
    until(lambda: not any(t.is_alive() for t in calls._LEFT))
    assert calls.within(5, "answering", lambda: 7) == 7


def test_requests_of_others_keep_the_timeouts_that_they_have(hub: HubServer) -> None:
    HubRepository(Destination(REPO, endpoint=hub.endpoint), hub.token).call("asking", time.monotonic)
    seen: list[Any] = []
    session = get_session()
    session.event_hooks["request"].append(lambda request: seen.append(dict(request.extensions["timeout"])))
    session.get(f"{hub.endpoint}/api/whoami-v2")
    assert set(seen[-1].values()) == {None}
    calls.within(5, "asking", session.get, f"{hub.endpoint}/api/whoami-v2", timeout=2)
    assert all(value <= 2 for value in seen[-1].values())


def test_a_day_that_the_hub_asks_for_is_not_slept(hub: HubServer) -> None:
    hub.fail(503, retry_after=86400.0)
    answer = calls.within(5, "asking", get_session().get, f"{hub.endpoint}/api/whoami-v2")
    assert float(answer.headers["Retry-After"]) == calls.LONGEST_WAIT


class SlowClient:
    """A client that another thread is making, or that another thread holds, for a while."""

    def __init__(self, made: threading.Event) -> None:
        assert made.wait(20)
        self.lock = threading.Lock()

    def close(self) -> None:
        with self.lock:
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_can_be_forked_while_another_thread_talks_to_the_hub() -> None:
    """The client's locks, held by a thread that the child does not have, would hang it for ever."""
    made = threading.Event()
    set_client_factory(lambda: SlowClient(made))  # type: ignore[arg-type, return-value]
    try:
        thread = threading.Thread(target=get_session)
        thread.start()  # holds the lock under which clients are made
        threading.Timer(0.2, made.set).start()  # the fork waits for it
        assert forked(lambda: isinstance(get_session(), SlowClient), seconds=20)
        thread.join()
        client: Any = get_session()
        with client.lock:  # as while a request takes its connection
            assert forked(lambda: get_session() is not client, seconds=20)
            assert get_session() is client
    finally:
        set_client_factory(default_client_factory)


def job(folder: Path, step: int, *, is_best: bool = False) -> Job:
    return Job(stage(folder), RunFacts(repo_id=REPO), step, title=f"Step {step}", is_best=is_best)


def staged_copies() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("lightning-lora-push-*"))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_hub_that_refuses_commits_leaves_few_copies(
    hub: HubServer, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "LINGER", 0.0)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    folder = save_adapter(model, tmp_path / "adapter")
    repository = HubRepository(Destination(REPO, endpoint=hub.endpoint), hub.token)
    repository.check()
    hub.fail(status, path="/commit/", times=999)
    pusher = BackgroundPusher(repository)
    for step in range(12):
        pusher.put(job(folder, step, is_best=step == 3))
        assert pusher.flush(30)
        assert len(staged_copies()) <= 2
    left = pusher.close()
    assert [one.step for one in left] == [3, 11]
    assert all(isinstance(one.error, HubError) for one in left)
    for one in left:
        one.staged.discard()
    assert staged_copies() == []
    said = [record for record in caplog.records if "was not pushed" in record.getMessage()]
    assert 1 <= len(said) < 12
