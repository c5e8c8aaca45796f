"""What is around a store fails: it is told as that, never as damage, and leaves nothing behind.

Faults are put in: clocks that differ, files that may not be read, references that were cut short.
Real small disks, limits and false clocks are in test_environment_slow.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from memtool_stores import (
    IntegrityError,
    MemoryStore,
    MemtoolError,
    NotFoundError,
    Space,
    StorageError,
    clock,
    ice,
    room,
    sums,
)
from memtool_stores.errors import ClockError, LockTimeoutError
from memtool_stores.testing import fill, small_space
from memtool_stores.verify import VerifyReport, verify


class FalseClock:
    """The clock of this process, wrong by some time; a pause sets it on and takes none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta) -> None:
        right = clock.now
        self.wrong_by, self.paused = wrong_by, timedelta(0)
        monkeypatch.setattr(clock, "now", lambda: right() + self.wrong_by + self.paused)
        monkeypatch.setattr(clock, "pause", self.pause)

    def pause(self, span: timedelta) -> None:
        """As `clock.pause`."""
        self.paused += span


# Clocks


@pytest.mark.parametrize("seconds", [1, 60, 240])
def test_a_clock_that_is_behind_is_waited_for(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    false = FalseClock(monkeypatch, -timedelta(seconds=seconds))
    with grown.transaction("from a clock behind") as txn:
        fill(txn, space, "late", 9)
    assert timedelta(seconds=seconds - 2) < false.paused < timedelta(seconds=seconds + 2)
    times = [version.time for version in grown.log()]
    assert times == sorted(times, reverse=True)
    assert grown.verify().ok


def test_a_clock_that_is_far_behind_is_told_how_far(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = grown.head()
    false = FalseClock(monkeypatch, -timedelta(minutes=20, seconds=30))
    with (
        pytest.raises(ClockError, match=r"20 minutes (29|30) seconds behind") as caught,
        grown.transaction("never") as txn,
    ):
        fill(txn, space, "late", 9)
    assert (caught.value.code, caught.value.exit_status) == ("clock", 1)
    assert caught.value.remedy is not None
    assert "memtool rollback" in caught.value.remedy
    assert false.paused == timedelta(0)
    assert grown.head() == head
    assert grown.verify().ok


def test_who_is_overtaken_while_waiting_has_a_conflict_and_runs_again(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    false = FalseClock(monkeypatch, -timedelta(seconds=60))
    other = MemoryStore.open(grown.url)

    def overtaken(span: timedelta) -> None:
        monkeypatch.setattr(clock, "pause", false.pause)
        false.paused = timedelta(seconds=90)
        with other.transaction("first") as txn:
            fill(txn, space, "other", 8)
        false.paused = timedelta(0)

    monkeypatch.setattr(clock, "pause", overtaken)
    grown.run(lambda txn: fill(txn, space, "late", 9), "second")
    assert [v.message for v in grown.log(limit=2)] == ["second", "first"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "x session error: invalid snapshot timestamp ordering. parent: `2026-11-28 "
            "04:51:55.683334 UTC`, child: `2026-11-28 04:42:56.288112\n  | UTC`",
            "8 minutes 59 seconds behind",
        ),
        (
            "x session error: snapshot timestamp is invalid, please verify if the machine clock "
            "has drifted: local clock: `2026-11-28 04:53:54.961047 UTC`, object store clock: "
            "`2026-11-28 04:42:54.961921064\n  | UTC`",
            "11 minutes ahead of",
        ),
        ("snapshot timestamp is invalid", "too far apart"),
    ],
)
def test_what_icechunk_says_of_clocks_is_no_damage(text: str, said: str) -> None:
    error = clock.of_message(text, "commit 'x'", "memory")
    assert error is not None
    assert said in error.message


@pytest.mark.parametrize("wrong_by", [timedelta(days=400), timedelta(days=-400)])
def test_gc_by_age_is_not_fooled_by_its_own_clock(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta
) -> None:
    FalseClock(monkeypatch, wrong_by)
    report = grown.gc(keep_days=30)
    assert report.expired == ()
    assert any("400 days" in note or "ahead of this one" in note for note in report.notes)
    assert len(grown.log()) == 4


def test_gc_by_age_takes_nothing_for_old_that_was_never_dated(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All versions are as from a clock that was never set, but the newest: its time is right.
    second = grown.log()[1].time
    monkeypatch.setattr(clock, "BEGIN", second + timedelta(microseconds=100_000))
    newest = grown.log()[0].time
    if newest < clock.BEGIN:
        monkeypatch.setattr(clock, "BEGIN", newest)
    report = grown.gc(keep_days=0)
    assert report.expired == ()
    assert any("never set" in note for note in report.notes)


def test_gc_by_number_with_a_version_from_a_clock_ahead(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    FalseClock(monkeypatch, -timedelta(minutes=9))
    report = grown.gc(keep_last=1)
    assert report.expired == ()
    assert any("ahead of this one" in note for note in report.notes)


# References


def _entries(store: MemoryStore) -> set[str]:
    root = Path(store.url)
    return {p.relative_to(root).as_posix() for p in root.rglob("*")}


def _without_room(store: MemoryStore, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "before":
        monkeypatch.setattr(room, "free", lambda url: 0)
    else:
        monkeypatch.setattr(f"memtool_stores.references.{where}", full)


@pytest.mark.parametrize("where", ["before", "sync_to_disk", "_is_marked", "Path.touch"])
@pytest.mark.parametrize("verb", ["tag", "branch", "rollback"])
def test_a_reference_without_room_leaves_nothing(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch, verb: str, where: str
) -> None:
    (Path(grown.url) / "ice" / "refs" / "tag.v0").mkdir()  # so that marks are looked at
    before, head = _entries(grown), grown.head()
    act: dict[str, Callable[[], object]] = {
        "tag": lambda: grown.tag("v1"),
        "branch": lambda: grown.branch("side"),
        "rollback": lambda: grown.rollback("HEAD~1"),
    }
    with monkeypatch.context() as patch:
        _without_room(grown, patch, where)
        with pytest.raises(StorageError, match=r"full \([\d,]+ bytes free"):
            act[verb]()
    assert _entries(grown) == before
    assert grown.head() == head
    assert grown.tags() == {}
    act[verb]()
    assert grown.verify().ok
    grown.gc()
    assert grown.verify().unfinished == ()


def test_a_rollback_that_cannot_move_takes_its_backup_back(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches, head = grown.branches(), grown.head()
    with monkeypatch.context() as patch:
        patch.setattr("memtool_stores.store.move_branch", _refused)
        with pytest.raises(StorageError, match="not now"):
            grown.rollback("HEAD~1")
    assert (grown.branches(), grown.head()) == (branches, head)


def _refused(*_: object) -> None:
    raise StorageError("not now")


@pytest.mark.parametrize("empty", ["no file", "an empty file"])
@pytest.mark.parametrize("kind", ["tag", "branch"])
@pytest.mark.parametrize("older", [False, True])
def test_an_unfinished_reference_is_absent_and_said(
    grown: MemoryStore, kind: str, empty: str, older: bool
) -> None:
    if older:  # an older memtool made no marks
        (Path(grown.url) / "refs" / "branch.main").unlink()
        (Path(grown.url) / "refs").rmdir()
    place = Path(grown.url) / "ice" / "refs" / f"{kind}.v1"
    place.mkdir()
    if empty == "an empty file":
        (place / "ref.json").touch()
    store = MemoryStore.open(grown.url)
    report = store.verify()
    assert report.ok
    assert report.unfinished == (f"{kind} v1",)
    assert len(store.log()) == 4
    assert (store.tags(), set(store.branches())) == ({}, {"main"})
    assert store.view(store.head()[:6]).version == store.head()
    with pytest.raises(NotFoundError):
        store.view("v1")
    with pytest.raises(NotFoundError):
        store.delete_tag("v1")
    assert any("never finished" in note for note in store.gc(keep_last=2, dry_run=True).notes)
    assert place.exists()
    (store.tag if kind == "tag" else store.branch)("v1")
    assert store.view("v1").version == store.head()
    assert store.verify().unfinished == ()
    place = place.with_name(f"{kind}.v2")
    place.mkdir()
    assert any("never finished" in note for note in store.gc(keep_last=2).notes)
    assert not place.exists()
    assert store.verify().ok


@pytest.mark.parametrize("empty", ["no file", "an empty file"])
@pytest.mark.parametrize("older", [False, True])
def test_a_reference_that_lost_its_file_is_damage_and_keeps_its_versions(
    grown: MemoryStore, empty: str, older: bool
) -> None:
    """With marks always; without them where some version has no other name."""
    grown.tag("v1")
    grown.rollback("HEAD~1")
    (backup,) = set(grown.branches()) - {"main"}
    grown.delete_branch(backup)
    if older:
        for mark in (Path(grown.url) / "refs").iterdir():
            mark.unlink()
        (Path(grown.url) / "refs").rmdir()
    file = Path(grown.url) / "ice" / "refs" / "tag.v1" / "ref.json"
    if empty == "no file":
        file.unlink()
    else:
        file.write_bytes(b"")
    store = MemoryStore.open(grown.url)
    assert ("tag", "v1") in {(damage.what, damage.name) for damage in store.verify().damages}
    for refused in (store.tags, store.gc, lambda: store.gc(keep_last=1), lambda: store.view("v1")):
        with pytest.raises(IntegrityError):
            refused()


def test_gc_gives_its_reserve_up_and_takes_it_again(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = Path(grown.url) / room.RESERVE
    assert reserve.stat().st_size == room.RESERVE_BYTES
    free = room.free

    def full(url: str) -> int:
        return 0 if reserve.exists() else room.RESERVE_BYTES

    monkeypatch.setattr(room, "free", full)
    assert len(grown.gc(keep_last=1).expired) == 3
    assert not reserve.exists()
    monkeypatch.setattr(room, "free", free)
    grown.gc()
    assert reserve.exists()


def test_gc_that_can_do_nothing_says_so(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free", lambda url: 0)
    with pytest.raises(StorageError, match="nothing was expired") as caught:
        grown.gc(keep_last=1)
    assert caught.value.remedy is not None
    assert len(grown.log()) == 4
    assert grown.verify().ok


# What could not be read


def _verified_by_nobody(url: str) -> VerifyReport:
    if os.geteuid() == 0:
        # What has to be imported, nobody may read.
        verify(url, "heads")
        MemoryStore.open(url).view().values()
        os.seteuid(65534)
    return verify(url, "full")


def _read_by_nobody(url: str, cache: str) -> list[str]:
    """What the errors of reading verbs are, as a user who has read nothing yet."""
    os.environ["MEMTOOL_CACHE"] = cache
    told = []
    for read in (
        lambda: MemoryStore.open(url).view().values(),
        lambda: MemoryStore.open(url).log(),
        lambda: MemoryStore.open(url).view(MemoryStore.open(url).head()),
        lambda: MemoryStore.open(url).tags(),
    ):
        try:
            read()
        except MemtoolError as error:
            told.append(error.code)
    return told


def test_a_file_that_may_not_be_read_is_not_called_damaged() -> None:
    """Every file in turn, as a user who may not read it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = MemoryStore.create(Path(folder) / "memory", small_space())
        with store.transaction("write") as txn:
            fill(txn, small_space(), "a", 1)
        store.tag("v1")
        files = [
            path
            for path in sorted(Path(store.url).rglob("*"))
            if path.is_file() and path.name not in {"lock", "reserve"} and path.stat().st_size
        ]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(_verified_by_nobody, (store.url,)).ok
            for path in files:
                path.chmod(0)
                told = pool.apply(_read_by_nobody, (store.url, f"{folder}/no-cache"))
                assert set(told) <= {"storage"}, (path, told)
                if path.parent.name == "branch.main":
                    with pytest.raises(StorageError, match="no permission to read"):
                        pool.apply(_verified_by_nobody, (store.url,))
                else:
                    report = pool.apply(_verified_by_nobody, (store.url,))
                    assert report.damages == (), path
                    assert report.unchecked, path
                    assert not report.ok
                    assert all("no permission to read" in one.why for one in report.unchecked)
                path.chmod(0o644)


def _verified_with_few_files(url: str) -> list[VerifyReport | StorageError]:
    """With 0 to 3 files more than are open when the store is."""
    MemoryStore.open(url).view().values()
    first_free = os.dup(0)
    os.close(first_free)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    found: list[VerifyReport | StorageError] = []
    for handles in range(4):
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + handles, most))
        try:
            found.append(verify(url, "full"))
        except StorageError as error:
            found.append(error)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return found


def test_few_files_are_not_called_damage(grown: MemoryStore) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_verified_with_few_files, (grown.url,))
    refused = [one for one in found if isinstance(one, StorageError)]
    reports = [one for one in found if isinstance(one, VerifyReport)]
    assert refused or any(report.unchecked for report in reports)
    assert all("too many open files" in error.message for error in refused)
    assert all(error.remedy and "ulimit -n" in error.remedy for error in refused)
    assert [report.damages for report in reports] == [()] * len(reports)


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EACCES]
)
def test_the_system_is_not_taken_for_damage(grown: MemoryStore, number: int) -> None:
    """As icechunk tells it in words, and as the system does."""
    words = f"x object store error Unable to open file a: {os.strerror(number)} (os error {number})"
    told = ice._of_message(f"{words}\n  0: icechunk::asset_manager::fetch_snapshot", "read", "m")
    with pytest.raises(StorageError) as caught, ice.translated("read", "m"):
        raise OSError(number, os.strerror(number))
    for error in (told, caught.value):
        assert isinstance(error, StorageError), error
        assert error.remedy is not None
        assert "rollback" not in error.remedy


def test_a_checksum_that_cannot_be_compared_is_unread(
    grown: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.parent.name == "manifests":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    head, parent = (version.id for version in grown.log(limit=2))
    found = list(sums.check(grown.url, head, parent))
    assert found
    assert all(isinstance(one, sums.Unread) for one in found)


def test_a_memory_that_is_short_is_not_taken_for_damage() -> None:
    with pytest.raises(StorageError, match="not enough memory"), ice.translated("read", "m"):
        raise MemoryError


def test_the_remedy_of_a_lock_names_its_option(tmp_path: Path, space: Space) -> None:
    store = MemoryStore.create(tmp_path / "memory", space, lock_timeout=0.05)
    other = MemoryStore.open(store.url, lock_timeout=0.05)
    with other._lock(), pytest.raises(LockTimeoutError) as caught:
        store.tag("v1")
    assert caught.value.remedy is not None
    assert "--lock-timeout SECONDS" in caught.value.remedy
