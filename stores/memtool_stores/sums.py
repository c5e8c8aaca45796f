"""Checksums of the files that icechunk gives none: snapshots, transaction logs and manifests.

Every version of a store in a directory has a file `sums/<version>` in the format of sha256sum, with
a line for each file that this version made and paths from the folder of the store, so that
`sha256sum -c sums/*` there is a check too. A file is written before its version gets a name: an
acknowledged commit has it, and a crash leaves at most one too many.

A file begins a history where the version before it has none, because there is none, or because an
older memtool wrote it: then it lists all that its version uses, and the empty snapshot that
icechunk begins with, so that a file that was lost can be told from one that never was. An object
store checks its own bytes and gets no files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from memtool_stores.errors import IntegrityError, MemtoolError
from memtool_stores.files import appearing
from memtool_stores.history import snapshots, tips
from memtool_stores.ice import manifests, of_os_error
from memtool_stores.names import is_version_id
from memtool_stores.printable import shown
from memtool_stores.references import SUMS

_KINDS = {"snapshots": "version", "transactions": "transaction log", "manifests": "manifest"}
_LINE = re.compile(rf"[0-9a-f]{{64}}  ice/({'|'.join(_KINDS)})/[0-9A-Z]{{20}}")


@dataclass(frozen=True)
class Wrong:
    """A file whose bytes are not the written ones: its kind and the version that made it."""

    kind: str
    version: str
    expected: str
    found: str


@dataclass(frozen=True)
class Unread:
    """A file that the system would not let us read: nobody knows what is in it."""

    kind: str
    version: str
    error: MemtoolError


def versions(url: str) -> frozenset[str]:
    """The versions that have a file of checksums.

    Raises:
        StorageError: the folder could not be read.
    """
    folder = _folder(url)
    try:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise of_os_error(error, "read the checksums", url) from error
    return frozenset(name for name in names if is_version_id(name))


def write(url: str, repository: Any, version: str) -> None:
    """Note the checksums of the files that a version made; it is in no history yet.

    Raises:
        StorageError: no permission, or no room.
    """
    if url.startswith("s3://"):
        return
    snapshot, _ = next(snapshots(repository, version))
    # One file is looked for: a list of all would grow with the history.
    begins = not (_folder(url) / snapshot.parent_id).is_file()
    _write(url, version, _files(repository, snapshot, begins=begins))


def before_expiry(url: str, repository: Any, cutoff: datetime) -> None:
    """Prepare for an expiry of what is older than `cutoff`, which writes some snapshots anew.

    Those are the ones whose parent goes. Their files are made to begin a history, without the line
    of their own snapshot until `after_expiry`: a crash in between leaves a version whose snapshot
    has no checksum, but none that has a wrong one.
    """
    known = versions(url)
    for tip in set(tips(repository, url).values()) if known else ():
        line = snapshots(repository, tip)
        last, _ = next(line)
        for snapshot, _ in line:
            if snapshot.written_at < cutoff:
                break
            last = snapshot
        else:
            continue  # nothing of this history goes
        if last.id in known:
            files = _files(repository, last, begins=True)
            _write(url, last.id, files - {_snapshot(last.id)})


def after_expiry(url: str, repository: Any) -> None:
    """Note the checksums of the versions that are now the oldest, forget those of no version."""
    known = versions(url)
    kept = set()
    for tip in set(tips(repository, url).values()) if known else ():
        for snapshot, oldest in snapshots(repository, tip):
            kept.add(snapshot.id)
            if oldest and snapshot.id in known:
                _write(url, snapshot.id, _files(repository, snapshot, begins=True))
    for version in known - kept:
        (_folder(url) / version).unlink()


def check(url: str, version: str, parent: str | None) -> Iterator[Wrong | Unread]:
    """What is wrong with the files that this version made; `parent` is None for an oldest one.

    Raises:
        OSError: the checksums themselves could not be read.
    """
    listed = set()
    *lines, rest = (_folder(url) / version).read_bytes().decode(errors="replace").split("\n")
    if rest or [*map(_path_in, lines)] != sorted({*map(_path_in, lines)}):
        yield Wrong("checksums", version, "a line a file, in order, each ended", shown(rest))
    for line in lines:
        expected, _, path = line.partition("  ")
        named = _LINE.fullmatch(line)
        if named is None:
            yield Wrong("checksums", version, "lines of sha256sum", shown(line))
            continue
        kind = _KINDS[named[1]]
        listed.add(path)
        try:
            data = (Path(url) / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            yield Wrong(kind, version, f"sha256 {expected}", f"{path}: {error.strerror}")
            continue
        except OSError as error:
            yield Unread(kind, version, of_os_error(error, f"read {path}", url))
            continue
        found = hashlib.sha256(data).hexdigest()
        if found != expected:
            yield Wrong(kind, version, f"sha256 {expected}", f"{path}: sha256 {found}")
    own = _snapshot(version)
    begins = any(path.startswith(_snapshot("")) for path in listed - {own})
    needed = {f"ice/transactions/{version}"} | (set() if begins else {own})
    for path in sorted(needed - listed):
        yield Wrong("checksums", version, f"a line for {path}", "none")
    if not begins and (parent is None or parent not in versions(url)):
        yield Wrong("checksums", parent or version, "a file with the checksums", "none")


def check_snapshot(url: str, version: str) -> None:
    """Nothing, unless the snapshot of a version has another checksum than was noted, if one was.

    Raises:
        IntegrityError: it has.
    """
    path, noted = _snapshot(version), _folder(url) / version
    if not noted.is_file():
        return
    lines = (line.partition("  ") for line in noted.read_text(errors="replace").splitlines())
    expected = {named: digest for digest, _, named in lines}.get(path)
    found = hashlib.sha256((Path(url) / path).read_bytes()).hexdigest()
    if expected not in {None, found}:
        raise IntegrityError(
            what="version", name=version, expected=f"sha256 {expected}", found=f"sha256 {found}"
        )


def _files(repository: Any, snapshot: Any, *, begins: bool) -> frozenset[str]:
    """The files that a version made; the one that begins lists all that it uses."""
    used, first = manifests(repository, snapshot.id), frozenset[str]()
    if begins:
        *_, (oldest, _) = snapshots(repository, snapshot.id)
        first = frozenset({_snapshot(oldest.parent_id)})
    else:
        used -= manifests(repository, snapshot.parent_id)
    made = frozenset({_snapshot(snapshot.id), f"ice/transactions/{snapshot.id}"})
    return made | {f"ice/manifests/{id}" for id in used} | first


def _snapshot(version: str) -> str:
    return f"ice/snapshots/{version}"


def _write(url: str, version: str, files: Collection[str]) -> None:
    lines = []
    try:
        for path in sorted(files):
            digest = hashlib.sha256((Path(url) / path).read_bytes()).hexdigest()
            lines.append(f"{digest}  {path}\n")
        _folder(url).mkdir(exist_ok=True)
        text = "".join(lines).encode()
        noted = _folder(url) / version
        if noted.is_file() and noted.read_bytes() == text:
            return  # on a full disk there would be no room to write the same again
        # Whoever commits brings all of it to the disk at once.
        with appearing(noted, flushed=False) as file:
            file.write(text)
    except OSError as error:
        raise of_os_error(error, f"note the checksums of version {version}", url) from error


def _path_in(line: str) -> str:
    """The file that a line is about."""
    return line.partition("  ")[2]


def _folder(url: str) -> Path:
    return Path(url) / SUMS
