"""Files and blobs that a transaction does not hold: read one by one in the commit, and checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

import memtool_stores
from memtool_stores import ChangedMeanwhileError, MemoryStore, Space, arrays, ragged
from memtool_stores.arrays import write_bytes
from memtool_stores.held import Held, Spool, TensorFile
from memtool_stores.parts import PART_BYTES
from memtool_stores.testing import fill, some_values
from memtool_stores.transaction import Transaction
from memtool_stores.tree import Tree

MIB = 1024 * 1024


def _written(folder: Path, count: int, nbytes: int = 400) -> list[Path]:
    """Files of one shape and unlike numbers."""
    generator = np.random.default_rng(0)
    files = [folder / f"f{number}" for number in range(count)]
    for file in files:
        file.write_bytes(save({"a": generator.integers(0, 99, nbytes // 4).astype(np.float32)}))
    return files


def _seen(file: Path) -> TensorFile:
    return TensorFile.of(file.read_bytes(), str(file), file.read_bytes)


def test_files_and_blobs_come_back_and_are_read_once_in_the_commit(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged, "CHUNK_BYTES", 64)
    files, read = _written(tmp_path, 40), list[str]()

    def again(file: Path) -> bytes:
        read.append(file.name)
        return file.read_bytes()

    with Spool() as spool, store.transaction("files") as txn:
        for file in files:
            txn.add_file(file.name, TensorFile.of(file.read_bytes(), "", partial(again, file)))
            txn.put_blob(f"looks.{file.name}", spool.put(file.name.encode()))
        txn.put_blob("large", bytes(range(256)) * (PART_BYTES // 200))
        txn.put_blob("empty", b"")
        assert read == []
        assert txn.value("f3").tobytes() == files[3].read_bytes()[-400:]
        read.clear()
    assert read == [file.name for file in files]
    view = MemoryStore.open(store.url).view()
    for file in files:
        assert view.export(file.name) == file.read_bytes()
        assert view.blob(f"looks.{file.name}") == file.name.encode()
    assert view.blob("large") == bytes(range(256)) * (PART_BYTES // 200)
    assert view.blob("empty") == b""
    with store.transaction("shorter") as txn:
        txn.put_blob("large", b"small now")
        txn.delete_blob("empty")
    assert store.view().blob("large") == b"small now"
    assert "empty" not in store.view().blobs()
    assert store.verify().ok


def test_a_file_of_the_layout_that_is_not_held_is_a_row_like_any_other(
    store: MemoryStore, space: Space
) -> None:
    with store.transaction("write") as txn:
        fill(txn, space, "plain", 1)
    data = store.export("plain")
    with store.transaction("again") as txn:
        txn.add_file("file", TensorFile.of(data, "", lambda: data))
        assert txn.value("file").tobytes() == some_values(space, 1).tobytes()
    view = store.view()
    assert not view.get("file").ragged
    assert np.array_equal(view.values(), np.stack([some_values(space, 1)] * 2))


def test_what_changed_since_it_was_looked_at_is_not_stored(
    store: MemoryStore, tmp_path: Path
) -> None:
    files = _written(tmp_path, 3)
    head = store.head()

    def append(txn: Transaction) -> None:
        for file in files:
            txn.add_file(file.name, _seen(file))
        files[1].write_bytes(files[2].read_bytes())

    with pytest.raises(ChangedMeanwhileError, match=r"f1 changed .* nothing was stored"):
        store.run(append, "files")
    assert store.head() == head
    assert len(store.view()) == 0
    store.gc()
    assert store.verify().ok


def test_arrays_are_documented_as_zarr_documents_them(store: MemoryStore) -> None:
    """The slow twin writes each array by zarr's own way."""
    session = store._repository.writable_session("main")
    tree = Tree(session, write=True)
    prototype = default_buffer_prototype()

    def stored(name: str) -> dict[str, bytes]:
        keys = [f"{name}/zarr.json", *(f"{name}/c/{place}" for place in range(4))]
        found = {key: sync(session.store.get(key, prototype)) for key in keys}
        return {k.removeprefix(name): v.to_bytes() for k, v in found.items() if v is not None}

    for length, step in ((0, 1), (1, 1), (10, 10), (10, 4), (12, 4)):
        data = bytes(range(1, length + 1))
        slow = tree._create("blobs/slow", (length,), (step,), np.dtype("u1"))
        if data:
            slow[:] = np.frombuffer(data, np.uint8)
        write_bytes(tree._group, "blobs/slow", [("blobs/fast", data, step)])
        slow_files, fast_files = stored("blobs/slow"), stored("blobs/fast")
        said = [json.loads(one.pop("/zarr.json")) for one in (slow_files, fast_files)]
        assert said[0] == said[1]
        chunks = -(-length // step)
        assert {k: v for k, v in fast_files.items() if int(k[-1]) < chunks} == slow_files


@pytest.mark.parametrize("held", [True, False])
def test_memory_does_not_grow_with_the_number_of_files(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setattr(arrays, "WRITTEN_BYTES", 2 * MIB)
    monkeypatch.setattr("memtool_stores.held.SPOOLED_BYTES", MIB)
    files = _written(tmp_path, 24, MIB)

    def peak(some: list[Path], begin: int) -> int:
        tracemalloc.start()
        with Spool() as spool, store.transaction("files") as txn:
            for number, file in enumerate(some, start=begin):
                data = _seen(file) if held else file.read_bytes()
                txn.add_file(f"a{number}", data)
                txn.put_blob(f"b{number}", spool.put(bytes(MIB)) if held else bytes(MIB))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(files[:6], 0), peak(files, 6)
    assert (many - few < 2 * MIB) is held
    assert (many > 40 * MIB) is not held
    assert store.verify().ok


def test_a_spool_gives_back_what_was_put_in_any_order() -> None:
    with Spool() as spool:
        parts = [bytes([n]) * n for n in range(50)]
        held = [spool.put(part) for part in parts]
        for n in (49, 0, 7, 7, 23):
            assert held[n].data() == parts[n]
            assert (held[n].nbytes, held[n].sha256) == (n, Held.of(parts[n]).sha256)


KILLED = """
import os, signal, sys
from pathlib import Path
from memtool_stores import MemoryStore, arrays
from memtool_stores.held import TensorFile
url, folder, die_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
arrays.WRITTEN_ARRAYS = 2
real, calls = arrays.put, []
def put(group, files):
    if len(calls) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    real(group, files)
arrays.put = put
store = MemoryStore.open(url)
with store.transaction("files") as txn:
    for file in sorted(folder.glob("f*")):
        txn.add_file(file.name, TensorFile.of(file.read_bytes(), "", file.read_bytes))
print(len(calls))
os._exit(0)
"""


@pytest.mark.parametrize("die_at", [0, 1, 3, 6])
def test_a_kill_between_files_leaves_the_version_before_and_gc_takes_the_rest(
    grown: MemoryStore, tmp_path: Path, die_at: int
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    files = _written(folder, 6)
    chunks = Path(grown.url) / "ice" / "chunks"
    before, head = {*chunks.iterdir()}, grown.head()
    environment = {**os.environ, "PYTHONPATH": str(Path(memtool_stores.__file__).parents[1])}

    def run(at: int) -> int:
        script = [sys.executable, "-c", KILLED, grown.url, str(folder), str(at)]
        return subprocess.run(script, env=environment, check=False).returncode

    assert run(die_at) == -signal.SIGKILL
    assert grown.head() == head
    assert grown.verify().ok
    left = {*chunks.iterdir()} - before
    assert bool(left) is (die_at > 1)
    grown.gc()
    assert {*chunks.iterdir()} == before
    assert run(-1) == 0
    view = grown.view()
    assert [view.export(file.name) for file in files] == [file.read_bytes() for file in files]
    assert grown.verify().ok
