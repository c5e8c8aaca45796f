"""Flipped bits: verify finds them, or nothing that a reader is given has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtool_stores import IntegrityError, MemoryStore, Space, StoreError
from memtool_stores.testing import fill


@pytest.fixture
def rich(grown: MemoryStore, space: Space) -> MemoryStore:
    """Every kind of file: rows, catalog, keys, blobs, tags, branches."""
    with grown.transaction("consolidate", {"seed": 3}) as txn:
        txn.set_keys(np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32))
        txn.put_blob("query-modules", bytes(range(200)))
    grown.tag("v1")
    grown.branch("side", "HEAD~1")
    with grown.transaction("more") as txn:
        txn.remove("t0")
        fill(txn, space, "t3", 3)
    return grown


def _everything(url: str) -> list[object]:
    """All that a reader can get, from every version."""
    store = MemoryStore.open(url)
    found: list[object] = [store.tags(), store.branches()]
    for ref in (*store.tags(), *store.branches()):
        found.append(store.log(ref))
        for version in store.log(ref):
            view = store.view(version.id)
            keys = view.keys()
            found += [
                view.space,
                view.adapters,
                [view.value(r.id).tobytes() for r in view.adapters],
                None if keys is None else keys.tobytes(),
                {name: view.blob(name) for name in view.blobs()},
            ]
    return found


def _files(url: str, kind: str) -> list[Path]:
    place = Path(url) / "ice" / kind
    return [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())


def _flips(url: str, kind: str, count: int) -> Iterator[str]:
    """Flip one bit of one file, yield its name, and put it back."""
    generator = random.Random(kind)
    for _ in range(count):
        path = generator.choice(_files(url, kind))
        whole = path.read_bytes()
        bit = generator.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield f"bit {bit} of {path.name}"
        path.write_bytes(whole)


@pytest.mark.parametrize("count", [12, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["chunks", "snapshots", "manifests", "transactions", "refs", "config.yaml"]
)
def test_a_flipped_bit_is_found_or_changes_nothing(
    rich: MemoryStore, kind: str, count: int
) -> None:
    before = _everything(rich.url)
    found = 0
    for flip in _flips(rich.url, kind, count):
        try:
            report = rich.verify("full")
        except StoreError:
            found += 1
            continue
        if not report.ok:
            found += 1
            assert all(damage.found for damage in report.damages)
        else:
            assert _everything(rich.url) == before, flip
    assert rich.verify().ok
    if kind == "chunks":
        assert found == count


def test_a_damaged_row_is_named(rich: MemoryStore, space: Space) -> None:
    chunks = [p for p in _files(rich.url, "chunks") if p.stat().st_size == space.layout.nbytes + 4]
    wanted = rich.view("v1").value("t1").tobytes()
    (path,) = [p for p in chunks if p.read_bytes().startswith(wanted)]
    data = bytearray(path.read_bytes())
    data[7] ^= 16
    path.write_bytes(data)
    for level in ("checksums", "full"):
        report = rich.verify(level)
        assert {(d.what, d.name) for d in report.damages} == {("values", "t1")}
    assert rich.verify("heads").ok
    fresh = MemoryStore.open(rich.url)
    with pytest.raises(IntegrityError):
        fresh.view().value("t1")
    with pytest.raises(IntegrityError):
        fresh.view().values()
    assert fresh.view().value("t2") is not None


def test_a_row_with_a_right_checksum_but_other_bytes_is_found(
    rich: MemoryStore, space: Space
) -> None:
    """Two chunks that changed places: every checksum holds, only the hash of the row tells."""
    one, two, *_ = [
        p for p in _files(rich.url, "chunks") if p.stat().st_size == space.layout.nbytes + 4
    ]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert rich.verify("checksums").ok
    report = rich.verify("full")
    assert {d.what for d in report.damages} == {"values"}
    assert len({d.name for d in report.damages}) == 2


def test_a_lost_file_is_found(rich: MemoryStore) -> None:
    for kind in ("chunks", "snapshots", "manifests", "transactions"):
        for path in _files(rich.url, kind):
            whole = path.read_bytes()
            path.unlink()
            assert not rich.verify("full").ok, path
            path.write_bytes(whole)
    assert rich.verify().ok


def test_gc_does_not_take_the_versions_of_a_damaged_tag(rich: MemoryStore) -> None:
    (path,) = [p for p in _files(rich.url, "refs") if "tag.v1" in str(p)]
    whole = path.read_bytes()
    path.write_bytes(b"?" + whole[1:])
    with pytest.raises(IntegrityError, match="tag 'v1' is damaged"):
        rich.gc(keep_last=1)
    path.write_bytes(whole)
    rich.gc(keep_last=1)
    assert len(rich.view("v1")) == 3


def test_what_was_written_twice_is_read_twice(grown: MemoryStore) -> None:
    """Keys and blobs that return to an earlier content lie in files of their own."""
    keys = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    for turn in (0, 1, 0, 1):
        with grown.transaction(f"turn {turn}") as txn:
            txn.set_keys(keys[turn])
            txn.put_blob("head", bytes([turn]) * 300)
    assert grown.verify().ok
    for path in _files(grown.url, "chunks"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not MemoryStore.open(grown.url).verify().ok, path.name
        path.write_bytes(whole)
    assert grown.verify().ok
