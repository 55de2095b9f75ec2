"""One connection to the server: reads requests, sends answers, and lets them go wrong as scripted."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hub_server.faults import Fault, flipped
from tests.hub_server.server import HubServer, Recorded


@dataclass
class Request:
    method: str
    path: str
    """Decoded nowhere: revisions and paths in it are still quoted."""
    query: dict[str, str]
    headers: Any
    body: bytes
    token: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"null")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class RefusedError(Exception):
    """An error that the server answers with; `code` goes into X-Error-Code, which selects the client's exception."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.answer = Answer.json({"error": message}, status, **{"X-Error-Message": message})
        if code:
            self.answer.headers["X-Error-Code"] = code


class DroppedError(Exception):
    """There is no answer, or no more of it."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, ValueError)):  # clients go away as they like
            super().handle_error(request, client_address)


class Exchange(BaseHTTPRequestHandler):
    """Bound to its `hub` by a subclass."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._exchange()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass

    def _exchange(self) -> None:
        hub = self.hub
        fault = next((f for f in list(hub.faults) if f.applies(self.command, self.path)), None)
        recorded = Recorded(self.command, self.path, self._token())
        with hub.lock:
            hub.requests.append(recorded)
        try:
            self._before(fault)
            answer = self._answered(self._request(fault), fault)
            if fault is not None and fault.kind == "lost_response":
                self._reset()
            recorded.status = answer.status
            self._send(answer, fault)
        except (DroppedError, ConnectionError):  # by us, or by a client that is gone
            self.close_connection = True

    def _before(self, fault: Fault | None) -> None:
        if self.hub.stopping.is_set():  # a connection that was kept open
            self._reset()
        if fault is None:
            return
        if fault.kind == "reset":
            self._reset()
        if fault.kind == "hang":
            self.hub.stopping.wait(fault.seconds)
            raise DroppedError
        if fault.kind == "stale":
            from tests.hub_server.routes import repository_in

            repo = repository_in(self.hub, self.path)
            if repo is not None:
                self.hub.commit(repo.id, {"NOTES.md": b"by somebody else"}, repo_type=repo.type)

    def _request(self, fault: Fault | None) -> Request:
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "reset_upload":
            self.rfile.read(max(1, length // 2) if length else 1)
            self._reset()
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self._whole(length)
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        return Request(self.command, url.path, query, self.headers, body, self._token())

    def _chunk(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise DroppedError
        chunk = self._whole(int(line.split(b";")[0], 16))
        self.rfile.readline()
        return chunk

    def _whole(self, length: int) -> bytes:
        """The next `length` bytes; a client that dies in the middle of a request has asked for nothing."""
        content = self.rfile.read(length)
        if len(content) < length:
            raise DroppedError
        return content

    def _answered(self, request: Request, fault: Fault | None) -> Answer:
        from tests.hub_server.routes import respond

        if fault is not None and fault.kind == "status":
            message = HTTPStatus(fault.status).phrase
            answer = Answer.json({"error": message}, fault.status)
            if fault.retry_after is not None:
                answer.headers["Retry-After"] = f"{fault.retry_after:g}"
            return answer
        try:
            with self.hub.lock:
                return respond(self.hub, request)
        except RefusedError as refusal:
            return refusal.answer

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        kind = None if fault is None else fault.kind
        body = flipped(answer.body) if kind == "flip" else answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind in ("reset_download", "truncate"):
            self.wfile.write(body[: len(body) // 2])
            if kind == "truncate":
                raise DroppedError
            # What was sent so far is to arrive: a reset discards what the other side has not read yet.
            self.hub.stopping.wait(0.1)
            self._reset()
        if kind == "drip":
            assert fault is not None
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                if self.hub.stopping.wait(fault.seconds):
                    raise DroppedError
            return
        self.wfile.write(body)

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None

    def _reset(self) -> None:
        """Close with RST, as a connection that breaks does."""
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
        raise DroppedError
