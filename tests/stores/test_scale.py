"""What a commit writes does not depend on how much is there: pages of blobs and blocks of keys."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import zarr

from memtool_stores import IntegrityError, MemoryStore, Space, SpaceMismatchError
from memtool_stores import keys as key_blocks
from memtool_stores.cost import state_bytes
from memtool_stores.index import LEAF, Entry, Index, IndexState, Page, Ref
from memtool_stores.keys import BLOCK_BYTES, BLOCK_ROWS, block_rows
from memtool_stores.testing import fill, some_values


class Paper:
    """An index whose parts lie in a dict; what a commit would do, without a store."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] = {}
        self.index = Index(IndexState(), self.read, {})

    def read(self, pieces: object) -> list[memoryview]:
        return [memoryview(self.parts[part][:n]) for part, n in pieces]  # type: ignore[attr-defined]

    def change(self, changes: dict[str, Entry | None]) -> int:
        """Do it; how many pages it wrote."""
        parts = self.index.allotment()
        made = self.index.changed(changes, parts)
        self.parts |= {part: page.data() for part, page in made.written.items()}
        for part in parts.emptied:
            del self.parts[part]
        state = IndexState(parts.count, made.page, made.count, free=parts.free)
        self.index = Index(state, self.read, {})
        return len(made.written)

    def pages(self) -> list[Page]:
        return [*self.index.walk()] if self.index.state.page else []


def _entry(number: int) -> Entry:
    return Entry(hashlib.sha256(bytes([number % 256])).hexdigest())


@pytest.mark.parametrize("seed", range(3))
def test_an_index_is_a_dict_whatever_is_done_to_it(seed: int) -> None:
    generator, paper, oracle = random.Random(seed), Paper(), dict[str, Entry]()
    for step in range(60):
        size = generator.choice([1, 3, 40, 300])
        names = [f"b{generator.randrange(600)}" for _ in range(size)]
        gone = generator.random() < 0.5
        changes: dict[str, Entry | None] = {
            name: None if gone else _entry(step) for name in names if not gone or name in oracle
        }
        if not changes:
            continue
        paper.change(changes)
        oracle |= {name: one for name, one in changes.items() if one is not None}
        oracle = {name: one for name, one in oracle.items() if changes.get(name, one) is not None}
        assert dict(paper.index.items()) == oracle
        assert len(paper.index) == len(oracle)
        assert all(paper.index.get(name) == oracle.get(name) for name in [*names, "none"])
        # Only pages in use have parts, and a page is a leaf wherever one is enough.
        pages = paper.pages()
        assert len(pages) == len(paper.parts)
        assert all(len(page.blobs) <= LEAF for page in pages)
        assert all(sum(r.count for r in p.pages.values()) > LEAF for p in pages if p.pages)
    paper.change(dict.fromkeys(oracle))
    assert (len(paper.index), paper.parts) == (0, {})


def test_what_changes_waits_in_the_first_page_and_goes_down_in_lots() -> None:
    """One page a change, now and then some more; and who was overtaken is not seen again."""
    paper = Paper()
    paper.change({f"b{number}": _entry(number) for number in range(5000)})
    written = []
    for number in range(600):
        written.append(paper.change({f"new{number}": _entry(number), "again": _entry(number)}))
        assert paper.index["again"] == _entry(number)
        if number % 100 == 0:
            paper.change({f"b{number}": None})
            assert f"b{number}" not in paper.index
            assert not any(f"b{number}" in page.blobs for page in paper.pages())
    assert (min(written), len(paper.index)) == (1, 5595)
    assert np.mean(written) < 2
    first, *_ = paper.pages()
    assert len(first.blobs) > LEAF // 2
    assert paper.index.state.page is not None
    assert paper.index.state.page.part == max(paper.parts)


def test_one_more_blob_writes_a_page_a_level() -> None:
    paper = Paper()
    paper.change({f"b{number}": _entry(number) for number in range(3000)})
    assert paper.change({"one more": _entry(1)}) <= 5
    assert paper.index.state.parts == len(paper.parts)


def test_a_page_that_another_hash_names_is_refused() -> None:
    paper = Paper()
    paper.change({"a": _entry(1)})
    page = paper.index.state.page
    assert page is not None
    other = Ref(page.part, page.nbytes, page.count, "0" * 64)
    with pytest.raises(IntegrityError, match="index 'part 0' is damaged"):
        Index(IndexState(1, other), paper.read, {})["a"]


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_zarr_reads_the_parts(store: MemoryStore) -> None:
    with store.transaction("blobs") as txn:
        txn.put_blob("a", b"some bytes")
        txn.put_blob("b", b"")
    session = store._repository.readonly_session(branch="main")
    parts = zarr.open_group(session.store, mode="r")["parts"]
    found = {*parts[:]}
    assert found >= {b"some bytes", b""}
    assert len(found) == 3  # and the page that names them


def _chunks(store: MemoryStore) -> set[Path]:
    return set((Path(store.url) / "ice" / "chunks").iterdir())


def test_keys_that_stay_are_not_written_again(store: MemoryStore, space: Space) -> None:
    """Set or added, they are what numpy says, and only blocks with another key are new."""
    generator = np.random.default_rng(0)
    layers, width, step = 2, 300, BLOCK_BYTES // (4 * 2 * 300)
    assert block_rows(layers, width, 400) == step < BLOCK_ROWS
    keys = generator.standard_normal((layers, 400, width)).astype(np.float32)
    with store.transaction("write") as txn:
        for number in range(400):
            fill(txn, space, f"t{number}", number)
        txn.set_keys(keys)
    for changed in ([], [5], [0, 399], [200]):
        keys[:, changed] += 1
        before = _chunks(store)
        with store.transaction("set") as txn:
            txn.set_keys(keys)
        found = store.view().keys()
        assert found is not None
        assert np.array_equal(found, keys)
        # The last one is written in any case: a commit is a version.
        assert len(_chunks(store) - before) == len({row // step for row in (*changed, 399)})
    for _ in range(2):
        before, more = _chunks(store), generator.standard_normal((layers, 1, width))
        keys = np.concatenate([keys, more.astype(np.float32)], axis=1)
        with store.transaction("add") as txn:
            fill(txn, space, f"t{keys.shape[1] - 1}", 1)
            txn.add_keys(keys[:, -1:])
        assert np.array_equal(MemoryStore.open(store.url).view().keys(), keys)  # type: ignore[arg-type]
        assert len(_chunks(store) - before) == 3  # the row, the catalog, the last block
    keys = np.concatenate([keys, keys], axis=1)
    with store.transaction("twice as many") as txn:
        for number in range(keys.shape[1] // 2, keys.shape[1]):
            fill(txn, space, f"t{number}", number)
        txn.set_keys(keys)
    assert np.array_equal(store.view().keys(), keys)  # type: ignore[arg-type]
    with store.transaction("fewer") as txn:
        for number in range(150, keys.shape[1]):
            txn.remove(f"t{number}")
        txn.set_keys(keys[:, :150])
    assert np.array_equal(store.view().keys(), keys[:, :150])  # type: ignore[arg-type]
    assert store.verify().ok


def test_the_chain_is_a_hash_of_a_hash_a_block(store: MemoryStore, space: Space) -> None:
    """The slow twin reads the definition aloud."""
    keys = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    with store.transaction("write") as txn:
        for number in range(5):
            fill(txn, space, f"t{number}", number)
        txn.set_keys(keys)
    state = store.view().state.keys
    assert state is not None
    begin = hashlib.sha256(b"keys 2 8 3").digest()
    block = hashlib.sha256(keys.tobytes()).digest()
    assert state.before == begin.hex()
    assert state.sha256 == hashlib.sha256(begin + block).hexdigest()
    assert key_blocks.block_rows(2, 3, 5) == 8


def test_keys_are_added_once_in_any_order_of_commits(store: MemoryStore, space: Space) -> None:
    """One by one, some at once, after a removal and beside atoms; a purge leaves zeros."""
    generator = np.random.default_rng(1)

    def some(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return generator.standard_normal((2, count, 3)).astype(np.float32)

    first, second, third = some(2), some(3), some(1)
    with store.transaction("first") as txn:
        fill(txn, space, "a", 1)
        fill(txn, space, "b", 2)
        txn.add_keys(first)
        fill(txn, space, "c", 3)
        fill(txn, space, "gone", 4)
        txn.remove("gone")
        fill(txn, space, "d", 5)
    with store.transaction("second") as txn:
        fill(txn, space, "e", 6)
        txn.add_keys(second)
        txn.add_atoms("atoms", some_values(space, 7))
        fill(txn, space, "f", 8)
        with pytest.raises(SpaceMismatchError, match="one key per adapter without one"):
            txn.add_keys(some(2))
        txn.add_keys(third)
        with pytest.raises(SpaceMismatchError, match="keys to add"):
            txn.add_keys(some(1))
    expected = np.concatenate([first, second, third], axis=1)
    assert np.array_equal(store.view().keys(), expected)  # type: ignore[arg-type]
    with store.transaction("purge") as txn:
        txn.purge("b")
        fill(txn, space, "g", 9)
        txn.add_keys(third)
    rows = store.view().row_keys()
    assert rows is not None
    assert not rows[:, 1].any()
    assert np.array_equal(rows[:, -1:], third)
    assert store.verify().ok


def _written(store: MemoryStore, space: Space, name: str) -> tuple[int, int]:
    """Bytes of the files and of the state of one more adapter with a blob and a key."""
    files = {path for path in Path(store.url).rglob("*") if path.is_file()}
    with store.transaction("one more") as txn:
        fill(txn, space, name, 1)
        txn.put_blob(f"head.{name}", bytes(100))
        txn.add_keys(np.ones((2, 1, 3), np.float32))
    new = {path for path in Path(store.url).rglob("*") if path.is_file()} - files
    state = store.view().state.to_json()
    return sum(path.stat().st_size for path in new), len(str(state))


def test_a_commit_among_many_writes_what_it_does_among_few(
    store: MemoryStore, space: Space
) -> None:
    sizes = []
    for first, last in ((0, 300), (300, 3000)):
        with store.transaction("many") as txn:
            for number in range(first, last):
                fill(txn, space, f"t{number}", number)
                txn.put_blob(f"head.t{number}", number.to_bytes(4, "big"))
            txn.add_keys(np.ones((2, last - first, 3), np.float32))
        expected = state_bytes(store.view(), blobs=1)
        some = [_written(store, space, f"one-{last}-{n}") for n in range(4)]
        for found, _ in some:  # besides the row, the key and the blob
            assert 0.5 < (found - 500) / expected < 2
        sizes.append(np.mean(some, axis=0))
    few, many = sizes
    # Manifests of up to 2,048 entries. A list of blobs would be 250 kB.
    assert many[0] - few[0] < 40_000
    assert many[1] - few[1] < 20
    assert store.verify().ok
