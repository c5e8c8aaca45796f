"""A proxy in front of an object store that drops, loses, delays and refuses every so many requests.

What it does to a request is one of `FAULTS`. A request whose answer is lost was carried out.
"""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from urllib.parse import urlsplit

FAULTS = ("drop", "lose", "delay", "refuse")
"""Closed before it is forwarded; closed after it was carried out; slow; answered with 500.

There is "hold" besides: closed, and carried out when it is released.
"""

DELAY_SECONDS = 0.3


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `target`; one of `every` requests meets a fault.

    Only those of a method in `methods` (None: all) and with `only` in their path are counted.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = urlsplit(target).netloc
        self.no_faults()
        self._held: list[tuple[str, str, bytes, dict[str, str]]] = []
        # moto looks at the condition of a write and then writes, in as many threads as there are
        # requests; an object store does both at once.
        self.one_by_one = threading.Lock()

    def no_faults(self) -> None:
        """Requests are forwarded."""
        self._faults: tuple[str, ...] = ()

    def faults(
        self,
        *faults: str,
        every: int = 1,
        times: float = inf,
        only: str = "",
        methods: Collection[str] = (),
    ) -> None:
        """From here on, one of `every` requests meets one of the faults in turn, so many `times`.

        Only requests of these methods (none: all), with `only` in their path or body, count.
        """
        self._faults, self._every, self._times = faults, every, times
        self._only, self._methods = only, methods
        self._requests = itertools.count(1)
        self.met: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """Where clients go."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str, body: bytes) -> str:
        """What happens to the next request; nothing to most."""
        faults = self._faults
        if not faults or method not in (self._methods or {method}):
            return ""
        if self._only not in path and self._only.encode() not in body:
            return ""
        number = next(self._requests)
        if number % self._every or number > self._every * self._times:
            return ""
        found = faults[number // self._every % len(faults)]
        self.met[found] += 1
        return found

    def hold(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        """Carry a request out later."""
        self._held.append((method, path, body, headers))

    def release(self) -> None:
        """Carry out what was held, in its order."""
        while self._held:
            self.carried_out(*self._held.pop(0))

    def carried_out(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """What the object store answers."""
        connection = http.client.HTTPConnection(self.target, timeout=60)
        try:
            with self.one_by_one:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _forward(self) -> None:
        body = self._body()
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        request = self.command, self.path, body, headers
        fault = self.server.fault(self.command, self.path, body)
        self.close_connection = fault in {"drop", "lose", "hold"}
        match fault:
            case "drop":
                return
            case "hold":
                self.server.hold(*request)
                return
            case "refuse":
                self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
                return
            case "delay":
                time.sleep(DELAY_SECONDS)
        answer = self.server.carried_out(*request)
        if fault != "lose":
            self._answer(*answer)

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
def faulty(target: str) -> Iterator[FaultyProxy]:
    """A proxy that serves until the end of the block, without faults until it is asked for some."""
    proxy = FaultyProxy(target)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
