"""What goes in comes out: values to the bit, metas, keys, blobs, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from memtool_stores import (
    AlreadyExistsError,
    MemoryStore,
    NotFoundError,
    SchemaError,
    Space,
    SpaceMismatchError,
)
from memtool_stores.testing import (
    CONTRACT,
    OracleVersion,
    assert_same,
    fill,
    small_space,
    some_values,
)


@pytest.mark.parametrize("check", CONTRACT)
def test_a_directory_keeps_the_contract(check: Callable[[str], None], tmp_path: Path) -> None:
    check(str(tmp_path / "contract"))


def test_round_trip_after_reopening(grown: MemoryStore, space: Space) -> None:
    oracle = OracleVersion("write task 2")
    for task in range(3):
        oracle = oracle.add(f"t{task}", some_values(space, task), {"task": task})
    assert_same(MemoryStore.open(grown.url).view(), oracle)
    assert MemoryStore.open(grown.url).space == space


def test_a_store_appears_with_its_first_commit_or_not_at_all(tmp_path: Path) -> None:
    space = small_space()

    def fail(made: MemoryStore) -> None:
        with made.transaction("half") as txn:
            txn.put_blob("a", b"a")
            raise KeyError

    with pytest.raises(KeyError):
        MemoryStore.create(tmp_path / "new" / "m", space, first=fail)
    assert [*tmp_path.iterdir()] == []

    def write(made: MemoryStore) -> None:
        assert not MemoryStore.exists(tmp_path / "m")
        with made.transaction("first") as txn:
            txn.put_blob("a", b"a")

    store = MemoryStore.create(tmp_path / "m", space, first=write)
    assert [one.message for one in store.log()] == ["first", "create the memory"]
    assert store.view().blob("a") == b"a"
    assert store.verify().ok
    with store.transaction("second") as txn:
        txn.put_blob("b", b"b")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_bit_comes_back(tmp_path: Path, dtype: str) -> None:
    space = small_space(dtype)
    store = MemoryStore.create(tmp_path / "m", space)
    bits = np.random.default_rng(0).bytes(space.layout.nbytes)
    strange = some_values(space, 0)
    strange = np.frombuffer(bits, strange.dtype)
    # Negative zeros equal the fill value of the array, but have other bits.
    zeros = np.frombuffer(
        b"\x00\x80" * (space.layout.nbytes // 2)
        if dtype != "float32"
        else b"\x00\x00\x00\x80" * space.numel,
        strange.dtype,
    )
    with store.transaction("bits") as txn:
        txn.add("strange", strange)
        txn.add("negative zeros", zeros)
    view = MemoryStore.open(store.url).view()
    assert view.value("strange").tobytes() == bits
    assert view.value("negative zeros").tobytes() == zeros.tobytes()
    assert view.values(["negative zeros", "strange"]).tobytes() == zeros.tobytes() + bits
    assert view.values().dtype == (np.uint16 if dtype == "bfloat16" else np.dtype(dtype))
    assert store.verify("full").ok


def test_meta_and_its_named_parts(store: MemoryStore, space: Space) -> None:
    meta = {
        "task": "photo",
        "domain": "pacs",
        "classes": ["dog", "cat"],
        "scaling": 0.5,
        "hyperparameters": {"lr": 1e-3},
    }
    with store.transaction("write") as txn:
        added = txn.add("photo", some_values(space, 1), meta)
        txn.add("plain", some_values(space, 2))
    view = store.view()
    record = view.get("photo")
    assert record == view.get(added)
    assert (record.task, record.domain, record.classes) == ("photo", "pacs", ("dog", "cat"))
    assert record.scaling == 0.5
    assert dict(record.meta) == meta
    assert view.get("plain").scaling == space.layout.alpha / space.layout.rank
    with store.transaction("rename") as txn:
        txn.update("photo", name="foto", scaling=2, domain=None)
    record = store.view().get(added)
    assert (record.name, record.scaling, record.domain) == ("foto", 2.0, None)
    assert record.meta["classes"] == ["dog", "cat"]


def test_removed_rows_are_skipped_and_names_come_free(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("keys") as txn:
        txn.set_keys(np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4))
    before = grown.view()
    with grown.transaction("forget") as txn:
        txn.remove("t1")
    with grown.transaction("again") as txn:
        fill(txn, space, "t1", 9)
    view = grown.view()
    assert [(r.name, r.row) for r in view.adapters] == [("t0", 0), ("t2", 2), ("t1", 3)]
    assert np.array_equal(view.values(["t1"])[0], some_values(space, 9))
    keys, old = view.keys(), before.keys()
    assert keys is not None
    assert old is not None
    # t1 is new and last: it has no key yet.
    assert np.array_equal(keys, old[:, [0, 2]])
    assert view.segment(space.layout.segments[1].name).shape == (3, 6, 2)
    assert grown.verify().ok


def test_keys_and_blobs_change_and_go(grown: MemoryStore) -> None:
    keys = np.random.default_rng(1).standard_normal((3, 3, 5)).astype(np.float32)
    with grown.transaction("first") as txn:
        txn.set_keys(keys)
        txn.put_blob("heads", b"")
        txn.put_blob("query-modules", b"abc")
    wider = np.concatenate([keys, keys], axis=2)
    with grown.transaction("second") as txn:
        txn.set_keys(wider)
        txn.put_blob("heads", b"longer")
        txn.delete_blob("query-modules")
    now, before = grown.view().keys(), grown.view("HEAD~1").keys()
    assert now is not None
    assert before is not None
    assert np.array_equal(now, wider)
    assert grown.view().blobs() == ("heads",)
    assert grown.view().blob("heads") == b"longer"
    assert np.array_equal(before, keys)
    assert grown.view("HEAD~1").blob("heads") == b""
    with grown.transaction("none") as txn:
        txn.set_keys(None)
    assert grown.view().keys() is None
    assert grown.verify().ok


def test_files_come_back_byte_for_byte(store: MemoryStore, space: Space) -> None:
    layout = space.layout
    tensors = {
        s.name: some_values(space, 3)[s.offset : s.offset + s.numel].reshape(s.shape)
        for s in layout.segments
    }
    data = save(tensors, metadata={"format": "pt"})
    with store.transaction("import") as txn:
        txn.add_file("file", data, {"task": 1})
        txn.add_file("again", data)
        txn.add("array", some_values(space, 3))
    view = MemoryStore.open(store.url).view()
    assert view.export("file") == view.export("again") == data
    assert view.blobs() == ()
    made = load(view.export("array"))
    assert {name: t.tobytes() for name, t in made.items()} == {
        name: t.tobytes() for name, t in tensors.items()
    }


def test_what_an_adapter_must_be(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("nothing") as txn:
        with pytest.raises(AlreadyExistsError):
            txn.add("t1", some_values(space, 0))
        with pytest.raises(SpaceMismatchError):
            txn.add("long", np.zeros(space.numel + 1, np.float32))
        with pytest.raises(SpaceMismatchError):
            txn.add("double", np.zeros(space.numel, np.float64))
        with pytest.raises(SchemaError):
            txn.add("odd meta", some_values(space, 0), {"x": object()})
        with pytest.raises(SchemaError):
            txn.add("", some_values(space, 0))
        with pytest.raises(NotFoundError):
            txn.remove("t7")
        with pytest.raises(NotFoundError):
            txn.delete_blob("none")
        with pytest.raises(SchemaError):
            txn.put_blob("a/b", b"")
        with pytest.raises(SpaceMismatchError):
            txn.set_keys(np.zeros((1, 2, 3), np.float32))
        assert not txn.changed
    with pytest.raises(NotFoundError, match="did you mean 't1'"):
        grown.view().get("t11")
    with pytest.raises(NotFoundError):
        grown.view().blob("none")


def test_a_transaction_without_operations_makes_no_version(grown: MemoryStore) -> None:
    head = grown.head()
    with grown.transaction("nothing") as txn:
        pass
    assert grown.head() == txn.version == head


def test_an_error_or_interrupt_inside_leaves_nothing(grown: MemoryStore, space: Space) -> None:
    head = grown.head()
    before = sorted(p for p in Path(grown.url).rglob("*"))
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), grown.transaction("broken") as txn:  # noqa: PT012
            fill(txn, space, "never", 5)
            raise error
    assert grown.head() == head
    assert sorted(p for p in Path(grown.url).rglob("*")) == before


def test_the_caller_may_reuse_its_array(store: MemoryStore, space: Space) -> None:
    values = some_values(space, 1)
    with store.transaction("write") as txn:
        txn.add("a", values)
        values[:] = 0
    assert np.array_equal(store.view().value("a"), some_values(space, 1))


def test_an_empty_store_is_a_store(store: MemoryStore, space: Space) -> None:
    view = store.view()
    assert len(view) == 0
    assert view.values().shape == (0, space.numel)
    assert view.keys() is None
    assert store.verify().ok
