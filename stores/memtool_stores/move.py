"""A whole store somewhere else: a clone in a directory or a bucket, or one bundle file.

Everything is copied as it lies, all versions and their ids included, and appears at once: the
references come last, so a copy that was cut short is no store. The references are read first, so a
copy that a writer overtakes is the store as it was then.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memtool_stores.errors import AlreadyExistsError, IntegrityError, SchemaError, StorageError
from memtool_stores.ice import of_os_error
from memtool_stores.objects import ObjectInfo, Objects

REFERENCES = "ice/refs/"
CONTENT = "ice/"
CHECKSUMS = "sums/"
"""What a store consists of; the lock and half-written files stay behind."""

MANIFEST = "memtool-bundle.json"
BUNDLE_SCHEMA = 1

_UNREADABLE = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    ValueError,
    # A flipped bit may claim another compression, or a password.
    NotImplementedError,
    RuntimeError,
    zlib.error,
)

Tell = Callable[[int, int], None]
"""Called with the files copied so far, and how many there are."""


def copy(
    source: Objects,
    target: Objects,
    tell: Tell | None = None,
    *,
    checksums: bool = True,
    there: frozenset[str] = frozenset(),
) -> int:
    """Copy every file of a store but those that are `there`; the number of files.

    Beside those the target must be empty.
    """
    files = list(_files(source, checksums))
    for number, (path, data) in enumerate(_in_order(source, files, checksums, there), start=1):
        if path not in there:
            target.write(path, data)
        if tell is not None:
            tell(number, len(files))
    return len(files)


def require_empty(target: Objects, url: str) -> None:
    """Raise AlreadyExistsError when there is anything at `url`."""
    for entry in target.list():
        raise AlreadyExistsError(
            f"{url} is there and not empty ({entry.path})",
            remedy="another place, or `memtool clone --resume` when a clone of this memory was cut "
            "short there; else first delete what is there",
        )


def begun_copy(source: Objects, target: Objects, url: str) -> frozenset[str]:
    """The files that a copy of `source` need not write again, when one to `url` was cut short.

    A file has a name that was drawn at random when it was written, and never changes: under the
    same name it is the same, when it is whole. Only references move.

    Raises:
        AlreadyExistsError: something else is there.
    """
    ours = {entry.path: entry for entry in source.list()}
    there = set()
    for entry in target.list():
        path, mine = entry.path, ours.get(entry.path)
        moves = path.startswith(REFERENCES)
        if mine is None or (moves and source.read(path) != target.read(path)):
            raise AlreadyExistsError(
                f"{url} is there and is no beginning of a copy of this memory ({path})",
                remedy="another place, or first delete what is there",
            )
        if moves or (mine.nbytes == entry.nbytes and _same_md5(source, mine, entry)):
            there.add(path)
    return frozenset(there)


def _same_md5(source: Objects, mine: ObjectInfo, other: ObjectInfo) -> bool:
    if other.md5 is None:
        return True
    data = b"" if mine.md5 else source.read(mine.path)
    return other.md5 == (mine.md5 or hashlib.md5(data, usedforsecurity=False).hexdigest())


def _files(source: Objects, checksums: bool) -> Iterator[str]:
    for entry in source.list():
        name = entry.path.rpartition("/")[2]
        if _belongs(entry.path, checksums) and not name.startswith("."):
            yield entry.path


def _belongs(path: str, checksums: bool) -> bool:
    return path.startswith(CONTENT) or (checksums and path.startswith(CHECKSUMS))


def _in_order(
    source: Objects, files: list[str], checksums: bool, unread: frozenset[str] = frozenset()
) -> Iterator[tuple[str, bytes]]:
    """Every file with its bytes (none of `unread`); references last, as they were at the start."""
    references = {path: source.read(path) for path in files if path.startswith(REFERENCES)}
    # Listed again: what the references lead to was written before them.
    rest = sorted({*_files(source, checksums)} - references.keys())
    for path in rest:
        if not path.startswith(REFERENCES):
            yield path, b"" if path in unread else source.read(path)
    yield from sorted(references.items())


def write_bundle(
    source: Objects, file: Path, about: dict[str, Any], *, checksums: bool = True
) -> int:
    """Write a store as one file, whole or not at all; its size in bytes.

    It is a zip archive without compression: the files as they lie, and their SHA-256 in
    `memtool-bundle.json` beside what `about` says.

    Raises:
        AlreadyExistsError: there is such a file.
        StorageError: no permission, or no room.
    """
    if file.exists():
        raise AlreadyExistsError(f"{file} is there already", remedy="another file name")
    part = file.with_name(f".{file.name}.part")
    hashes: dict[str, str] = {}
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            files = list(_files(source, checksums))
            for path, data in _in_order(source, files, checksums):
                hashes[path] = hashlib.sha256(data).hexdigest()
                archive.writestr(_entry(path), data)
            said = {"bundle_schema": BUNDLE_SCHEMA, **about, "files": hashes}
            archive.writestr(_entry(MANIFEST), json.dumps(said, indent=1, sort_keys=True))
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        raise of_os_error(error, "write the bundle", str(file.parent)) from error
    finally:
        part.unlink(missing_ok=True)
    return file.stat().st_size


def _entry(path: str) -> zipfile.ZipInfo:
    """The same bytes for the same store, whenever the bundle is made."""
    return zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))


def read_bundle(
    file: Path, target: Objects, tell: Tell | None = None, *, checksums: bool = True
) -> dict[str, Any]:
    """Copy a bundle into an empty place, every file checked; what its manifest says.

    Raises:
        IntegrityError: the bundle is cut short or damaged; it names the file inside.
        SchemaError: it is no bundle, or a newer memtool made it.
    """
    with _opened(file) as archive:
        said = _manifest(archive, file)
        hashes: dict[str, str] = said["files"]
        # References come last here, too.
        paths = sorted(hashes, key=lambda path: (path.startswith(REFERENCES), path))
        for number, path in enumerate(paths, start=1):
            if not _belongs(path, True) or ".." in Path(path).parts:
                raise _damaged(file, path, "a file of a store", "a path outside of it")
            try:
                data = archive.read(path)
            except (KeyError, *_UNREADABLE) as error:
                raise _damaged(file, path, f"sha256 {hashes[path]}", str(error)) from error
            found = hashlib.sha256(data).hexdigest()
            if found != hashes[path]:
                raise _damaged(file, path, f"sha256 {hashes[path]}", found)
            if _belongs(path, checksums):
                target.write(path, data)
            if tell is not None:
                tell(number, len(paths))
    return said


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(file)
    except FileNotFoundError as error:
        raise StorageError(f"no bundle {file}") from error
    except OSError as error:
        raise of_os_error(error, "read the bundle", str(file)) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise IntegrityError(
            what="bundle",
            name=str(file),
            expected="a whole file, as memtool export --bundle wrote it",
            found=str(error),
            remedy="copy the bundle again",
        ) from error
    with archive:
        yield archive


def _manifest(archive: zipfile.ZipFile, file: Path) -> dict[str, Any]:
    try:
        said = json.loads(archive.read(MANIFEST))
        schema = said["bundle_schema"]
        hashes = said["files"]
    except (KeyError, TypeError, *_UNREADABLE) as error:
        raise SchemaError(
            f"{file} is no bundle of memtool: {error}",
            expected=f"a file with {MANIFEST} in it, as memtool export --bundle writes it",
        ) from error
    if not isinstance(schema, int) or not isinstance(hashes, dict):
        raise SchemaError(f"{file} is no bundle of memtool: {MANIFEST} is of another kind")
    if schema > BUNDLE_SCHEMA:
        raise SchemaError(
            f"{file} is a bundle of schema {schema}, made by a newer memtool",
            expected=f"at most {BUNDLE_SCHEMA}",
            remedy="pip install --upgrade memtool",
        )
    if not any(path.startswith(REFERENCES) for path in hashes):
        raise SchemaError(f"{file} holds no store")
    return dict(said)


def _damaged(file: Path, path: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        what="bundle",
        name=f"{file}: {path}",
        expected=expected,
        found=found,
        remedy="copy the bundle again",
    )
