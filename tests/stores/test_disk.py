"""A disk that is full, or closed for writing: a clear error, the store as it was, and a way on."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtool_stores import MemoryStore, Space, StorageError
from memtool_stores.testing import fill, some_values


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own, where this machine lets us mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def _no_file_above(nbytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk is like without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _closed(folder: Path) -> Iterator[None]:
    """No file of the folder can be written or made; root has to mount it so."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        return
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        yield
    finally:
        for place in places:
            place.chmod(0o755)


def test_a_read_only_store_can_be_read(tmp_path: Path, space: Space) -> None:
    folder = tmp_path / "mount"
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(_mounted(folder, "size=4m"))
        else:
            folder.mkdir()
        store = MemoryStore.create(folder / "memory", space)
        with store.transaction("write") as txn:
            fill(txn, space, "a", 1)
        with _closed(folder):
            store = MemoryStore.open(folder / "memory")
            assert store.view().value("a").tobytes() == some_values(space, 1).tobytes()
            assert store.verify().ok
            with (
                pytest.raises(StorageError, match="no permission to write"),
                store.transaction("never") as txn,
            ):
                fill(txn, space, "b", 2)
            for refused in (
                lambda: store.tag("v1"),
                lambda: store.rollback("HEAD~1"),
                lambda: store.gc(keep_last=1),
                lambda: MemoryStore.create(folder / "other", space),
            ):
                with pytest.raises(StorageError, match="no permission to write"):
                    refused()
            assert [v.message for v in store.log()] == ["write", "create the memory"]
        with store.transaction("open again") as txn:
            fill(txn, space, "b", 2)
        assert store.verify().ok


def test_a_full_disk_stops_a_commit_before_it_begins(tmp_path: Path, space: Space) -> None:
    folder = tmp_path / "mount"
    with _mounted(folder, "size=2m"):
        store = MemoryStore.create(folder / "memory", space)
        with store.transaction("write") as txn:
            fill(txn, space, "a", 1)
        (folder / "others").write_bytes(bytes(1_200_000))
        with (
            pytest.raises(StorageError, match=r"bytes free, .* bytes needed") as caught,
            store.transaction("too much") as txn,
        ):
            txn.put_blob("large", np.random.default_rng(0).bytes(600_000))
        assert not caught.value.transient
        assert "the last version is as it was" in caught.value.message
        assert caught.value.remedy is not None
        assert [v.message for v in store.log()] == ["write", "create the memory"]
        assert store.verify().ok
        (folder / "others").unlink()
        with store.transaction("there is room") as txn:
            txn.put_blob("large", np.random.default_rng(0).bytes(600_000))
        assert store.verify().ok


@pytest.mark.parametrize("files", range(33, 79, 3))
def test_a_disk_that_fills_during_a_commit(tmp_path: Path, space: Space, files: int) -> None:
    """No file can be made although bytes are free, so the commit fails on its way."""
    folder = tmp_path / "mount"
    with _mounted(folder, f"size=4m,nr_inodes={files}"):
        store = MemoryStore.create(folder / "memory", space)
        done = 0
        with pytest.raises(StorageError, match="is full") as caught:  # noqa: PT012
            for done in range(60):
                with store.transaction(f"write {done}") as txn:
                    fill(txn, space, f"a{done}", done)
        assert not caught.value.transient
        fresh = MemoryStore.open(store.url)
        assert len(fresh.view()) == done > 0
        report = fresh.verify()
        assert report.ok, report.damages
        # There is a way out.
        fresh.gc(keep_last=1)
        with fresh.transaction("again") as txn:
            fill(txn, space, "again", 7)
        assert fresh.verify().ok
        assert len(fresh.view()) == done + 1


def test_a_file_that_cannot_be_written_to_its_end(store: MemoryStore, space: Space) -> None:
    with store.transaction("write") as txn:
        fill(txn, space, "a", 1)
    data = np.random.default_rng(0).bytes(300_000)
    with _no_file_above(100_000):
        with (  # noqa: PT012
            pytest.raises(StorageError, match="larger than this process may write") as caught,
            store.transaction("too much") as txn,
        ):
            fill(txn, space, "b", 2)
            txn.put_blob("large", data)
        assert caught.value.remedy is not None
        fresh = MemoryStore.open(store.url)
        assert [v.message for v in fresh.log()] == ["write", "create the memory"]
        assert fresh.verify().ok
        with fresh.transaction("a small one") as txn:
            fill(txn, space, "small", 3)
    with store.transaction("again") as txn:
        txn.put_blob("large", data)
    assert store.view().blob("large") == data
    assert [r.name for r in store.view().adapters] == ["a", "small"]
    store.gc()
    assert store.verify().ok
