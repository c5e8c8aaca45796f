"""Several processes at once: nothing acknowledged is lost, readers see only whole versions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import memtool_stores
from memtool_stores import (
    ConflictError,
    ForkedProcessError,
    LockTimeoutError,
    MemoryStore,
    Space,
    Transaction,
)
from memtool_stores.testing import fill, some_values

Writer = subprocess.Popen[str]


def _writer(url: str, prefix: str, count: int, seconds: float = 0.0) -> Writer:
    source = Path(memtool_stores.__file__).parents[1]
    script = Path(__file__).with_name("writer.py")
    return subprocess.Popen(
        [sys.executable, str(script), url, prefix, str(count), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        text=True,
    )


def _ready(writer: Writer) -> None:
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"


def _acknowledged(writer: Writer) -> list[str]:
    # Not communicate(): it reads past what readline has taken into its buffer already.
    assert writer.stdout is not None
    with writer.stdout as lines:
        names = lines.read().split()
    writer.wait(timeout=120)
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


@pytest.mark.parametrize(
    ("processes", "commits"), [(2, 10), pytest.param(4, 20, marks=pytest.mark.slow)]
)
def test_no_commit_of_concurrent_writers_is_lost(
    store: MemoryStore, processes: int, commits: int
) -> None:
    writers = [_writer(store.url, f"w{n}", commits, 0.002) for n in range(processes)]
    for writer in writers:
        _ready(writer)
    acknowledged = [name for writer in writers for name in _acknowledged(writer)]
    assert all(writer.returncode == 0 for writer in writers)
    assert len(acknowledged) == processes * commits
    assert {r.name for r in store.view().adapters} == set(acknowledged)
    assert len(store.log()) == processes * commits + 1
    assert store.verify().ok


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_that_was_acknowledged(
    store: MemoryStore, space: Space, kills: int
) -> None:
    generator = random.Random(kills)
    known: set[str] = set()
    for number in range(kills):
        writer = _writer(store.url, f"k{number}", 10_000)
        _ready(writer)
        time.sleep(generator.uniform(0.02, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        said = _acknowledged(writer)
        view = store.view()
        names = {r.name for r in view.adapters}
        # The last commit may have happened without its word getting out.
        assert known | set(said) <= names
        assert len(names - known - set(said)) <= 1
        known = names
        assert store.verify("heads").ok
        # No lock is left behind.
        with store.transaction("after the kill") as txn:
            txn.put_blob("count", str(number).encode())
    assert store.verify("full").ok
    for record in store.view().adapters:
        expected = some_values(space, record.meta["number"])
        assert np.array_equal(store.view().value(record.id), expected)
    store.gc()
    assert store.verify("full").ok


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
