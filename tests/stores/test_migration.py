"""Schemas: an old store is read as it was, its first commit brings it up, a newer one is refused.

fixtures/schema-1.zip is a store that the code of schema 1 wrote: adapters photo, art, cartoon and
sketch (`some_values` of seeds 0 to 3), keys, a blob, tag v1, branch side; art was removed.
schema-2.zip: photo, art and cartoon, tag v1 and branch side; then art was purged, and atoms were
written and pruned. schema-3.zip: likewise, and between them sketch and clipart, files with layouts
of their own (`ragged_file` of seeds 0 and 1); clipart was purged, too. schema-4.zip: likewise, with
a key and a blob of each adapter, and blobs for two levels of pages. schema-5.zip: likewise, and
some of the blobs, changed and gone ones too, wait in the first page.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

import memtool_stores
from memtool_stores import MemoryStore, NewerSchemaError, SchemaError, Space
from memtool_stores.migrate import MIGRATIONS, SCHEMA_VERSION
from memtool_stores.store import _sealed
from memtool_stores.testing import MODULE, fill, small_space, some_values
from memtool_stores.tree import Tree

STEPS = 10
"""Steps of a commit to the disk at which dying.py can die, counted from 0."""

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(memtool_stores.__file__).parents[1])}

SEEDS = {"photo": 0, "art": 1, "cartoon": 2, "sketch": 3}


@pytest.fixture
def old(tmp_path: Path) -> MemoryStore:
    return _of_schema(1, tmp_path)


def _of_schema(schema: int, tmp_path: Path) -> MemoryStore:
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / f"schema-{schema}.zip") as archive:
        archive.extractall(tmp_path / "old")
    return MemoryStore.open(tmp_path / "old")


def _everything(store: MemoryStore) -> dict[str, object]:
    """All that a reader can get, from every version that a branch or tag leads to."""
    found: dict[str, object] = {"tags": store.tags()}
    for ref in (*store.tags(), *store.branches()):
        for version in store.log(ref):
            view = store.view(version.id)
            keys = view.keys()
            found[version.id] = (
                version,
                view.adapters,
                [view.value(record.id).tobytes() for record in view.adapters],
                b"" if any(record.ragged for record in view.adapters) else view.values().tobytes(),
                None if keys is None else keys.tobytes(),
                {name: view.blob(name) for name in view.blobs()},
            )
    return found


def _attributes(store: MemoryStore, ref: str = "main") -> dict[str, object]:
    session = store._repository.readonly_session(snapshot_id=store.view(ref).version)
    group = zarr.open_group(session.store, mode="r")
    return {**group.attrs, "members": sorted(name for name, _ in group.members())}


def test_every_schema_has_its_step() -> None:
    assert sorted(MIGRATIONS) == list(range(1, SCHEMA_VERSION))


def test_an_old_store_is_whole_and_reads_as_it_was_written(old: MemoryStore) -> None:
    assert _attributes(old)["schema_version"] == 1
    assert old.space == small_space()
    view = old.view()
    assert {record.name for record in view.adapters} == {"photo", "cartoon", "sketch"}
    for record in view.adapters:
        expected = some_values(old.space, SEEDS[record.name])
        assert view.value(record.name).tobytes() == expected.tobytes()
        assert (record.kind, record.state, dict(record.pruned)) == ("adapter", "live", {})
    assert {r.state for r in view.catalog.records.values()} == {"live", "removed"}
    assert (view.state.atoms, view.state.purged) == (0, 0)
    assert view.atom_records == ()
    assert len(view.atoms(MODULE)) == 0
    assert view.keys() is not None
    assert "memory" in view.blobs()
    for level in ("heads", "checksums", "full"):
        assert old.verify(level).ok


def test_reading_changes_nothing(old: MemoryStore) -> None:
    files = {p: p.read_bytes() for p in Path(old.url).rglob("*") if p.is_file()}
    _everything(old)
    old.verify()
    assert files == {p: p.read_bytes() for p in Path(old.url).rglob("*") if p.is_file()}


def test_the_first_commit_migrates_and_history_stays(old: MemoryStore) -> None:
    before = _everything(old)
    first = old.head()
    with old.transaction("atoms") as txn:
        txn.add_atoms("a", some_values(old.space, 5), {"task": 5})
        txn.prune_atoms("a", {MODULE: [1]})
    new = _attributes(old)
    assert (new["schema_version"], new["min_reader"]) == (SCHEMA_VERSION, SCHEMA_VERSION)
    assert new["members"] == ["blobs", "catalog", "keys", "parts", "values"]
    assert _attributes(old, first)["schema_version"] == 1
    assert "atoms" in _attributes(old, first)["members"]  # type: ignore[operator]
    again = MemoryStore.open(old.url)
    after = _everything(again)
    assert {version: after[version] for version in before} == before
    view, was = again.view(), again.view(first)
    assert view.adapters == was.adapters
    assert np.array_equal(view.values(), was.values())
    assert np.array_equal(view.keys(), was.keys())  # type: ignore[arg-type]
    assert view.atoms(MODULE).rank.tolist() == [0]
    assert [r.name for r in again.diff(first).added_atoms] == ["a"]
    for level in ("heads", "checksums", "full"):
        assert again.verify(level).ok


@pytest.mark.parametrize("first", [1, SCHEMA_VERSION - 1])
@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_migrates_a_store_is_old_or_new(
    tmp_path: Path, kills: int, first: int
) -> None:
    """Half of the kills come at the steps to the disk in turn, half at any moment of a commit."""
    old = _of_schema(first, tmp_path)
    before = _everything(old)
    generator = random.Random(kills)
    schemas = set()
    for number in range(kills):
        url = str(tmp_path / "killed")
        shutil.rmtree(url, ignore_errors=True)
        shutil.copytree(old.url, url)
        said = set[str]()
        if number % 2:
            said = _killed_after(url, generator.uniform(0, 0.05))
        else:
            _killed_at(url, number // 2 * (STEPS - 1) // (kills // 2 - 1))
        again = MemoryStore.open(url, lock_timeout=5)
        after = _everything(again)
        assert {version: after[version] for version in before} == before
        schema = _attributes(again)["schema_version"]
        assert (schema == first) == (again.head() == old.head())
        if schema != first:
            assert len(again.view()) > len(old.view())
        assert said <= {record.name for record in again.view().adapters}
        schemas.add(schema)
        report = again.verify()
        assert report.ok, report.damages
        with again.transaction("after the kill") as txn:
            fill(txn, old.space, "after", 7)
        assert _attributes(again)["schema_version"] == SCHEMA_VERSION
        assert again.verify().ok
    assert schemas == {first, SCHEMA_VERSION}


def _killed_at(url: str, step: int) -> None:
    run = [sys.executable, str(Path(__file__).parent / "dying.py"), url, "add", str(step)]
    assert subprocess.run(run, env=ENVIRONMENT).returncode == -signal.SIGKILL


def _killed_after(url: str, seconds: float) -> set[str]:
    """A process that commits and commits, killed so long after it has begun to; what it stored."""
    run = [sys.executable, str(Path(__file__).parent / "writer.py"), url, "k", "10000", "0"]
    with subprocess.Popen(run, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(seconds)
        writer.kill()
        said = set(writer.stdout.read().split())
    assert writer.returncode == -signal.SIGKILL
    return said


@pytest.mark.parametrize("change", ["add", "remove", "keys", "blob", "purge removed"])
def test_any_commit_migrates(old: MemoryStore, change: str) -> None:
    with old.transaction("change") as txn:
        match change:
            case "add":
                fill(txn, old.space, "new", 9)
            case "remove":
                txn.remove("photo")
            case "keys":
                txn.set_keys(None)
            case "blob":
                txn.put_blob("head", b"1")
            case _:
                txn.purge("art")
    assert _attributes(old)["schema_version"] == SCHEMA_VERSION
    assert MemoryStore.open(old.url).verify().ok
    if change == "purge removed":
        (digest,) = [r.sha256 for r in old.view().catalog.records.values() if r.name == "art"]
        assert len(old.find_bytes([digest])) == 1
        for name in old.tags():
            old.delete_tag(name)
        old.delete_branch("side")
        old.gc(keep_last=1)
        assert old.find_bytes([digest]) == {}


def _listing(store: MemoryStore) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, its inode and when it was changed."""
    found = {}
    for path in (Path(store.url), *Path(store.url).rglob("*")):
        stat = path.stat()
        found[str(path)] = (stat.st_size, stat.st_ino, stat.st_mtime_ns)
    return found


def test_a_dry_run_tells_all_and_changes_nothing(old: MemoryStore) -> None:
    before = _listing(old)
    told = old.migrate(dry_run=True)
    assert _listing(old) == before
    tips = old.branches()
    assert [(t.branch, t.version) for t in told.branches] == [
        ("main", tips["main"]),
        ("side", tips["side"]),
    ]
    assert all(t.needed and t.schema == 1 and t.committed is None for t in told.branches)
    assert [(t.rows, t.blobs) for t in told.branches] == [(4, 1), (3, 1)]
    sizes = [size for path, (size, _, _) in before.items() if Path(path).is_file()]
    assert (told.files, told.nbytes) == (len(sizes), sum(sizes))


def test_migrate_adds_a_commit_to_every_branch_and_touches_nothing_else(old: MemoryStore) -> None:
    before, files = _everything(old), _listing(old)
    data = {path: Path(path).read_bytes() for path in files if Path(path).is_file()}
    done = old.migrate()
    again = MemoryStore.open(old.url)
    assert {tip.branch: tip.committed for tip in done.branches} == again.branches()
    for tip in done.branches:
        assert again.log(tip.branch)[0].message == f"migrate from schema 1 to {SCHEMA_VERSION}"
        assert again.log(tip.branch)[1].id == tip.version
        new, was = again.view(tip.branch), again.view(tip.version)
        assert (new.schema, was.schema) == (SCHEMA_VERSION, 1)
        assert new.adapters == was.adapters
        assert new.values().tobytes() == was.values().tobytes()
        assert _attributes(again, tip.branch)["members"] == [
            "blobs",
            "catalog",
            "keys",
            "parts",
            "values",
        ]
    after = _everything(again)
    assert {version: after[version] for version in before} == before
    changed = {Path(p).name for p, was in data.items() if Path(p).read_bytes() != was}
    assert changed <= {"ref.json"}
    assert again.verify().ok
    second = again.migrate()
    assert not any(tip.needed or tip.committed for tip in second.branches)
    assert again.branches() == {tip.branch: tip.version for tip in second.branches}


def test_migrate_leaves_what_is_newer_and_refuses_what_is_too_new(grown: MemoryStore) -> None:
    _claim(grown, SCHEMA_VERSION + 1, SCHEMA_VERSION)
    (tip,) = grown.migrate().branches
    assert (tip.schema, tip.needed, tip.committed) == (SCHEMA_VERSION + 1, False, None)
    _claim(grown, SCHEMA_VERSION + 2, SCHEMA_VERSION + 2)
    for dry_run in (True, False):
        with pytest.raises(NewerSchemaError, match=f"schema {SCHEMA_VERSION + 2}"):
            grown.migrate(dry_run=dry_run)


def test_tags_and_branches_of_the_old_schema_open_and_go_on(old: MemoryStore) -> None:
    with old.transaction("on main") as txn:
        fill(txn, old.space, "main only", 8)
    assert _attributes(old, "side")["schema_version"] == 1
    with old.transaction("on side", branch="side") as txn:
        fill(txn, old.space, "side only", 9)
    again = MemoryStore.open(old.url)
    assert _attributes(again, "side")["schema_version"] == SCHEMA_VERSION
    assert again.view("side").value("side only").tobytes() == some_values(old.space, 9).tobytes()
    assert _attributes(again, "v1")["schema_version"] == 1
    assert len(again.view("v1").values()) == len(again.view("v1"))
    # Back to a version of the old schema, and on from there.
    again.rollback("v1")
    with again.transaction("after a rollback") as txn:
        fill(txn, old.space, "again", 10)
    assert _attributes(again)["schema_version"] == SCHEMA_VERSION
    assert again.verify().ok


@pytest.mark.parametrize("schema", range(1, SCHEMA_VERSION + 1))
def test_a_store_of_any_schema_is_copied_goes_on_and_is_brought_forward(
    tmp_path: Path, schema: int
) -> None:
    """In a clone and in a bundle; what a clone committed comes into the store it came from."""
    old = _of_schema(schema, tmp_path)
    clone = old.clone(tmp_path / "clone")
    old.bundle(tmp_path / "bundle")
    copy = MemoryStore.from_bundle(tmp_path / "bundle", tmp_path / "copy")

    def told(store: MemoryStore, ref: str) -> tuple[object, ...]:
        view = store.view(ref)
        blobs = {name: view.blob(name) for name in view.blobs()}
        files = [view.export(record.id) for record in view.live]
        keys = view.keys()
        return view.adapters, files, blobs, None if keys is None else keys.tobytes()

    before = {v.id: told(old, v.id) for ref in (*old.branches(), *old.tags()) for v in old.log(ref)}
    first = old.view()
    for store in (clone, copy):
        with store.transaction("on") as txn:
            fill(txn, store.space, "more", 9)
            txn.put_blob("more", b"of it")
            for name in first.blobs()[:1]:
                txn.put_blob(name, b"another")
        with store.transaction("and on") as txn:
            for name in first.blobs()[1:2]:
                txn.delete_blob(name)
            txn.remove("more")
        assert {version: told(store, version) for version in before} == before
        assert store.verify().ok
    assert old.view().schema == schema
    old.forward_to(clone)
    assert old.head() == clone.head()
    assert told(old, "main") == told(clone, "main")
    assert {version: told(old, version) for version in before} == before
    assert old.verify().ok


def test_pages_of_schema_4_are_pages_in_which_nothing_waits(tmp_path: Path) -> None:
    """The first commit writes the first page, and those that a blob goes from; others stay."""
    old = _of_schema(4, tmp_path)
    before = old.view()
    page = before.state.index.page
    assert page is not None
    with old.transaction("blobs") as txn:
        txn.put_blob("new", b"new")
        txn.put_blob("head.photo", b"another")
        txn.delete_blob("looks.3")
    view = old.view()
    now, (first, *others) = view.state.index, view.index.walk()
    assert now.page is not None
    assert (before.state.index.count, now.count) == (page.count, len(view.index))
    assert set(first.blobs) == {"new", "head.photo"}
    was = before.index.page(page, "")
    digit = hashlib.sha256(b"looks.3").hexdigest()[0]
    assert {one for one in first.pages if first.pages[one] != was.pages[one]} == {digit}
    assert not any("looks.3" in one.blobs for one in others)
    same = [one for one in before.index.walk() if "looks.3" not in one.blobs][1:]
    assert all(one in others for one in same)
    assert set(view.blobs()) == {*before.blobs(), "new"} - {"looks.3"}
    assert view.blob("head.photo") == b"another"
    assert before.blob("looks.3") == old.view(before.version).blob("looks.3")
    assert MemoryStore.open(old.url).verify().ok


def test_an_old_store_can_be_collected(old: MemoryStore) -> None:
    with old.transaction("new") as txn:
        fill(txn, old.space, "new", 9)
    old.gc(keep_last=1)
    assert len(old.log()) == 1
    assert old.verify().ok


def _claim(store: MemoryStore, schema: int, min_reader: int) -> None:
    """A version as a later memtool would have written it."""
    session = store._repository.writable_session("main")
    attributes = zarr.open_group(session.store, mode="r+").attrs
    attributes.update({"schema_version": schema, "min_reader": min_reader})
    attributes["state"] = {**attributes["state"], "something": "new"}
    parent, message = store.head(), "from the future"
    sealed = _sealed(Tree(session), parent=parent, message=message, user="{}")
    session.commit(message, sealed)


def test_a_schema_that_needs_a_newer_reader_is_refused(grown: MemoryStore) -> None:
    _claim(grown, SCHEMA_VERSION + 1, SCHEMA_VERSION + 1)
    for look in (
        lambda: MemoryStore.open(grown.url),
        lambda: grown.view().space,
        grown.verify,
    ):
        with pytest.raises(NewerSchemaError, match=f"schema {SCHEMA_VERSION + 1}") as raised:
            look()
        assert raised.value.expected == f"at most schema {SCHEMA_VERSION}"
    assert len(grown.view("HEAD~1")) == 3


def test_a_newer_schema_that_we_can_read_is_read_but_not_written(
    grown: MemoryStore, space: Space
) -> None:
    _claim(grown, SCHEMA_VERSION + 1, SCHEMA_VERSION)
    again = MemoryStore.open(grown.url)
    assert len(again.view()) == 3
    head = again.head()
    with (
        pytest.raises(NewerSchemaError, match="written only by"),
        again.transaction("write") as txn,
    ):
        fill(txn, space, "new", 9)
    assert again.head() == head


@pytest.mark.parametrize("attributes", [{}, {"schema_version": 1}, {"schema_version": "1"}])
def test_a_tree_that_is_no_memory(grown: MemoryStore, attributes: dict[str, object]) -> None:
    session = grown._repository.writable_session("main")
    zarr.open_group(session.store, mode="r+").attrs.put(attributes)
    session.commit("something else")
    with pytest.raises(SchemaError, match="not a memory"):
        MemoryStore.open(grown.url)


@pytest.mark.parametrize("blobs", [[], None, 5, {"parts": 0, "page": [1]}, {"page": None}])
def test_a_strange_state_of_an_older_schema_is_an_error_of_ours(blobs: object) -> None:
    tree = Tree.__new__(Tree)
    tree.attributes = {"schema_version": 4, "min_reader": 4, "state": {"blobs": blobs}}
    with pytest.raises(SchemaError):
        tree.root()
