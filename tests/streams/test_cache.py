from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memtool.errors import DataError
from memtool.streams import open_table

Folder = Callable[..., Path]

LEAVES = ["photo/dog", "photo/cat", "sketch/dog", "sketch/cat"]


def _entry(cache: Path) -> Path:
    (entry,) = [path for path in (cache / "images").iterdir() if path.is_dir()]
    return entry


def test_the_second_opening_maps_the_first(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    first = open_table(str(root), 12)
    written = (_entry(own_cache) / "images.npy").stat().st_mtime_ns
    second = open_table(str(root), 12)
    assert (_entry(own_cache) / "images.npy").stat().st_mtime_ns == written
    assert np.array_equal(first.images, second.images)
    assert isinstance(second.images.base, np.memmap)
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


def _older_format(entry: Path) -> None:
    header = json.loads((entry / "header.json").read_text())
    header["format"] = 0
    (entry / "header.json").write_text(json.dumps(header))


def _garbage(entry: Path) -> None:
    (entry / "header.json").write_text("{")


def _no_rows(entry: Path) -> None:
    (entry / "rows.npz").write_bytes(b"PK nothing")


@pytest.mark.parametrize(
    "damage", [_truncate, _swap_labels, _other_shape, _older_format, _garbage, _no_rows]
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
    # A copy is damaged, since truncating a mapped file would end this process.
    entry = _entry(own_cache)
    shutil.copytree(entry, entry.with_name("other"))
    shutil.rmtree(entry)
    entry.with_name("other").rename(entry)
    damage(entry)
    after = open_table(str(root), 12)
    assert np.array_equal(after.labels, labels)
    assert np.array_equal(after.images, images)
    assert "is broken and will be built again" in caplog.text
    assert open_table(str(root), 12).fingerprint == before.fingerprint


def test_what_a_killed_build_left_is_cleared(image_folder: Folder, own_cache: Path) -> None:
    root = image_folder(LEAVES)
    open_table(str(root), 12)
    entry = _entry(own_cache)
    entry.rename(entry.with_name(f"{entry.name}.building"))
    assert len(open_table(str(root), 12)) == 20
    assert _entry(own_cache) == entry


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
    real_mkdir = Path.mkdir

    def mkdir(path: Path, *args: int, **kwargs: bool) -> None:
        real_mkdir(path, *args, **kwargs)
        if path.suffix == ".building":
            (path / "images.npy").symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(DataError, match="No space left") as error:
        open_table(str(root), 12)
    assert "free some space" in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv("MEMTOOL_CACHE", str(own_cache))
    assert len(open_table(str(root), 12)) == 20
