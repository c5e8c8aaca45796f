"""Rows with a layout of their own: whole and byte for byte, apart from the others, and provable."""

from __future__ import annotations

import json
import math
import random
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from zarr.core.sync import sync

from memtool_stores import (
    AlreadyExistsError,
    IntegrityError,
    MemoryStore,
    NotFoundError,
    SchemaError,
    Space,
    SpaceMismatchError,
    limits,
    ragged,
    sums,
)
from memtool_stores.catalog import AdapterRecord
from memtool_stores.migrate import SCHEMA_VERSION
from memtool_stores.store import _sealed
from memtool_stores.tensorfile import write_header
from memtool_stores.testing import (
    MODULE,
    file_data,
    fill,
    ragged_file,
    small_space,
    some_values,
)
from memtool_stores.transaction import Transaction
from memtool_stores.tree import Tree, sha256

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Tensor = tuple[str, str, list[int]]
"""Name, dtype and shape."""


def _file(tensors: Sequence[Tensor], data: bytes, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with these tensors, one after the other, their data cut from `data`."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + WIDTHS[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries).encode()
    filled = data * (begin // max(1, len(data)) + 1) if data else bytes(begin)
    return len(text).to_bytes(8, "little") + text + filled[:begin]


SHAPES = st.lists(st.integers(0, 5), max_size=3)
FILES = st.builds(
    _file,
    st.lists(
        st.tuples(st.text("abAB._é ", min_size=1, max_size=4), st.sampled_from([*WIDTHS]), SHAPES),
        min_size=1,
        max_size=6,
        unique_by=lambda tensor: tensor[0],
    ),
    st.binary(max_size=40),
    st.none() | st.dictionaries(st.text("ab"), st.text("xyé"), max_size=2),
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few bytes have several chunks."""
    monkeypatch.setattr(ragged, "CHUNK_BYTES", 32)


@pytest.mark.parametrize("most", [7, ragged.CHUNK_BYTES])
@settings(max_examples=15)
@given(files=st.lists(FILES, min_size=1, max_size=4))
def test_any_files_come_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, most: int, files: list[bytes]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "CHUNK_BYTES", most)
        folder = tmp_path_factory.mktemp("any")
        store = MemoryStore.create(folder / "memory", small_space())
        with store.transaction("files") as txn:
            for number, file in enumerate(files):
                id = txn.add_file(f"f{number}", file)
                assert txn.value(id).tobytes() == file_data(file)
        for again in (
            MemoryStore.open(store.url),
            store.clone(folder / "clone"),
            MemoryStore.from_bundle(_bundled(store, folder), folder / "unpacked"),
        ):
            view = again.view()
            for number, file in enumerate(files):
                value = view.value(f"f{number}")
                assert (value.dtype, value.shape) == (np.uint8, (len(file_data(file)),))
                assert value.tobytes() == file_data(file)
                assert view.export(f"f{number}") == file
                assert view.get(f"f{number}").nbytes == len(file_data(file))
            for level in ("heads", "checksums", "full"):
                assert again.verify(level).ok


def _bundled(store: MemoryStore, folder: Path) -> Path:
    store.bundle(folder / "bundle")
    return folder / "bundle"


def test_only_the_layout_itself_is_a_row_of_the_layout(store: MemoryStore, space: Space) -> None:
    """Another order, dtype, name or shape is another layout; metadata are no part of one."""
    layout, data = space.layout, some_values(space, 0).tobytes()
    tensors: list[Tensor] = [(s.name, "F32", list(s.shape)) for s in layout.segments]
    (name, _, shape), second = tensors
    others = {
        "order": tensors[::-1],
        "dtype": [(n, "BF16", s) for n, _, s in tensors],
        "name": [(name + "x", "F32", shape), second],
        "shape": [(name, "F32", shape[::-1]), second],
        "more": [*tensors, ("more", "F32", [0])],
        "less": [second],
    }
    with store.transaction("files") as txn:
        txn.add_file("same", _file(tensors, data, {"any": "thing"}))
        for what, other in others.items():
            txn.add_file(what, _file(other, data))
    view = store.view()
    assert {record.name for record in view.adapters if not record.ragged} == {"same"}
    assert view.values(["same"]).tobytes() == data
    assert {what: view.export(what) for what in others} == {
        what: _file(other, data) for what, other in others.items()
    }


def test_files_of_safetensors_itself(store: MemoryStore) -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float64).reshape(2, 3),
        "a": np.ones((4, 1), np.float16),
        "none": np.zeros((0, 3), np.float32),
    }
    with store.transaction("file") as txn:
        txn.add_file("file", save(tensors, metadata={"format": "np"}), {"task": 7})
    found = load(store.export("file"))
    assert {k: (v.dtype, v.tolist()) for k, v in found.items()} == {
        k: (v.dtype, v.tolist()) for k, v in tensors.items()
    }
    assert (store.view().get("file").task, store.view().blobs()) == (7, ())


@pytest.mark.parametrize(
    "file",
    [
        b"",
        _file([], b""),
        ragged_file(0)[:-1],
        ragged_file(0) + b"\0",
        ragged_file(0).replace(b"F64", b"I64"),
        ragged_file(0).replace(b"[0, 24]", b"[1, 24]"),
    ],
    ids=["nothing", "no tensor", "cut", "more", "whole numbers", "a gap"],
)
def test_what_is_no_file_of_float_tensors_is_refused(store: MemoryStore, file: bytes) -> None:
    with store.transaction("refused") as txn:
        with pytest.raises(SchemaError):
            txn.add_file("no", file)
        assert not txn.changed


def test_one_too_large_is_refused_where_it_is_written(store: MemoryStore) -> None:
    fits, too_large = (_file([("a", "F32", [n])], b"1") for n in (1000, 1001))
    limits.use(replace(limits.current(), array_bytes=4000))
    with store.transaction("refused") as txn:
        txn.add_file("fits", fits)
        with pytest.raises(SchemaError, match=r"limits\.array_bytes"):
            txn.add_file("too large", too_large)
    assert store.export("fits") == fits
    assert [record.name for record in store.view().adapters] == ["fits"]


@pytest.fixture
def mixed(grown: MemoryStore, small_chunks: None) -> MemoryStore:
    """t0, t1 and t2 of the layout, then r0 and r1, ragged: one chunk of 32 bytes, two of 32."""
    with grown.transaction("ragged") as txn:
        txn.add_file("r0", ragged_file(0), {"task": 0})
        txn.add_file("r1", ragged_file(1), {"task": 1})
    return grown


def test_tensors_of_all_are_refused_and_the_row_is_named(mixed: MemoryStore, space: Space) -> None:
    view = mixed.view()
    tensor = space.layout.segments[0]
    for ask in (
        view.values,
        lambda: view.values(["t0", "r0"]),
        lambda: view.segment(tensor.name),
        lambda: view.segment(tensor.name, np.empty((5, *tensor.shape), np.float32)),
    ):
        with pytest.raises(SpaceMismatchError, match=r"'r0' is ragged") as raised:
            ask()
        assert "export" in str(raised.value.remedy)
    found = view.values(["t2", "t0"])
    assert found.tobytes() == np.stack([some_values(space, t) for t in (2, 0)]).tobytes()
    before = mixed.view("HEAD~1")
    assert before.values().shape == (3, space.numel)
    with mixed.transaction("out") as txn:
        txn.remove("r0")
        txn.purge("r1")
    assert mixed.view().values().tobytes() == before.values().tobytes()
    assert mixed.view().segment(tensor.name).shape == (3, *tensor.shape)


def test_keys_cover_ragged_rows_and_atoms_stand_beside_them(
    mixed: MemoryStore, space: Space
) -> None:
    keys = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    with mixed.transaction("keys") as txn:
        txn.set_keys(keys)
        txn.add_atoms("atoms", some_values(space, 9))
    assert np.array_equal(mixed.view().keys(), keys)  # type: ignore[arg-type]
    assert len(mixed.view().atoms(MODULE)) == 2
    with mixed.transaction("purge") as txn:
        txn.purge("r0")
    assert np.array_equal(mixed.view().keys(), keys[:, [0, 1, 2, 4]])  # type: ignore[arg-type]
    assert [r.name for r in mixed.diff("HEAD~1").removed] == ["r0"]
    assert mixed.verify().ok


def test_what_is_said_of_a_row_changes_and_its_bytes_do_not(mixed: MemoryStore) -> None:
    with mixed.transaction("say") as txn:
        txn.update("r1", name="renamed", task=5)
        assert txn.value("renamed").tobytes() == file_data(ragged_file(1))
    view = mixed.view()
    assert (view.get("renamed").task, view.export("renamed")) == (5, ragged_file(1))
    before = mixed.view("HEAD~1").get("r1")
    assert (before.nbytes, before.pieces) == (
        view.get("renamed").nbytes,
        view.get("renamed").pieces,
    )
    assert len(before.pieces) == 2
    assert [(r.name, r.task) for r in mixed.diff("HEAD~1").changed] == [("renamed", 5)]
    with mixed.transaction("out") as txn:
        txn.remove("renamed")
        txn.add_file("r1", ragged_file(2))
        with pytest.raises(AlreadyExistsError):
            txn.add_file("r0", ragged_file(2))
    assert mixed.view().export("r1") == ragged_file(2)
    with pytest.raises(NotFoundError):
        mixed.view().value("renamed")
    mixed.rollback("HEAD~2")
    assert mixed.view().export("r1") == ragged_file(1)
    assert mixed.verify().ok


def _with(data: bytes, *folders: str | Path) -> list[Path]:
    """Every file below these folders in which the bytes lie somewhere."""
    files = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return [path for path in files if data in path.read_bytes()]


def _headers(store: MemoryStore) -> set[str]:
    return {name for name in store.view().blob_hashes if name.startswith("header-")}


@pytest.mark.parametrize("removed_before", [False, True])
def test_after_purge_and_gc_no_byte_is_left(
    mixed: MemoryStore, cache: Path, removed_before: bool
) -> None:
    record = mixed.view().get("r1")
    pieces = [file_data(ragged_file(1))[:30], file_data(ragged_file(1))[34:]]
    assert set(mixed.find_bytes([record.sha256])) == {record.sha256}
    assert len(mixed.find_bytes([record.sha256])[record.sha256]) == 2
    mixed.tag("before")
    if removed_before:
        with mixed.transaction("remove") as txn:
            txn.remove("r1")
        assert all(_with(piece, mixed.url) for piece in pieces)
    with mixed.transaction("purge") as txn:
        txn.purge("r1")
    view = mixed.view()
    assert (view.state.purged, view.state.rows, view.state.ragged) == (1, 5, 1)
    assert view._tree.files() == ["3"]
    assert mixed.holders(record.id) == ["before"]
    mixed.gc(keep_last=1)
    assert len(mixed.find_bytes([record.sha256])[record.sha256]) == 2
    mixed.delete_tag("before")
    mixed.gc(keep_last=1)
    assert mixed.find_bytes([record.sha256, *record.pieces]) == {}
    assert not any(_with(piece, mixed.url, cache) for piece in pieces)
    assert mixed.export("r0") == ragged_file(0)
    assert mixed.verify().ok


def test_one_piece_that_is_left_is_found(mixed: MemoryStore) -> None:
    """Of a row of several chunks no object has the hash; any of its pieces tells."""
    record = mixed.view().get("r1")
    (path, _) = mixed.find_bytes([record.sha256])[record.sha256]
    kept = (Path(mixed.url) / path).read_bytes()
    with mixed.transaction("purge") as txn:
        txn.purge("r1")
    mixed.gc(keep_last=1)
    (Path(mixed.url) / "ice" / "chunks" / "of-nobody").write_bytes(kept)
    assert mixed.find_bytes([record.sha256]) == {record.sha256: ["ice/chunks/of-nobody"]}


def test_a_header_goes_with_the_last_row_that_has_it(mixed: MemoryStore) -> None:
    """That of r0 is the one of r0 and of nobody else; the one of r1 is shared by `again`."""
    with mixed.transaction("again") as txn:
        txn.add_file("again", ragged_file(1)[:-1] + b"\1")
    assert len(_headers(mixed)) == 2
    with mixed.transaction("purge") as txn:
        txn.purge("r1")
        txn.purge("r0")
    (left,) = _headers(mixed)
    assert left == f"header-{mixed.view().get('again').header}"
    assert mixed.export("again") == ragged_file(1)[:-1] + b"\1"
    with mixed.transaction("at once") as txn:
        txn.purge(txn.add_file("never", ragged_file(2)))
        txn.purge("again")
        txn.add_file("after", ragged_file(1))
    assert _headers(mixed) == {left}
    assert mixed.export("after") == ragged_file(1)
    assert not _with(file_data(ragged_file(2)), mixed.url)
    assert mixed.verify().ok


def test_a_row_without_bytes_is_one(store: MemoryStore) -> None:
    """And no empty file of the store passes for it."""
    with store.transaction("empty") as txn:
        txn.add_file("empty", _file([("a", "F32", [0, 3])], b""))
    assert store.view().value("empty").shape == (0,)
    assert store.verify().ok
    record = store.view().get("empty")
    with store.transaction("purge") as txn:
        txn.purge("empty")
    store.gc(keep_last=1)
    assert store.find_bytes([record.sha256]) == {}
    assert store.verify().ok


# Damage


def _chunks(store: MemoryStore, name: str) -> list[Path]:
    digest = store.view().get(name).sha256
    return [Path(store.url) / path for path in store.find_bytes([digest])[digest]]


def test_every_flipped_bit_is_found_and_named(mixed: MemoryStore) -> None:
    generator = random.Random(0)
    for name in ("r0", "r1"):
        for path in _chunks(mixed, name):
            whole = path.read_bytes()
            for bit in generator.sample(range(8 * len(whole)), 8):
                data = bytearray(whole)
                data[bit // 8] ^= 1 << bit % 8
                path.write_bytes(data)
                for level in ("checksums", "full"):
                    (damage,) = mixed.verify(level).damages  # type: ignore[arg-type]
                    assert (damage.what, damage.name) == ("values", name)
                for read in (mixed.view().value, mixed.view().export):
                    with pytest.raises(IntegrityError, match=name):
                        read(name)
                path.write_bytes(whole)
    assert mixed.verify().ok


@pytest.mark.parametrize("how", ["cut", "empty", "gone", "more"])
def test_a_chunk_of_another_length_is_found_and_named(mixed: MemoryStore, how: str) -> None:
    for path in _chunks(mixed, "r1"):
        whole = path.read_bytes()
        match how:
            case "gone":
                path.unlink()
            case "more":
                path.write_bytes(whole + b"\0")
            case _:
                path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
        damages = mixed.verify().damages
        if how == "more":  # no reader is given what is beyond the end
            assert [(d.what, d.name) for d in damages] == [
                ("chunk", str(path.relative_to(mixed.url)))
            ]
        else:
            assert [(d.what, d.name) for d in damages] == [("values", "r1")]
        assert mixed.view().value("r0").tobytes() == file_data(ragged_file(0))
        path.write_bytes(whole)


Change = Callable[[Any, dict[str, Any]], None]


def _changed(store: MemoryStore, change: Change) -> None:
    """A version with a right seal and right checksums, made by hand."""
    parent = store.head()
    session = store._repository.writable_session("main")
    group = zarr.open_group(session.store, mode="r+")
    attributes = dict(group.attrs)
    change(group, attributes)
    group.attrs.put(attributes)
    sealed = _sealed(Tree(session), parent=parent, message="by hand", user="{}")
    version = session.flush("by hand", metadata=sealed)
    sums.write(store.url, store._repository, version)
    store._repository.reset_branch("main", version, from_snapshot_id=parent)


def _missing(group: Any, _: dict[str, Any]) -> None:
    del group["files/4"]


def _missing_all(group: Any, _: dict[str, Any]) -> None:
    del group["files"]


def _missing_chunk(group: Any, _: dict[str, Any]) -> None:
    sync(group.store.delete("files/4/c/1"))


def _stranger(group: Any, _: dict[str, Any]) -> None:
    group.create_array("files/0", shape=(3,), chunks=(3,), dtype="u1")


def _longer(group: Any, _: dict[str, Any]) -> None:
    group["files/4"].resize((10**15,))


def _in_values(group: Any, _: dict[str, Any]) -> None:
    group["values"][4] = 1.0


@pytest.mark.parametrize(
    ("change", "level", "name"),
    [
        (_missing, "full", "values r1"),
        (_missing, "heads", "array files"),
        (_missing_all, "full", "values r1"),
        (_missing_all, "heads", "array files"),
        (_missing_chunk, "checksums", "values r1"),
        (_stranger, "checksums", "array files"),
        (_stranger, "heads", "array files"),
        (_longer, "checksums", "values r1"),
        (_in_values, "checksums", "values r1"),
    ],
)
@pytest.mark.parametrize("at_tip", [True, False])
def test_what_is_missing_strange_or_elsewhere_is_damage(
    mixed: MemoryStore, change: Change, level: Any, name: str, at_tip: bool
) -> None:
    """At the tip, or in a version before it (which the level of heads does not look at)."""
    _changed(mixed, change)
    if not at_tip:
        mixed.rollback("HEAD~1")
    report = mixed.verify(level)
    if name == "array files":  # as a blob of nobody: in what of its version is wrong
        assert any(damage.found.startswith("files: ") for damage in report.damages)
    else:
        assert name in {f"{damage.what} {damage.name}" for damage in report.damages}


def _tidied(group: Any, _: dict[str, Any]) -> None:
    del group["files/0"]


def test_what_is_wrong_in_a_version_between_is_found(mixed: MemoryStore) -> None:
    """The versions before and after it are whole, and no row of it is new."""
    _changed(mixed, _stranger)
    strange = mixed.head()
    _changed(mixed, _tidied)
    (damage,) = mixed.verify("checksums").damages
    assert (damage.what, damage.name) == ("version", strange)
    assert damage.found.startswith("files: 0 of nobody")
    mixed.rollback("HEAD~2")
    mixed.delete_branch(next(name for name in mixed.branches() if name != "main"))
    assert mixed.verify().ok
    _changed(mixed, _missing)
    with mixed.transaction("purge") as txn:
        txn.purge("r1")
    (damage,) = mixed.verify("checksums").damages
    assert (damage.what, damage.name, damage.found) == ("values", "r1", "no such array")


def test_what_was_appended_to_a_large_chunk_is_found(grown: MemoryStore) -> None:
    """One too long for its end to be looked for: its length must be known."""
    with grown.transaction("large") as txn:
        txn.add_file("large", _file([("a", "F32", [10_000])], bytes(range(256))))
    (path,) = _chunks(grown, "large")
    path.write_bytes(path.read_bytes() + b"\0")
    (damage,) = grown.verify().damages
    assert (damage.what, damage.name) == ("chunk", str(path.relative_to(grown.url)))


def _line(store: MemoryStore, name: str, **said: Any) -> Change:
    """A last line of the catalog that says something else of a row, with the right chain."""
    base = store.view().catalog
    record = base.by_name(name)
    assert record is not None
    line = json.dumps({**json.loads(record.line()), **said}).encode() + b"\n"

    def change(group: Any, attributes: dict[str, Any]) -> None:
        array, size = group["catalog"], base.size
        array.resize((size + len(line),))
        array[size:] = np.frombuffer(line, np.uint8)
        state = {
            **attributes["state"],
            "catalog_bytes": size + len(line),
            "catalog_chain": base._link([line]),
            "catalog_lines": base.lines + 1,
        }
        if said.get("nbytes", 0) is None:
            state["ragged"] -= 1
        attributes["state"] = state

    return change


@pytest.mark.parametrize(
    "said",
    [
        {"nbytes": -1},
        {"nbytes": 10**15},
        {"nbytes": 2**70},
        {"nbytes": 64.0},
        {"nbytes": True},
        {"nbytes": 63},
        {"nbytes": 64},
        {"nbytes": 65},
        {"nbytes": 0, "pieces": []},
        {"nbytes": None},
        {"pieces": []},
        {"pieces": ["0" * 64] * 2},
        {"pieces": ["0" * 64] * 3},
        {"kind": "atoms"},
        {"header": None},
        {"sha256": "0" * 64},
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_what_lies_there_is_never_believed(
    mixed: MemoryStore, said: dict[str, Any]
) -> None:
    right = json.loads(mixed.view().get("r1").line())
    _changed(mixed, _line(mixed, "r1", **said))
    if all(right[key] == value and type(right[key]) is type(value) for key, value in said.items()):
        assert mixed.view().export("r1") == ragged_file(1)  # nothing was changed
        assert mixed.verify().ok
        return
    assert not mixed.verify().ok
    if said == {"pieces": ["0" * 64] * 2}:
        return  # a reader does without them
    with pytest.raises(IntegrityError):
        mixed.view().value("r1")
    with pytest.raises((IntegrityError, SchemaError)):  # its header says another length
        mixed.view().export("r1")


@pytest.mark.parametrize("ragged_rows", [0, 1, 3, -1, 10**9, "2", None])
def test_a_state_that_counts_other_files_is_damage(mixed: MemoryStore, ragged_rows: object) -> None:
    def change(_: Any, attributes: dict[str, Any]) -> None:
        attributes["state"] = {**attributes["state"], "ragged": ragged_rows}

    _changed(mixed, change)
    for level in ("heads", "full"):
        assert not mixed.verify(level).ok  # type: ignore[arg-type]
    with pytest.raises((IntegrityError, SchemaError)):
        mixed.view().export("r1")


@pytest.mark.parametrize("what", ["group", "array"])
def test_what_a_stranger_put_in_the_place_of_a_row_is_not_taken_for_one(
    grown: MemoryStore, what: str
) -> None:
    def change(group: Any, _: dict[str, Any]) -> None:
        if what == "array":
            group.create_array("files", shape=(3,), chunks=(3,), dtype="u1")
        else:
            group.create_array("files/3", shape=(96,), chunks=(96,), dtype="u1")

    _changed(grown, change)
    if what == "array":
        with pytest.raises(IntegrityError, match="a group"), grown.transaction("on it") as txn:
            txn.add_file("r0", ragged_file(0))
    else:
        with grown.transaction("on it") as txn:
            txn.add_file("r0", ragged_file(0))
        assert grown.export("r0") == ragged_file(0)


# Cost


def _added(store: MemoryStore, add: Callable[[Transaction], object]) -> int:
    """Bytes of chunks that a commit brings to the disk."""
    folder = Path(store.url) / "ice" / "chunks"
    before = {path.name for path in folder.iterdir()} if folder.exists() else set()
    with store.transaction("add") as txn:
        add(txn)
    return sum(p.stat().st_size for p in folder.iterdir() if p.name not in before)


def test_an_append_costs_its_own_bytes(grown: MemoryStore) -> None:
    file = _file([("a", "F32", [1300, 1000])], bytes(range(256)))
    assert len(file_data(file)) > ragged.CHUNK_BYTES
    first = _added(grown, lambda txn: txn.add_file("large", file))
    second = _added(grown, lambda txn: txn.add_file("again", file))
    assert second <= first + 2048 < len(file) + 8 * 1024
    assert len(grown.view().get("large").pieces) == 2
    assert grown.export("again") == file
    assert grown.verify().ok


def test_a_thousand_files_are_one_commit_and_reading_one_reads_no_other(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_file([("a", "F32", [1, 1 + n % 5])], n.to_bytes(2, "big")) for n in range(1000)]
    with store.transaction("write") as txn:
        for n, file in enumerate(files):
            txn.add_file(f"f{n}", file)
    assert len(store.log()) == 2
    assert len(_headers(store)) == 5
    view = MemoryStore.open(store.url).view()
    assert view.state.rows == view.state.ragged == 1000
    asked: list[str] = []
    view.get("f0")
    store_class = type(view._tree._group.store)
    get = store_class.get

    async def noted(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(store_class, "get", noted)
    assert view.export("f123") == files[123]
    assert {key.split("/")[1] for key in asked if key.startswith("files/")} == {"123"}
    # The row, its header, and the page that says where that is.
    assert len([key for key in asked if "/c/" in key]) == 3


def _unpacked(schema: int, folder: Path) -> MemoryStore:
    with zipfile.ZipFile(Path(__file__).parent / "fixtures" / f"schema-{schema}.zip") as archive:
        archive.extractall(folder)
    return MemoryStore.open(folder)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_store_of_an_older_schema_takes_ragged_rows(tmp_path: Path, schema: int) -> None:
    """Its own records have no word of them, and none is ragged; its older versions stay."""
    store = _unpacked(schema, tmp_path / "old")
    before, adapters = store.head(), store.view().adapters
    assert not any(record.ragged for record in store.view().catalog.records.values())
    with store.transaction("ragged") as txn:
        txn.add_file("ragged", ragged_file(0))
    again = MemoryStore.open(store.url)
    assert (again.view().schema, again.view(before).schema) == (SCHEMA_VERSION, schema)
    assert again.view().adapters[:-1] == again.view(before).adapters == adapters
    assert again.export("ragged") == ragged_file(0)
    assert again.verify().ok


def test_what_the_code_of_schema_3_wrote_is_read(tmp_path: Path) -> None:
    store = _unpacked(3, tmp_path / "old")
    assert store.export("sketch") == ragged_file(0)
    assert store.export("clipart", "side") == ragged_file(1)
    assert (store.view().state.ragged, store.view("side").state.ragged) == (1, 2)


def test_a_record_of_the_layout_is_written_as_it_always_was(space: Space) -> None:
    """Without a word of what it is not: an older catalog is a catalog, to the byte."""
    record = AdapterRecord.of(
        id="0" * 26, row=0, name="a", sha256=sha256(b""), meta={}, scaling=2.0, header="1" * 64
    )
    assert "nbytes" not in json.loads(record.line())
    assert AdapterRecord.of_line(record.line()) == record
    own = replace(record, nbytes=3)
    assert own.ragged
    assert AdapterRecord.of_line(own.line()) == own


@given(nbytes=st.integers(0, 10**12))
def test_chunks_are_equal_few_and_hold_everything(nbytes: int) -> None:
    length, count = ragged.chunk_bytes(nbytes), ragged.chunk_count(nbytes)
    assert 1 <= length <= ragged.CHUNK_BYTES
    assert count * length >= nbytes > (count - 1) * length or nbytes == count == 0
    assert count * length - nbytes <= count


def test_rows_of_the_layout_go_on_beside_ragged_ones(mixed: MemoryStore, space: Space) -> None:
    header = write_header([(s.name, s.shape) for s in space.layout.segments], space.layout.dtype)
    with mixed.transaction("more") as txn:
        fill(txn, space, "t3", 3)
        txn.add_file("t4", header + some_values(space, 4).tobytes())
    view = mixed.view()
    assert [(r.name, r.row, r.ragged) for r in view.adapters][3:] == [
        ("r0", 3, True),
        ("r1", 4, True),
        ("t3", 5, False),
        ("t4", 6, False),
    ]
    assert view.values(["t3", "t4"]).tobytes() == b"".join(
        some_values(space, t).tobytes() for t in (3, 4)
    )
    assert mixed.verify().ok
