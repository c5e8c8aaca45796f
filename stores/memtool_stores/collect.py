"""Garbage collection: expire old versions, then delete what no version needs any more."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from memtool_stores import sums
from memtool_stores.errors import SchemaError
from memtool_stores.history import MAIN, damaged_ref, damaged_refs, reachable, snapshots
from memtool_stores.ice import open_repository, translated
from memtool_stores.objects import objects_at

UNLOCKED_GRACE = timedelta(hours=1)
"""On an object store no lock keeps writers out: files younger than this may be theirs."""


@dataclass(frozen=True)
class GcReport:
    """What gc did, or with `dry_run` would do.

    `expired` are the versions taken away; `freed_bytes` and `deleted_files` what that gave back.
    """

    dry_run: bool
    expired: tuple[str, ...]
    freed_bytes: int
    deleted_files: int


def collect(
    url: str, *, local: bool, keep_last: int | None, keep_days: float | None, dry_run: bool
) -> GcReport:
    """Expire and delete; the caller holds the lock.

    A version stays when it is among the last `keep_last` of main, or younger than `keep_days`
    days, or named by a tag or a branch. With neither, only files that no version needs go.
    """
    if keep_last is not None and keep_last < 1:
        raise SchemaError(f"keep_last={keep_last}", expected="at least 1: the newest version stays")
    if keep_days is not None and keep_days < 0:
        raise SchemaError(f"keep_days={keep_days}", expected="0 or more")
    with ExitStack() as stack:
        if dry_run:
            # The dry run is the real run, on a copy.
            url = str(stack.enter_context(_linked(Path(url)) if local else _sketched(url)))
        with translated("collect garbage", url):
            repository = open_repository(url)
            for kind, name in damaged_refs(url):
                raise damaged_ref(kind, name)
            before = set(reachable(repository))
            cutoff = _cutoff(repository, keep_last, keep_days)
            # What a crash or a full disk left goes first: to expire, a little room is needed.
            summaries = [_delete_unneeded(repository, local)]
            if cutoff is not None:
                sums.before_expiry(url, repository, cutoff)
                repository.expire_snapshots(cutoff)
                repository = open_repository(url)
            sums.after_expiry(url, repository)
            if cutoff is not None:
                summaries.append(_delete_unneeded(repository, local))
            expired = before - set(reachable(repository))
    return GcReport(
        dry_run,
        tuple(sorted(expired)),
        sum(freed for freed, _ in summaries),
        sum(files for _, files in summaries),
    )


def _delete_unneeded(repository: Any, local: bool) -> tuple[int, int]:
    """Delete the files that no branch or tag leads to; their bytes and their number."""
    now = datetime.now(UTC)
    summary = repository.garbage_collect(now if local else now - UNLOCKED_GRACE)
    files = (
        summary.chunks_deleted
        + summary.manifests_deleted
        + summary.snapshots_deleted
        + summary.transaction_logs_deleted
    )
    return int(summary.bytes_deleted), int(files)


def _cutoff(repository: Any, keep_last: int | None, keep_days: float | None) -> datetime | None:
    """Snapshots written before this go; None when nothing is to expire."""
    cutoffs = []
    if keep_last is not None:
        head = repository.lookup_branch(MAIN)
        kept = [
            snapshot
            for snapshot, _ in zip(snapshots(repository, head), range(keep_last), strict=False)
        ]
        cutoffs.append(kept[-1][0].written_at)
    if keep_days is not None:
        cutoffs.append(datetime.now(UTC) - timedelta(days=keep_days))
    return min(cutoffs, default=None)


@contextmanager
def _linked(store: Path) -> Iterator[Path]:
    """A folder inside the store with hard links to all files of the repository, gone at the end.

    icechunk never writes into a file: it makes new ones and deletes old ones.
    """
    with tempfile.TemporaryDirectory(dir=store, prefix=".dry-run-") as folder:
        shutil.copytree(store / "ice", Path(folder) / "ice", copy_function=os.link)
        yield Path(folder)


@contextmanager
def _sketched(url: str) -> Iterator[Path]:
    """A folder that looks like a store in a bucket: chunks have their size and age, but no bytes.

    Chunks are the bulk of a store, and nobody reads them to find out which of them are needed.
    """
    objects = objects_at(url)
    with tempfile.TemporaryDirectory(prefix="memtool-dry-run-") as folder:
        for entry in objects.list("ice"):
            path = Path(folder) / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.path.startswith("ice/chunks/"):
                with path.open("wb") as file:
                    file.truncate(entry.nbytes)  # a hole: it takes no room
            else:
                path.write_bytes(objects.read(entry.path))
            moment = entry.modified.timestamp()
            os.utime(path, (moment, moment))
        yield Path(folder)
