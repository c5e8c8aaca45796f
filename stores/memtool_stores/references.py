"""Branches and tags as files: which are whole, which were never finished, and which are damaged.

icechunk makes a folder for each and then a file in it. A full disk or a kill in between leaves a
folder with nothing in it, which icechunk takes for nothing, for a branch that it cannot read, or
for a tag that cannot be made again. So that nobody takes it for a branch or tag that lost its file,
a store in a directory has an empty file `refs/<kind>.<name>` for each that was made whole: what has
no such mark and says nothing was never finished, and nobody was told that it was there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtool_stores.errors import IntegrityError, MemtoolError, NotFoundError
from memtool_stores.files import open_as_usual, part_folder
from memtool_stores.ice import of_os_error, open_repository, sync_to_disk, translated
from memtool_stores.objects import objects_at

SUMS = "sums"
"""The folder of the checksums that sums.py writes, a file for each version."""

MARKS = "refs"
"""The folder of the marks of what was made whole."""

KINDS = frozenset({"branch", "tag"})
"""Kinds of names of versions."""

REF_BYTES = 100
"""More than the file of a branch or tag has."""

_MAIN = "branch.main"
_REF = re.compile(rb'\{"snapshot":"([0-9A-HJKMNP-TV-Z]{20})"\}')


@dataclass(frozen=True)
class References:
    """Kind and name of the branches and tags that cannot be read."""

    damaged: tuple[tuple[str, str], ...] = ()
    """Their files are not as written. A version of which there is no trace never was one."""
    unfinished: tuple[tuple[str, str], ...] = ()
    """They say nothing, and never did: as if they were not there."""


def unreadable(url: str) -> References:
    """The branches and tags of a store that say nothing, or nothing right.

    icechunk leaves some of them out of its lists without a word, and gc would take their versions.
    A folder without a file has lost it, or was never finished: who deletes a tag leaves a mark of
    icechunk's in its folder, and who deletes a branch takes the folder away.

    Raises:
        StorageError: a file could not be read.
    """
    if url.startswith("s3://"):
        return References(tuple(_damaged_in_bucket(url)))
    try:
        return _unreadable(url)
    except OSError as error:
        raise of_os_error(error, "read the branches and tags", url) from error


def file_of(kind: str, name: str) -> str:
    """The path of the file of a branch or tag in its store."""
    return f"ice/refs/{kind}.{name}/ref.json"


def deleted_tags(url: str) -> frozenset[str]:
    """The names that were tags of a store in a directory; icechunk never gives one again.

    Raises StorageError where they could not be read.
    """
    try:
        marks = list((Path(url) / "ice" / "refs").glob("tag.*/ref.json.deleted"))
    except OSError as error:
        raise of_os_error(error, "read the branches and tags", url) from error
    return frozenset(mark.parent.name.removeprefix("tag.") for mark in marks)


def unfinished(url: str) -> frozenset[tuple[str, str]]:
    """Kind and name of what was never finished; in a bucket nothing is half."""
    return frozenset() if url.startswith("s3://") else frozenset(unreadable(url).unfinished)


def _unreadable(url: str) -> References:
    folder = Path(url) / "ice" / "refs"
    damaged, empty, versions = [], [], []
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind, _, name = place.name.partition(".")
        if kind not in KINDS:
            # Nobody else's file may lie there: icechunk then lists no reference at all.
            damaged.append(("reference", place.name))
            continue
        if (place / "ref.json.deleted").exists():
            continue
        data = _beginning(place / "ref.json")
        ref = _REF.fullmatch(data)
        version = "" if ref is None else ref[1].decode()
        traces = (Path(url) / "ice" / "snapshots" / version, Path(url) / SUMS / version)
        if ref is not None and any(trace.exists() for trace in traces):
            versions.append(version)
        elif not data and not _is_marked(url, place.name):
            empty.append((kind, name))
        else:
            damaged.append((kind, name))
    # Before the first mark, only a store that lost no version proves that none was named.
    if empty and not (Path(url) / MARKS).is_dir() and not _lead_everywhere(url, versions):
        damaged, empty = sorted(damaged + empty), []
    return References(tuple(damaged), tuple(empty))


def _beginning(file: Path) -> bytes:
    """As much of a file as tells whether it is that of a branch or tag; nothing of none."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        return opened.read(REF_BYTES)


def _is_marked(url: str, entry: str) -> bool:
    return entry == _MAIN or (Path(url) / MARKS / entry).exists()


def _lead_everywhere(url: str, versions: list[str]) -> bool:
    """Whether every snapshot that lies in a store is an ancestor of these versions."""
    found = set()
    try:
        with translated("read the history", url):
            repository = open_repository(url)
            for version in versions:
                for snapshot in repository.ancestry(snapshot_id=version):
                    if snapshot.id in found:
                        break
                    found.add(snapshot.id)
    except (IntegrityError, NotFoundError):
        return False
    return {path.name for path in (Path(url) / "ice" / "snapshots").iterdir()} <= found


def _damaged_in_bucket(url: str) -> list[tuple[str, str]]:
    """A bucket has no folders: a lost object leaves no trace, a wrong one does, and none is half.

    Versions are looked up one by one: a bucket lists thousands of them slower than it gives two.
    """
    objects = objects_at(url)
    paths = {entry.path for entry in objects.list("ice/refs")}
    found = []
    for path in sorted(paths):
        if not path.endswith("/ref.json") or f"{path}.deleted" in paths:
            continue
        kind, _, name = path.split("/")[-2].partition(".")
        try:
            ref = _REF.fullmatch(objects.read(path))
            if ref is None:
                found.append((kind, name))
            else:
                objects.read(f"ice/snapshots/{ref[1].decode()}")
        except NotFoundError:
            # Without its version it is damaged; without its own object, someone just deleted it.
            if any(entry.path == path for entry in objects.list("ice/refs")):
                found.append((kind, name))
    return found


def damaged_ref(kind: str, name: str) -> IntegrityError:
    """The error for a damaged one."""
    return IntegrityError(
        what=kind, name=name, expected="the id of a version", found="a file that is none"
    )


def make(url: str, repository: Any, kind: str, name: str, version: str, doing: str) -> None:
    """Make a branch or a tag, whole or not at all; the caller holds the lock.

    `doing` is what it is made for, as errors say it ("roll back to 'v1'").

    Raises:
        StorageError: no permission, or no room; what was begun is taken back.
    """
    create = repository.create_tag if kind == "tag" else repository.create_branch
    if url.startswith("s3://"):
        with translated(doing, url):
            create(name, version)
        return
    entry = f"{kind}.{name}"
    with translated(doing, url):
        mark_all(url)
        if (kind, name) in unfinished(url):
            take_away_unfinished(url, [(kind, name)])
        place = Path(url) / "ice" / "refs" / entry
        taken, made = place.exists(), False
        try:
            create(name, version)
            # A mark that is on the disk before its file is would make a lost one of it.
            sync_to_disk(place)
            (Path(url) / MARKS / entry).touch()
            made = True
        finally:
            if not made and not taken:
                shutil.rmtree(place, ignore_errors=True)


def mark_all(url: str) -> None:
    """Give a store in a directory that has no marks all of them at once."""
    marks = Path(url) / MARKS
    if marks.is_dir():
        return
    half = unfinished(url)
    folder = part_folder(marks)
    try:
        for place in (Path(url) / "ice" / "refs").iterdir():
            kind, _, name = place.name.partition(".")
            if (kind, name) not in half:
                (folder / place.name).touch()
        open_as_usual(folder)
        folder.rename(marks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mark_new(url: str) -> None:
    """Give branches and tags that came as files, and are on the disk, their marks.

    A store without any marks is whole without them.
    """
    marks, half = Path(url) / MARKS, unfinished(url)
    if marks.is_dir():
        for place in (Path(url) / "ice" / "refs").iterdir():
            kind, _, name = place.name.partition(".")
            if (kind, name) not in half:
                (marks / place.name).touch()


def unmark(url: str, kind: str, name: str) -> None:
    """Before a branch or a tag is deleted: what then says nothing is not damaged."""
    if not url.startswith("s3://"):
        (Path(url) / MARKS / f"{kind}.{name}").unlink(missing_ok=True)


def take_away_unfinished(url: str, unfinished: Iterable[tuple[str, str]]) -> None:
    """Take the folders of these away; the caller holds the lock."""
    for kind, name in unfinished:
        place = Path(url) / "ice" / "refs" / f"{kind}.{name}"
        (place / "ref.json").unlink(missing_ok=True)
        shutil.rmtree(place)


def try_to_mark_all(url: str) -> None:
    """As `mark_all`; a store without marks is whole, so that a failure says nothing."""
    try:
        with translated("mark the branches and tags", url):
            mark_all(url)
    except MemtoolError:
        return
