"""What cannot be done: a clear error that says where and what helps, and the store as it was."""

from __future__ import annotations

from pathlib import Path

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
