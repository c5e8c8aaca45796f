"""A store whose files anything has happened to, and one that a stranger made on purpose.

Of the first, a reader is told of damage or gets what was written, and verify names it. The second
has every hash and seal right over attributes, arrays and a catalog in which anything stands.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from memtool_stores import MemoryStore, MemoryView, MemtoolError, sums
from memtool_stores.catalog import Catalog
from memtool_stores.held import Held
from memtool_stores.store import _sealed
from memtool_stores.tensorfile import write_header
from memtool_stores.testing import MODULE, fill, ragged_file, small_space, some_values
from memtool_stores.tree import Tree
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


HEADER = write_header([(s.name, s.shape) for s in SPACE.layout.segments], SPACE.layout.dtype)


def _grown(folder: Path) -> MemoryStore:
    """Two commits with all that a store can have: rows, files, atoms, keys, blobs, names."""
    store = MemoryStore.create(folder, SPACE)
    with store.transaction("write", {"seed": 1}) as txn:
        fill(txn, SPACE, "t0", 0)
        txn.add_file("file", HEADER + some_values(SPACE, 1).tobytes(), {"classes": ["a"]})
        txn.add_atoms("atoms", some_values(SPACE, 2), {"task": 2})
        txn.put_blob("memory", b"{}" * 40)
    store.tag("v1")
    with store.transaction("consolidate") as txn:
        txn.set_keys(np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32))
        txn.prune_atoms("atoms", {MODULE: [1]})
        fill(txn, SPACE, "t1", 3)
        txn.add_file("ragged", ragged_file(4))
        txn.purge("t0")
    return store


def _looks(view: MemoryView) -> Iterator[tuple[str, Callable[[], object]]]:
    """All that a reader can ask a version for."""
    yield "page", lambda: [record.line() for record in view.page(0, 1)]
    yield "records", lambda: [record.line() for record in view.catalog.records.values()]
    yield "values", lambda: view.values([r.id for r in view.adapters if not r.ragged]).tobytes()
    yield "each", lambda: [view.value(record.id).tobytes() for record in view.live]
    yield "files", lambda: [view.export(record.id) for record in view.live]
    yield "atoms", lambda: [view.atoms(m).values.tobytes() for m in view.modules()]
    yield "keys", lambda: None if (keys := view.keys()) is None else keys.tobytes()
    yield "blobs", lambda: {name: view.blob(name) for name in view.blobs()}
    yield "version", lambda: (view.message, view.time, dict(view.metadata), view.space)


LOOKS = ["log", "page", "records", "values", "each", "files", "atoms", "keys", "blobs", "version"]


def _told(url: str, ref: str, looks: Collection[str] = LOOKS) -> dict[str, object]:
    """What a reader gets of these, the errors left out."""
    found: dict[str, object] = {}
    with refused_or_taken():
        store = MemoryStore.open(url)
        if "log" in looks:
            with refused_or_taken():
                found["log"] = [version.message for version in store.log(ref)]
        with refused_or_taken():
            for what, look in _looks(store.view(ref)):
                if what in looks:
                    with refused_or_taken():
                        found[what] = look()
    return found


@dataclass(frozen=True, repr=False)
class Small:
    """A store, its files in which anything stands, and what a reader of each name gets of it."""

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
            for path in sorted((*root.glob("ice/**/*"), *root.glob("sums/*")))
            if path.is_file()
        }
        yield Small(store, files, {ref: _told(store.url, ref) for ref in ("main", "v1")})


ACCIDENTS = ["damage", "damage", "other", "strange", "gone", "more", "of nobody"]
FOLDERS = ["", "ice", "ice/chunks", "ice/snapshots", "ice/manifests", "sums"]


def _accidents(data: st.DataObject, files: dict[str, bytes]) -> dict[str, bytes | None]:
    """What one or two files of a store hold afterwards, None for one that is gone."""
    changes: dict[str, bytes | None] = {}
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(files)))
        match data.draw(st.sampled_from(ACCIDENTS)):
            case "damage":
                changes[path] = data.draw(damaged(files[path]))
            case "other":
                changes[path] = files[data.draw(st.sampled_from(sorted(files)))]
            case "strange":
                changes[path] = data.draw(STRANGE)
            case "more":
                changes[path] = files[path] + data.draw(st.binary(min_size=1, max_size=50))
            case "gone":
                changes[path] = None
            case _:
                changes[f"{data.draw(st.sampled_from(FOLDERS))}/of-nobody".lstrip("/")] = data.draw(
                    STRANGE
                )
    return changes


@cases
@given(data=st.data(), ref=st.sampled_from(["main", "v1"]), looks=st.sets(st.sampled_from(LOOKS)))
def test_damage_is_named_and_never_believed(
    small: Small, data: st.DataObject, ref: str, looks: set[str]
) -> None:
    """A file that belongs to nothing is in nobody's way, and no damage."""
    root = Path(small.store.url)
    changes = _accidents(data, small.files)
    try:
        for path, content in changes.items():
            if content is None:
                (root / path).unlink()
            else:
                (root / path).write_bytes(content)
        with nothing_else_changes(root.parent, but=root.parent / "cache"):
            report = small.store.verify()
            told = _told(small.store.url, ref, looks)
        assert told.items() <= small.right[ref].items() or _moved(changes)
        harmless = all(small.files.get(path, new) == new for path, new in changes.items())
        assert report.ok == harmless or _moved(changes), changes.keys()
        assert told.keys() == looks or not harmless
        for damage in report.damages:
            for text in (damage.what, damage.name, damage.expected, damage.found):
                assert text.isprintable()
    finally:
        for path in changes:
            if path in small.files:
                (root / path).write_bytes(small.files[path])
            else:
                (root / path).unlink()
        shutil.rmtree(root.parent / "cache", ignore_errors=True)


def _moved(changes: dict[str, bytes | None]) -> bool:
    """Whether a branch or tag may lead to another version, as it does after a rollback."""
    return any("/refs/" in path and content is not None for path, content in changes.items())


# A stranger's store

Change = Callable[[Any, dict[str, Any]], None]
"""What is done to an open session, and to the attributes that will be written in it."""


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


@contextmanager
def _strange(store: MemoryStore, change: Change) -> Iterator[bool]:
    """A version with a right seal and right checksums at the tip of main, if it can be made."""
    repository = store._repository
    base = str(repository.lookup_branch("main"))
    files = {path for path in Path(store.url).rglob("*") if path.is_file()}
    session = repository.writable_session("main")
    attributes = _attributes(store)
    made = True
    try:
        change(session, attributes)
        zarr.open_group(session.store, mode="r+").attrs.put(attributes)
        sealed = _sealed(Tree(session), parent=base, message="strange", user="{}")
        version = session.flush("strange", metadata=sealed)
        sums.write(store.url, repository, version)
        repository.reset_branch("main", version, from_snapshot_id=base)
    except Exception:  # noqa: BLE001 - what zarr and icechunk do not write, nobody reads
        made = False
    try:
        yield made
    finally:
        if made:
            repository.reset_branch("main", base, from_snapshot_id=version)
        for path in {path for path in Path(store.url).rglob("*") if path.is_file()} - files:
            path.unlink()


STRANGE_IDS = st.sampled_from(["../../victim", "/", ".", "../memory", "0" * 26])


def _strange_attributes(data: st.DataObject, store: MemoryStore) -> Change:
    said = _attributes(store)
    with_id = STRANGE_IDS.map(lambda id: {**said, "store_id": id})
    strange = data.draw(altered(said) | st.dictionaries(st.text(), VALUES) | with_id)

    def change(_: Any, attributes: dict[str, Any]) -> None:
        attributes.clear()
        attributes.update(strange)

    return change


NODES = ["", "values", "catalog", "keys", "parts", "files", "files/4"]


def _strange_array(data: st.DataObject, store: MemoryStore) -> Change:
    """Metadata of zarr with anything in them, or a chunk of any bytes."""
    node, file = data.draw(st.sampled_from(NODES)), data.draw(st.sampled_from(NODES[1:]))
    path = f"{node}/zarr.json".lstrip("/")
    prototype = default_buffer_prototype()
    session = store._repository.readonly_session(branch="main")
    said = json.loads(sync(session.store.get(path, prototype)).to_bytes())
    strange = data.draw(altered(said) | st.just(said))
    chunk = data.draw(STRANGE | st.binary(min_size=88, max_size=92))
    place = {"values": "1/0", "keys": "0/0/0", "parts": data.draw(st.sampled_from("0123"))}.get(
        file, "0"
    )

    def change(session: Any, attributes: dict[str, Any]) -> None:
        buffer = prototype.buffer.from_bytes
        sync(session.store.set(path, buffer(json.dumps(strange).encode())))
        if strange == said:
            sync(session.store.set(f"{file}/c/{place}", buffer(chunk)))

    return change


def _strange_catalog(data: st.DataObject, store: MemoryStore) -> Change:
    """Lines with anything in them, with a right chain and length, and right counts if any are."""
    lines = [json.loads(record.line()) for record in store.view().catalog.records.values()]
    strange = data.draw(altered(lines))
    rows = strange if isinstance(strange, list) else [strange]
    text = [json.dumps(row).encode() + b"\n" for row in rows]
    whole = b"".join(text)

    def change(session: Any, attributes: dict[str, Any]) -> None:
        array = zarr.open_group(session.store, mode="r+")["catalog"]
        array.resize((len(whole),))
        array[:] = np.frombuffer(whole, np.uint8)
        chain = Catalog()._link(text)
        state = {**attributes["state"], "catalog_bytes": len(whole), "catalog_chain": chain}
        with refused_or_taken():
            catalog = Catalog().read_on(whole, chain)
            names = ("adapters", "atoms", "purged", "rows", "ragged")
            state.update({name: getattr(catalog.counts, name) for name in names})
            state["catalog_lines"] = catalog.lines
        attributes["state"] = state

    return change


def _strange_blob(data: st.DataObject, store: MemoryStore) -> Change:
    """Bytes in a blob, with a right hash, also where the header of a file should be."""
    names = sorted(store.view().blob_hashes)
    name, content = data.draw(st.sampled_from(names)), data.draw(damaged(HEADER) | STRANGE)

    def change(session: Any, attributes: dict[str, Any]) -> None:
        tree = Tree(session, write=True)
        index = tree.index(tree.root().state)
        attributes["state"]["blobs"] = tree.write_blobs(index, {name: Held.of(content)}).to_json()

    return change


@cases
@given(
    data=st.data(),
    kind=st.sampled_from([_strange_attributes, _strange_array, _strange_catalog, _strange_blob]),
    looks=st.sets(st.sampled_from(LOOKS)),
)
def test_a_strangers_store_is_refused_or_does_no_harm(
    hostile: MemoryStore,
    data: st.DataObject,
    kind: Callable[[st.DataObject, MemoryStore], Change],
    looks: set[str],
) -> None:
    sandbox = Path(hostile.url).parent
    with _strange(hostile, kind(data, hostile)) as made:
        if made:
            with nothing_else_changes(sandbox, but=sandbox / "cache" / "stores"):
                told = _told(hostile.url, "main", looks)
                with refused_or_taken():
                    report = hostile.verify()
                    # Whether a blob is what its readers expect, the store does not know.
                    assert not report.ok or looks - told.keys() <= {"files"}
            with refused_or_taken(), MemoryStore.open(hostile.url).transaction("on it") as txn:
                fill(txn, SPACE, "on it", 5)
                txn.purge("on it")
                txn.add_file("ragged on it", ragged_file(5))
                raise MemtoolError("never stored")
    assert (sandbox / "victim" / "lock").read_text() == "not yours"
