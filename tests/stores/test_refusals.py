"""What cannot be done: a clear error that says where and what helps, and the store as it was."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from memtool_stores import (
    AlreadyExistsError,
    MemoryStore,
    NewerSchemaError,
    NotFoundError,
    Space,
    StorageError,
)
from memtool_stores.testing import fill, some_values


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        MemoryStore.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotFoundError, match="it is not a store"):
        MemoryStore.open(tmp_path / "folder")
    assert not MemoryStore.exists(tmp_path / "folder")
    with pytest.raises(StorageError, match="cannot keep a store at"):
        MemoryStore.open("ftp://host/x")


def test_a_place_that_is_taken(store: MemoryStore, space: Space, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError):
        MemoryStore.create(store.url, space)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(AlreadyExistsError):
        MemoryStore.create(tmp_path / "full", space)
    (tmp_path / "empty").mkdir()
    assert MemoryStore.exists(MemoryStore.create(tmp_path / "empty", space).url)
    (tmp_path / "file").write_text("x")
    with pytest.raises(AlreadyExistsError):
        MemoryStore.create(tmp_path / "file", space)
    with pytest.raises(StorageError):
        MemoryStore.create(tmp_path / "file" / "below", space)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full", "memory"]


def test_a_store_of_a_newer_memtool(grown: MemoryStore) -> None:
    session = grown._repository.writable_session("main")
    group = zarr.open_group(session.store, mode="r+")
    group.attrs["min_reader"] = 99
    session.commit("from the future")
    with pytest.raises(NewerSchemaError, match="needs a memtool that reads schema 99"):
        MemoryStore.open(grown.url)


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


def test_a_read_only_store_can_be_read(tmp_path: Path, space: Space) -> None:
    folder = tmp_path / "mount"
    with _mounted(folder, "size=4m"):
        store = MemoryStore.create(folder / "memory", space)
        with store.transaction("write") as txn:
            fill(txn, space, "a", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        store = MemoryStore.open(folder / "memory")
        assert store.view().value("a").tobytes() == some_values(space, 1).tobytes()
        assert store.verify().ok
        with (
            pytest.raises(StorageError, match="no permission to write"),
            store.transaction("never") as txn,
        ):
            fill(txn, space, "b", 2)
        with pytest.raises(StorageError, match="no permission to write"):
            store.tag("v1")
        with pytest.raises(StorageError, match="no permission to write"):
            MemoryStore.create(folder / "other", space)


def test_a_full_disk_stops_a_commit_before_it_begins(tmp_path: Path, space: Space) -> None:
    folder = tmp_path / "mount"
    with _mounted(folder, "size=1m"):
        store = MemoryStore.create(folder / "memory", space)
        with store.transaction("write") as txn:
            fill(txn, space, "a", 1)
        with (
            pytest.raises(StorageError, match=r"bytes free, .* bytes needed") as caught,
            store.transaction("too much") as txn,
        ):
            txn.put_blob("large", np.random.default_rng(0).bytes(2_000_000))
        assert not caught.value.transient
        assert [v.message for v in store.log()] == ["write", "create the memory"]
        assert store.verify().ok


def test_a_disk_that_fills_during_a_commit(tmp_path: Path, space: Space) -> None:
    """No file can be made although bytes are free, so the commit fails on its way."""
    folder = tmp_path / "mount"
    with _mounted(folder, "size=4m,nr_inodes=60"):
        store = MemoryStore.create(folder / "memory", space)
        done = 0
        with pytest.raises(StorageError, match="is full") as caught:  # noqa: PT012
            for done in range(60):
                with store.transaction(f"write {done}") as txn:
                    fill(txn, space, f"a{done}", done)
        assert not caught.value.transient
        fresh = MemoryStore.open(store.url)
        assert len(fresh.view()) == done > 0
        assert fresh.verify().ok
        # There is a way out.
        fresh.gc(keep_last=1)
        with fresh.transaction("again") as txn:
            fill(txn, space, "again", 7)
        assert fresh.verify().ok
