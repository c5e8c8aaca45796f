"""A small store in a fresh folder, with a cache of its own; a bucket on loopback."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtool_stores import MemoryStore, Space
from memtool_stores.testing import fill, small_space


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def space() -> Space:
    return small_space()


@pytest.fixture
def store(tmp_path: Path, space: Space) -> MemoryStore:
    return MemoryStore.create(tmp_path / "memory", space)


@pytest.fixture
def grown(store: MemoryStore, space: Space) -> MemoryStore:
    """Three adapters, one a commit: t0, t1, t2."""
    for task in range(3):
        with store.transaction(f"write task {task}", {"seed": task}) as txn:
            fill(txn, space, f"t{task}", task)
    return store


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An object store on loopback, in this process, with one bucket."""
    moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    pytest.importorskip("obstore", reason="obstore is not installed")
    kept = dict(os.environ)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        NO_PROXY="127.0.0.1,localhost",
    )
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield f"http://{host}:{port}"
    server.stop()
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def url(endpoint: str, tmp_path: Path) -> str:
    """A place in the bucket that nobody used before."""
    return f"s3://bucket/{tmp_path.name}/{time.monotonic_ns()}"
