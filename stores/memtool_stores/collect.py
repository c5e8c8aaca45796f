"""Garbage collection: expire old versions, then delete what no version needs any more."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memtool_stores import clock, references, room, sums
from memtool_stores.errors import SchemaError, StorageError
from memtool_stores.files import part_folder
from memtool_stores.history import MAIN, Version, reachable, snapshots, tips
from memtool_stores.ice import open_repository, translated
from memtool_stores.leftovers import Leftover
from memtool_stores.names import below
from memtool_stores.objects import objects_at

UNLOCKED_GRACE = timedelta(hours=1)
"""On an object store no lock keeps writers out: files younger than this may be theirs."""


_ALL = datetime(9000, 1, 1, tzinfo=UTC)
"""Later than the time of any file: under the lock, what no version needs is nobody's."""

FETCHED, FETCHED_BYTES = 8, 8 * 1024 * 1024
"""Snapshots, or manifests and bytes of them, that are on their way into memory at a time."""

EXPIRY_BYTES = 16 * 1024
"""Room that expiry needs for each branch and tag: a snapshot and its checksums, written anew."""


@dataclass(frozen=True)
class GcReport:
    """What gc did, or with `dry_run` would do.

    `expired` are the versions taken away; `freed_bytes` and `deleted_files` what that gave back.
    `notes` say what else was found: branches and tags that were never finished, times that no
    clock can have meant. `leftovers` are what killed processes had left in the making.
    """

    dry_run: bool
    expired: tuple[str, ...]
    freed_bytes: int
    deleted_files: int
    notes: tuple[str, ...] = ()
    leftovers: tuple[Leftover, ...] = ()


def collect(
    url: str, *, local: bool, keep_last: int | None, keep_days: float | None, dry_run: bool
) -> GcReport:
    """Expire and delete; the caller holds the lock.

    A version stays when it is among the last `keep_last` of main, or younger than `keep_days`
    days, or named by a tag or a branch. With neither, only files that no version needs go.

    Raises:
        IntegrityError: a branch or tag is damaged: nobody knows what it needs.
        StorageError: there is no room to expire anything, and nothing else could be deleted.
    """
    if keep_last is not None and keep_last < 1:
        raise SchemaError(f"keep_last={keep_last}", expected="at least 1: the newest version stays")
    if keep_days is not None and keep_days < 0:
        raise SchemaError(f"keep_days={keep_days}", expected="0 or more")
    with ExitStack() as stack, translated("collect garbage", url):
        unreadable = references.unreadable(url)
        for kind, name in unreadable.damaged:
            raise references.damaged_ref(kind, name)
        grown_before = _ALL if local else _newest(url) - UNLOCKED_GRACE
        if dry_run:
            # The dry run is the real run, on a copy.
            url = _copied(url, local, stack)
        references.take_away_unfinished(url, unreadable.unfinished)
        repository = open_repository(url)
        before = reachable(repository, url)
        # What a crash or a full disk left goes first: to expire, a little room is needed.
        summaries = [_delete_unneeded(repository, grown_before)]
        expiry = _expiry(repository, url, before.values(), keep_last, keep_days)
        if expiry.cutoff is not None and any(v.time < expiry.cutoff for v in before.values()):
            if local and not dry_run:
                _make_room(url, tips(repository, url))
            sums.before_expiry(url, repository, expiry.cutoff)
            repository.expire_snapshots(expiry.cutoff)
            repository = open_repository(url)
        sums.after_expiry(url, repository)
        if expiry.cutoff is not None:
            summaries.append(_delete_unneeded(repository, grown_before))
        expired = before.keys() - reachable(repository, url).keys()
    return GcReport(
        dry_run,
        tuple(sorted(expired)),
        sum(freed for freed, _ in summaries),
        sum(files for _, files in summaries),
        (*_said(unreadable.unfinished, dry_run), *expiry.notes),
    )


def _said(unfinished: Iterable[tuple[str, str]], dry_run: bool) -> Iterator[str]:
    done = "would be taken away" if dry_run else "was taken away"
    for kind, name in unfinished:
        yield f"{kind} {name!r}, which was never finished and names no version, {done}"


def _make_room(url: str, tips: Collection[str]) -> None:
    """Room to expire: snapshots and checksums are written anew before the old ones go.

    Raises:
        StorageError: there is too little, with what was kept for this.
    """
    needed = EXPIRY_BYTES * (1 + len(tips))
    if room.is_full(url, needed):
        room.give_up_reserve(url)
    if room.is_full(url, EXPIRY_BYTES):
        raise StorageError(
            f"could not expire versions: the disk of {url} is full ({room.free(url):,} bytes free, "
            f"about {needed:,} needed), and no file in the store is without use; nothing was "
            "expired",
            remedy=f"delete or move something beside the store ({needed:,} bytes), then "
            "`memtool gc` again",
        )


def _newest(url: str) -> datetime:
    """When a bucket last took a file, by its own clock; ours may be wrong."""
    modified = (entry.modified for entry in objects_at(url).list("ice"))
    return min(max(modified, default=clock.BEGIN), clock.now())


def _delete_unneeded(repository: Any, grown_before: datetime) -> tuple[int, int]:
    """Delete the files that no branch or tag leads to; their bytes and their number."""
    summary = repository.garbage_collect(
        grown_before,
        max_snapshots_in_memory=FETCHED,
        max_compressed_manifest_mem_bytes=FETCHED_BYTES,
        max_concurrent_manifest_fetches=FETCHED,
    )
    files = (
        summary.chunks_deleted
        + summary.manifests_deleted
        + summary.snapshots_deleted
        + summary.transaction_logs_deleted
    )
    return int(summary.bytes_deleted), int(files)


@dataclass(frozen=True)
class _Expiry:
    """Snapshots written before `cutoff` go, none when it is None; and what there is to say."""

    cutoff: datetime | None
    notes: tuple[str, ...] = ()


def _expiry(
    repository: Any,
    url: str,
    versions: Collection[Version],
    keep_last: int | None,
    keep_days: float | None,
) -> _Expiry:
    """What is to expire. No single wrong clock, of gc or of a version, makes it more."""
    cutoffs, notes, now = [], list[str](), clock.now()
    ahead = sorted(v.id for v in versions if v.time > now + clock.PATIENCE)
    if ahead:
        notes.append(
            f"{len(ahead)} versions are from clocks ahead of this one ({_some(ahead)}): kept"
        )
    if keep_last is not None:
        head = repository.lookup_branch(MAIN)
        kept = [
            snapshot
            for snapshot, _ in zip(snapshots(repository, head), range(keep_last), strict=False)
        ]
        cutoffs.append(kept[-1][0].written_at)
    if keep_days is not None:
        cutoff, found = _by_age(repository, url, versions, timedelta(days=keep_days))
        cutoffs.append(cutoff)
        notes += found
    # With a version from a clock that was ahead, what others wrote on other branches would go.
    return _Expiry(min([*cutoffs, now]), tuple(notes)) if cutoffs else _Expiry(None)


def _by_age(
    repository: Any, url: str, versions: Collection[Version], age: timedelta
) -> tuple[datetime, list[str]]:
    """Where the versions of that age end, and what was not believed.

    Ages count back from the newest version, where that is before this clock's time: a clock that
    is ahead expires nothing more. A version whose time is none that a clock can have meant is as
    old as the next one after it at the least: it goes when that one does.
    """
    now, notes = clock.now(), []
    newest = max((v.time for v in versions), default=now)
    cutoff = min(now, newest) - age
    if newest < now - age:
        notes.append(
            f"the newest version is {clock.span(now - newest)} old by this clock: ages are counted "
            "from it, not from the clock"
        )
    unset = []
    for tip in set(tips(repository, url).values()):
        line = [snapshot for snapshot, _ in snapshots(repository, tip)]
        old = [snapshot for snapshot in line if snapshot.written_at < cutoff]
        if old and old[0].written_at < clock.BEGIN:
            cutoff = min(cutoff, old[-1].written_at)
            unset += [snapshot.id for snapshot in old]
    if unset:
        notes.append(
            f"{len(set(unset))} versions are from a clock that was never set "
            f"({_some(sorted(set(unset)))}): their age is not known, so they are kept"
        )
    return cutoff, notes


def _some(versions: list[str]) -> str:
    return ", ".join(versions[:3]) + (", …" if len(versions) > 3 else "")


def _copied(url: str, local: bool, stack: ExitStack) -> str:
    """What the dry run works on: links beside the files, or a sketch of them elsewhere."""
    needed = 2 * EXPIRY_BYTES
    if local and room.is_full(url, needed):
        room.give_up_reserve(url)
    if local and not room.is_full(url, needed):
        with suppress(OSError):  # some file systems have no links
            return str(stack.enter_context(_linked(Path(url))))
    return str(stack.enter_context(_sketched(url)))


@contextmanager
def _linked(store: Path) -> Iterator[Path]:
    """A folder inside the store with hard links to all files of the repository, gone at the end.

    icechunk never writes into a file: it makes new ones and deletes old ones.
    """
    folder = part_folder(store / "dry-run")
    try:
        shutil.copytree(store / "ice", folder / "ice", copy_function=os.link)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _sketched(url: str) -> Iterator[Path]:
    """A folder that looks like a store in a bucket: chunks have their size and age, but no bytes.

    Chunks are the bulk of a store, and nobody reads them to find out which of them are needed.
    """
    objects = objects_at(url)
    with tempfile.TemporaryDirectory(prefix="memtool-dry-run-") as folder:
        for entry in objects.list("ice"):
            path = below(Path(folder), *entry.path.split("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.path.startswith("ice/chunks/"):
                with path.open("wb") as file:
                    file.truncate(entry.nbytes)  # a hole: it takes no room
            else:
                path.write_bytes(objects.read(entry.path))
            moment = entry.modified.timestamp()
            os.utime(path, (moment, moment))
        yield Path(folder)
