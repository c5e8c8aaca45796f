"""Several processes at once: nothing acknowledged is lost, readers see only whole versions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest

import memtool_stores
from memtool_stores import (
    ConflictError,
    ForkedProcessError,
    LockTimeoutError,
    MemoryStore,
    MemoryView,
    Space,
    Transaction,
)
from memtool_stores.testing import fill, some_values

Process = subprocess.Popen[str]


_started: list[Process] = []


@pytest.fixture(autouse=True)
def _end_processes() -> Iterator[None]:
    """A test that fails leaves no process behind."""
    yield
    for process in _started:
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.wait()
    _started.clear()


def _process(script: str, *arguments: object) -> Process:
    source = Path(memtool_stores.__file__).parents[1]
    start = ["-c"] if script == "-c" else [str(Path(__file__).with_name(script))]
    process = subprocess.Popen(
        [sys.executable, *start, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


def _writer(url: str, prefix: str, count: int, seconds: float = 0.0) -> Process:
    return _process("writer.py", url, prefix, count, seconds)


def _ready(process: Process) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def _acknowledged(process: Process) -> list[str]:
    # Not communicate(): it reads past what readline has taken into its buffer already.
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()  # a reader ends by that
    with process.stdout as lines:
        names = lines.read().split()
    process.wait(timeout=120)
    return names


def test_a_view_stays_as_it_is_while_another_process_writes(
    grown: MemoryStore, space: Space
) -> None:
    view = grown.view()
    expected = np.stack([some_values(space, t) for t in range(3)])
    writer = _writer(grown.url, "other", 8)
    _ready(writer)
    seen = set()
    while writer.poll() is None:
        assert [r.name for r in view.adapters] == ["t0", "t1", "t2"]
        assert np.array_equal(view.values(), expected)
        assert np.array_equal(view.value("t1"), expected[1])
        newest = grown.view()
        seen.add(len(newest))
        for record in newest.adapters[3:]:
            assert np.array_equal(
                newest.value(record.id), some_values(space, record.meta["number"])
            )
    assert len(_acknowledged(writer)) == 8
    assert len(seen) > 1
    assert len(grown.view()) == 11


@pytest.mark.parametrize(("processes", "commits"), [(2, 20), (4, 20)])
def test_no_commit_of_concurrent_writers_is_lost_and_no_reader_sees_a_wrong_row(
    store: MemoryStore, space: Space, processes: int, commits: int
) -> None:
    reader = _process("reader.py", store.url)
    _ready(reader)
    writers = [_writer(store.url, f"w{n}", commits, 0.002) for n in range(processes)]
    for writer in writers:
        _ready(writer)
    acknowledged = [name for writer in writers for name in _acknowledged(writer)]
    assert all(writer.returncode == 0 for writer in writers)
    versions, rows, wrong = map(int, _acknowledged(reader))
    assert reader.returncode == 0
    assert wrong == 0
    assert versions > 2
    assert rows > commits
    assert len(acknowledged) == len(set(acknowledged)) == processes * commits
    view = store.view()
    assert {r.name for r in view.adapters} == set(acknowledged)
    for record in view.adapters:
        expected = some_values(space, record.meta["number"])
        assert np.array_equal(view.value(record.id), expected)
    assert len(store.log()) == processes * commits + 1
    assert store.verify().ok


def test_processes_that_need_the_same_cache_file_build_it_once(
    grown: MemoryStore, cache: Path, tmp_path: Path
) -> None:
    """All wait for a lock that we hold, and then one builds and the others map what it made."""
    code = (
        "import sys, logging; from memtool_stores import MemoryStore\n"
        "import memtool_stores.cache as cache\n"
        "real, built = cache.ValueCache._build_alone, []\n"
        "def build(self, **how): built.append(1); return real(self, **how)\n"
        "cache.ValueCache._build_alone = build\n"
        "view = MemoryStore.open(sys.argv[1]).view()\n"
        "print('ready', flush=True)\n"
        "print(len(built) if view.values().sum() else 'wrong', len(built))\n"
    )
    place = cache / "stores" / grown.view().store_id
    place.mkdir(parents=True)
    left = place / ".left.12345678.memtool-part"
    left.write_bytes(b"of a builder that was killed")
    with filelock.FileLock(place / "lock"):
        processes = [_process("-c", code, grown.url) for _ in range(3)]
        for process in processes:
            _ready(process)
        time.sleep(0.3)
        assert all(process.poll() is None for process in processes)
    counts = [_acknowledged(process)[1] for process in processes]
    assert sorted(counts) == ["0", "0", "1"]
    assert len(list(place.glob("*.values"))) == 1
    assert not left.exists()


def test_readers_of_a_cache_file_with_a_flipped_bit_mend_it_together(
    grown: MemoryStore, cache: Path
) -> None:
    expected = grown.view().values().tobytes()
    (file,) = cache.rglob("*.values")
    whole = file.read_bytes()
    generator = random.Random(0)
    for _ in range(40):
        bit = generator.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        views = [MemoryStore.open(grown.url).view() for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            for values in pool.map(MemoryView.values, views):
                assert values.tobytes() == expected
        assert file.read_bytes() == whole


def test_run_replays_on_conflict(grown: MemoryStore, space: Space) -> None:
    other = MemoryStore.open(grown.url)
    seen = []

    def function(txn: Transaction) -> int:
        seen.append(len(txn.adapters))
        if len(seen) <= 2:
            with other.transaction(f"in between {len(seen)}") as between:
                fill(between, space, f"b{len(seen)}", 50)
        fill(txn, space, "mine", 60)
        return len(txn.adapters)

    assert grown.run(function, "mine", {"who": "me"}) == 6
    assert seen == [3, 4, 5]
    assert [v.message for v in grown.log(limit=3)] == ["mine", "in between 2", "in between 1"]
    assert grown.log(limit=1)[0].metadata == {"who": "me"}


def test_run_wins_in_the_end(grown: MemoryStore, space: Space) -> None:
    other = MemoryStore.open(grown.url, lock_timeout=0.05)
    tries = 0

    def function(txn: Transaction) -> None:
        nonlocal tries
        tries += 1
        # Someone commits during every try; the last try holds the lock, and they wait in vain.
        try:
            with other.transaction("always first") as between:
                between.put_blob("b", str(tries).encode())
        except LockTimeoutError:
            pass
        fill(txn, space, "mine", 1)

    grown.run(function, "mine")
    assert tries == 10
    assert grown.view().get("mine")


def test_a_plain_transaction_does_not_overwrite(grown: MemoryStore, space: Space) -> None:
    other = MemoryStore.open(grown.url)
    with pytest.raises(ConflictError), grown.transaction("late") as txn:  # noqa: PT012
        fill(txn, space, "late", 1)
        with other.transaction("early") as early:
            fill(early, space, "early", 2)
    assert [r.name for r in grown.view().adapters] == ["t0", "t1", "t2", "early"]


def test_a_held_lock_times_out(grown: MemoryStore, space: Space) -> None:
    waiting = MemoryStore.open(grown.url, lock_timeout=0.1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with grown._lock():
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    try:
        with (
            pytest.raises(LockTimeoutError, match=r"more than 0\.1 seconds"),
            waiting.transaction("never") as txn,
        ):
            fill(txn, space, "never", 1)
        assert len(waiting.view()) == 3
    finally:
        done.set()
        thread.join()


def test_a_forked_child_is_told_instead_of_hanging(grown: MemoryStore) -> None:
    view = grown.view()
    expected = view.values().tobytes()
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for action in (
            lambda: grown.view(),
            lambda: MemoryStore.open(grown.url),
            lambda: view.keys() or view.value("t0"),
        ):
            try:
                action()
            except ForkedProcessError as error:
                said.append(error.code)
        # What is mapped already stays readable.
        said.append(str(view.values().tobytes() == expected))
        os.write(sending, " ".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    heard = os.read(receiving, 1000).decode()
    os.close(receiving)
    os.close(sending)
    assert heard == "forked-process forked-process forked-process True"
