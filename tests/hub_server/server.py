"""A Hub on loopback for the unmodified huggingface_hub client: accounts, history, LFS, and faults on demand.

    with HubServer() as hub:
        hub.create_repo("user/adapter", private=True, files={"README.md": b"..."})
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.upload_folder(repo_id="user/adapter", folder_path=folder)
        hub.files("user/adapter")                       # {path: content} on main
        [c.title for c in hub.commits("user/adapter")]  # from the newest to the first
        hub.fail("lost_response", method="POST", path="/commit/")
        hub.fail(503, path="/preupload/", times=2, retry_after=0.1)

Uploads come over LFS or, where hf_xet is installed and HF_HUB_DISABLE_XET is not set, over Xet; downloads over HTTP.
The client reads HF_ENDPOINT when it is imported: pass `endpoint=`, or start a process with `hub.environment(home)`.
There are two users, "user" and "stranger"; `hub.token` is user's and writes, `hub.read_token` reads,
`hub.no_access_token` belongs to user and may do neither, `hub.stranger_token` writes as stranger. Further ones:
`hub.add_user(name, role)`.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub_server.faults import Fault
from tests.hub_server.repository import Blob, Commit, Repository, blob


@dataclass(frozen=True)
class Account:
    user: str
    role: str
    """What its token may do: "write", "read", or "none"."""


@dataclass
class Recorded:
    """A request that was received."""

    method: str
    path: str
    """With the query."""
    token: str | None
    status: int = 0
    """0 where there was no answer."""


class HubServer:
    """The server and what it holds; every change of that is under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.accounts: dict[str, Account] = {}
        """By token."""
        self.organizations: dict[str, dict[str, str]] = {}
        """Name -> user -> "admin", "write" or "read"."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        """By type ("model") and id."""
        self.stored: dict[str, bytes] = {}
        """What was uploaded to LFS, by its sha256."""
        self.xorbs: dict[str, list[bytes]] = {}
        """What was uploaded to Xet: name -> chunks."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Recorded] = []
        self.faults: list[Fault] = []
        self.page_size = 1000
        self.part_size: int | None = None
        """Where set, larger files are uploaded in parts of this size."""
        self.stopping = threading.Event()
        self.token = self.add_user("user")
        self.read_token = self.add_user("user", "read")
        self.no_access_token = self.add_user("user", "none")
        self.stranger_token = self.add_user("stranger")
        self._server: ThreadingHTTPServer | None = None

    # Life.

    def __enter__(self) -> HubServer:
        from tests.hub_server.exchange import Exchange, Listener

        exchange = type("BoundExchange", (Exchange,), {"hub": self})
        self._server = Listener(("127.0.0.1", 0), exchange)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True, name="hub-server").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No answers from here on; connections that hang are let go."""
        self.stopping.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def port(self) -> int:
        assert self._server is not None, "the server is not running"
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: str | os.PathLike[str], *, xet: bool = False) -> dict[str, str]:
        """What a process needs in its environment, before it imports huggingface_hub, to talk to this server.

        With `xet` it uploads over Xet where hf_xet is installed, else over LFS.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": os.fspath(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
        }

    # Content.

    def add_user(self, name: str, role: str = "write") -> str:
        """Make a token of this user, who may be new; returns it."""
        token = f"hf_{secrets.token_hex(17)}"
        self.accounts[token] = Account(name, role)
        return token

    def create_repo(
        self,
        repo_id: str,
        *,
        private: bool = False,
        gated: bool = False,
        files: Mapping[str, bytes] | None = None,
        repo_type: str = "model",
    ) -> Repository:
        """Make a repository; `files` are its second commit."""
        with self.lock:
            repo = Repository(repo_id, repo_type, private=private, gated=gated)
            self.repositories[repo_type, repo_id] = repo
            if files:
                self.commit(repo_id, files, repo_type=repo_type)
            return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Blob | None],
        *,
        title: str = "somebody's commit",
        branch: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Commit `files` (None deletes one) as somebody else would; returns the commit's oid."""
        with self.lock:
            changes = {path: blob(path, c) if isinstance(c, bytes) else c for path, c in files.items()}
            return self.repo(repo_id, repo_type).commit(changes, title=title, branch=branch).oid

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, without the .gitattributes that every repository has."""
        commit = self.repo(repo_id).resolve(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return {path: b.content for path, b in sorted(commit.files.items()) if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """From the newest to the first, which made the repository."""
        return self.repo(repo_id).commits(revision)

    # Faults and records.

    def fail(self, kind: str | int, **options: Any) -> Fault:
        """Let requests go wrong; `kind` is one of `faults.KINDS` or a status, `options` are the fields of `Fault`.

        Faults are tried in the order in which they were added, and stay until they happened `times` often.
        """
        fault = Fault("status", status=kind, **options) if isinstance(kind, int) else Fault(kind, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def requested(self, path: str, method: str | None = None) -> list[Recorded]:
        """The requests so far with this text in their path."""
        with self.lock:
            return [r for r in self.requests if path in r.path and method in (None, r.method)]
