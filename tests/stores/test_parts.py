"""Parts of /parts are taken, freed and used again, and no bytes are lost, mixed up or left."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memtool_stores import IntegrityError, MemoryStore, Space, sums
from memtool_stores.errors import SchemaError
from memtool_stores.index import FREE_RUNS, LEAF, Allotment, Entry, IndexState, Page, Ref
from memtool_stores.parts import PART_BYTES, read_parts, write_parts
from memtool_stores.store import _sealed
from memtool_stores.testing import fill
from memtool_stores.tree import Tree


def _blob(seed: int, nbytes: int = 200) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parts(store: MemoryStore, ref: str) -> Tree:
    return Tree(store._repository.readonly_session(snapshot_id=store.view(ref).version))


@contextmanager
def _by_hand(store: MemoryStore) -> Iterator[tuple[Tree, Any]]:
    """The tree of a version that no store of ours writes, and its group; with a right seal."""
    session = store._repository.writable_session("main")
    tree, parent = Tree(session, write=True), store.head()
    yield tree, tree._group
    tree._group.attrs.put(tree.attributes)
    sealed = _sealed(tree, parent=parent, message="by hand", user="{}")
    version = session.flush("by hand", metadata=sealed)
    sums.write(store.url, store._repository, version)
    store._repository.reset_branch("main", version, from_snapshot_id=parent)


def _put_page(tree: Tree, group: Any, part: int, page: Page, parts: int) -> Ref:
    """Write a page, and say in the state that it is the first one."""
    write_parts(group, parts, [(part, page.data())])
    ref = page.ref(part)
    tree.attributes["state"]["blobs"] = IndexState(parts, ref, ref.count).to_json()
    return ref


def test_any_history_on_two_branches_reads_as_it_was_written(
    store: MemoryStore, space: Space, tmp_path: Path
) -> None:
    """The oracle holds every version as a dict; each is read again after all was done, and after
    a clone, a rollback, and a collection."""
    generator, oracle = random.Random(5), dict[str, dict[str, bytes]]()
    tips: dict[str, dict[str, bytes]] = {"main": {}}
    for step in range(30):
        if step == 8:
            store.branch("side", "HEAD")
            tips["side"] = dict(tips["main"])
        branch = generator.choice([*tips])
        blobs = tips[branch]
        with store.transaction(f"step {step}", branch=branch) as txn:
            fill(txn, space, f"t{step}", step)
            for _ in range(generator.choice([1, 5, 90])):
                name = f"b{generator.randrange(150)}"
                if name in blobs and generator.random() < 0.5:
                    txn.delete_blob(name)
                    del blobs[name]
                else:
                    size = PART_BYTES + 7 if generator.random() < 0.01 else 50
                    # The same bytes now and then: equal pages on two branches are two things.
                    blobs[name] = _blob(generator.randrange(40), size)
                    txn.put_blob(name, blobs[name])
        oracle[store.view(branch).version] = dict(blobs)

    def check(where: MemoryStore, versions: set[str]) -> None:
        for version in versions:
            view = where.view(version)
            assert {name: view.blob(name) for name in view.blobs()} == oracle[version]
        assert where.verify().ok

    check(MemoryStore.open(store.url), {*oracle})
    check(store.clone(tmp_path / "clone"), {*oracle})
    store.bundle(tmp_path / "bundle")
    check(MemoryStore.from_bundle(tmp_path / "bundle", tmp_path / "of bundle"), {*oracle})
    store.rollback("HEAD~3")
    old = store.head()
    with store.transaction("another way") as txn:
        txn.put_blob("b1", b"another way")
    oracle[store.head()] = {**oracle[old], "b1": b"another way"}
    check(store, {*oracle})
    store.gc(keep_last=1)
    check(store, {store.head(), store.view("side").version})


def test_a_blob_that_goes_is_not_readable_and_after_gc_nowhere(
    store: MemoryStore, space: Space
) -> None:
    """Neither where another takes its part, nor where none does."""
    gone, changed, large = _blob(1), _blob(2), _blob(3, PART_BYTES + 5)
    with store.transaction("write") as txn:
        fill(txn, space, "t", 1)
        for name, data in (("gone", gone), ("changed", changed), ("large", large)):
            txn.put_blob(name, data)
    before, index = store.head(), store.view().index
    places = {name: index[name].part for name in ("gone", "changed", "large")}
    with store.transaction("change") as txn:
        txn.delete_blob("gone")
        txn.put_blob("changed", b"new")
        txn.delete_blob("large")
    tree = _parts(store, "HEAD")
    for name, data in (("gone", gone), ("changed", changed), ("large", large[:PART_BYTES])):
        part = places[name]
        assert part is not None
        with pytest.raises(IntegrityError):
            next(read_parts(tree._group, [(part, len(data))]))
        assert store.view(before).blob(name)[:PART_BYTES] == data
    hashes = {_sha256(gone), _sha256(changed), _sha256(large[:PART_BYTES])}
    assert store.find_bytes(hashes).keys() == hashes
    store.gc(keep_last=1)
    assert store.find_bytes(hashes) == {}
    files = [path for path in Path(store.url).rglob("*") if path.is_file()]
    assert not [p for p in files for one in (gone, changed, large[-5:]) if one in p.read_bytes()]
    assert store.verify().ok


def _two_names(tree: Tree, group: Any) -> None:
    index = tree.index(tree.root().state)
    _put_page(tree, group, 2, Page({"a": index["a"], "b": index["a"]}), 3)


def _beyond(tree: Tree, group: Any) -> None:
    entry = tree.index(tree.root().state)["a"]
    _put_page(tree, group, 2, Page({"a": Entry(entry.sha256, 2, PART_BYTES + 1)}), 3)


def _in_the_page(tree: Tree, group: Any) -> None:
    entry = tree.index(tree.root().state)["a"]
    _put_page(tree, group, 2, Page({"a": entry, "b": Entry(entry.sha256, 2, entry.nbytes)}), 3)


def _free_and_used(tree: Tree, group: Any) -> None:
    tree.attributes["state"]["blobs"]["free"] = [[0, 1]]


def _of_nobody(tree: Tree, group: Any) -> None:
    write_parts(group, 4, [(3, b"secret")])
    tree.attributes["state"]["blobs"]["parts"] = 4


def _waiting_in_a_leaf(tree: Tree, group: Any) -> None:
    entry = tree.index(tree.root().state)["a"]
    _put_page(tree, group, 2, Page({"a": entry, "b": None}), 3)


def _miscounted(tree: Tree, group: Any) -> None:
    tree.attributes["state"]["blobs"]["count"] = 1


def _used_and_free(store: MemoryStore) -> None:
    """Nothing, when every part is used or free, or was given up as one run too many."""
    index = store.view().state.index
    assert index.parts <= len(_parts(store, "HEAD").parts()) + sum(n for _, n in index.free)


def test_a_large_blob_that_is_replaced_again_and_again_lies_where_it_lay(
    store: MemoryStore,
) -> None:
    """Of one length, and of lengths that change; the parts are those of the longest, and a few."""
    with store.transaction("write") as txn:
        txn.put_blob("large", _blob(0, 3 * PART_BYTES))
        txn.put_blob("small", b"small")
    count = store.view().state.index.parts
    for seed in range(1, 6):
        with store.transaction("again") as txn:
            txn.put_blob("large", _blob(seed, 3 * PART_BYTES))
        assert store.view().state.index.parts == count
    most = 0
    for seed, length in enumerate((2, 4, 1, 3, 4, 2, 4), start=10):
        data = _blob(seed, length * PART_BYTES)
        with store.transaction("another length") as txn:
            txn.put_blob("large", data)
        most = max(most, store.view().state.index.parts)
        assert MemoryStore.open(store.url).view().blob("large") == data
        _used_and_free(store)
    assert most <= count + 4
    assert store.view().blob("small") == b"small"
    assert store.verify().ok


@pytest.mark.parametrize("seed", range(4))
def test_an_allotment_gives_no_part_twice_and_keeps_what_is_free(seed: int) -> None:
    """The oracle is the set of parts in use; after every commit the free ones are all others."""
    generator, used, state = random.Random(seed), dict[int, int](), IndexState()
    for _ in range(40):
        parts = Allotment(state.parts, state.free)
        before = set(used)
        for _ in range(generator.randrange(1, 8)):
            if used and generator.random() < 0.5:
                first = generator.choice([*used])
                parts.give_back(first, used.pop(first))
            count = generator.choice([1, 1, 1, 2, 5])
            first = parts.take(count)
            mine = set(range(first, first + count))
            assert not mine & {p for f, n in used.items() for p in range(f, f + n)}
            used[first] = count
        state = IndexState(parts.count, free=parts.free)
        in_use = {p for f, n in used.items() for p in range(f, f + n)}
        free = {p for first, count in state.free for p in range(first, first + count)}
        assert free == set(range(state.parts)) - in_use
        assert set(parts.emptied) <= free
        assert not before or state == IndexState.of_json(state.to_json())


def test_a_state_lists_so_many_runs_of_free_parts_and_no_more() -> None:
    parts = Allotment(1000)
    for first in range(0, 1000, 4):
        parts.give_back(first, 1 + (first == 400))
    assert len(parts.free) == FREE_RUNS
    assert (400, 2) in parts.free


@pytest.mark.parametrize("free", [[[0, 3]], [[1, 1], [1, 1]], [[1, 0]], [[1]], [[1, 1, 1]], 7])
def test_free_parts_that_cannot_be_are_refused(free: object) -> None:
    with pytest.raises(SchemaError):
        IndexState.of_json({"parts": 2, "page": None, "free": free})


@pytest.mark.parametrize(
    ("change", "what", "name", "found"),
    [
        (_two_names, "index", "part 0", "several"),
        (_in_the_page, "index", "part 2", "several"),
        (_beyond, "index", "part 2", "inside of 3 parts"),
        (_free_and_used, "index", "part 0", "none where it is free"),
        (_waiting_in_a_leaf, "index", "part 2", "blob 'b' of a page"),
        (_miscounted, "index", "count", "2 blobs 1"),
        (_of_nobody, "array", "parts", "bytes in part 3, one of 1 of nobody"),
    ],
)
def test_parts_of_two_or_of_nobody_or_beyond_the_end_are_damage(
    store: MemoryStore, change: Callable[[Tree, Any], None], what: str, name: str, found: str
) -> None:
    with store.transaction("write") as txn:
        txn.put_blob("a", b"one")
        txn.put_blob("b", b"two")
    assert store.view().state.index.parts == 3
    with _by_hand(store) as (tree, group):
        change(tree, group)
    report = MemoryStore.open(store.url).verify()
    said = {(one.what, one.name): f"{one.found} {one.expected}" for one in report.damages}
    assert found in said[what, name]


@pytest.mark.parametrize("level", ["checksums", "full"])
def test_a_page_that_many_digits_name_is_refused_at_once(store: MemoryStore, level: Any) -> None:
    """Sixteen digits of thirteen levels lead to one page: 16 ** 13 ways that nobody may walk."""
    with store.transaction("write") as txn:
        txn.put_blob("a", b"one")
    digits = "0123456789abcdef"
    with _by_hand(store) as (tree, group):
        page: Page = Page({"a": tree.index(tree.root().state)["a"]})
        ref = _put_page(tree, group, 1, page, 20)
        for part in range(2, 15):
            ref = _put_page(tree, group, part, Page(pages=dict.fromkeys(digits, ref)), 20)
    again = MemoryStore.open(store.url)
    with pytest.raises(IntegrityError, match="index 'part"):
        again.view().blobs()
    assert again.view().blob("a") == b"one"  # along its own path all is as it should be
    report = again.verify(level)
    assert 0 < len(report.damages) < 20


def test_pages_change_while_an_index_has_one_level_and_two(store: MemoryStore) -> None:
    """From a leaf to two levels and back, each commit with one blob more or less."""
    blobs: dict[str, bytes] = {}
    with store.transaction("nearly a level") as txn:
        for number in range(LEAF - 1):
            blobs[f"b{number}"] = _blob(number)
            txn.put_blob(f"b{number}", blobs[f"b{number}"])
    for step, name in enumerate(["x", "y", "b3", "z", "y", "z"]):
        with store.transaction("one") as txn:
            if name in blobs:
                txn.delete_blob(name)
                del blobs[name]
            else:
                blobs[name] = _blob(100 + step)
                txn.put_blob(name, blobs[name])
        view = MemoryStore.open(store.url).view()
        assert {name: view.blob(name) for name in view.blobs()} == blobs
        assert len(view.index) == len(blobs)
    assert store.verify().ok


def test_a_new_name_is_told_without_the_leaf_and_older_references_are_read(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"b{number}" for number in range(8 * LEAF)]
    with store.transaction("many") as txn:
        for name in names:
            txn.put_blob(name, name.encode())
    index = MemoryStore.open(store.url).view().index
    leaves = [page for page in index.walk() if not page.pages]
    assert sum(len(page.blobs) for page in leaves) > 7 * LEAF
    fresh, read = MemoryStore.open(store.url).view().index, []
    honest = fresh._read
    monkeypatch.setattr(fresh, "_read", lambda parts: (read.extend(parts), honest(parts))[1])
    absent = [f"absent{number}" for number in range(200)]
    assert not any(name in fresh for name in absent)
    assert len(read) <= 3  # the first page, and at most a leaf or two whose digits agree
    assert all(name in fresh for name in names)
    for ref in (ref for page in index.walk() for ref in page.pages.values()):
        older = Ref(ref.part, ref.nbytes, ref.count, ref.sha256)
        assert Ref.of_json(older.to_json(), 10**6) == older
        assert Ref.of_json(ref.to_json(), 10**6) == ref
        assert older.may_have("0" * 64)


def test_digits_that_are_not_those_of_the_names_below_are_damage(store: MemoryStore) -> None:
    with store.transaction("many") as txn:
        for number in range(2 * LEAF):
            txn.put_blob(f"b{number}", b"one")
    index = store.view().index
    (first, *_) = index.walk()
    digit, ref = next(iter(first.pages.items()))
    wrong = Ref(ref.part, ref.nbytes, ref.count, ref.sha256, ref.told[:-1] + "x")
    with pytest.raises(IntegrityError):
        index.page(wrong, digit)
