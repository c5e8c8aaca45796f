"""A memory served in a thread of this process, on the loopback, and one who asks it."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from memtool.serving.limits import Limits
from memtool.serving.models import Models
from memtool.serving.run import Server, bound

LINE = "line-between-parts"
FORM = f"multipart/form-data; boundary={LINE}"


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        return self.json["error"]["message"]


@dataclass
class Served:
    """A service; `stop` asks it to end."""

    port: int
    server: Server
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] = {}, verb: str = ""
    ) -> Reply:
        """Ask once: bytes as they are, anything else as JSON; without a body it is a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = dict(headers)
        if self.key:
            sent.setdefault("Authorization", f"Bearer {self.key}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(verb or ("GET" if body is None else "POST"), path, body, sent)
            reply = connection.getresponse()
            text = reply.read().decode()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, text)
        finally:
            connection.close()

    def send(self, *files: tuple[str, bytes], path: str = "/v1/predict", **fields: str) -> Reply:
        """Files and fields as a form."""
        return self.ask(path, form(*files, **fields), {"Content-Type": FORM})

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        text = self.ask("/metrics").text
        return sum(float(one) for one in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))

    def stop(self) -> None:
        self.server.should_exit = True


def form(*files: tuple[str, bytes], **fields: str) -> bytes:
    found = b""
    for name, value in fields.items():
        head = f'--{LINE}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        found += head.encode() + value.encode() + b"\r\n"
    for name, data in files:
        head = f'--{LINE}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        found += head.encode() + data + b"\r\n"
    return found + f"--{LINE}--\r\n".encode()


@contextmanager
def served(models: Models, **limits: Any) -> Iterator[Served]:
    """The models, served until the block ends; how it ended is looked at."""
    listening, ready = bound("127.0.0.1", 0), threading.Event()
    server = Server(models, Limits(**limits), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert ready.wait(30)
        yield Served(listening.getsockname()[1], server, limits.get("key"))
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
