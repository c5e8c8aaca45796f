"""The environment of a store for real: a full disk, limits of the system, false clocks.

What this machine cannot give (mounting, faketime) is skipped, and said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtool_stores import MemoryStore, Space, StorageError, room
from memtool_stores.testing import fill

pytestmark = pytest.mark.slow

COMMIT = """
import sys
from memtool_stores import MemoryStore
from memtool_stores.testing import fill, small_space
store = MemoryStore.open(sys.argv[1])
with store.transaction(sys.argv[2]) as txn:
    fill(txn, small_space(), sys.argv[2], 1)
"""

VERIFY = """
import resource, sys
from memtool_stores import MemtoolError
from memtool_stores.verify import verify
kind, number = sys.argv[2], int(sys.argv[3])
resource.setrlimit(getattr(resource, kind), (number, number))
try:
    report = verify(sys.argv[1], "full")
except MemtoolError as error:
    print("error", error.code, error.message)
else:
    print("damages", len(report.damages), "unchecked", len(report.unchecked))
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill_up(folder: Path) -> Path:
    filler = folder / "others"
    with filler.open("wb", buffering=0) as file:
        for step in (65_536, 4096, 1):
            try:
                while True:
                    file.write(bytes(step))
            except OSError:
                continue
    assert shutil.disk_usage(folder).free == 0
    return filler


@pytest.mark.parametrize("reserve", [True, False])
def test_a_disk_with_nothing_free(disk: Path, space: Space, reserve: bool) -> None:
    store = MemoryStore.create(disk / "memory", space)
    for task in range(5):
        with store.transaction(f"write {task}") as txn:
            fill(txn, space, f"t{task}", task)
    store.tag("v1", "HEAD~1")
    if not reserve:  # as an older memtool made it
        (Path(store.url) / room.RESERVE).unlink()
    filler = _fill_up(disk)
    for refused in (
        lambda: store.tag("v2"),
        lambda: store.branch("side"),
        lambda: store.rollback("HEAD~1"),
    ):
        with pytest.raises(StorageError, match="is full"):
            refused()
    assert store.tags().keys() == {"v1"}
    assert len(store.log()) == 6
    assert store.verify().ok
    store.gc()
    if reserve:
        assert store.gc(keep_last=1, dry_run=True).expired
        assert len(store.gc(keep_last=1).expired) == 4
        assert store.verify().ok
    else:
        with pytest.raises(StorageError, match="nothing was expired"):
            store.gc(keep_last=1)
        assert len(store.log()) == 6
    filler.unlink()
    store.tag("v2")
    store.gc(keep_last=1)
    assert (Path(store.url) / room.RESERVE).exists()
    assert len(store.view()) == 5
    assert store.verify().ok


@pytest.mark.parametrize("left", range(0, 40_000, 4096))
def test_a_reference_on_a_disk_with_little_room(
    disk: Path, space: Space, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Without the check of room before it, whatever step the disk is full at."""
    store = MemoryStore.create(disk / "memory", space)
    filler = _fill_up(disk)
    os.truncate(filler, filler.stat().st_size - left)
    monkeypatch.setattr(room, "REFERENCE_BYTES", 0)
    made = set()
    for number in range(12):
        try:
            store.tag(f"v{number}")
        except StorageError as error:
            assert "is full" in error.message  # noqa: PT017
        else:
            made.add(f"v{number}")
    assert store.tags().keys() == made
    report = store.verify()
    assert report.ok
    assert report.unfinished == ()


@pytest.mark.parametrize("handles", [4, 6, 8, 10, 12, 16, 20, 24, 26, 28, 32])
def test_a_limit_of_files(grown: MemoryStore, handles: int) -> None:
    _assert_no_damage(grown, "RLIMIT_NOFILE", handles)


@pytest.mark.parametrize("megabytes", [150, 300, 600, 900, 1200])
def test_a_limit_of_memory(grown: MemoryStore, megabytes: int) -> None:
    _assert_no_damage(grown, "RLIMIT_AS", megabytes * 1024 * 1024)


def _assert_no_damage(store: MemoryStore, kind: str, number: int) -> None:
    command = [sys.executable, "-c", VERIFY, store.url, kind, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith(("error storage", "damages 0 ")), done


def _commit(store: MemoryStore, name: str, shift: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMIT, store.url, name]
    if shift:
        if shutil.which("faketime") is None:
            pytest.skip("faketime is not installed (apt-get install faketime)")
        command = ["faketime", "-f", shift, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("shift", ["-60s", "+60s"])
def test_machines_whose_clocks_are_a_minute_apart(grown: MemoryStore, shift: str) -> None:
    for name, clock in (("right", ""), ("wrong", shift), ("right again", "")):
        done = _commit(grown, name, clock)
        assert done.returncode == 0, done.stderr
    times = [version.time for version in grown.log()]
    assert times == sorted(times, reverse=True)
    assert grown.verify().ok


@pytest.mark.parametrize("shift", ["-20m", "+11m"])
def test_machines_whose_clocks_are_far_apart(grown: MemoryStore, shift: str) -> None:
    head = grown.head()
    done = _commit(grown, "wrong", shift)
    assert done.returncode == 1
    assert "ClockError" in done.stderr
    assert "19 minutes" in done.stderr or "20 minutes" in done.stderr or "11 min" in done.stderr
    assert "is damaged" not in done.stderr
    assert grown.head() == head
    assert grown.verify().ok
