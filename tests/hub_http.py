"""The HTTP of the tests' hub: requests from the socket to a hub, and its answers back, with ranges and cuts."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from tests.hub_repository import chunks


@dataclass
class Request:
    """One request as the server saw it; it is logged before its first byte goes out."""

    method: str
    path: str  # quoted as it came, without the query
    status: int
    range: str | None  # the Range header
    authorized: bool  # whether it carried the server's token
    sent: int = 0  # bytes of the body


@dataclass
class Answer:
    """A response: the body is bytes, or the range [start, stop) of a blob, of which at most `limit` bytes are sent."""

    status: int
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    limit: int | None = None

    @classmethod
    def of(cls, content: object, **headers: str) -> Self:
        body = json.dumps(content).encode()
        return cls(200, body, {"Content-Type": "application/json"} | headers, stop=len(body))

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None, **headers: str) -> Self:
        """A refusal; the client picks its exception by the code, such as RepoNotFound or EntryNotFound."""
        body = json.dumps({"error": message}).encode()
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls(status, body, {"Content-Type": "application/json"} | headers, stop=len(body))


class Hub(Protocol):
    """What the handler asks."""

    log: list[Request]

    def accepts(self, headers: Message) -> bool: ...

    def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer: ...


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a snapshot opens eight connections at once; the default of five would delay some


class Handler(BaseHTTPRequestHandler):
    """Reads a request from the socket, asks the hub for the answer and writes it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client may leave in the middle of a file
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self._body()
        answer = self.hub.answer(self.command, self.path, self.headers, body)
        path, authorized = urlsplit(self.path).path, self.hub.accepts(self.headers)
        request = Request(self.command, path, answer.status, self.headers.get("Range"), authorized)
        self.hub.log.append(request)
        self.send_response(answer.status)
        length = answer.stop - answer.start
        for header in {**answer.headers, "Content-Length": str(length)}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = length if answer.limit is None else min(answer.limit, length)
        self.close_connection = self.close_connection or limit < length
        for chunk in chunks(answer.body, answer.start, answer.start + limit):
            request.sent += len(chunk)  # before the write, so that a client that has the file finds it in the log
            self.wfile.write(chunk)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET
