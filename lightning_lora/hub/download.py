"""Files of one commit of a repository, fetched by the client of huggingface_hub and kept in its cache.

The client's download compares sizes alone, so each checksum is compared here; and it waits for ever where a server
sends a byte now and then, so each call has an end. Files are fetched into a staging folder: other programs read the
cache, and find nothing there that was not checked.

    models--user--name/
      blobs/<checksum>             contents, by the sha256 of large files and by git's id of small ones
      snapshots/<commit>/<file>    links to them (copies where the system has no links)
      refs/<revision>              the commit that a branch or a tag meant when it was last asked for

Names in blobs/ are checksums, so the files can be verified again without the Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_token

from lightning_lora.checked import did_you_mean
from lightning_lora.errors import CheckpointError, HubError, HubIntegrityError
from lightning_lora.files import own_name, remove_leftovers, written_beside
from lightning_lora.hub.address import local_path
from lightning_lora.hub.client import Api, asked, plain_token, within, without_progress_bars

T = TypeVar("T")

SLOWEST = 16_000
"""Bytes per second below which a download counts as hung."""
_TRIES = 3
"""The number of times that content with a wrong checksum is fetched before an error."""
_MOST_MODELS = 1000
"""The most models of one owner among which the name that a misspelt one meant is looked for."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it."""

    name: str
    """The path in the repository."""
    size: int
    checksum: str
    """The sha256 of its content (64 digits), or git's id of it as a blob (40)."""


class Remote:
    """A repository on the Hub. Every method ends after about `timeout` seconds, a download later, by its size."""

    def __init__(
        self, repo_id: str, *, endpoint: str | None, token: str | bool | None, timeout: float, subfolder: str = ""
    ) -> None:
        self.repo_id, self.subfolder, self.timeout = repo_id, subfolder, timeout
        given = get_token() if token in (None, True) else token
        self.api = Api(
            endpoint=endpoint,
            token=plain_token(str(given)) if given else False,
            library_name="lightning_lora",
            library_version=version("lightning-lora"),
        )

    def commit_of(self, revision: str) -> str:
        """The commit that `revision` means now. Raises a HubError that says why there is none."""
        doing = f"looking for {self.repo_id} at {revision!r}"
        commit = self._ask(doing, self.api.model_info, self.repo_id, revision=revision, expand=["sha"]).sha
        if not isinstance(commit, str) or not _is_checksum(commit, 40):
            raise HubError(f"{self.api.endpoint} names no commit for {self.repo_id} at {revision!r}, but {commit!r}.")
        return commit

    def entries(self, commit: str) -> dict[str, RemoteFile | None]:
        """Name -> file in the subfolder of `commit`, or at its top; None for a folder."""

        def look() -> list[Any]:
            try:
                return list(self.api.list_repo_tree(self.repo_id, self.subfolder or None, revision=commit))
            except EntryNotFoundError:  # there is no such folder
                return []

        found = self._ask(f"listing the files of {self.repo_id} at {commit}", look)
        return {entry.path.rpartition("/")[2]: _file(entry) if isinstance(entry, RepoFile) else None for entry in found}

    def fetch(self, commit: str, file: RemoteFile, staged: Path) -> Path:
        """Download `file` into the folder `staged`, under its path in the repository. Raises HubIntegrityError where
        it is not what the Hub listed, and HubUnavailableError where it did not arrive in time."""
        until = time.monotonic() + self.timeout + file.size / SLOWEST
        doing = f"downloading {file.name} of {self.repo_id} at {commit}"
        place = staged / file.name
        for _ in range(_TRIES):
            self._ask(doing, self._download, commit, file.name, staged, until=until)
            if checksum(place, file.checksum) == file.checksum:
                return place
            place.unlink()
        raise HubIntegrityError(
            f"{file.name} of {self.repo_id} at {commit} arrived {_TRIES} times with another checksum than the Hub's "
            f"{file.checksum}. Nothing of it was kept. Something between the Hub and this machine changes it."
        )

    def _download(self, commit: str, name: str, staged: Path) -> None:
        try:
            self.api.hf_hub_download(
                self.repo_id, name, revision=commit, local_dir=staged, cache_dir=staged, etag_timeout=self._patience
            )
        except OSError as error:  # errors of the network have no errno, those of connections aside
            if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise CheckpointError(f"{staged / name} could not be written: {error.strerror}.") from error

    def _ask(self, doing: str, call: Callable[..., T], *args: Any, until: float | None = None, **kwargs: Any) -> T:
        """Returns `call(...)`, repeated where that may help, until `until` (time.monotonic): by default, for `timeout`.
        A question that hangs is asked again; a download goes on by itself."""
        most = self._patience if until is None else float("inf")
        until = time.monotonic() + self.timeout if until is None else until
        try:
            with without_progress_bars():
                return asked(until, doing, call, *args, most=most, **kwargs)
        except HubError as error:
            if isinstance(error.__cause__, GatedRepoError):
                error.args = (f"{error} Ask for access at {self.api.endpoint}/{self.repo_id}.",)
            elif isinstance(error.__cause__, RepositoryNotFoundError):
                error.args = (f"{error}{self._whose()}{self._meant()}",)
            raise

    @property
    def _patience(self) -> float:
        """Seconds without an answer after which a question is asked again."""
        return max(self.timeout / 3, 0.1)

    # These only improve an error's message: they ask once, and may fail.

    def _whose(self) -> str:
        with contextlib.suppress(HubError, LookupError, TypeError):
            if self.api.token:
                user = within(self._patience, "asking whose the token is", self.api.whoami)["name"]
                return f" The token is that of {user!r}."
        return ""

    def _meant(self) -> str:
        def names() -> list[str]:
            owner = self.repo_id.partition("/")[0]
            return [model.id for model in self.api.list_models(author=owner, limit=_MOST_MODELS)]

        with contextlib.suppress(HubError):
            return did_you_mean(self.repo_id, within(self._patience, "looking for names like it", names))
        return ""


def checksum(path: Path, like: str) -> str:
    """The checksum of the file, of the same kind as `like`: sha256, or git's id of a blob."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_checksum(text: str, digits: int) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None


def _file(entry: RepoFile) -> RemoteFile:
    sum_ = str(entry.lfs.sha256 if entry.lfs else entry.blob_id)
    if not isinstance(entry.size, int) or entry.size < 0 or not _is_checksum(sum_, 64 if entry.lfs else 40):
        raise HubError(f"The Hub lists {entry.path!r} without a size and a checksum: {entry!r:.200}.")
    return RemoteFile(entry.path, entry.size, sum_)


class CachedRepository:
    """The files of one repository in the cache."""

    def __init__(self, repo_id: str, cache_dir: str | os.PathLike[str] | None, subfolder: str = "") -> None:
        cache = local_path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
        self.folder = cache / "--".join(["models", *repo_id.split("/")])
        self._subfolder = subfolder

    def commit_of(self, revision: str) -> str | None:
        """The commit that `revision` meant when the Hub was last asked; None where that is not known."""
        if _is_checksum(revision, 40):
            return revision
        with contextlib.suppress(OSError, ValueError):
            commit = self.folder.joinpath("refs", *revision.split("/")).read_text("utf-8").strip()
            return commit if _is_checksum(commit, 40) else None
        return None

    def snapshot(self, commit: str) -> Path:
        """The folder of the adapter in the cache, at `commit`."""
        return self.folder / "snapshots" / commit / self._subfolder

    def blob(self, checksum: str) -> Path:
        return self.folder / "blobs" / checksum

    def is_whole(self, path: Path) -> bool:
        """True if the content of a file in a snapshot is still what was fetched: its checksum names a blob."""
        return path.is_file() and any(self.blob(checksum(path, like)).is_file() for like in ("-" * 64, "-" * 40))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder beside the blobs, for files that are not checked yet; it is removed afterwards."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            staged = self.folder / own_name(".lightning_lora.", ".tmp")
            staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def keep(self, commit: str, files: Mapping[str, tuple[Path, str]]) -> None:
        """Move checked files (name -> file, checksum) to their place in the snapshot of `commit`."""
        snapshot = self.snapshot(commit)
        with writing(self.folder):
            snapshot.mkdir(parents=True, exist_ok=True)
            self.blob("").mkdir(exist_ok=True)
            for name, (file, sum_) in files.items():
                blob, place = self.blob(sum_), snapshot / name
                if not file.is_symlink():
                    os.replace(file, blob)
                if not (place.is_symlink() and place.resolve() == blob.resolve()):
                    with written_beside(place) as beside:
                        link_or_copy(blob, beside)

    def remember(self, revision: str, commit: str) -> None:
        """Note the commit that `revision` means now, for a time when the Hub is out of reach."""
        if revision == commit:
            return
        ref = self.folder.joinpath("refs", *revision.split("/"))
        with contextlib.suppress(OSError):  # a branch of today may be a folder of branches of yesterday
            ref.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(ref) as beside:
                beside.write_text(commit, "utf-8")


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn an error of the disk into a CheckpointError that names the place."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The cache could not be written at {where}: {error.strerror or error}. "
            "Give another place as cache_dir=, or set HF_HOME."
        ) from error


def link_or_copy(file: Path, place: Path) -> None:
    """Make `place` a relative link to `file`, or a copy where the system has no links."""
    try:
        os.symlink(os.path.relpath(file, place.parent), place)
    except OSError:
        shutil.copyfile(file, place)
