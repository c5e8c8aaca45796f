"""A store whose files anything has happened to, and one that a stranger made on purpose.

Of the first, a reader is told of damage or gets what was written, and verify names it. The second
has every hash and seal right over attributes, arrays and a catalog in which anything stands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from memtool_stores import MemoryStore, MemoryView, StoreError
from memtool_stores.catalog import Catalog
from memtool_stores.store import _sealed
from memtool_stores.tensorfile import write_header
from memtool_stores.testing import MODULE, fill, small_space, some_values
from memtool_stores.tree import Tree, sha256
from tests.fuzz.door import (
    STRANGE,
    VALUES,
    altered,
    cases,
    damaged,
    long,
    nothing_else_changes,
    refused_or_taken,
)

pytestmark = [long, pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")]

SPACE = small_space()


def _grown(folder: Path) -> MemoryStore:
    """Two commits with all that a store can have: rows, a file, atoms, keys, blobs, names."""
    store = MemoryStore.create(folder, SPACE)
    layout = SPACE.layout
    header = write_header([(s.name, s.shape) for s in layout.segments], layout.dtype)
    with store.transaction("write", {"seed": 1}) as txn:
        fill(txn, SPACE, "t0", 0)
        txn.add_file("file", header + some_values(SPACE, 1).tobytes(), {"classes": ["a"]})
        txn.add_atoms("atoms", some_values(SPACE, 2), {"task": 2})
        txn.put_blob("memory", b"{}" * 40)
    store.tag("v1")
    with store.transaction("consolidate") as txn:
        txn.set_keys(np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32))
        txn.prune_atoms("atoms", {MODULE: [1]})
        fill(txn, SPACE, "t1", 3)
        txn.purge("t0")
    return store


def _looks(view: MemoryView) -> Iterator[tuple[str, Callable[[], object]]]:
    """All that a reader can ask a version for."""
    yield "records", lambda: [record.line() for record in view.catalog.records.values()]
    yield "values", lambda: view.values().tobytes()
    yield "each", lambda: [view.value(record.id).tobytes() for record in view.live]
    yield "files", lambda: [view.export(record.id) for record in view.live]
    yield "atoms", lambda: [view.atoms(m).values.tobytes() for m in view.modules()]
    yield "keys", lambda: None if (keys := view.keys()) is None else keys.tobytes()
    yield "blobs", lambda: {name: view.blob(name) for name in view.blobs()}
    yield "version", lambda: (view.message, view.time, dict(view.metadata), view.space)


def _told(url: str, ref: str) -> dict[str, object]:
    """What a reader gets, the errors left out."""
    found: dict[str, object] = {}
    with refused_or_taken():
        store = MemoryStore.open(url)
        with refused_or_taken():
            found["log"] = [version.message for version in store.log(ref)]
        with refused_or_taken():
            view = store.view(ref)
            for what, look in _looks(view):
                with refused_or_taken():
                    found[what] = look()
    return found


@dataclass(frozen=True, repr=False)
class Small:
    """A store, its files, and what a reader of each name gets of it."""

    store: MemoryStore
    files: dict[str, bytes]
    right: dict[str, dict[str, object]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    sandbox = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTOOL_CACHE", str(sandbox / "cache"))
        store = _grown(sandbox / "memory")
        root = Path(store.url)
        files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and path.name != "lock"
        }
        yield Small(store, files, {ref: _told(store.url, ref) for ref in ("main", "v1")})


@cases
@given(data=st.data(), ref=st.sampled_from(["main", "v1"]))
def test_damage_is_named_and_never_believed(small: Small, data: st.DataObject, ref: str) -> None:
    root = Path(small.store.url)
    changes: dict[str, bytes | None] = {}
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(small.files)))
        match data.draw(st.sampled_from(["damage", "damage", "other", "strange", "gone", "more"])):
            case "damage":
                changes[path] = data.draw(damaged(small.files[path]))
            case "other":
                changes[path] = small.files[data.draw(st.sampled_from(sorted(small.files)))]
            case "strange":
                changes[path] = data.draw(STRANGE)
            case "more":
                changes[path] = small.files[path] + data.draw(st.binary(min_size=1, max_size=50))
            case _:
                changes[path] = None
    try:
        for path, content in changes.items():
            if content is None:
                (root / path).unlink()
            else:
                (root / path).write_bytes(content)
        with nothing_else_changes(root.parent, but=root.parent / "cache"):
            report = small.store.verify()
            told = _told(small.store.url, ref)
        assert told.items() <= small.right[ref].items() or _moved(changes)
        harmless = all(small.files[path] == content for path, content in changes.items())
        assert report.ok == harmless or _moved(changes), changes.keys()
        for damage in report.damages:
            for text in (damage.what, damage.name, damage.expected, damage.found):
                assert text.isprintable()
    finally:
        for path in changes:
            (root / path).write_bytes(small.files[path])
        shutil.rmtree(root.parent / "cache", ignore_errors=True)


def _moved(changes: dict[str, bytes | None]) -> bool:
    """Whether a branch or tag may lead to another version, as it does after a rollback."""
    return any("/refs/" in path and content is not None for path, content in changes.items())


FOLDERS = ["", "ice", "ice/chunks", "ice/snapshots", "ice/manifests", "sums"]


@cases
@given(path=st.sampled_from(FOLDERS), data=STRANGE)
def test_a_file_of_nobody_is_no_damage(small: Small, path: str, data: bytes) -> None:
    stranger = Path(small.store.url, path, "of-nobody")
    stranger.write_bytes(data)
    try:
        assert small.store.verify().ok
        assert _told(small.store.url, "main") == small.right["main"]
    finally:
        stranger.unlink()


# A stranger's store


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryStore]:
    sandbox = tmp_path_factory.mktemp("hostile")
    (sandbox / "victim").mkdir()
    for name in ("lock", "a.values", "b.part"):
        (sandbox / "victim" / name).write_text("not yours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMTOOL_CACHE", str(sandbox / "cache"))
        store = _grown(sandbox / "memory")
        store.delete_tag("v1")
        store.gc(keep_last=1)
        yield store


def _attributes(store: MemoryStore) -> dict[str, Any]:
    session = store._repository.readonly_session(branch="main")
    return dict(zarr.open_group(session.store, mode="r").attrs)


def _strange(store: MemoryStore, change: Callable[[Any, dict[str, Any]], None]) -> str | None:
    """Put a version with a right seal at the tip of main; what was there, if it could be made."""
    repository = store._repository
    base = str(repository.lookup_branch("main"))
    session = repository.writable_session("main")
    attributes = _attributes(store)
    try:
        change(session, attributes)
        group = zarr.open_group(session.store, mode="r+")
        group.attrs.put(attributes)
        sealed = _sealed(Tree(session), parent=base, message="strange", user="{}")
        version = session.flush("strange", metadata=sealed)
    except Exception:  # noqa: BLE001 - what zarr and icechunk do not write, nobody reads
        return None
    repository.reset_branch("main", version, from_snapshot_id=base)
    return base


def _is_refused_or_taken(store: MemoryStore, change: Callable[[Any, dict[str, Any]], None]) -> None:
    base = _strange(store, change)
    if base is None:
        return
    sandbox = Path(store.url).parent
    try:
        with nothing_else_changes(sandbox, but=sandbox / "cache" / "stores"):
            told = _told(store.url, "main")
            with refused_or_taken():
                report = store.verify()
                assert not report.ok or {"records", "values", "keys"} <= told.keys()
        with refused_or_taken(), MemoryStore.open(store.url).transaction("on it") as txn:
            fill(txn, SPACE, "on it", 5)
            txn.purge("on it")
            raise StoreError("never stored")
    finally:
        tip = str(store._repository.lookup_branch("main"))
        store._repository.reset_branch("main", base, from_snapshot_id=tip)


@cases
@given(data=st.data())
def test_strange_attributes_are_refused_or_harmless(
    hostile: MemoryStore, data: st.DataObject
) -> None:
    strange = data.draw(altered(_attributes(hostile)) | st.dictionaries(st.text(), VALUES))

    def change(_: Any, attributes: dict[str, Any]) -> None:
        attributes.clear()
        attributes.update(strange)

    _is_refused_or_taken(hostile, change)


NODES = ["", "values", "catalog", "keys", "blobs", "blobs/memory"]


@cases
@given(data=st.data(), node=st.sampled_from(NODES), file=st.sampled_from(NODES[1:]))
def test_strange_arrays_are_refused_or_harmless(
    hostile: MemoryStore, data: st.DataObject, node: str, file: str
) -> None:
    """Metadata of zarr with anything in them, and chunks of one array in another."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    prototype = default_buffer_prototype()
    path = f"{node}/zarr.json".lstrip("/")
    session = hostile._repository.readonly_session(branch="main")
    said = json.loads(sync(session.store.get(path, prototype)).to_bytes())
    strange = data.draw(altered(said) | st.just(said))
    chunk = data.draw(STRANGE | st.binary(min_size=88, max_size=92))
    place = {"values": "1/0", "keys": "0/0/0"}.get(file, "0")

    def change(session: Any, attributes: dict[str, Any]) -> None:
        buffer = prototype.buffer.from_bytes
        sync(session.store.set(path, buffer(json.dumps(strange).encode())))
        if strange == said:
            sync(session.store.set(f"{file}/c/{place}", buffer(chunk)))

    _is_refused_or_taken(hostile, change)


@cases
@given(data=st.data())
def test_a_strange_catalog_is_refused_or_harmless(
    hostile: MemoryStore, data: st.DataObject
) -> None:
    """Lines with anything in them, with a right chain and length, and counts that may be right."""
    view = hostile.view()
    lines = [json.loads(record.line()) for record in view.catalog.records.values()]
    strange = data.draw(altered(lines))
    rows = strange if isinstance(strange, list) else [strange]
    text = [json.dumps(row).encode() + b"\n" for row in rows]

    def change(session: Any, attributes: dict[str, Any]) -> None:
        group = zarr.open_group(session.store, mode="r+")
        whole = b"".join(text)
        group["catalog"].resize((len(whole),))
        group["catalog"][:] = np.frombuffer(whole, np.uint8)
        catalog = Catalog()
        state = {**attributes["state"], "catalog_bytes": len(whole)}
        state["catalog_chain"] = catalog._link(text)
        with refused_or_taken():
            counts = catalog.read_on(whole, state["catalog_chain"]).counts
            names = ("adapters", "atoms", "purged", "rows")
            state.update({name: getattr(counts, name) for name in names})
        attributes["state"] = state

    _is_refused_or_taken(hostile, change)


@cases
@given(data=damaged(b"\x08\0\0\0\0\0\0\0{}      ") | STRANGE)
def test_a_strange_blob_comes_out_as_it_is(hostile: MemoryStore, data: bytes) -> None:
    """Also where it stands for the header of a file, which must then be one."""
    (name,) = (blob for blob in hostile.view().state.blobs if blob.startswith("header-"))

    def change(session: Any, attributes: dict[str, Any]) -> None:
        Tree(session, write=True).write_blob(name, data)
        attributes["state"]["blobs"][name] = sha256(data)

    _is_refused_or_taken(hostile, change)
    header = write_header([(s.name, s.shape) for s in SPACE.layout.segments], "float32")
    assert hostile.export("file").startswith(header)
