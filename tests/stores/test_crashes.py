"""Killed at any moment, a store is what it was or what it was to become, and never in between."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import memtool_stores
from memtool_stores import MemoryStore, Space
from memtool_stores.testing import fill, some_values
from tests.fuzz.door import CASES

HERE = Path(__file__).parent
SUBSETS = 60 if CASES > 200 else 10
"""How many sets of files that exist, besides those in the order of the run, are tried."""


def _python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(HERE / script), *map(str, arguments)]


def _environment() -> dict[str, str]:
    source = Path(memtool_stores.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(source)}


@pytest.fixture
def rich(grown: MemoryStore, space: Space) -> MemoryStore:
    """Rows, keys, a blob, a tag."""
    with grown.transaction("consolidate") as txn:
        keys = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
        txn.set_keys(keys)
        txn.put_blob("query-modules", bytes(range(200)))
    grown.tag("v1", "HEAD~2")
    return grown


def _told(url: str) -> dict[str, object]:
    """All that a reader is told of main, without the time of it."""
    view = MemoryStore.open(url).view()
    keys = view.keys()
    return {
        "message": view.message,
        "values": {r.name: view.value(r.id).tobytes() for r in view.adapters},
        "all": view.values().tobytes(),
        "keys": None if keys is None else keys.tobytes(),
        "blobs": {name: view.blob(name) for name in view.blobs()},
    }


def _goes_on(url: str, space: Space) -> None:
    """No lock is left, the next commit works, gc takes what was left, and all is whole."""
    store = MemoryStore.open(url, lock_timeout=5)
    with store.transaction("after the crash") as txn:
        fill(txn, space, "after", 7)
    assert store.verify().ok
    assert store.view().value("after").tobytes() == some_values(space, 7).tobytes()
    store.gc()
    assert store.verify().ok


def _copy(store: MemoryStore, target: Path) -> str:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(store.url, target)
    return str(target)


@pytest.mark.parametrize("what", ["add", "consolidate", "rollback", "gc"])
def test_a_kill_before_and_after_each_step_to_the_disk(
    rich: MemoryStore, space: Space, tmp_path: Path, what: str
) -> None:
    done = _copy(rich, tmp_path / "done")
    ran = subprocess.run(
        _python("dying.py", done, what, -1),
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    steps = ran.stdout.splitlines()
    old, new = _told(rich.url), _told(done)
    assert (old == new) == (what == "gc")
    switch = steps.index("after reset_branch") if what != "gc" else 0
    dying = subprocess.Popen(
        _python("dying.py", tmp_path / "killed", what, "each"),
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert dying.stdin is not None
    assert dying.stdout is not None
    for number, step in enumerate(steps):
        url = _copy(rich, tmp_path / "killed")
        dying.stdin.write(f"{number}\n")
        dying.stdin.flush()
        assert dying.stdout.readline() == f"{-signal.SIGKILL}\n", step
        assert _told(url) == (old if number < switch else new), step
        report = MemoryStore.open(url).verify()
        assert report.ok, (step, report.damages)
        _goes_on(url, space)
    dying.communicate()
    assert dying.returncode == 0
    assert len(steps) >= (8 if what != "gc" else 6)


def _files(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _orders(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Every beginning of the order of the run; each file alone and each but one; some more sets."""
    for count in range(len(names) + 1):
        yield tuple(names[:count])
    for count in (1, len(names) - 1):
        yield from combinations(names, count)
    generator = random.Random(len(names))
    for _ in range(SUBSETS):
        yield tuple(generator.sample(names, generator.randrange(len(names))))


@pytest.mark.parametrize("what", ["add", "consolidate"])
def test_every_order_in_which_the_files_of_a_commit_can_appear(
    rich: MemoryStore, space: Space, tmp_path: Path, what: str
) -> None:
    """What a commit writes, replayed file by file on what was there before.

    Files other than that of the branch are written side by side, so every set of them can be what
    a kill leaves, with one more written by half beside its place. That of the branch comes last.
    """
    done = _copy(rich, tmp_path / "done")
    subprocess.run(_python("dying.py", done, what, -1), env=_environment(), check=True)
    before, after = _files(rich.url), _files(done)
    changed = {name for name, data in after.items() if before.get(name) != data}
    assert before.keys() <= after.keys() | {"lock"}
    switch = "ice/refs/branch.main/ref.json"
    assert changed & before.keys() == {switch}
    names = sorted(changed - {switch}, key=lambda name: (Path(done) / name).stat().st_mtime_ns)
    assert len(names) >= 6
    old, new = _told(rich.url), _told(done)
    states = 0
    for present in _orders(names):
        url = _copy(rich, tmp_path / "state")
        for name in present:
            path = Path(url) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(after[name])
        half = next((name for name in names if name not in present), None)
        if half is not None:
            staged = Path(url) / f"{half}#1"
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(after[half][: len(after[half]) // 2])
        assert _told(url) == old, present
        report = MemoryStore.open(url).verify()
        assert report.ok, (present, report.damages)
        states += 1
        if states % 10 == 1:
            _goes_on(url, space)
    url = _copy(rich, tmp_path / "state")
    for name in (*names, switch):
        path = Path(url) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(after[name])
    assert _told(url) == new
    assert MemoryStore.open(url).verify().ok
    assert states > len(names) + SUBSETS


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_was_acknowledged(
    store: MemoryStore, space: Space, kills: int
) -> None:
    generator = random.Random(kills)
    known: set[str] = set()
    for number in range(kills):
        writer = subprocess.Popen(
            _python("writer.py", store.url, f"k{number}", 10_000, 0),
            env=_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        with writer.stdout as lines:
            assert lines.readline() == "ready\n"
            time.sleep(generator.uniform(0.02, 0.25))
            os.kill(writer.pid, signal.SIGKILL)
            said = set(lines.read().split())
        assert writer.wait(timeout=120) == -signal.SIGKILL
        fresh = MemoryStore.open(store.url)
        view = fresh.view()
        names = {r.name for r in view.adapters}
        # The last commit may have happened without its word getting out.
        assert known | said <= names
        assert len(names - known - said) <= 1
        # A commit of the writer is an adapter and a blob: both or none.
        newest = [r.name for r in view.adapters if r.name.startswith(f"k{number}-")]
        if newest:
            assert view.blob(f"blob-k{number}") == newest[-1].encode() * 10
        known = names
        report = fresh.verify("full" if number % 10 == 9 else "heads")
        assert report.ok, report.damages
        # No lock is left behind.
        with store.transaction("after the kill") as txn:
            txn.put_blob("count", str(number).encode())
    view = store.view()
    for record in view.adapters:
        expected = some_values(space, record.meta["number"])
        assert np.array_equal(view.value(record.id), expected)
    store.gc()
    assert store.verify("full").ok


CALLS = "rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,syncfs"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("what", ["add", "consolidate"])
def test_a_kill_at_each_call_that_changes_the_file_system(
    rich: MemoryStore, space: Space, tmp_path: Path, what: str
) -> None:
    """The same with the calls of the kernel themselves, the n-th of a thread for every n."""
    done = _copy(rich, tmp_path / "done")
    subprocess.run(_python("dying.py", done, what, -1), env=_environment(), check=True)
    old, new = _told(rich.url), _told(done)
    kills = 0
    for call in CALLS.split(","):
        for number in range(1, 100):
            url = _copy(rich, tmp_path / "killed")
            inject = f"inject={call}:signal=KILL:when={number}"
            traced = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
            ran = subprocess.run(
                [*traced, *_python("dying.py", url, what, -1)],
                env={**_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
            )
            if ran.returncode == 0:
                break
            assert ran.returncode == -signal.SIGKILL, ran.stderr
            kills += 1
            assert _told(url) in (old, new), inject
            report = MemoryStore.open(url).verify()
            assert report.ok, (inject, report.damages)
            _goes_on(url, space)
    assert kills >= 3
