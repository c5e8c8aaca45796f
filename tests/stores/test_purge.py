"""Purge: the bytes of a row are gone, provably, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from memtool_stores import MemoryStore, NotFoundError, Space
from memtool_stores.testing import MODULE, fill, some_values


def _files_with(data: bytes, *folders: str | Path) -> list[Path]:
    """Every file below these folders in which the bytes lie somewhere."""
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in files if data in path.read_bytes()]


@pytest.mark.parametrize("removed_before", [False, True])
def test_after_purge_and_gc_the_bytes_are_nowhere(
    grown: MemoryStore, space: Space, cache: Path, removed_before: bool
) -> None:
    # A piece that lies in one place in every file: the first tensor.
    values = some_values(space, 1)[: space.layout.segments[0].numel].tobytes()
    keys = np.random.default_rng(99).standard_normal((2, 3, 4)).astype(np.float32)
    with grown.transaction("keys") as txn:
        txn.set_keys(keys)
    gone = grown.view().get("t1")
    grown.view().values()
    grown.view("HEAD~2").values()
    assert len(_files_with(values, grown.url)) == 1
    assert _files_with(values, cache)
    if removed_before:
        with grown.transaction("remove") as txn:
            txn.remove("t1")
    with grown.transaction("purge") as txn:
        txn.purge("t1")
    assert not _files_with(values, cache)
    # Before gc, older versions still have it; one who looks at them fills the cache again.
    assert list(grown.find_bytes([gone.sha256])) == [gone.sha256]
    grown.view("HEAD~2").values()
    assert _files_with(values, cache)
    assert grown.verify().ok
    grown.gc(keep_last=1)
    assert not _files_with(values, grown.url, cache)
    assert not _files_with(keys[:, 1].tobytes(), grown.url)
    assert grown.find_bytes([gone.sha256]) == {}
    assert grown.verify().ok
    view = MemoryStore.open(grown.url).view()
    assert [r.name for r in view.adapters] == ["t0", "t2"]
    assert np.array_equal(view.values(), np.stack([some_values(space, t) for t in (0, 2)]))
    assert np.array_equal(view.keys(), keys[:, [0, 2]])  # type: ignore[arg-type]
    assert (view.state.purged, view.state.rows) == (1, 3)
    with pytest.raises(NotFoundError):
        view.value("t1")


def test_atoms_are_purged_like_adapters(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("atoms") as txn:
        added = txn.add_atoms("a", some_values(space, 7))
        txn.add_atoms("b", some_values(space, 8))
    digest = grown.view().get("a").sha256
    with grown.transaction("purge") as txn:
        txn.purge(added)
    grown.gc(keep_last=1)
    assert grown.find_bytes([digest]) == {}
    assert not _files_with(some_values(space, 7).tobytes(), grown.url)
    assert np.array_equal(grown.view().atoms(MODULE).keys, some_values(space, 8)[:10].reshape(2, 5))
    assert grown.verify().ok


def test_what_is_added_and_purged_at_once_is_never_written(
    grown: MemoryStore, space: Space
) -> None:
    with grown.transaction("both") as txn:
        fill(txn, space, "never", 9)
        txn.purge("never")
        fill(txn, space, "after", 10)
    assert not _files_with(some_values(space, 9).tobytes(), grown.url)
    view = grown.view()
    assert [(r.name, r.row) for r in view.adapters][-1] == ("after", 4)
    assert view.value("after").tobytes() == some_values(space, 10).tobytes()
    assert view.values().shape == (4, space.numel)
    assert grown.verify().ok


def test_the_last_row_can_be_purged_and_rows_are_not_used_again(
    grown: MemoryStore, space: Space
) -> None:
    with grown.transaction("purge") as txn:
        txn.purge("t2")
    with grown.transaction("again") as txn:
        fill(txn, space, "t2", 5)
    view = grown.view()
    assert [(r.name, r.row) for r in view.adapters] == [("t0", 0), ("t1", 1), ("t2", 3)]
    assert grown.verify().ok


def test_a_name_that_fits_several_removed_rows_needs_the_id(
    grown: MemoryStore, space: Space
) -> None:
    ids = [grown.view().get("t1").id]
    with grown.transaction("forget twice") as txn:
        txn.remove("t1")
        ids.append(fill(txn, space, "t1", 11))
        txn.remove("t1")
    with grown.transaction("purge") as txn:
        with pytest.raises(NotFoundError, match="2 removed rows"):
            txn.purge("t1")
        txn.purge(ids[0])
        # Now the name is enough.
        txn.purge("t1")
        for name in ("t1", ids[0], ids[1]):
            with pytest.raises(NotFoundError, match="purged already"):
                txn.purge(name)
        with pytest.raises(NotFoundError):
            txn.purge("t7")
        # The name is free again, and the live one goes first.
        fill(txn, space, "t1", 12)
    assert grown.view().state.purged == 2
    with grown.transaction("remove and rename") as txn:
        txn.remove("t0")
        txn.update("t1", name="t0")
        txn.purge("t0")
    assert [r.name for r in grown.view().adapters] == ["t2"]
    assert {r.state for r in grown.view().catalog.records.values()} == {"live", "removed", "purged"}
    assert grown.verify().ok


def test_holders_are_the_names_that_keep_the_bytes(grown: MemoryStore, space: Space) -> None:
    record = grown.view().get("t1")
    grown.tag("without", "HEAD~2")
    grown.tag("with", "HEAD~1")
    grown.branch("side", "HEAD~1")
    with grown.transaction("purge") as txn:
        txn.purge("t1")
    grown.tag("after")
    grown.branch("later")
    assert grown.holders(record.id) == ["side", "with"]
    with grown.transaction("purge there too", branch="side") as txn:
        fill(txn, space, "s", 5)
    with grown.transaction("purge there too", branch="side") as txn:
        txn.purge("t1")
    # The tip of side is clean, but the version before it, which main has not, is not.
    assert grown.holders(record.id) == ["side", "with"]
    grown.delete_tag("with")
    grown.delete_branch("side")
    assert grown.holders(record.id) == []
    grown.gc(keep_last=1)
    assert grown.find_bytes([record.sha256]) == {}
    assert grown.holders("nobody") == []


def test_a_row_of_another_branch_in_the_same_place_is_no_holder(
    grown: MemoryStore, space: Space
) -> None:
    grown.branch("side", "HEAD~1")
    with grown.transaction("aside", branch="side") as txn:
        fill(txn, space, "other", 20)
    record = grown.view().get("t2")
    with grown.transaction("purge") as txn:
        txn.purge("t2")
    assert grown.view("side").get("other").row == record.row
    assert grown.holders(record.id) == []


def test_the_same_bytes_in_another_row_are_found(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("twin") as txn:
        fill(txn, space, "twin", 1)
    digest = grown.view().get("t1").sha256
    with grown.transaction("purge") as txn:
        txn.purge("t1")
    grown.gc(keep_last=1)
    assert len(grown.find_bytes([digest])[digest]) == 1
    with grown.transaction("purge") as txn:
        txn.purge("twin")
    grown.gc(keep_last=1)
    assert grown.find_bytes([digest]) == {}


def test_rolling_back_over_a_purge_brings_the_row_back(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("purge") as txn:
        txn.purge("t1")
    grown.rollback("HEAD~1")
    assert grown.view().value("t1").tobytes() == some_values(space, 1).tobytes()
    assert grown.verify().ok


def test_a_purge_keeps_other_changes_of_the_same_commit(grown: MemoryStore, space: Space) -> None:
    keys = np.random.default_rng(99).standard_normal((2, 3, 4)).astype(np.float32)
    with grown.transaction("all at once", {"task": json.dumps([1])}) as txn:
        txn.set_keys(keys)
        txn.purge("t0")
        fill(txn, space, "t3", 3)
        txn.put_blob("head", b"1")
    view = MemoryStore.open(grown.url).view()
    assert np.array_equal(view.keys(), keys[:, 1:])  # type: ignore[arg-type]
    assert [r.name for r in view.adapters] == ["t1", "t2", "t3"]
    assert not _files_with(keys[0, 0].tobytes(), grown.url)
    assert view.blob("head") == b"1"
    assert grown.verify().ok


def test_a_purge_before_the_newest_version_is_no_damage(grown: MemoryStore, space: Space) -> None:
    """Nor where gc made of the version after it the oldest, or it came and went at once."""
    for number in range(3):
        with grown.transaction("purge") as txn:
            fill(txn, space, f"at once {number}", 7)
            txn.purge(f"at once {number}")
            if number == 0:
                txn.purge("t1")
    assert grown.verify().ok
    grown.gc(keep_last=2)
    assert grown.verify().damages == ()


def test_a_purged_row_with_bytes_is_damage(grown: MemoryStore, space: Space) -> None:
    """As if an old chunk had come back: only a version made by hand can be so."""
    with grown.transaction("purge") as txn:
        txn.purge("t1")
    import zarr

    from memtool_stores import sums
    from memtool_stores.store import _sealed
    from memtool_stores.tree import Tree

    session = grown._repository.writable_session("main")
    zarr.open_group(session.store, mode="r+")["values"][1] = some_values(space, 1)
    parent = grown.head()
    sealed = _sealed(Tree(session), parent=parent, message="by hand", user="{}")
    version = session.flush("by hand", metadata=sealed)
    sums.write(grown.url, grown._repository, version)
    grown._repository.reset_branch("main", version, from_snapshot_id=parent)
    (damage,) = grown.verify().damages
    assert (damage.what, damage.name, damage.found) == ("values", "t1", "bytes")
