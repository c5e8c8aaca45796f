"""The cache gives what the store has, or is built again; it is never believed."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import memtool_stores
from memtool_stores import MemoryStore, Space
from memtool_stores.testing import fill, some_values


def _files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.values"), key=lambda p: p.stat().st_mtime_ns)


def test_versions_with_the_same_adapters_share_a_file(grown: MemoryStore, cache: Path) -> None:
    grown.view().values()
    with grown.transaction("blob") as txn:
        txn.put_blob("b", b"1")
    grown.view().values()
    assert len(_files(cache)) == 1


def test_values_are_copies_and_cannot_be_written(grown: MemoryStore, space: Space) -> None:
    view = grown.view()
    values = view.values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(3)]))
    for segment in space.layout.segments:
        tensor = view.segment(segment.name)
        assert tensor.flags.c_contiguous
        columns = values[:, segment.offset : segment.offset + segment.numel]
        assert np.array_equal(tensor, columns.reshape(3, *segment.shape))
        for array in (values, tensor):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty"])
def test_a_wrong_file_is_built_again(grown: MemoryStore, cache: Path, damage: str) -> None:
    expected = grown.view().values().tobytes()
    (path,) = _files(cache)
    right = path.read_bytes()
    data = bytearray(right)
    if damage == "flip":
        data[100] ^= 1
    path.write_bytes(data if damage == "flip" else data[:50] if damage == "shorten" else b"")
    assert MemoryStore.open(grown.url).view().values().tobytes() == expected
    assert path.read_bytes() == right


def test_a_file_grows_from_the_older_one(grown: MemoryStore, space: Space, cache: Path) -> None:
    grown.view().values()
    (older,) = _files(cache)
    # A wrong row in the older file must not come through.
    data = bytearray(older.read_bytes())
    data[5] ^= 4
    older.write_bytes(data)
    with grown.transaction("more") as txn:
        fill(txn, space, "t3", 3)
    values = grown.view().values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(4)]))


def test_old_files_go(store: MemoryStore, space: Space, cache: Path) -> None:
    for seed in range(7):
        with store.transaction("add") as txn:
            fill(txn, space, f"a{seed}", seed)
        store.view().values()
    assert len(_files(cache)) == 4
    assert len(store.view("HEAD~6").values()) == 1


def test_without_a_place_for_it_values_come_all_the_same(
    grown: MemoryStore, cache: Path, space: Space
) -> None:
    cache.write_text("a file where the folder should be")
    values = grown.view().values()
    assert np.array_equal(values, np.stack([some_values(space, t) for t in range(3)]))


LEFT = Path(__file__).parent / "left.py"


def _right(space: Space, count: int = 3) -> bytes:
    return np.stack([some_values(space, t) for t in range(count)]).tobytes()


@pytest.mark.parametrize("place", ["wrong", "folder", "link", "pipe", "long"])
def test_what_lies_in_the_place_of_a_file_is_not_believed(
    grown: MemoryStore, cache: Path, space: Space, tmp_path: Path, place: str
) -> None:
    grown.view().values()
    (path,) = _files(cache)
    size = path.stat().st_size
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(size))
    match place:
        case "wrong":
            path.write_bytes(bytes(size))
        case "long":
            path.write_bytes(bytes(2 * size))
        case "folder":
            path.mkdir()
            (path / "theirs").write_bytes(b"kept")
        case "link":
            path.symlink_to(victim)
        case _:
            os.mkfifo(path)
    assert grown.view().values().tobytes() == _right(space)
    assert victim.read_bytes() == bytes(size)
    if place == "folder":
        assert (path / "theirs").read_bytes() == b"kept"
    else:
        assert path.lstat().st_size == size
        assert stat.S_ISREG(path.lstat().st_mode)


def test_only_its_owner_may_read_it(grown: MemoryStore, cache: Path) -> None:
    grown.view().values()
    (path,) = _files(cache)
    path.parent.chmod(0o755)
    path.unlink()
    grown.view().values()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["cut", "overwrite", "replace", "delete"])
def test_a_file_that_changes_under_a_reader_does_it_no_harm(
    grown: MemoryStore, space: Space, cache: Path, harm: str
) -> None:
    view = grown.view()
    first = view.segment(space.layout.segments[0].name)
    before = first.tobytes()
    (path,) = _files(cache)
    for size in (path.stat().st_size // 2, 0):
        match harm:
            case "cut":
                os.truncate(path, size)
            case "overwrite":
                path.write_bytes(bytes(path.stat().st_size))
            case "replace":
                path.unlink()
                path.write_bytes(b"x" * size)
            case _:
                path.unlink(missing_ok=True)
        assert view.values().tobytes() == _right(space)
        assert view.segment(space.layout.segments[0].name).tobytes() == before
        assert first.tobytes() == before


def test_a_segment_goes_into_an_array_of_the_caller(grown: MemoryStore, space: Space) -> None:
    view, segment = grown.view(), space.layout.segments[1]
    out = np.empty((3, *segment.shape), np.float32)
    assert view.segment(segment.name, out=out) is out
    assert out.tobytes() == view.segment(segment.name).tobytes()
    for wrong in (out[:2], out.astype(np.float64), out[:, ::-1]):
        with pytest.raises(ValueError, match="can be written"):
            view.segment(segment.name, out=wrong)


def test_rows_come_in_any_order(grown: MemoryStore, space: Space) -> None:
    for picked in ([2, 0], [0, 1, 2], [1, 2, 0, 1], [1], []):
        found = grown.view().values([f"t{t}" for t in picked])
        assert found.tobytes() == b"".join(some_values(space, t).tobytes() for t in picked)


def test_a_stopped_builder_is_named_and_not_waited_for(
    grown: MemoryStore, space: Space, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Path(memtool_stores.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "STOP": "1"}
    builder = subprocess.Popen(
        [sys.executable, str(LEFT), grown.url, "cache", ""],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "stopped\n"
        with caplog.at_level(logging.WARNING):
            found = MemoryStore.open(grown.url, lock_timeout=0.3).view().values()
        assert found.tobytes() == _right(space)
        assert "has held the lock of the cache" in caplog.text
        assert "0.3 seconds: values are read into memory" in caplog.text
        assert not _files(cache)
        # It goes on as if nothing had been.
        builder.send_signal(signal.SIGCONT)
        assert builder.wait(timeout=60) == 0
        assert len(_files(cache)) == 1
    finally:
        builder.kill()
        builder.wait()
        builder.stdout.close()


def test_two_stores_of_one_id_share_a_cache(
    grown: MemoryStore, space: Space, tmp_path: Path
) -> None:
    other = grown.clone(tmp_path / "clone")
    for number in range(3):
        for seed, store in ((10, grown), (20, other)):
            with store.transaction("its own way") as txn:
                fill(txn, space, f"own-{number}", seed + number)
            seeds = [0, 1, 2, *(seed + n for n in range(number + 1))]
            expected = np.stack([some_values(space, one) for one in seeds])
            assert np.array_equal(store.view().values(), expected)
    with other.transaction("forget") as txn:
        txn.purge("t0")
    assert grown.view().values(["t0"]).tobytes() == some_values(space, 0).tobytes()
    shutil.rmtree(other.url)
    assert len(grown.view().values()) == 6


AS_NOBODY = """
import os, sys
import icechunk, zarr, numpy, filelock, logging, resource
from memtool_stores import MemoryStore, StorageError, testing
logging.basicConfig()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
store = MemoryStore.open(sys.argv[1])
sys.stdout.write(store.view().values().tobytes().hex())
for change in (
    lambda: store.tag("mine"),
    lambda: store.gc(),
    lambda: store.rollback("HEAD~1"),
    lambda: store.run(lambda txn: txn.put_blob("b", b"1"), "blob"),
):
    try:
        change()
    except StorageError as error:
        assert "no permission" in str(error), error
    else:
        raise AssertionError("it was allowed")
try:
    store.clone(sys.argv[1] + "-clone")
except StorageError as error:
    assert "no permission" in str(error), error
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_only_read_reads_without_a_cache_and_changes_nothing(
    grown: MemoryStore, space: Space
) -> None:
    grown.tag("v1")
    source = Path(memtool_stores.__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        copied = grown.clone(folder / "memory")
        (folder / "cache").mkdir()
        before = sorted(map(str, folder.rglob("*")))
        ran = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, copied.url],
            env={
                **os.environ,
                "PYTHONPATH": str(source),
                "PYTHONDONTWRITEBYTECODE": "1",
                "MEMTOOL_CACHE": str(folder / "cache"),
            },
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        assert ran.returncode == 0, ran.stderr
        assert bytes.fromhex(ran.stdout) == _right(space)
        assert "values are read into memory" in ran.stderr
        assert sorted(map(str, folder.rglob("*"))) == before
        assert copied.verify().ok
