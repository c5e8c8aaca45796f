"""A bucket whose answers are lost, late or errors: nothing is lost, and nobody is told wrongly."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memtool_stores import (
    AlreadyExistsError,
    MemoryStore,
    NotFoundError,
    StorageError,
    Transaction,
    ice,
)
from memtool_stores import store as store_module
from memtool_stores.objects import ObjectInfo, objects_at
from memtool_stores.testing import small_space, some_values
from tests.stores.faulty import FAULTS, FaultyProxy, faulty

ROOT = Path(__file__).parents[2]
SPACE = small_space()


@pytest.fixture
def proxy(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between this process and the bucket; without faults until it is asked for some."""
    with faulty(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(url: str, proxy: FaultyProxy) -> MemoryStore:
    store = MemoryStore.create(url, SPACE, lock_timeout=0.5)
    for number in range(2):
        with store.transaction(f"write {number}") as txn:
            txn.add(f"a{number}", some_values(SPACE, number))
    return store


def start_writer(url: str, name: str, count: int) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "cli", "stores"))
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("bucket_writer.py"), url, name, str(count)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("writers", "count"),
    [
        (2, 3),
        pytest.param(2, 30, marks=pytest.mark.slow),
        pytest.param(4, 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_every_fourth_request_fails_and_every_commit_is_stored_once(
    url: str, proxy: FaultyProxy, writers: int, count: int
) -> None:
    MemoryStore.create(url, SPACE)
    proxy.faults(*FAULTS, every=4)
    names = [f"w{number}" for number in range(writers)]
    processes = [start_writer(url, name, count) for name in names]
    said = [process.communicate() for process in processes]
    proxy.no_faults()
    commits = [f"{name}-{number}" for name in names for number in range(count)]
    told = [line for out, _ in said for line in out.splitlines()]
    assert sorted(told) == sorted(f"stored {name}" for name in commits), said
    store = MemoryStore.open(url)
    assert sorted(record.name for record in store.view().adapters) == sorted(commits)
    assert store.view().blob("count") == str(len(commits)).encode()
    assert Counter(v.message for v in store.log()) == Counter([*commits, "create the memory"])
    assert store.verify().ok
    assert set(proxy.met) == set(FAULTS), "too few requests to meet every fault"


def test_run_wins_however_often_others_were_first(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TRIES", 2)
    other, tries = MemoryStore.open(store.url), 5

    def function(txn: Transaction) -> int:
        nonlocal tries
        tries -= 1
        if tries:
            with other.transaction(f"before try {tries}") as first:
                first.put_blob("b", str(tries).encode())
        txn.add("mine", some_values(SPACE, 5))
        return len(txn.adapters)

    assert store.run(function, "mine") == 3
    assert store.log(limit=1)[0].message == "mine"


def write_c(store: MemoryStore) -> None:
    with store.transaction("c") as txn:
        txn.add("c", some_values(SPACE, 5))


def messages(store: MemoryStore) -> list[str]:
    return [version.message for version in store.log()]


def backed_up(store: MemoryStore) -> list[str]:
    """The version before that of each branch which a rollback has made."""
    backups = [name for name in store.branches() if name.startswith("backup-")]
    return [store.view(f"{name}~1").version for name in backups]


def more(store: MemoryStore) -> str:
    return f"{store.url}-more"


CHANGES: dict[str, tuple[Callable[[MemoryStore], object], Callable[[MemoryStore], bool]]] = {
    "run": (
        lambda store: store.run(lambda txn: txn.add("b", some_values(SPACE, 5)), "b"),
        lambda store: messages(store).count("b") == 1 and len(store.view()) == 3,
    ),
    "transaction": (write_c, lambda store: messages(store).count("c") == 1),
    "tag": (
        lambda store: store.tag("new", "HEAD~1"),
        lambda store: store.tags().get("new") == store.view("HEAD~1").version,
    ),
    "branch": (
        lambda store: store.branch("beside", "HEAD~1"),
        lambda store: store.branches().get("beside") == store.view("HEAD~1").version,
    ),
    "delete_tag": (lambda store: store.delete_tag("old"), lambda store: "old" not in store.tags()),
    "delete_branch": (
        lambda store: store.delete_branch("side"),
        lambda store: "side" not in store.branches(),
    ),
    "rollback": (
        lambda store: store.rollback("HEAD~1"),
        lambda store: [store.head()] == backed_up(store),
    ),
    "create": (
        lambda store: MemoryStore.create(more(store), SPACE),
        lambda store: MemoryStore.exists(more(store)) and len(MemoryStore.open(more(store)).log()),
    ),
}
"""Every change of a reference, and whether it was carried out, and once."""


WRITING = {"PUT", "POST", "DELETE"}


def test_a_change_whose_answer_is_lost_is_done(store: MemoryStore, proxy: FaultyProxy) -> None:
    store.tag("old")
    store.branch("side")
    for name, (change, holds) in CHANGES.items():
        proxy.faults("lose", only="ref.json", methods=WRITING, times=1)
        change(store)
        assert proxy.met["lose"], name
        proxy.no_faults()
        assert holds(MemoryStore.open(store.url)), name
    assert store.verify().ok


@pytest.mark.slow  # icechunk asks ten times, and waits half a minute in all
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_nobody_answers_is_told_neither_as_done_nor_as_not_done(
    store: MemoryStore, proxy: FaultyProxy, name: str
) -> None:
    change, holds = CHANGES[name]
    store.tag("old")
    store.branch("side")
    proxy.faults("drop", only="ref.json", methods=WRITING)
    with pytest.raises(StorageError) as told:
        change(store)
    assert told.value.transient
    assert name == "create" or "whether it was carried out is not known" in told.value.message
    proxy.no_faults()
    assert not holds(MemoryStore.open(store.url))
    change(store)
    assert holds(MemoryStore.open(store.url))
    assert store.verify().ok


@pytest.mark.slow
def test_a_request_that_is_carried_out_after_its_writer_gave_up_counts_once(
    store: MemoryStore, proxy: FaultyProxy
) -> None:
    patient = MemoryStore.open(store.url, lock_timeout=300)
    tries = 0

    def function(txn: Transaction) -> int:
        nonlocal tries
        tries += 1
        txn.put_blob("count", str(tries).encode())
        if tries == 2:
            proxy.no_faults()
            proxy.release()
        return tries

    proxy.faults("hold", only="branch.main/ref.json", methods={"PUT"})
    assert patient.run(function, "count") == 1
    assert tries == 2
    assert messages(store).count("count") == 1
    assert store.view().blob("count") == b"1"


@pytest.mark.parametrize("left", [1, 2])
def test_a_store_whose_making_was_cut_short_is_none_and_can_be_made(url: str, left: int) -> None:
    """`left` files are there of the two with which icechunk begins."""
    ice.create_repository(url)
    for entry in objects_at(url).list():
        if left == 1 and not entry.path.startswith("ice/snapshots/"):
            objects_at(url).delete(entry.path)
    with pytest.raises(NotFoundError, match="no store"):
        MemoryStore.open(url)
    assert MemoryStore.create(url, SPACE).verify().ok
    with pytest.raises(AlreadyExistsError):
        MemoryStore.create(url, SPACE)
    beside = f"{url}-beside"
    objects_at(beside).write("ice/chunks/0", b"of a copy that was killed")
    with pytest.raises(AlreadyExistsError, match="there are files"):
        MemoryStore.create(beside, SPACE)


def test_two_that_make_the_same_are_told_who_was_first(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have looked before either writes.
    monkeypatch.setattr(MemoryStore, "branches", lambda self: {})
    monkeypatch.setattr(MemoryStore, "tags", lambda self: {})
    for kind in ("tag", "branch"):
        getattr(store, kind)(kind, "HEAD")
        with pytest.raises(AlreadyExistsError):
            getattr(store, kind)(kind, "HEAD~1")


@pytest.mark.slow
def test_everything_else_goes_through_faults_too(store: MemoryStore, proxy: FaultyProxy) -> None:
    proxy.faults(*FAULTS, every=4)
    fresh = MemoryStore.open(store.url)
    fresh.tag("v1", "HEAD~1")
    assert fresh.verify().ok
    copied = fresh.clone(f"{store.url}-copy")
    assert copied.tags() == fresh.tags()
    assert copied.gc(keep_last=1).expired == fresh.gc(keep_last=1).expired
    assert fresh.find_bytes(["0" * 64]) == {}
    proxy.no_faults()
    assert copied.verify().ok
    assert fresh.verify().ok


KILLED = """
import os, sys
from memtool_stores import MemoryStore
MemoryStore.open(sys.argv[1]).clone(
    sys.argv[2], lambda done, total: os._exit(9) if done == int(sys.argv[3]) else None
)
"""


def files(url: str) -> dict[str, ObjectInfo]:
    return {entry.path: entry for entry in objects_at(url).list()}


@pytest.mark.parametrize("left", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_clone_that_was_killed_goes_on(store: MemoryStore, tmp_path: Path, left: int) -> None:
    """`left` files are missing, of which the last two are references."""
    store.tag("v1")
    here = store.clone(tmp_path / "here")
    target = f"{store.url}-copy"
    total = len(files(store.url))
    command = [sys.executable, "-c", KILLED, here.url, target, str(total - left)]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "cli", "stores"))
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode == 9
    begun = files(target)
    assert len(begun) == total - left
    with pytest.raises(AlreadyExistsError, match="clone --resume"):
        here.clone(target)
    # One of them is not whole.
    cut = next(path for path in begun if path.startswith("ice/chunks/"))
    objects_at(target).write(cut, objects_at(target).read(cut)[:-1])
    copied = here.clone(target, resume=True)
    after = files(target)
    assert {p: i.md5 for p, i in after.items()} == {p: i.md5 for p, i in files(store.url).items()}
    again = {p for p, info in begun.items() if after[p].modified != info.modified}
    assert again <= {cut}
    assert copied.verify().ok
    assert copied.tags() == store.tags()


@pytest.mark.slow
def test_a_clone_goes_on_only_with_its_own_beginning(store: MemoryStore, tmp_path: Path) -> None:
    other = MemoryStore.create(f"{store.url}-other", SPACE)
    with other.transaction("theirs") as txn:
        txn.add("theirs", some_values(SPACE, 1))
    before = files(other.url)
    with pytest.raises(AlreadyExistsError, match="no beginning of a copy"):
        store.clone(other.url, resume=True)
    assert files(other.url) == before
    # A copy that has been written to since is a store of its own.
    copied = store.clone(f"{store.url}-copy")
    with copied.transaction("at home") as txn:
        txn.add("home", some_values(SPACE, 1))
    before = files(copied.url)
    with pytest.raises(AlreadyExistsError, match="no beginning of a copy"):
        store.clone(copied.url, resume=True)
    assert files(copied.url) == before


@pytest.mark.slow
def test_a_clone_that_fails_takes_back_all_that_it_can(
    store: MemoryStore, proxy: FaultyProxy
) -> None:
    target = f"{store.url}-copy"

    def cut(done: int, total: int) -> None:
        if done == total:
            proxy.faults("refuse", only="ice/chunks", methods=WRITING)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store.clone(target, cut)
    proxy.no_faults()
    assert {path.split("/")[1] for path in files(target)} == {"chunks"}
    assert not MemoryStore.exists(target)
    assert store.clone(target, resume=True).verify().ok
