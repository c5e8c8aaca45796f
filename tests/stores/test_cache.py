"""The cache gives what the store has, or is built again; it is never believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memtool_stores import MemoryStore, Space
from memtool_stores.testing import fill, some_values


def _files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.values"), key=lambda p: p.stat().st_mtime_ns)


def test_versions_with_the_same_adapters_share_a_file(grown: MemoryStore, cache: Path) -> None:
    grown.view().values()
    with grown.transaction("blob") as txn:
        txn.put_blob("b", b"1")
    grown.view().values()
    assert len(_files(cache)) == 1


def test_values_are_copies_and_cannot_be_written(grown: MemoryStore, space: Space) -> None:
    view = grown.view()
    values = view.values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(3)]))
    for segment in space.layout.segments:
        tensor = view.segment(segment.name)
        assert tensor.flags.c_contiguous
        columns = values[:, segment.offset : segment.offset + segment.numel]
        assert np.array_equal(tensor, columns.reshape(3, *segment.shape))
        for array in (values, tensor):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty"])
def test_a_wrong_file_is_built_again(grown: MemoryStore, cache: Path, damage: str) -> None:
    expected = grown.view().values().tobytes()
    (path,) = _files(cache)
    right = path.read_bytes()
    data = bytearray(right)
    if damage == "flip":
        data[100] ^= 1
    path.write_bytes(data if damage == "flip" else data[:50] if damage == "shorten" else b"")
    assert MemoryStore.open(grown.url).view().values().tobytes() == expected
    assert path.read_bytes() == right


def test_a_file_grows_from_the_older_one(grown: MemoryStore, space: Space, cache: Path) -> None:
    grown.view().values()
    (older,) = _files(cache)
    # A wrong row in the older file must not come through.
    data = bytearray(older.read_bytes())
    data[5] ^= 4
    older.write_bytes(data)
    with grown.transaction("more") as txn:
        fill(txn, space, "t3", 3)
    values = grown.view().values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(4)]))


def test_old_files_go(store: MemoryStore, space: Space, cache: Path) -> None:
    for seed in range(7):
        with store.transaction("add") as txn:
            fill(txn, space, f"a{seed}", seed)
        store.view().values()
    assert len(_files(cache)) == 4
    assert len(store.view("HEAD~6").values()) == 1


def test_without_a_place_for_it_values_come_all_the_same(
    grown: MemoryStore, cache: Path, space: Space
) -> None:
    cache.write_text("a file where the folder should be")
    values = grown.view().values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(3)]))
