"""Contents on the server: uploads to LFS in one piece or in parts, and downloads, whole or by range."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from tests.hub_server.exchange import Answer, RefusedError, Request
from tests.hub_server.repository import Commit
from tests.hub_server.server import HubServer


def batch(hub: HubServer, request: Request) -> Answer:
    """Where to put each object that is not there yet."""
    objects = []
    in_parts = "multipart" in request.json().get("transfers", ())
    for wanted in request.json()["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size, "authenticated": True}
        if oid not in hub.stored:
            url = f"{hub.endpoint}/-/lfs/{oid}"
            upload: dict[str, Any] = {"href": url}
            if in_parts and hub.part_size and size > hub.part_size:
                count = -(-size // hub.part_size)
                urls = {str(n): f"{url}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{url}/complete", "header": {"chunk_size": str(hub.part_size), **urls}}
            answer["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
        objects.append(answer)
    return Answer.json({"transfer": "basic", "objects": objects})


def put(hub: HubServer, request: Request, oid: str, part: str) -> Answer:
    if part:
        hub.parts[oid, int(part)] = request.body
        return Answer(200, headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
    return _keep(hub, oid, request.body)


def complete(hub: HubServer, request: Request, oid: str) -> Answer:
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    missing = [n for n in numbers if (oid, n) not in hub.parts]
    if missing:
        raise RefusedError(400, f"Parts {missing} were not uploaded")
    return _keep(hub, oid, b"".join(hub.parts.pop((oid, n)) for n in numbers))


def _keep(hub: HubServer, oid: str, content: bytes) -> Answer:
    if hashlib.sha256(content).hexdigest() != oid:
        raise RefusedError(400, "The content does not match its SHA-256")
    hub.stored[oid] = content
    return Answer(200)


def verify(hub: HubServer, request: Request, oid: str) -> Answer:
    if len(hub.stored.get(oid, b"")) != request.json()["size"] or oid not in hub.stored:
        raise RefusedError(404, "The object was not uploaded, or has another size")
    return Answer.json({})


def served(hub: HubServer, request: Request, commit: Commit, path: str) -> Answer:
    """A file of a commit: small ones at once, those in LFS by a redirect to another host, as the Hub does."""
    blob = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if not blob.large:
        return _ranged(request, blob.content, {**headers, "ETag": f'"{blob.oid}"'})
    hub.stored[blob.sha256] = blob.content
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content)), "ETag": f'"{blob.oid}"'}
    return Answer(302, headers={**headers, "Location": f"http://localhost:{hub.port}/-/cdn/{blob.sha256}"})


def stored(hub: HubServer, request: Request, oid: str) -> Answer:
    if oid not in hub.stored:
        raise RefusedError(404, "There is no such object")
    return _ranged(request, hub.stored[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    headers = {"Content-Type": "application/octet-stream", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if wanted is None:
        return Answer(200, content, headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or len(content) - 1) + 1, len(content))
    if start >= len(content):
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
