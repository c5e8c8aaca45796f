"""A store in a bucket: moto's server on loopback, the same laws as in a directory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from memtool_stores import (
    AlreadyExistsError,
    ConflictError,
    IntegrityError,
    MemoryStore,
    NotFoundError,
    StorageError,
)
from memtool_stores import collect as collect_module
from memtool_stores import objects as objects_module
from memtool_stores.arrays import CRC32C_BYTES
from memtool_stores.objects import objects_at
from memtool_stores.testing import CONTRACT, small_space, some_values

ROOT = Path(__file__).parents[2]
SPACE = small_space()

WRITER = """
import sys
from memtool_stores import MemoryStore
from memtool_stores.testing import small_space, some_values
store, space = MemoryStore.open(sys.argv[1]), small_space()
for number in range(10):
    name = f"{sys.argv[2]}-{number}"
    store.run(lambda txn: txn.add(name, some_values(space, number)), name)
"""


@pytest.fixture
def store(url):
    made = MemoryStore.create(url, SPACE)
    for number in range(3):
        with made.transaction(f"write {number}") as txn:
            txn.add(f"a{number}", some_values(SPACE, number), {"task": number})
            txn.put_blob("note", str(number).encode())
    return made


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_a_bucket_keeps_the_contract(url, check):
    check(url)


def test_a_second_writer_conflicts_and_run_goes_on(store):
    other = MemoryStore.open(store.url)

    def meanwhile(txn):
        txn.add("late", some_values(SPACE, 5))
        with store.transaction("first") as first:
            first.add("first", some_values(SPACE, 4))

    with pytest.raises(ConflictError), other.transaction("late") as late:
        meanwhile(late)
    assert other.run(lambda txn: txn.add("late", some_values(SPACE, 5)), "late")
    assert [v.message for v in store.log(limit=2)] == ["late", "first"]


def test_no_commit_of_two_processes_is_lost(store):
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "cli", "stores"))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, store.url, name],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("left", "right")
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    names = {record.name for record in MemoryStore.open(store.url).view().adapters}
    assert names >= {f"{side}-{number}" for side in ("left", "right") for number in range(10)}


def test_there_and_back_again(store, tmp_path):
    store.tag("v1", "HEAD~1")
    down = store.clone(tmp_path / "here")
    assert [v.id for v in down.log()] == [v.id for v in store.log()]
    assert down.tags() == store.tags()
    assert down.verify().ok
    with down.transaction("at home") as txn:
        txn.add("home", some_values(SPACE, 8))
    assert down.verify().ok
    up = down.clone(f"{store.url}-back")
    assert len(up.view()) == 4
    assert up.verify().ok
    beside = up.clone(f"{store.url}-beside")
    assert beside.log()[0].message == "at home"
    file = tmp_path / "memory.bundle"
    store.bundle(file)
    again = MemoryStore.from_bundle(file, f"{store.url}-bundle")
    assert again.view("v1").version == store.view("v1").version


def test_a_flipped_byte_is_found(store):
    objects = objects_at(store.url)
    rows = [e for e in objects.list("ice/chunks") if e.nbytes == SPACE.layout.nbytes + CRC32C_BYTES]
    assert len(rows) == 3
    for entry in rows:
        data = bytearray(objects.read(entry.path))
        data[len(data) // 2] ^= 4
        objects.write(entry.path, bytes(data))
    report = MemoryStore.open(store.url).verify()
    assert not report.ok
    assert {"a0", "a1", "a2"} == {damage.name for damage in report.damages}
    with pytest.raises(IntegrityError):
        MemoryStore.open(store.url).view().value("a1")


def test_gc_spares_what_is_young_and_its_dry_run_changes_nothing(store):
    before = sorted(entry.path for entry in objects_at(store.url).list())
    planned = store.gc(keep_last=1, dry_run=True)
    assert len(planned.expired) == 3
    assert planned.freed_bytes == 0  # all of it is younger than an hour
    assert sorted(entry.path for entry in objects_at(store.url).list()) == before
    assert store.gc(keep_last=1).expired == planned.expired
    assert len(store.log()) == 1
    assert store.verify().ok


def test_the_dry_run_of_gc_counts_what_gc_frees(store, monkeypatch):
    monkeypatch.setattr(collect_module, "UNLOCKED_GRACE", timedelta(seconds=-5))
    before = sum(entry.nbytes for entry in objects_at(store.url).list())
    planned = store.gc(keep_last=1, dry_run=True)
    done = store.gc(keep_last=1)
    after = sum(entry.nbytes for entry in objects_at(store.url).list())
    assert (planned.expired, planned.freed_bytes) == (done.expired, done.freed_bytes)
    assert planned.freed_bytes > 0
    # The oldest snapshot is written anew, without a parent.
    assert abs(before - after - done.freed_bytes) < 100
    assert store.verify().ok


def test_gc_does_not_take_the_versions_of_a_damaged_tag(store):
    store.tag("v1", "HEAD~1")
    store.tag("gone", "HEAD~1")
    store.delete_tag("gone")
    assert store.verify().ok
    objects = objects_at(store.url)
    path = "ice/refs/tag.v1/ref.json"
    whole = objects.read(path)
    other = b'{"snapshot":"00000000000000000000"}'
    for wrong in (b"?" + whole[1:], b"", other):
        objects.write(path, wrong)
        fresh = MemoryStore.open(store.url)
        assert ("tag", "v1") in {(damage.what, damage.name) for damage in fresh.verify().damages}
        for dry_run in (True, False):
            with pytest.raises(IntegrityError, match="tag 'v1' is damaged"):
                fresh.gc(keep_last=1, dry_run=dry_run)
    objects.write(path, whole)
    store.gc(keep_last=1)
    assert len(store.view("v1")) == 2


def test_a_copy_that_fails_leaves_nothing(store, tmp_path):
    target = f"{store.url}-copy"

    def cut(step, total):
        if step == total - 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store.clone(target, cut)
    assert list(objects_at(target).list()) == []
    file = tmp_path / "memory.bundle"
    store.bundle(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "broken.bundle").write_bytes(data)
    with pytest.raises(IntegrityError):
        MemoryStore.from_bundle(tmp_path / "broken.bundle", target)
    assert list(objects_at(target).list()) == []
    assert store.clone(target).verify().ok
    with pytest.raises(AlreadyExistsError):
        store.clone(target)
    assert MemoryStore.open(target).verify().ok


def test_what_is_no_address_is_refused(endpoint, monkeypatch):
    for wrong in ("s3://", "s3:///x", "s3://bucket//x", "s3://bucket/../x", Path("s3://bucket/x")):
        with pytest.raises(StorageError, match="cannot keep a store"):
            MemoryStore.open(wrong)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1")
    with pytest.raises(StorageError, match="is no address"):
        MemoryStore.open("s3://bucket/memory")


def test_without_credentials_the_variables_are_named(endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        MemoryStore.open("s3://bucket/memory")


def test_a_server_that_is_silent_is_not_waited_for(endpoint, monkeypatch):
    monkeypatch.setattr(objects_module, "FIRST_ANSWER_TIMEOUT", "1s")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(StorageError, match="no answer") as told:
            MemoryStore.open("s3://bucket/memory")
    assert told.value.transient
    assert time.monotonic() - begin < 15


def test_what_is_not_there_is_said_soon(endpoint, monkeypatch):
    begin = time.monotonic()
    with pytest.raises(NotFoundError, match="nothing is there"):
        MemoryStore.open("s3://bucket/nothing")
    with pytest.raises(NotFoundError, match="no bucket 'nobucket'"):
        MemoryStore.open("s3://nobucket/memory")
    with pytest.raises(NotFoundError, match="no bucket"):
        MemoryStore.create("s3://nobucket/memory", SPACE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"no answer from http://127\.0\.0\.1:9"):
        MemoryStore.open("s3://bucket/memory")
    assert time.monotonic() - begin < 20
