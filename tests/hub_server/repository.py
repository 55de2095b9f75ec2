"""A repository of the Hub in memory: commits with all their files, branches, tags, pull requests."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_LARGE_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".zip", ".gz", ".npy", ".npz", ".gguf")
_LARGE_SIZE = 10 << 20

_commit_numbers = itertools.count()


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    content: bytes
    large: bool
    """Whether it is kept in LFS."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds instead of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """The id of the object in git."""
        stored = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: float
    files: Mapping[str, Blob]
    """All files of the repository as of this commit, not only the changed ones."""


@dataclass
class Repository:
    id: str
    type: str = "model"
    private: bool = False
    gated: bool = False
    members: dict[str, str] = field(default_factory=dict)
    """Users besides the owner -> "read" or "write"; where the repository is gated, those who were let in."""
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)
    """Of the pull requests."""
    history: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            attributes = "".join(f"*{e} filter=lfs diff=lfs merge=lfs -text\n" for e in _LARGE_ENDINGS).encode()
            first = self._add(None, {".gitattributes": Blob(attributes, False)}, "initial commit", "", "system")
            self.branches["main"] = first.oid

    @property
    def name(self) -> str:
        return self.id.rpartition("/")[2]

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def resolve(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a pull request's ref or the beginning of an oid means."""
        for name in (revision, revision.removeprefix("refs/heads/"), revision.removeprefix("refs/tags/")):
            for refs in (self.branches, self.tags):
                if name in refs:
                    return self.history[refs[name]]
        number = revision.removeprefix("refs/pr/")
        if number != revision and number.isdigit() and int(number) in self.pull_requests:
            return self.history[self.pull_requests[int(number)]]
        if len(revision) >= 7:
            return next((c for oid, c in self.history.items() if oid.startswith(revision)), None)
        return None

    def commits(self, revision: str = "main") -> list[Commit]:
        """From the newest to the first."""
        found = []
        commit = self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.history[commit.parent] if commit.parent else None
        return found

    def commit(
        self,
        changes: Mapping[str, Blob | None],
        *,
        title: str,
        message: str = "",
        author: str = "somebody",
        branch: str = "main",
    ) -> Commit:
        """Add a commit on top of `branch` (or of a pull request's ref); None deletes a file."""
        parent = self.resolve(branch)
        assert parent is not None, f"no branch {branch}"
        files = {**parent.files, **{k: v for k, v in changes.items() if v is not None}}
        for path in (k for k, v in changes.items() if v is None):
            files.pop(path, None)
        commit = self._add(parent.oid, files, title, message, author)
        number = branch.removeprefix("refs/pr/")
        if number != branch:
            self.pull_requests[int(number)] = commit.oid
        else:
            self.branches[branch.removeprefix("refs/heads/")] = commit.oid
        return commit

    def open_pull_request(self, title: str) -> int:
        number = len(self.pull_requests) + 1
        self.pull_requests[number] = self.branches["main"]
        self.titles[number] = title
        return number

    def _add(self, parent: str | None, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        oid = hashlib.sha1(f"{next(_commit_numbers)} {self.id} {parent} {title} {time.time_ns()}".encode()).hexdigest()
        self.history[oid] = Commit(oid, parent, title, message, author, time.time(), dict(files))
        return self.history[oid]


def is_large(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub keeps such a file in LFS."""
    return path.endswith(_LARGE_ENDINGS) or size > _LARGE_SIZE or b"\0" in sample


def blob(path: str, content: bytes) -> Blob:
    """`content` stored as the Hub would store it under `path`."""
    return Blob(content, is_large(path, len(content), content[:512]))
