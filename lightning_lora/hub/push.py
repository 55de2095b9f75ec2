"""Push an adapter: one commit with its files and its card, made exactly once, whatever happens on the way."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, HubError, HubUnavailableError
from lightning_lora.files import within_temporary_folder
from lightning_lora.format.folder import CARD
from lightning_lora.hub.adapters import save_tensors
from lightning_lora.hub.address import local_path
from lightning_lora.hub.card import Card, RunFacts, merge_cards
from lightning_lora.hub.client import SLOWEST, TIMEOUT, plain_token, retried
from lightning_lora.hub.hub_private import is_left_out
from lightning_lora.hub.repository import Destination, HubRepository
from lightning_lora.hub.staging import PICTURE, Staged, digest, stage


@dataclass(frozen=True)
class DryRun:
    """The files and the card that a push would upload; `print` shows them."""

    repo_id: str
    message: str
    files: dict[str, int]
    """Name -> size in bytes."""
    card: str

    def __str__(self) -> str:
        lines = [f"{size:>14,}  {name}" for name, size in self.files.items()]
        return "\n".join([f"to {self.repo_id}: {self.message}", "", *lines, "", f"{CARD}:", "", self.card])


def push_adapter(
    adapter: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    branch: str | None = None,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    message: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    card: Card | Mapping[str, Any] | None = None,
    timeout: float = TIMEOUT,
    dry_run: bool = False,
    ignore_fields: Collection[str] = (),
) -> CommitInfo | DryRun:
    """Push the adapter in a folder, or that of a model, to the Hub; returns the commit (`oid`, `commit_url`, `pr_url`).

    A private copy of adapter_config.json, adapter_model.safetensors and the card is uploaded, and nothing else. The
    same push again makes no second commit. Text that a user wrote into the card on the Hub, or in the folder, is kept.

    Args:
        adapter: A model that `save_adapter` can save, or a folder that it or PEFT wrote.
        repo_id: "user/name", or "name" in the account of the token.
        branch: Created from main where it is not there.
        private: True creates the repository as a private one; an existing repository stays as it is.
        token: None takes HF_TOKEN, or the token of `hf auth login`.
        endpoint: The address of a Hub of your own.
        message: The commit's title.
        tag: A tag for the commit.
        create_pr: Open a pull request instead of committing to a branch.
        card: Facts for the card that the files do not hold: `Card(metrics={"val_loss": 0.3}, data="...")`.
        timeout: Seconds after which one call to the Hub counts as hung; uploads get more, by their size.
        dry_run: Touch no network; returns a list of the files, and the card.
        ignore_fields: Fields of the folder's config that are not known here and pushed all the same, though they have
            a value.

    Raises AdapterFormatError for a folder that is no adapter or holds other weights, HubAccessError where the token is
    missing, wrong, or may not write, HubUnavailableError where the Hub cannot be reached after some tries.
    """
    to = Destination(repo_id, private=private, branch=branch, create_pr=create_pr, endpoint=endpoint, timeout=timeout)
    token = None if token is None else plain_token(token)
    facts = Card.of(card)
    picture = None if facts.picture is None else local_path(facts.picture)
    staged = stage_model(adapter) if isinstance(adapter, nn.Module) else stage(adapter, ignore_fields=ignore_fields)
    try:
        if picture is not None:
            staged = staged.with_file(PICTURE, _content(picture))
        run = RunFacts(repo_id=repo_id, **vars(facts))
        title = message or f"LoRA adapter of rank {staged.config.get('r', 8)}{in_words(run.metrics, run.step)}"
        if dry_run:
            content = staged.card(run)
            files = {name: part.size for name, part in staged.digests.items()} | {CARD: len(content.encode())}
            return DryRun(repo_id, title, files, content)
        repository = HubRepository(to, token)
        repository.check()
        push = Push(repository, staged, replace(run, repo_id=repository.repo_id), title)
        commit = retried(push.attempt)
        if tag is not None:
            other = retried(lambda: repository.tag(tag, commit.oid, title))
            if other is not None:
                raise HubError(
                    f"The adapter was pushed as commit {commit.oid[:8]}, but {repository.repo_id} has the tag {tag!r} "
                    f"already, on {other[:8]}. Choose another, or delete that one."
                )
        return commit
    finally:
        staged.discard()


def stage_model(
    model: nn.Module, tensors: Mapping[str, Tensor] | None = None, known_base: Mapping[str, Any] | None = None
) -> Staged:
    """A staged copy of the folder that `save_tensors` writes with these arguments."""
    with within_temporary_folder("save") as folder:
        return stage(save_tensors(model, folder / "adapter", tensors, known_base))


def in_words(metrics: Mapping[str, float], step: int | None = None) -> str:
    """ ": step 120, val_loss 0.42", for the title of a commit."""
    parts = [] if step is None else [f"step {step}"]
    parts += [f"{name} {value:.4g}" for name, value in list(metrics.items())[:3]]
    return f": {', '.join(parts)}" if parts else ""


class Push:
    """One commit that is to be made exactly once, by as many attempts as it takes.

    Every attempt names the head that it saw as the parent, so the server accepts only one of two attempts. And it looks
    first if an earlier attempt arrived whose answer was lost.
    """

    def __init__(
        self, repository: HubRepository, staged: Staged, run: RunFacts, title: str, description: str = ""
    ) -> None:
        self.repository = repository
        self.staged = staged
        self.run = run
        self.title, _, more = title.strip().partition("\n")
        parts = [more.strip(), description.strip(), f"Pushed by lightning_lora {version('lightning-lora')}."]
        self.description = "\n\n".join(part for part in parts if part)
        self._first_head: str | None = None
        self._pull_requests: dict[str, str] = {}
        self._sent: str | None = None
        """The card of the last attempt that reached the commit."""
        self._over_lfs = False
        self._uploaded: dict[str, CommitOperationAdd] = {}

    def attempt(self) -> CommitInfo:
        """Make the commit, or find that an earlier attempt made it. Raises HubUnavailableError where another attempt
        may help, or HubError."""
        repository = self.repository
        head = repository.head()
        if self._sent is not None and (landed := self._landed(head, self._sent)):
            return landed
        theirs = repository.card_at(head) if head else None
        card = merge_cards(self.staged.card(self.run), theirs, explicit=self.run.front_matter)
        repository.check_card(card)
        operations = [self._upload(name) for name in self.staged.digests]
        readme = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode())
        repository.call(f"announcing {CARD}", self._preupload, readme)
        if self._sent is None:
            self._first_head = head
            self._pull_requests = repository.pull_requests() if repository.opens_pr else {}
        self._sent = card
        commit = repository.call(
            f"committing to {repository}",
            repository.api.create_commit,
            repository.repo_id,
            [*operations, readme],
            seconds=self.staged.size / SLOWEST,
            commit_message=self.title,
            commit_description=self.description,
            revision=repository.revision,
            create_pr=repository.opens_pr,
            parent_commit=head,
            num_threads=1,
        )
        if commit.pr_revision is not None:
            repository.went_into(commit.pr_revision)
        return commit

    def _upload(self, name: str) -> CommitOperationAdd:
        if name in self._uploaded:
            return self._uploaded[name]
        path = self.staged.folder / name
        # The client sends a file object over LFS, and a path over Xet where that is installed.
        content = io.BytesIO(path.read_bytes()) if self._over_lfs else str(path)
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        seconds = self.staged.digests[name].size / SLOWEST
        try:
            # One by one: two files at once go through a pool of threads, and that holds the process's exit.
            self.repository.call(f"uploading {name}", self._preupload, operation, seconds=seconds)
        except HubUnavailableError:
            self._over_lfs = not self._over_lfs  # a Hub of one's own may know only one of the two
            raise
        self._uploaded[name] = operation
        return operation

    def _preupload(self, operation: CommitOperationAdd) -> None:
        self.repository.api.preupload_lfs_files(
            self.repository.repo_id,
            [operation],
            revision=self.repository.revision,
            create_pr=self.repository.opens_pr,
            num_threads=1,
            free_memory=False,
        )
        if is_left_out(operation):  # the client would only write a line to its log
            raise HubError(
                f"{self.repository.repo_id} has a .gitignore that keeps {operation.path_in_repo} out. Remove that line "
                "of it on the Hub."
            )

    def _landed(self, head: str | None, card: str) -> CommitInfo | None:
        """The commit of an earlier attempt, if it was made and the answer was lost."""
        repository = self.repository
        if repository.opens_pr:
            for revision, newest in repository.pull_requests().items():
                if revision not in self._pull_requests and self._is_ours(newest, revision, card):
                    repository.went_into(revision)
                    return self._info(newest, pull_request=revision)
            return None
        if head == self._first_head:
            return None
        for commit in self._commits(repository.revision):
            if commit.commit_id == self._first_head:
                return None
            if commit.title.strip() == self.title and self._has_files(commit.commit_id, card):
                return self._info(commit.commit_id)
        return None

    def _is_ours(self, commit: str, revision: str, card: str) -> bool:
        newest = self._commits(revision)[0]
        return newest.title.strip() == self.title and self._has_files(commit, card)

    def _commits(self, revision: str) -> Sequence[Any]:
        api, repo_id = self.repository.api, self.repository.repo_id
        return self.repository.call(
            f"reading the history of {repo_id}", api.list_repo_commits, repo_id, revision=revision
        )

    def _has_files(self, commit: str, card: str) -> bool:
        wanted = {**self.staged.digests, CARD: digest(card.encode())}
        found = {entry.path: entry for entry in self._entries(commit)}
        for name, one in wanted.items():
            entry: Any = found.get(name)
            lfs = getattr(entry, "lfs", None)
            if entry is None or (lfs.sha256 != one.sha256 if lfs else entry.blob_id != one.git):
                return False
        return True

    def _entries(self, commit: str) -> Sequence[Any]:
        api, repo_id = self.repository.api, self.repository.repo_id
        doing = f"reading the files of {commit[:8]}"
        return self.repository.call(doing, lambda: list(api.list_repo_tree(repo_id, revision=commit)))

    def _info(self, commit: str, pull_request: str | None = None) -> CommitInfo:
        base = f"{self.repository.api.endpoint.rstrip('/')}/{self.repository.repo_id}"
        return CommitInfo(
            commit_url=f"{base}/commit/{commit}",
            commit_message=self.title,
            commit_description=self.description,
            oid=commit,
            pr_url=pull_request and f"{base}/discussions/{pull_request.rpartition('/')[2]}",
            _endpoint=self.repository.api.endpoint,
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}.") from error
