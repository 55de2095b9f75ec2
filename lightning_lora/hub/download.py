"""Files of one commit of a repository, over plain HTTP: sizes before, checksums after, an end to every wait.

The client's own download checks sizes alone, gives up where a connection is reset in the middle, and waits for ever
where a server sends a byte now and then.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, get_token, hf_raise_for_status

import lightning_lora
from lightning_lora.errors import (
    CheckpointError,
    HubAccessError,
    HubError,
    HubIntegrityError,
    HubNotFoundError,
    HubUnavailableError,
    closest,
    listed,
)
from lightning_lora.hub.client import plain_token, retried, within

T = TypeVar("T")

SLOWEST = 16_000
"""Bytes per second below which a download counts as hung."""
_CHUNK = 1 << 20
_MOST_PAGES = 20
_TRIES = 3
"""How often content with a wrong checksum is fetched before it is given up."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it."""

    name: str
    """With its folder."""
    size: int
    checksum: str
    """The sha256 of its content (64 digits), or git's id of it as a blob (40)."""


class Remote:
    """A repository on the Hub. Every method ends after about `timeout` seconds, a download after its share more."""

    def __init__(
        self, repo_id: str, *, endpoint: str | None, token: str | bool | None, timeout: float, subfolder: str = ""
    ) -> None:
        self.repo_id = repo_id
        self.subfolder = subfolder
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.timeout = timeout
        given = get_token() if token in (None, True) else token or None
        self._token = None if given is None else plain_token(str(given))

    def commit_of(self, revision: str) -> str:
        """The commit that `revision` means now. Raises a HubError that says why there is none."""
        url = f"{self.endpoint}/api/models/{self.repo_id}/revision/{quote(revision, safe='')}"
        data = self._ask("GET", url, revision, params={"expand": "sha"})
        commit = data.get("sha") if isinstance(data, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubError(f"{self.endpoint} names no commit for {self.repo_id} at {revision!r}, but {commit!r}.")
        return commit

    def listed(self, commit: str, names: list[str]) -> dict[str, RemoteFile]:
        """Those of the files `names` that `commit` has in the subfolder."""
        paths = {f"{self.subfolder}/{name}" if self.subfolder else name: name for name in names}
        url = f"{self.endpoint}/api/models/{self.repo_id}/paths-info/{commit}"
        try:
            entries = self._ask("POST", url, commit, data={"paths": list(paths), "expand": "false"})
        except (HubAccessError, HubUnavailableError):
            raise
        except HubError:  # mirrors of the Hub know trees better
            entries = None
        if not isinstance(entries, list) or not entries:
            entries = self._tree(commit)
        found = {}
        for entry in entries:
            if isinstance(entry, dict) and entry.get("type") == "file" and entry.get("path") in paths:
                found[paths[entry["path"]]] = _remote_file(entry)
        return found

    def names(self, commit: str) -> list[str]:
        """What lies in the subfolder of `commit`, or at its top."""
        entries = [entry for entry in self._tree(commit) if isinstance(entry, dict)]
        return [entry["path"] for entry in entries if isinstance(entry.get("path"), str)]

    def _tree(self, commit: str) -> list[Any]:
        entries: list[Any] = []
        folder = f"/{quote(self.subfolder)}" if self.subfolder else ""
        url: str | None = f"{self.endpoint}/api/models/{self.repo_id}/tree/{commit}{folder}"
        for _ in range(_MOST_PAGES):
            # The token goes nowhere else, whatever the link to the next page says.
            if url is None or not url.startswith(f"{self.endpoint}/"):
                break
            page, url = self._page("GET", url, commit)
            entries += page if isinstance(page, list) else []
        return entries

    def fetch(self, commit: str, file: RemoteFile, path: Path) -> None:
        """Write the content of `file` to `path`. Raises HubIntegrityError where it is not what the Hub listed, and
        HubUnavailableError where it did not arrive in time."""
        url = f"{self.endpoint}/{self.repo_id}/resolve/{commit}/{quote(file.name)}"
        until = time.monotonic() + self.timeout + file.size / SLOWEST
        doing = f"downloading {file.name} of {self.repo_id}"
        for _ in range(_TRIES):
            path.unlink(missing_ok=True)
            retried(lambda: self._going_on(until, doing, url, commit, file, path), until=until)
            if checksum(path, file.checksum) == file.checksum:
                return
        path.unlink(missing_ok=True)
        raise HubIntegrityError(
            f"{file.name} of {self.repo_id} at {commit} arrived {_TRIES} times with another checksum than the Hub's "
            f"{file.checksum}. Nothing of it was kept. Something between the Hub and this machine changes it."
        )

    def _going_on(self, until: float, doing: str, url: str, commit: str, file: RemoteFile, path: Path) -> None:
        """Connect again at once for as long as each connection brings some of `file`."""
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                return self._within(until, doing, self._stream, url, commit, file, path)
            except HubUnavailableError as error:
                grown = (path.stat().st_size if path.exists() else 0) - before
                if error.retry_after is not None or grown <= 0 or time.monotonic() >= until:
                    raise

    def _stream(self, gone: threading.Event, url: str, commit: str, file: RemoteFile, path: Path) -> None:
        """One connection's worth of `file`, from where `path` ends."""
        have = path.stat().st_size if path.exists() else 0
        headers = {**self._headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get_session().stream("GET", url, headers=headers, timeout=self._patience) as response:
            if response.status_code >= 400:
                response.read()
            if response.status_code == 416:  # all was there already, or more
                path.unlink()
                raise HubUnavailableError(f"The Hub has no more of {file.name} than {have:,} bytes.")
            self._raise_for_status(response, commit)
            begins = re.match(rf"bytes {have}-", response.headers.get("Content-Range", ""))
            goes_on = have > 0 and response.status_code == 206 and begins is not None
            self._write(gone, response, file, path, have if goes_on else 0)

    def _write(self, gone: threading.Event, response: Any, file: RemoteFile, path: Path, have: int) -> None:
        begun, before = time.monotonic(), have
        try:
            with open(path, "ab" if have else "wb") as target:
                for chunk in response.iter_bytes():
                    have += len(chunk)
                    taken = time.monotonic() - begun
                    if gone.is_set() or have > file.size or taken > self._patience + (have - before) / SLOWEST:
                        break
                    target.write(chunk)
        except OSError as error:
            if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise CheckpointError(f"{path} could not be written: {error.strerror}.") from error
        if have < file.size:
            raise HubUnavailableError(f"The connection ended after {have:,} of {file.size:,} bytes of {file.name}.")
        if have > file.size:
            path.unlink()
            raise HubIntegrityError(
                f"{file.name} of {self.repo_id} is longer than the {file.size:,} bytes that it is listed with."
            )

    # Questions.

    def _ask(self, method: str, url: str, revision: str, **content: Any) -> Any:
        return self._page(method, url, revision, **content)[0]

    def _page(self, method: str, url: str, revision: str, **content: Any) -> tuple[Any, str | None]:
        """The JSON of an answer, and where the next page of it is."""
        until = time.monotonic() + self.timeout

        def ask(gone: threading.Event) -> tuple[Any, str | None]:
            response = get_session().request(
                method, url, headers=self._headers(), timeout=self._patience, follow_redirects=True, **content
            )
            self._raise_for_status(response, revision)
            return response.json(), response.links.get("next", {}).get("url")

        return retried(lambda: self._within(until, f"asking for {self.repo_id}", ask), until=until)

    def _within(self, until: float, doing: str, call: Callable[..., T], *args: Any) -> T:
        """`call(gone, *args)`, where `gone` is set once nobody waits for it any more."""
        gone = threading.Event()
        try:
            return within(until - time.monotonic(), doing, call, gone, *args)
        except HubUnavailableError as error:
            retry_after = error.retry_after
            if retry_after is not None and time.monotonic() + retry_after > until:
                raise HubUnavailableError(f"{error} It asks to come again in {retry_after:g} s.") from error
            raise
        finally:
            gone.set()

    @property
    def _patience(self) -> float:
        """Seconds without a byte after which a connection is tried anew."""
        return max(self.timeout / 3, 0.1)

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(
            token=self._token or False, library_name="lightning_lora", library_version=lightning_lora.__version__
        )

    # What a refusal means.

    def _raise_for_status(self, response: Any, revision: str) -> None:
        try:
            hf_raise_for_status(response)
        except GatedRepoError as error:
            raise HubAccessError(self._gated()) from error
        except RevisionNotFoundError as error:
            raise HubNotFoundError(
                f"{self.repo_id} has no revision {revision!r}: no branch, tag or commit of that name."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status == 401 or isinstance(error, RepositoryNotFoundError):
                raise self._absent(error) from error
            if status == 403:
                raise HubAccessError(
                    f"The token may not read {self.repo_id} (status 403). Give it read access to this repository at "
                    f"{self.endpoint}/settings/tokens, or pass another as token=."
                ) from error
            if status == 404:
                raise HubNotFoundError(f"{self.endpoint} does not know {self.repo_id} at {revision!r}.") from error
            raise

    def _gated(self) -> str:
        if self._token is None:
            return (
                f"{self.repo_id} is gated: its files need a token of a user who was let in. Ask for access at "
                f"{self.endpoint}/{self.repo_id}, then log in with `hf auth login` or pass token=."
            )
        return (
            f"{self.repo_id} is gated, and the user of this token has not been let in. Ask for access at "
            f"{self.endpoint}/{self.repo_id}."
        )

    def _absent(self, error: HfHubHTTPError) -> HubError:
        """Why the Hub says that there is no such repository: it does not tell a private one from one that is not."""
        wrong = HubAccessError(
            f"The token is wrong, expired or revoked, so {self.endpoint} refuses it (status 401). "
            "Log in with `hf auth login`, set HF_TOKEN, or pass another as token=."
        )
        if "Invalid credentials" in (error.response.headers.get("X-Error-Message") or ""):
            return wrong
        if self._token is None:
            return HubNotFoundError(
                f"There is no public repository {self.repo_id!r} at {self.endpoint}.{self._meant()} If it is private, "
                "log in with `hf auth login`, set HF_TOKEN, or pass token=."
            )
        status, who = self._try("/api/whoami-v2")
        if status == 401:
            return wrong
        user = f"The user {who['name']!r}" if isinstance(who, dict) and "name" in who else "The user of this token"
        return HubNotFoundError(
            f"{user} finds no repository {self.repo_id!r} at {self.endpoint}.{self._meant()} Either the name is "
            "misspelt, or the repository is private and this token may not read it."
        )

    def _meant(self) -> str:
        owner, slash, name = self.repo_id.partition("/")
        _, repositories = self._try("/api/models", author=owner) if slash else (0, None)
        entries = repositories if isinstance(repositories, list) else []
        names = [str(entry.get("id")).rpartition("/")[2] for entry in entries if isinstance(entry, dict)]
        near = closest(name, names)
        return f" Did you mean {listed(repr(f'{owner}/{n}') for n in near)}?" if near else ""

    def _try(self, path: str, **query: str) -> tuple[int, Any]:
        """The status and the JSON of an answer that only makes a message better: no second try, no error."""
        try:
            response = get_session().get(
                f"{self.endpoint}{path}", params=query, headers=self._headers(), timeout=min(self._patience, 5.0)
            )
            return response.status_code, response.json()
        except Exception:
            return 0, None


def checksum(path: Path, like: str) -> str:
    """The checksum of the file, of the kind that `like` is: sha256, or git's id of a blob."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    large = entry.get("lfs") or {}
    size, content = large.get("size", entry.get("size")), str(large.get("oid", entry.get("oid")))
    is_checksum = re.fullmatch(r"[0-9a-f]{64}" if large else r"[0-9a-f]{40}", content) is not None
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or not is_checksum:
        raise HubError(f"The Hub lists {entry.get('path')!r} without a size and a checksum: {str(entry)[:200]}.")
    return RemoteFile(entry["path"], size, content)
