"""What the server answers: the part of the Hub's interface that huggingface_hub uses for repositories."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

from tests.hub_server import commits, storage, xet
from tests.hub_server.access import (
    account_of,
    check_download,
    check_namespace,
    check_write,
    signed_in,
    visible,
)
from tests.hub_server.exchange import Answer, RefusedError, Request
from tests.hub_server.repository import Blob, Commit, Repository
from tests.hub_server.server import HubServer

Handler = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
_KINDS = r"(?P<kind>models|datasets|spaces)"
_ID = r"(?P<id>[^/]+(?:/[^/]+)?)"


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        _ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return add


def respond(hub: HubServer, request: Request) -> Answer:
    """The answer to a request. Raises RefusedError for one that is refused."""
    method = "GET" if request.method == "HEAD" else request.method
    for known, pattern, handler in _ROUTES:
        found = pattern.fullmatch(request.path) if known == method else None
        if found is not None:
            return handler(hub, request, **{k: unquote(v or "") for k, v in found.groupdict().items()})
    raise RefusedError(404, f"There is no {method} {request.path} on this server")


def repository_in(hub: HubServer, path: str) -> Repository | None:
    """The repository that the path of a request is about."""
    path = urlsplit(path).path
    ids = sorted(hub.repositories, key=lambda key: -len(key[1]))
    return next((hub.repositories[key] for key in ids if f"/{key[1]}/" in path or f"/{key[1]}.git" in path), None)


def _repo(hub: HubServer, request: Request, kind: str, id: str) -> Repository:
    return visible(hub, kind.removesuffix("s") or "model", id, account_of(hub, request.token))


def _writable(hub: HubServer, request: Request, kind: str, id: str) -> Repository:
    account = signed_in(hub, request.token)
    repo = visible(hub, kind.removesuffix("s") or "model", id, account)
    check_write(hub, repo, account)
    return repo


def _commit(repo: Repository, revision: str) -> Commit:
    commit = repo.resolve(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


# Accounts and repositories.


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Answer:
    account = signed_in(hub, request.token)
    orgs = [
        {"type": "org", "name": name, "roleInOrg": members[account.user]}
        for name, members in hub.organizations.items()
        if account.user in members
    ]
    role = "fineGrained" if account.role == "none" else account.role
    token = {"displayName": "a token", "role": role}
    return Answer.json(
        {"type": "user", "name": account.user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}}
    )


@route("POST", "/api/repos/create")
def create(hub: HubServer, request: Request) -> Answer:
    account = signed_in(hub, request.token)
    given = request.json()
    owner = given.get("organization") or account.user
    repo_id, kind = f"{owner}/{given['name']}", given.get("type") or "model"
    check_namespace(hub, owner, account)
    url = f"{hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if (kind, repo_id) in hub.repositories:
        return Answer.json({"error": "You already created this model repo", "url": url}, 409)
    private = given.get("visibility") == "private" or bool(given.get("private"))
    hub.create_repo(repo_id, private=private, repo_type=kind)
    return Answer.json({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(hub: HubServer, request: Request) -> Answer:
    account = signed_in(hub, request.token)
    given = request.json()
    kind, repo_id = given.get("type") or "model", f"{given.get('organization') or account.user}/{given['name']}"
    repo = visible(hub, kind, repo_id, account)
    check_write(hub, repo, account)
    del hub.repositories[kind, repo_id]
    return Answer.json({})


@route("GET", f"/api/{_KINDS}")
def listing(hub: HubServer, request: Request, kind: str) -> Answer:
    account, author = account_of(hub, request.token), request.query.get("author")
    found = []
    for repo in hub.repositories.values():
        try:
            visible(hub, repo.type, repo.id, account)
        except RefusedError:
            continue
        if repo.type + "s" == kind and author in (None, repo.owner):
            found.append({"_id": repo.id, "id": repo.id, "private": repo.private})
    return Answer.json(found)


@route("PUT", f"/api/{_KINDS}/{_ID}/settings")
def settings(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    given = request.json()
    if "visibility" in given or "private" in given:
        repo.private = given.get("visibility") == "private" or bool(given.get("private"))
    if "gated" in given:
        repo.gated = bool(given["gated"])
    return Answer.json({})


@route("GET", f"/api/{_KINDS}/{_ID}/auth-check(?P<write>/write)?")
def auth_check(hub: HubServer, request: Request, kind: str, id: str, write: str) -> Answer:
    repo = _writable(hub, request, kind, id) if write else _repo(hub, request, kind, id)
    check_download(hub, repo, account_of(hub, request.token))
    return Answer.json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Answer:
    content = request.json()["content"]
    found = re.match(r"\A---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    errors, warnings = [], []
    if found is None:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    else:
        try:
            data = yaml.safe_load(found[1]) or {}
        except yaml.YAMLError as error:
            data = {}
            errors.append({"message": f"YAML Metadata Error: {error}"})
        bases = data.get("base_model") or [] if isinstance(data, dict) else []
        for base in [bases] if isinstance(bases, str) else bases:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) or base.startswith("."):
                errors.append({"message": f'"base_model" is "{base}", which is not the id of a model on the Hub'})
    return Answer.json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


# Reading.


def _entry(path: str, content: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": content.oid, "size": len(content.content)}
    if content.large:
        size = {"oid": content.sha256, "size": len(content.content), "pointerSize": len(content.pointer)}
        entry["lfs"] = size
    return entry


@route("GET", f"/api/{_KINDS}/{_ID}(?:/revision/(?P<revision>[^/]+))?")
def info(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = _repo(hub, request, kind, id)
    commit = _commit(repo, revision or "main")
    siblings = [{"rfilename": path} for path in commit.files]
    if "blobs" in request.query:
        siblings = [{"rfilename": p, "blobId": b.oid, **_entry(p, b)} for p, b in commit.files.items()]
    return Answer.json(
        {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }
    )


@route("GET", f"/api/{_KINDS}/{_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(hub: HubServer, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
    repo = _repo(hub, request, kind, id)
    prefix = f"{path}/" if path else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in sorted(_commit(repo, revision).files.items()):
        if not name.startswith(prefix):
            continue
        first, *rest = name.removeprefix(prefix).split("/")
        if rest:
            folder = prefix + first
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        if not rest or request.query.get("recursive", "").lower() == "true":
            entries[name] = _entry(name, content)
    return _page(hub, request, list(entries.values()))


@route("POST", f"/api/{_KINDS}/{_ID}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    files = _commit(_repo(hub, request, kind, id), revision).files
    is_json = "json" in (request.headers.get("Content-Type") or "")
    wanted = request.json()["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
    return Answer.json([_entry(path, files[path]) for path in wanted if path in files])


@route("GET", f"/api/{_KINDS}/{_ID}/refs")
def refs(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    repo = _repo(hub, request, kind, id)

    def listed(names: dict[str, str], where: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": oid} for n, oid in names.items()]

    numbers = {str(n): oid for n, oid in repo.pull_requests.items()}
    pulls = {"pullRequests": listed(numbers, "pr")} if "include_prs" in request.query else {}
    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return Answer.json({"branches": branches, "converts": [], "tags": tags, **pulls})


@route("GET", f"/api/{_KINDS}/{_ID}/commits/(?P<revision>[^/]+)")
def history(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = _repo(hub, request, kind, id)
    _commit(repo, revision)
    return _page(hub, request, [commits.described(commit) for commit in repo.commits(revision)])


@route("GET", f"/(?:(?P<kind>datasets|spaces)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubServer, request: Request, kind: str, id: str, revision: str, path: str) -> Answer:
    repo = _repo(hub, request, kind, id)
    check_download(hub, repo, account_of(hub, request.token))
    commit = _commit(repo, revision)
    if path not in commit.files:
        raise RefusedError(404, "Entry not found", "EntryNotFound")
    return storage.served(hub, request, commit, path)


def _page(hub: HubServer, request: Request, entries: list[Any]) -> Answer:
    start = int(request.query.get("cursor", "0"))
    stop = start + hub.page_size
    answer = Answer.json(entries[start:stop])
    if stop < len(entries):
        query = urlencode({**request.query, "cursor": stop})
        answer.headers["Link"] = f'<{hub.endpoint}{quote(request.path, safe="/%")}?{query}>; rel="next"'
    return answer


# Writing.


@route("POST", f"/api/{_KINDS}/{_ID}/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    return commits.preupload(request, _commit(repo, revision))


@route("POST", f"/api/{_KINDS}/{_ID}/commit/(?P<revision>[^/]+)")
def commit(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    _commit(repo, revision)
    return commits.commit(hub, request, repo, revision, signed_in(hub, request.token).user)


@route("POST", f"/api/{_KINDS}/{_ID}/branch/(?P<name>[^/]+)")
def create_branch(hub: HubServer, request: Request, kind: str, id: str, name: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    if name in repo.branches:
        raise RefusedError(409, f"Reference already exists: refs/heads/{name}")
    start = request.json() if request.body else {}
    repo.branches[name] = _commit(repo, start.get("startingPoint") or "main").oid
    return Answer.json({})


@route("DELETE", f"/api/{_KINDS}/{_ID}/branch/(?P<name>[^/]+)")
def delete_branch(hub: HubServer, request: Request, kind: str, id: str, name: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    if name == "main":
        raise RefusedError(403, "The main branch is protected")
    if repo.branches.pop(name, None) is None:
        raise RefusedError(404, f"Reference does not exist: refs/heads/{name}", "RevisionNotFound")
    return Answer.json({})


@route("POST", f"/api/{_KINDS}/{_ID}/tag/(?P<revision>[^/]+)")
def create_tag(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo, name = _writable(hub, request, kind, id), request.json()["tag"]
    if name in repo.tags:
        raise RefusedError(409, f"Tag reference exists already: {name}")
    repo.tags[name] = _commit(repo, revision).oid
    return Answer.json({})


@route("DELETE", f"/api/{_KINDS}/{_ID}/tag/(?P<revision>[^/]+)")
def delete_tag(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = _writable(hub, request, kind, id)
    if repo.tags.pop(revision, None) is None:
        raise RefusedError(404, f"Tag reference does not exist: {revision}", "RevisionNotFound")
    return Answer.json({})


@route("POST", f"/api/{_KINDS}/{_ID}/discussions")
def open_discussion(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    repo, given = _repo(hub, request, kind, id), request.json()
    signed_in(hub, request.token)
    if not given.get("pullRequest"):
        raise RefusedError(400, "Only pull requests can be opened on this server")
    return Answer.json({"num": repo.open_pull_request(given["title"])})


@route("GET", f"/api/{_KINDS}/{_ID}/discussions/(?P<number>[0-9]+)")
def discussion(hub: HubServer, request: Request, kind: str, id: str, number: str) -> Answer:
    repo = _repo(hub, request, kind, id)
    if int(number) not in repo.pull_requests:
        raise RefusedError(404, "Discussion not found")
    return Answer.json(commits.pull_request(repo, int(number)))


@route("POST", f"/(?:(?P<kind>datasets|spaces)/)?{_ID}\\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    _writable(hub, request, kind, id)
    return storage.batch(hub, request)


@route("PUT", "/-/lfs/(?P<oid>[0-9a-f]{64})(?:/(?P<part>[0-9]+))?")
def lfs_put(hub: HubServer, request: Request, oid: str, part: str) -> Answer:
    return storage.put(hub, request, oid, part)


@route("POST", "/-/lfs/(?P<oid>[0-9a-f]{64})/(?P<step>complete|verify)")
def lfs_finish(hub: HubServer, request: Request, oid: str, step: str) -> Answer:
    return storage.complete(hub, request, oid) if step == "complete" else storage.verify(hub, request, oid)


@route("GET", "/-/cdn/(?P<oid>[0-9a-f]{64})")
def cdn(hub: HubServer, request: Request, oid: str) -> Answer:
    return storage.stored(hub, request, oid)


@route("GET", f"/api/{_KINDS}/{_ID}/xet-(?P<use>read|write)-token/(?P<revision>[^/]+)")
def xet_token(hub: HubServer, request: Request, kind: str, id: str, use: str, revision: str) -> Answer:
    _repo(hub, request, kind, id) if use == "read" else _writable(hub, request, kind, id)
    return xet.token(hub)


@route("POST", "/v[0-9]/xorbs?/[^/]+/(?P<name>[0-9a-f]{64})")
def xet_xorb(hub: HubServer, request: Request, name: str) -> Answer:
    return xet.put_xorb(hub, request, name)


@route("POST", "/v1/shards?(?:/.*)?")  # v2 reports progress; the client takes this one where that is missing
def xet_shard(hub: HubServer, request: Request) -> Answer:
    return xet.put_shard(hub, request)
