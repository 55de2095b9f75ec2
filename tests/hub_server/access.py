"""Who may do what on the server: tokens, owners, organizations, private and gated repositories."""

from __future__ import annotations

from tests.hub_server.exchange import RefusedError
from tests.hub_server.repository import Repository
from tests.hub_server.server import Account, HubServer

_RANK = {"none": 0, "read": 1, "write": 2, "admin": 2}


def account_of(hub: HubServer, token: str | None) -> Account | None:
    """The account behind a token, None without one. A token that is not known is refused everywhere."""
    if token is None:
        return None
    if token not in hub.accounts:
        raise RefusedError(401, "Invalid credentials in Authorization header")
    return hub.accounts[token]


def signed_in(hub: HubServer, token: str | None) -> Account:
    account = account_of(hub, token)
    if account is None:
        raise RefusedError(401, "Invalid username or password.")
    return account


def visible(hub: HubServer, repo_type: str, repo_id: str, account: Account | None) -> Repository:
    """The repository, for somebody who may know that it is there; others cannot tell it from one that is not."""
    repo = hub.repositories.get((repo_type, repo_id))
    if repo is None or (repo.private and _rights(hub, repo, account) < _RANK["read"]):
        # As the Hub does: without a token 401, which hides whether the repository is private or missing.
        if account is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        raise RefusedError(404, "Repository not found", "RepoNotFound")
    return repo


def check_download(hub: HubServer, repo: Repository, account: Account | None) -> None:
    """Refuse the files of a gated repository to those who were not let in."""
    if repo.gated and _rights(hub, repo, account) < _RANK["read"]:
        raise RefusedError(
            401 if account is None else 403,
            f"Access to model {repo.id} is restricted. You must have access to it and be authenticated to access it.",
            "GatedRepo",
        )


def check_write(hub: HubServer, repo: Repository, account: Account) -> None:
    if _rights(hub, repo, account) < _RANK["write"]:
        raise RefusedError(403, f"You don't have the rights to write to {repo.id} with this token")


def check_namespace(hub: HubServer, name: str, account: Account) -> None:
    """Refuse who may not make or delete repositories under `name`."""
    role = hub.organizations.get(name, {}).get(account.user, "none")
    if account.role != "write" or (name != account.user and _RANK[role] < _RANK["write"]):
        raise RefusedError(403, f"You don't have the rights to create a model under the namespace {name!r}")


def _rights(hub: HubServer, repo: Repository, account: Account | None) -> int:
    if account is None:
        return _RANK["none"]
    granted = repo.members.get(account.user) or hub.organizations.get(repo.owner, {}).get(account.user, "none")
    own = _RANK["write"] if repo.owner == account.user else _RANK[granted]
    return min(own, _RANK[account.role])
