"""Nothing that gives access is printed, whatever an object store answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cli.conftest import Memtool

pytest.importorskip("obstore", reason="obstore is not installed")

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA0123456789ABCDEF",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzzzzzzzzzz",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaDKq4Zzzzz==",
}
PASSWORD = "tr0ub4dor3"
ANSWERS = (200, 400, 403, 404, 500)


class _Echo(BaseHTTPRequestHandler):
    """Answers a request for /<status>/… with that status, and with all that it was sent."""

    def _echo(self) -> None:
        status = int(self.path.split("/")[1])
        sent = f"<Error><Code>X</Code><Message>{self.path} {self.headers}</Message></Error>"
        self.send_response(status)
        self.end_headers()
        self.wfile.write(sent.encode())

    do_GET = do_HEAD = do_PUT = do_POST = _echo

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def echo() -> Iterator[str]:
    """Host and port of a server that sends back what it gets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_secret_is_printed(
    memtool: Memtool, process: Memtool, environ: dict[str, str], echo: str
) -> None:
    endpoints = [f"http://user:{PASSWORD}@{echo}/{status}" for status in ANSWERS]
    endpoints += [f"http://{PASSWORD}@127.0.0.1:9", f"user:{PASSWORD}@{echo}"]
    environ.update(SECRETS, AWS_REGION="us-east-1", NO_PROXY="127.0.0.1")
    runs = [(memtool, endpoint, option) for endpoint in endpoints for option in ("--debug", "-q")]
    runs += [(process, endpoints[ANSWERS.index(403)], "--debug")]
    for start, endpoint, option in runs:
        done = start("log", "--store", "s3://bucket/x", option, AWS_ENDPOINT_URL=endpoint)
        assert done.returncode in {1, 2, 3}, done
        assert done.stderr
        for secret in (*SECRETS.values(), PASSWORD):
            assert secret not in done.stdout + done.stderr, (endpoint, option)
