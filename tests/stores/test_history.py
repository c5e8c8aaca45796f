"""Versions: names, log, diff, tags, branches, rollback, gc, clone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from memtool_stores import (
    AlreadyExistsError,
    MemoryStore,
    NotFoundError,
    SchemaError,
    Space,
    VersionExpiredError,
)
from memtool_stores.testing import fill


def test_log_tells_everything(grown: MemoryStore) -> None:
    log = grown.log()
    assert [v.message for v in log] == [
        "write task 2",
        "write task 1",
        "write task 0",
        "create the memory",
    ]
    assert [v.parent for v in log] == [*(v.id for v in log[1:]), None]
    assert log[0].metadata == {"seed": 2}
    assert all(v.time.tzinfo is not None for v in log)
    assert log[0].id == grown.head() == grown.view().version
    assert grown.log(limit=2) == log[:2]
    assert grown.log("HEAD~2") == log[2:]


def test_every_way_to_name_a_version(grown: MemoryStore) -> None:
    ids = [v.id for v in grown.log()]
    grown.tag("paper", "HEAD~1")
    grown.branch("side", "HEAD~2")
    for ref, expected in {
        "HEAD": ids[0],
        "main": ids[0],
        "HEAD~": ids[1],
        "HEAD~2": ids[2],
        "paper": ids[1],
        "paper~1": ids[2],
        "side": ids[2],
        ids[1]: ids[1],
        ids[1][:8]: ids[1],
        ids[1][:8].lower(): ids[1],
        f"{ids[0]}~3": ids[3],
    }.items():
        assert grown.view(ref).version == expected
    time = grown.log()[1].time
    assert grown.view(as_of=time).version == ids[1]
    assert grown.view(as_of=datetime.now(UTC)).version == ids[0]
    for ref in ("HEAD~9", "nothing", "HEAD~x", "ABC"):
        with pytest.raises(NotFoundError):
            grown.view(ref)
    with pytest.raises(NotFoundError):
        grown.view(as_of=time - timedelta(days=1))
    with pytest.raises(VersionExpiredError):
        grown.view("ABCDEFGHJKMNPQRSTVW0")


def test_names_are_taken_once(grown: MemoryStore) -> None:
    grown.tag("v1")
    with pytest.raises(AlreadyExistsError):
        grown.tag("v1", "HEAD~1")
    with pytest.raises(AlreadyExistsError):
        grown.branch("main")
    for name in ("HEAD", "a/b", "", "~1", "-x", grown.head()):
        with pytest.raises(SchemaError):
            grown.tag(name)
    grown.delete_tag("v1")
    assert grown.tags() == {}
    with pytest.raises(NotFoundError):
        grown.delete_tag("v1")
    with pytest.raises(NotFoundError):
        grown.delete_branch("main")


def test_rollback_keeps_what_was(grown: MemoryStore, space: Space) -> None:
    head = grown.head()
    backup = grown.rollback("HEAD~2")
    assert [r.name for r in grown.view().adapters] == ["t0"]
    assert grown.branches()[backup] == head
    # History goes on from there with other content in the same rows.
    with grown.transaction("another way") as txn:
        fill(txn, space, "t1", 77)
    assert grown.view().value("t1").tobytes() != grown.view(backup).value("t1").tobytes()
    assert grown.rollback(backup) != backup
    assert grown.head() == head
    assert grown.verify().ok


def test_branches_can_be_written(grown: MemoryStore, space: Space) -> None:
    grown.branch("side", "HEAD~1")
    with grown.transaction("aside", branch="side") as txn:
        fill(txn, space, "s", 5)
    assert [r.name for r in grown.view("side").adapters] == ["t0", "t1", "s"]
    assert [r.name for r in grown.view().adapters] == ["t0", "t1", "t2"]
    grown.delete_branch("side")
    assert list(grown.branches()) == ["main"]


def test_diff_names_everything(grown: MemoryStore, space: Space) -> None:
    x, y = np.eye(2, dtype=np.float32)
    with grown.transaction("keys") as txn:
        txn.set_keys(np.stack([[x, x, x], [x, x, x]]))
        txn.put_blob("kept", b"1")
        txn.put_blob("changed", b"1")
    with grown.transaction("more") as txn:
        txn.set_keys(np.stack([[x, y, -x], [x, x, -x]]))
        txn.put_blob("changed", b"2")
        txn.update("t0", domain="photo")
        txn.remove("t2")
        fill(txn, space, "t3", 3)
    diff = grown.diff("HEAD~1", "HEAD")
    assert [r.name for r in diff.added] == ["t3"]
    assert [r.name for r in diff.removed] == ["t2"]
    assert [(r.name, r.domain) for r in diff.changed] == [("t0", "photo")]
    assert diff.key_drift_degrees == pytest.approx({"t0": 0.0, "t1": 45.0})
    assert diff.changed_blobs == ("changed",)
    back = grown.diff("HEAD", "HEAD~1")
    assert [r.name for r in back.added] == ["t2"]


def _payload_and_disk(store: MemoryStore) -> tuple[int, int]:
    files = [p for p in (Path(store.url) / "ice").rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if p.parent.name == "chunks"), sum(
        p.stat().st_size for p in files
    )


def test_gc_expires_frees_and_says_so_before(grown: MemoryStore) -> None:
    for seed in range(4):
        with grown.transaction("keys") as txn:
            keys = np.random.default_rng(seed).standard_normal((4, 3, 64)).astype(np.float32)
            txn.set_keys(keys)
    grown.tag("kept", "HEAD~4")
    old = grown.view("HEAD~3")
    _, before = _payload_and_disk(grown)
    plan = grown.gc(keep_last=2, dry_run=True)
    assert _payload_and_disk(grown)[1] == before
    assert len(grown.log()) == 8
    report = grown.gc(keep_last=2)
    _, after = _payload_and_disk(grown)
    assert (report.expired, report.freed_bytes) == (plan.expired, plan.freed_bytes)
    assert before - after == pytest.approx(report.freed_bytes, abs=100)
    assert len(report.expired) == 5
    assert [v.parent for v in grown.log()] == [grown.log()[1].id, None]
    assert grown.verify().ok
    assert len(grown.view("kept")) == 3
    with pytest.raises(VersionExpiredError):
        old.keys()
    with pytest.raises(VersionExpiredError):
        grown.view(old.version)
    assert grown.gc().freed_bytes == 0
    assert grown.gc(keep_days=1).expired == ()
    with pytest.raises(SchemaError):
        grown.gc(keep_last=0)
    with pytest.raises(SchemaError):
        grown.gc(keep_days=-1)


def test_gc_takes_what_a_crash_left(grown: MemoryStore) -> None:
    session = grown._repository.writable_session("main")
    import zarr

    zarr.open_group(session.store, mode="r+").attrs["left"] = "over"
    session.flush("a commit that never was")
    assert grown.log()[0].message == "write task 2"
    assert grown.gc().deleted_files > 0
    assert grown.verify().ok


def test_clone_has_every_version_and_its_own_life(
    grown: MemoryStore, space: Space, tmp_path: Path
) -> None:
    grown.tag("v1", "HEAD~1")
    copy = grown.clone(tmp_path / "copies" / "memory")
    assert copy.log() == grown.log()
    assert copy.tags() == grown.tags()
    with copy.transaction("only there") as txn:
        fill(txn, space, "new", 8)
    assert len(copy.view()) == 4
    assert len(grown.view()) == 3
    assert copy.verify().ok
    with pytest.raises(AlreadyExistsError):
        grown.clone(copy.url)
    assert sorted(p.name for p in (tmp_path / "copies").iterdir()) == ["memory"]
