from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memtool.errors import BusyError, CorruptError, DataError, MemtoolError
from memtool.streams import cache, open_table, stored
from memtool_stores.files import part_folder

Folder = Callable[..., Path]

LEAVES = ["photo/dog", "photo/cat", "sketch/dog", "sketch/cat"]


def _entry(cache: Path) -> Path:
    (entry,) = [path for path in (cache / "images").iterdir() if path.is_dir()]
    return entry


def test_the_second_opening_reads_the_first(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    first = open_table(str(root), 12)
    written = (_entry(own_cache) / "images.npy").stat().st_mtime_ns
    second = open_table(str(root), 12)
    assert (_entry(own_cache) / "images.npy").stat().st_mtime_ns == written
    assert np.array_equal(first.images, second.images)
    assert _entry(own_cache).stat().st_mode & 0o077 == 0, "it holds training data"
    assert first.fingerprint == second.fingerprint


def test_writing_into_a_sample_never_reaches_the_cache(
    image_folder: Folder, own_cache: Path
) -> None:
    root = image_folder(LEAVES)
    before = open_table(str(root), 12).images.copy()
    open_table(str(root), 12).images[:] = 0
    assert np.array_equal(open_table(str(root), 12).images, before)


def test_every_size_has_an_entry(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    small, large = open_table(str(root), 8), open_table(str(root), 16)
    assert small.images.shape[1:] == (8, 8, 3)
    assert large.images.shape[1:] == (16, 16, 3)
    assert small.fingerprint == large.fingerprint


def test_a_changed_file_is_read_again(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    before = open_table(str(root), 12)
    shutil.copy(root / "photo/dog/00.png", root / "photo/dog/99.png")
    after = open_table(str(root), 12)
    assert len(after) == len(before) + 1
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_is_of_the_content(image_folder: Folder, tmp_path: Path) -> None:
    root = image_folder(LEAVES)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for file in copy.rglob("*.png"):
        os.utime(file, ns=(1, 1))
    assert open_table(str(root), 12).fingerprint == open_table(str(copy), 12).fingerprint


def _truncate(entry: Path) -> None:
    with (entry / "images.npy").open("r+b") as file:
        file.truncate(2000)


def _swap_labels(entry: Path) -> None:
    with np.load(entry / "rows.npz") as rows:
        arrays = dict(rows)
    arrays["labels"] = 1 - arrays["labels"]
    np.savez(entry / "rows.npz", **arrays)


def _other_shape(entry: Path) -> None:
    np.save(entry / "images.npy", np.zeros((20, 8, 8, 3), dtype=np.uint8))


def _flip_a_pixel(entry: Path) -> None:
    data = bytearray((entry / "images.npy").read_bytes())
    data[-1] ^= 1
    (entry / "images.npy").write_bytes(data)


def _swap_names(entry: Path) -> None:
    text = (entry / "header.json").read_text()
    (entry / "header.json").write_text(text.replace("dog", "cow"))


def _no_images(entry: Path) -> None:
    (entry / "images.npy").unlink()


def _older_format(entry: Path) -> None:
    header = json.loads((entry / "header.json").read_text())
    header["format"] = 0
    (entry / "header.json").write_text(json.dumps(header))


def _garbage(entry: Path) -> None:
    (entry / "header.json").write_text("{")


def _no_rows(entry: Path) -> None:
    (entry / "rows.npz").write_bytes(b"PK nothing")


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _swap_labels,
        _other_shape,
        _flip_a_pixel,
        _swap_names,
        _no_images,
        _older_format,
        _garbage,
        _no_rows,
    ],
)
def test_a_damaged_entry_is_built_again(
    image_folder: Folder,
    own_cache: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = image_folder(LEAVES)
    before = open_table(str(root), 12)
    labels, images = before.labels.copy(), before.images.copy()
    damage(_entry(own_cache))
    after = open_table(str(root), 12)
    assert np.array_equal(after.labels, labels)
    assert np.array_equal(after.images, images)
    assert "is broken and will be built again" in caplog.text
    assert open_table(str(root), 12).fingerprint == before.fingerprint


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables too large for memory, in blocks of two images."""
    monkeypatch.setattr(cache, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 2 * 12 * 12 * 3)


@pytest.mark.usefixtures("on_disk")
def test_a_table_too_large_for_memory_gives_the_same_samples(
    image_folder: Folder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(LEAVES)
    large = open_table(str(root), 12)
    assert isinstance(large.images, stored.StoredImages)
    monkeypatch.setattr(cache, "_IN_MEMORY_BYTES", 1 << 20)
    small = open_table(str(root), 12)
    for rows in ([], [3], [4, 5, 6, 7], [0, 3, 8, 19], list(range(20))):
        chosen = np.array(rows, dtype=np.int64)
        one, other = large.samples(chosen), small.samples(chosen)
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)


@pytest.mark.usefixtures("on_disk")
def test_a_large_table_cut_short_while_it_is_open_is_an_error_and_no_signal(
    image_folder: Folder, own_cache: Path
) -> None:
    table = open_table(str(image_folder(LEAVES)), 12)
    taken = table.samples(np.arange(20))
    before = taken.images.copy()
    file = _entry(own_cache) / "images.npy"
    os.truncate(file, 2000)
    assert np.array_equal(taken.images, before), "what was taken stays as it is"
    with pytest.raises(CorruptError, match=re.escape(str(file))) as refused:
        table.samples(np.arange(20))
    assert str(file.parent) in (refused.value.remedy or "")
    shutil.rmtree(file.parent)
    again = open_table(str(file.parents[3] / "pictures"), 12)
    assert np.array_equal(again.samples(np.arange(20)).images, before)


def test_no_file_handles_are_no_damage(
    image_folder: Folder, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import resource

    root = image_folder(LEAVES)
    before = open_table(str(root), 12)
    entry, source = _entry(own_cache), before.name
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(MemtoolError, match="Too many open files") as refused:
            cache._read(entry, source, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(refused.value, CorruptError)
    assert "broken" not in caplog.text
    assert np.array_equal(open_table(str(root), 12).images, before.images)


def test_a_builder_that_has_stopped_is_named(
    image_folder: Folder,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from filelock import FileLock

    root = image_folder(LEAVES)
    open_table(str(root), 12)
    entry = _entry(own_cache)
    shutil.rmtree(entry)
    monkeypatch.setattr(cache, "_SAID_SECONDS", 0.1)
    monkeypatch.setattr(cache, "_STALLED_SECONDS", 0.5)
    building = part_folder(entry)
    (building / "images.npy").write_bytes(b"half")
    with (
        FileLock(entry.with_name(f"{entry.name}.lock"), is_singleton=False),
        pytest.raises(BusyError, match="written nothing") as refused,
    ):
        open_table(str(root), 12)
    assert "MEMTOOL_CACHE" in str(refused.value)
    assert "waiting for another process" in caplog.text
    assert len(open_table(str(root), 12)) == 20


def test_what_a_killed_build_left_is_cleared(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    open_table(str(root), 12)
    entry = _entry(own_cache)
    left = part_folder(entry)
    shutil.rmtree(left)
    entry.rename(left)
    assert len(open_table(str(root), 12)) == 20
    assert _entry(own_cache) == entry
    assert not left.exists()


def test_two_processes_at_once(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES, each=100)
    start = time.time() + 3
    program = (
        "import sys, time, logging\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from memtool.streams import open_table\n"
        "import memtool.streams.cache\n"
        f"time.sleep(max(0, {start} - time.time()))\n"
        "table = open_table(sys.argv[1], 24)\n"
        "print(len(table), table.fingerprint, int(table.images.sum()))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert answers[0][0].startswith("400 ")
    # One of them decoded, the other waited and read.
    assert sum("decoding 400 images" in stderr for _, stderr in answers) == 1


def test_a_cache_that_cannot_be_written(
    image_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(LEAVES)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEMTOOL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write to the cache") as error:
        open_table(str(root), 12)
    assert "MEMTOOL_CACHE" in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_a_full_disk(
    image_folder: Folder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(LEAVES)

    def full(target: Path) -> Path:
        folder = part_folder(target)
        (folder / "images.npy").symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(cache, "part_folder", full)
    with pytest.raises(DataError, match="No space left") as error:
        open_table(str(root), 12)
    assert "free some space" in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv("MEMTOOL_CACHE", str(own_cache))
    assert len(open_table(str(root), 12)) == 20
