"""What gc takes from under a reader is expired, and no damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memtool_stores import MemoryStore, SchemaError, history, verify
from memtool_stores.index import Entry, Index, IndexState, Ref
from memtool_stores.testing import small_space

VERSIONS = 4


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    made = MemoryStore.create(tmp_path / "memory", small_space())
    for number in range(VERSIONS):
        with made.transaction("more") as txn:
            for name in range(5):
                txn.put_blob(f"b{name}", b"%d" % number)
    return made


def once(real: Callable[..., Any], then: Callable[[], object], at: int = 1) -> Callable[..., Any]:
    """A function that does something else, once, at its call number `at`."""
    calls = [0]

    def called(*args: Any, **given: Any) -> Any:
        found = real(*args, **given)
        calls[0] += 1
        if calls[0] == at:
            then()
        return found

    return called


def test_verify_looks_again_where_gc_ran_meanwhile(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MemoryStore.open(store.url)
    collect = once(verify._verify_version, lambda: other.gc(keep_last=1), at=2)
    monkeypatch.setattr(verify, "_verify_version", collect)
    report = store.verify()
    assert report.ok, report.damages
    assert report.versions == 1


@pytest.mark.parametrize("read", ["view", "log"])
def test_a_newest_version_that_expires_while_it_is_looked_up_is_looked_up_again(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    other = MemoryStore.open(store.url)

    def meanwhile() -> None:
        with other.transaction("newest") as txn:
            txn.put_blob("b0", b"newest")
        other.gc(keep_last=1)

    monkeypatch.setattr(history, "_resolve_name", once(history._resolve_name, meanwhile))
    getattr(store, read)()
    assert store.view().blob("b0") == b"newest"


def test_a_number_of_blobs_that_nobody_could_read_is_not_written() -> None:
    pages: dict[Any, Any] = {}
    ref = Ref(0, 1, 100, "0" * 64)
    index = Index(IndexState(1, ref, 2**53), lambda parts: iter(()), pages)
    index.page = lambda *given: pytest.fail("read before it was refused")  # type: ignore[method-assign]
    index.__class__ = type("Empty", (Index,), {"__contains__": lambda self, name: False})
    with pytest.raises(SchemaError, match="number of blobs"):
        index.changed({"one": Entry("0" * 64)}, index.allotment())
