"""A proxy in front of an object store that loses, cuts, delays and refuses every so many requests.

What it does to a request is one of `FAULTS`. A request whose answer is lost was carried out.
"""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("drop", "lose", "delay", "refuse")
"""Closed before it is forwarded; closed after it was carried out; late; answered with 500."""

DELAY_SECONDS = 0.3


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `target`; one of `every` requests meets a fault.

    Only those of a method in `methods` (None: all) and with `only` in their path are counted.
    """

    daemon_threads = True

    def __init__(self, target: str, *, every: int = 4, faults: tuple[str, ...] = FAULTS) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = urlsplit(target).netloc
        self.every = every
        self.faults = faults
        self.methods: frozenset[str] | None = None
        self.only = ""
        self.met: Counter[str] = Counter()
        self.requests = itertools.count(1)
        # moto looks at the condition of a write and then writes, in as many threads as there are
        # requests; an object store does both at once.
        self.conditional = threading.Lock()

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> str:
        """What happens to the next request; nothing for most."""
        if method not in (self.methods or {method}) or self.only not in path:
            return ""
        number = next(self.requests)
        if number % self.every:
            return ""
        found = self.faults[number // self.every % len(self.faults)]
        self.met[found] += 1
        return found


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        body = self._body()
        fault = self.server.fault(self.command, self.path)
        match fault:
            case "drop":
                self.close_connection = True
                return
            case "refuse":
                self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
                return
            case "delay":
                time.sleep(DELAY_SECONDS)
        status, headers, answer = self._carried_out(body)
        if fault == "lose":
            self.close_connection = True
            return
        self._answer(status, headers, answer)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _carried_out(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            with self.server.conditional:
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        skipped = {"transfer-encoding", "connection", "content-length"}
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() not in skipped:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

    def log_message(self, *args: object) -> None:
        """Nothing: the faults are wanted."""


@contextmanager
def faulty(
    target: str, *, every: int = 4, faults: tuple[str, ...] = FAULTS
) -> Iterator[FaultyProxy]:
    """A proxy that serves until the end of the block."""
    proxy = FaultyProxy(target, every=every, faults=faults)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
