"""A repository on the Hub that adapters are pushed to: checked before the first push, then one commit after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from lightning_lora.checked import flag, number
from lightning_lora.errors import ConfigError, HubError
from lightning_lora.hub.address import hub_address
from lightning_lora.hub.client import TIMEOUT, Api, asked, within

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Destination:
    """The repository and branch to which adapters are pushed. Raises ConfigError for an invalid value."""

    repo_id: str
    """"user/name", or "name" in the account of the token."""
    _: KW_ONLY
    private: bool = True
    """True creates the repository as a private one; an existing repository stays as it is."""
    branch: str | None = None
    """The branch, which is created from main if it does not exist; None means main."""
    create_pr: bool = False
    """Open a pull request instead of committing to a branch."""
    endpoint: str | None = None
    """The address of a Hub of your own; None takes HF_ENDPOINT or huggingface.co."""
    timeout: float = TIMEOUT
    """Seconds after which one call to the Hub counts as hung; uploads get more, by their size."""

    def __post_init__(self) -> None:
        if not isinstance(self.repo_id, str) or not self.repo_id:
            raise ConfigError(f"repo_id is {self.repo_id!r}; give the repository's id, such as 'user/my-adapter'.")
        if (address := hub_address(self.repo_id)) is not None:
            object.__setattr__(self, "repo_id", address.repo_id)
            object.__setattr__(self, "branch", self.branch or address.revision)
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ConfigError(f"repo_id {self.repo_id!r} cannot be the name of a repository: {error}") from error
        if self.create_pr and self.branch not in (None, "main"):
            raise ConfigError(f"A pull request is opened against main: leave out branch={self.branch!r}.")
        number("timeout", self.timeout, above=0, unit="seconds")
        for name in ("private", "create_pr"):
            flag(name, getattr(self, name))
        for name in ("branch", "endpoint"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"{name} is empty, or no text; leave it out for the default.")


class HubRepository:
    """The repository of a `Destination`. Every call has a time limit, and raises HubError."""

    def __init__(self, to: Destination, token: str | None = None) -> None:
        """With `token` None, HF_TOKEN or the token of `hf auth login` is taken."""
        self.to = to
        self.api, self._token = Api(endpoint=to.endpoint, token=token), token
        self.repo_id = to.repo_id
        self.revision = to.branch or constants.DEFAULT_REVISION
        self.opens_pr = to.create_pr
        """True if the next commit opens a pull request; the ones after it go into that."""
        self._checked_card: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision == constants.DEFAULT_REVISION else f" ({self.revision})"
        return f"{self.repo_id}{at}"

    def call(self, doing: str, function: Callable[..., T], *args: Any, seconds: float = 0.0, **kwargs: Any) -> T:
        """Returns `function(...)`, within the timeout and `seconds` more."""
        return within(self.to.timeout + seconds, doing, function, *args, **kwargs)

    def check(self) -> None:
        """Raise HubError unless later pushes will be allowed. Checks token, repository and branch (both are created if
        they do not exist), and write permission, all within one timeout."""
        step = partial(asked, time.monotonic() + self.to.timeout)
        name = step("asking whose the token is", lambda: self.api.whoami()["name"])
        if "/" not in self.repo_id:
            self.repo_id = f"{name}/{self.repo_id}"
        here = self.repo_id
        step(f"creating {here}", self.api.create_repo, here, private=self.to.private, exist_ok=True)
        info = step(f"looking at {here}", self.api.repo_info, here)
        if self.to.private and info.private is False:
            log.warning("%s was public before: everybody can read what is pushed there.", here)
        # create_repo does not fail for an existing repository that this token may only read.
        if self.opens_pr:
            step(f"asking whether {name!r} may open a pull request on {here}", self.api.auth_check, here)
        else:
            step(f"asking whether {name!r} may write to {here}", self.api.auth_check, here, write=True)
            if self.revision != constants.DEFAULT_REVISION:
                branch = self.revision
                step(f"creating the branch {branch!r}", self.api.create_branch, here, branch=branch, exist_ok=True)

    def head(self) -> str | None:
        """The newest commit; None where there is no commit."""

        def sha() -> str | None:
            try:
                return self.api.repo_info(self.repo_id, revision=self.revision).sha
            except RevisionNotFoundError:
                return None

        return self.call(f"reading the head of {self}", sha)

    def card_at(self, commit: str) -> str | None:
        """The README.md of `commit`, or None."""
        endpoint = self.api.endpoint.rstrip("/")
        url = f"{endpoint}/{self.repo_id}/resolve/{quote(commit, safe='')}/README.md"

        def read() -> str | None:
            answer = get_session().get(url, headers=self._headers(), follow_redirects=True)
            if answer.status_code == 404:
                return None
            hf_raise_for_status(answer)
            return answer.content.decode("utf-8", errors="replace")

        return self.call(f"reading the card of {self}", read)

    def check_card(self, card: str) -> None:
        """Raise HubError, with the Hub's reasons, for a card that it would refuse. All of it within one timeout."""
        if card != self._checked_card:
            asked(time.monotonic() + self.to.timeout, "checking the card", self._validate, card)
            self._checked_card = card

    def _validate(self, card: str) -> None:
        answer = get_session().post(
            f"{self.api.endpoint.rstrip('/')}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=self._headers(),
        )
        if answer.status_code == 400:
            raise HubError(f"The Hub refuses the card: {_reasons(answer)}")
        if answer.status_code != 404:  # a Hub of one's own may have no such check
            hf_raise_for_status(answer)

    def tag(self, name: str, commit: str, message: str) -> str | None:
        """Tag `commit`. Returns None, or the other commit that has this tag already."""
        doing = f"tagging {commit[:8]} as {name!r}"

        def tag() -> str:
            self.api.create_tag(self.repo_id, tag=name, revision=commit, tag_message=message, exist_ok=True)
            refs = self.api.list_repo_refs(self.repo_id)
            return next((ref.target_commit for ref in refs.tags if ref.name == name), commit)

        found = self.call(doing, tag)
        return None if found == commit else found

    def pull_requests(self) -> dict[str, str]:
        """Revision -> newest commit of each pull request."""
        doing = f"listing the pull requests of {self.repo_id}"
        refs = self.call(doing, self.api.list_repo_refs, self.repo_id, include_pull_requests=True)
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}

    def _headers(self) -> dict[str, str]:
        return build_hf_headers(token=self._token)

    def went_into(self, pull_request: str) -> None:
        """Send further commits into this pull request, given by its revision."""
        self.opens_pr = False
        self.revision = pull_request


def _reasons(answer: Any) -> str:
    try:
        return "; ".join(error["message"] for error in answer.json()["errors"])
    except (ValueError, LookupError, TypeError):
        return answer.text[:500]
