"""Commits that come over HTTP: what an upload needs, and the ndjson of the commit itself."""

from __future__ import annotations

import base64
import json
from datetime import datetime, timezone
from fnmatch import fnmatch
from typing import Any

from tests.hub_server.exchange import Answer, RefusedError, Request
from tests.hub_server.repository import Blob, Commit, Repository, is_large
from tests.hub_server.server import HubServer


def preupload(request: Request, head: Commit) -> Answer:
    """For each file: how to upload it, and what is there under its name already."""
    files = []
    ignored = head.files[".gitignore"].content.decode().split() if ".gitignore" in head.files else []
    for given in request.json()["files"]:
        path, size = given["path"], given["size"]
        large = is_large(path, size, base64.b64decode(given.get("sample", "")))
        answer: dict[str, Any] = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(fnmatch(path, pattern) for pattern in ignored),
        }
        if path in head.files:
            answer["oid"] = head.files[path].etag
        files.append(answer)
    return Answer.json({"files": files})


def commit(hub: HubServer, request: Request, repo: Repository, revision: str, author: str) -> Answer:
    head = repo.resolve(revision)
    assert head is not None
    header: dict[str, Any] = {}
    changes: dict[str, Blob | None] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            changes[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            changes[value["path"]] = Blob(_uploaded(hub, value), True)
        elif key == "deletedFile":
            if value["path"] not in head.files:
                raise RefusedError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            changes[value["path"]] = None
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            changes |= {path: None for path in head.files if path.startswith(folder)}
        else:
            raise RefusedError(400, f"{key!r} is not known to this server")
    if header.get("parentCommit") not in (None, head.oid):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    number = None
    if request.query.get("create_pr") == "1":
        number = repo.open_pull_request(header["summary"])
        revision = f"refs/pr/{number}"
    made = repo.commit(
        changes, title=header["summary"], message=header.get("description", ""), author=author, branch=revision
    )
    url = f"{hub.endpoint}/{repo.id}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    if number is not None:
        answer["pullRequestUrl"] = f"{url}/discussions/{number}"
    return Answer.json(answer)


def _uploaded(hub: HubServer, value: dict[str, Any]) -> bytes:
    if value["oid"] not in hub.stored:
        raise RefusedError(400, f"{value['path']}: there is no LFS object {value['oid']}")
    return hub.stored[value["oid"]]


def described(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author}],
        "date": _date(commit.date),
    }


def pull_request(repo: Repository, number: int) -> dict[str, Any]:
    head = repo.history[repo.pull_requests[number]]
    return {
        "title": repo.titles[number],
        "num": number,
        "author": {"name": head.author},
        "createdAt": _date(head.date),
        "status": "draft",
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": repo.type},
        "events": [],
        "filesWithConflicts": [],
        "changes": {"base": "refs/heads/main"},
        "diff": "",
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
