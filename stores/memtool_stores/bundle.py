"""A whole store as one file: a bundle.

It is a zip archive without compression, comments or links: the files as they lie, the references
last, and behind them `memtool-bundle.json` with their SHA-256. People send each other such files,
so nothing that one says of itself is believed: a member is as long as what is there, lies beside
the others and not over them, has a path that a file of a store can have, and is in the manifest.
Both ways a file is in memory by pieces only, and one whose hash is wrong never appears.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from memtool_stores import limits
from memtool_stores.errors import AlreadyExistsError, IntegrityError, SchemaError, StorageError
from memtool_stores.files import appearing, is_special
from memtool_stores.ice import of_os_error
from memtool_stores.move import REFERENCES, Tell, belongs, files_of, in_order
from memtool_stores.names import check_id, check_path
from memtool_stores.objects import PIECE_BYTES, Objects
from memtool_stores.printable import shown

MANIFEST = "memtool-bundle.json"
BUNDLE_SCHEMA = 1

_UNREADABLE = (
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    NotImplementedError,  # how zipfile tells of another compression, which a flipped bit may claim
    RuntimeError,  # and of a password
    zlib.error,
    struct.error,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_LOCAL_HEADER = struct.Struct("<26x2H")
"""Records of a zip file, as its specification (APPNOTE 6.3.10, 4.3) lays them out."""

_UTF8 = 0x800
"""The one flag of a member that we write: its name is UTF-8."""


def write_bundle(
    source: Objects, file: Path, about: Mapping[str, Any], *, checksums: bool = True
) -> int:
    """Write a store as one file, whole or not at all; its size in bytes.

    A device or a pipe is written through. The manifest holds the SHA-256 of every file, beside
    what `about` says.

    Raises:
        AlreadyExistsError: there is such a file.
        SchemaError: it would be larger than a bundle may be.
        StorageError: no permission, or no room.
    """
    if is_special(file):
        return _write_through(source, file, about, checksums=checksums)
    if file.exists() or file.is_symlink():
        raise AlreadyExistsError(f"{file} is there already", remedy="another file name")
    hashes: dict[str, str] = {}
    try:
        with appearing(file) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            files = list(files_of(source, checksums))
            limits.require("bundle_files", len(files), f"the memory in {file}")
            for path, pieces in in_order(source, files, checksums):
                hashes[path] = _put(archive, path, pieces)
            said = {"bundle_schema": BUNDLE_SCHEMA, **about, "files": hashes}
            text = json.dumps(said, indent=1, sort_keys=True).encode()
            limits.require("text_bytes", len(text), f"the list of files in {file}")
            _put(archive, MANIFEST, (text,))
    except OSError as error:
        raise of_os_error(error, "write the bundle", str(file.parent)) from error
    return file.stat().st_size


def _write_through(
    source: Objects, file: Path, about: Mapping[str, Any], *, checksums: bool
) -> int:
    """By way of a file: what cannot be sought in would get members of another kind."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "bundle"
            nbytes = write_bundle(source, whole, about, checksums=checksums)
            with whole.open("rb") as made, appearing(file) as out:
                shutil.copyfileobj(made, out, PIECE_BYTES)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise of_os_error(error, "write the bundle", str(file)) from error
    return nbytes


def _put(archive: zipfile.ZipFile, path: str, pieces: Iterable[bytes]) -> str:
    """Write one member; the hash of its bytes."""
    # The same bytes for the same store, whenever the bundle is made.
    entry = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
    digest = hashlib.sha256()
    with archive.open(entry, "w", force_zip64=True) as member:
        for piece in pieces:
            digest.update(piece)
            member.write(piece)
    return digest.hexdigest()


def read_bundle(
    file: Path, target: Objects, tell: Tell | None = None, *, checksums: bool = True
) -> dict[str, Any]:
    """Copy a bundle into an empty place, every file checked; what its manifest says.

    Raises:
        IntegrityError: the bundle is cut short or damaged; it names the file inside.
        SchemaError: it is no bundle, larger than one may be, or a newer memtool made it.
        StorageError: it cannot be read.
    """
    with _opened(file) as archive:
        with _reading(file):
            members = _members(archive, file)
        said = _manifest(archive, members, file)
        hashes: dict[str, str] = said["files"]
        # References come last here, too.
        paths = sorted(hashes, key=lambda path: (path.startswith(REFERENCES), path))
        for number, path in enumerate(paths, start=1):
            pieces = _checked(archive, members[path], hashes[path], file)
            if belongs(path, checksums):
                target.write_pieces(path, pieces)
            else:
                for _ in pieces:
                    pass
            if tell is not None:
                tell(number, len(paths))
    return said


def _checked(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, expected: str, file: Path
) -> Iterator[bytes]:
    """The bytes of a member, some at a time; behind them an error if they are not the written."""
    digest = hashlib.sha256()
    try:
        with archive.open(member) as stream:
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
                yield piece
    except _UNREADABLE as error:
        raise _damaged(file, member.filename, f"sha256 {expected}", str(error)) from error
    except OSError as error:
        raise of_os_error(error, "read the bundle", str(file)) from error
    if digest.hexdigest() != expected:
        raise _damaged(file, member.filename, f"sha256 {expected}", digest.hexdigest())


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    if file.exists() and not file.is_file():
        raise SchemaError(f"{file} is no bundle of memtool: it is no ordinary file")
    with _reading(file):
        stream = file.open("rb")
    with stream:
        with _reading(file):
            _require_small_directory(stream, file)
            archive = zipfile.ZipFile(stream)
        with archive:
            yield archive


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of the system and of zipfile inside the block, as errors of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"no bundle {file}") from error
    except OSError as error:
        raise of_os_error(error, "read the bundle", str(file)) from error
    except _UNREADABLE as error:
        raise IntegrityError(
            what="bundle",
            name=str(file),
            expected="a whole file, as memtool export --bundle wrote it",
            found=str(error),
            remedy="copy the bundle again",
        ) from error


def _require_small_directory(stream: BinaryIO, file: Path) -> None:
    """Nothing, when the list of members at the end is no larger than one may be: it is read whole.

    Raises:
        SchemaError: it is larger.
        zipfile.BadZipFile: there is no end as we write it.
    """
    size = stream.seek(0, 2)
    stream.seek(max(0, size - _END.size - _LOCATOR64.size - _END64.size))
    tail = stream.read()
    end = tail[-_END.size :]
    if len(end) < _END.size or not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):
        raise zipfile.BadZipFile("there is no end of a zip file without a comment")
    directory = _END.unpack(end)[5]
    before = tail[: -_END.size]
    if before[-_LOCATOR64.size :].startswith(b"PK\6\7") and before.startswith(b"PK\6\6"):
        directory = _END64.unpack_from(before)[8]
    limits.require("text_bytes", directory, f"the list of members in {file}")
    if directory > size:
        raise zipfile.BadZipFile("the list of members is longer than the file")


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The members by their path, when all of them are as we write them."""
    entries = archive.infolist()
    limits.require("bundle_files", len(entries), f"members of {file}")
    members: dict[str, zipfile.ZipInfo] = {}
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        path, kind = entry.filename, stat.S_IFMT(entry.external_attr >> 16)
        try:
            check_path(entry.orig_filename, "a file of a store")
        except SchemaError as error:
            raise _hostile(file, path, "the path of a file of a store", "that path") from error
        if entry.orig_filename != path:
            raise _hostile(file, path, "one name", f"also {shown(entry.orig_filename)}")
        if path in members:
            raise _hostile(file, path, "one member of that path", "two")
        if kind not in {0, stat.S_IFREG}:
            raise _hostile(file, path, "an ordinary file", "a link or a special file")
        if entry.flag_bits & ~_UTF8:
            raise _hostile(file, path, "no encryption", f"flags {entry.flag_bits:#x}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _hostile(file, path, "a file as it lies", "one that has to be unpacked")
        if entry.header_offset < free:
            raise _hostile(file, path, f"a place from byte {free:,} on", f"{entry.header_offset:,}")
        free = _data_offset(archive, entry) + entry.file_size
        members[path] = entry
    if free > archive.start_dir:
        raise _hostile(file, path, f"an end before byte {archive.start_dir:,}", f"{free:,}")
    return members


def _data_offset(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: behind its own header, whose length only that says."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise zipfile.BadZipFile(f"the header of {entry.filename} is cut short")
    return entry.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header))


def _manifest(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], file: Path
) -> dict[str, Any]:
    """What the manifest says; `files` is the hash of every other member by its path."""
    if MANIFEST not in members:
        raise _no_bundle(file, f"there is no {MANIFEST} in it")
    limits.require("text_bytes", members[MANIFEST].file_size, f"{MANIFEST} in {file}")
    try:
        said = json.loads(archive.read(MANIFEST))
    except OSError as error:
        raise of_os_error(error, "read the bundle", str(file)) from error
    except _UNREADABLE as error:
        raise _no_bundle(file, f"{MANIFEST}: {error}") from error
    if not isinstance(said, dict):
        raise _no_bundle(file, f"{MANIFEST} holds no object")
    schema, hashes = said.get("bundle_schema"), said.get("files")
    if type(schema) is not int or schema < 1:
        raise _no_bundle(file, f"bundle_schema is {shown(schema)}, no number from 1 on")
    if schema > BUNDLE_SCHEMA:
        raise SchemaError(
            f"{file} is a bundle of schema {shown(schema)}, made by a newer memtool",
            expected=f"at most {BUNDLE_SCHEMA}",
            remedy="pip install --upgrade memtool",
        )
    if not isinstance(hashes, dict):
        raise _no_bundle(file, f"files is {shown(hashes)}, no object")
    if "store_id" in said:
        check_id(said["store_id"], f"the store in {file}")
    for path, digest in hashes.items():
        if not belongs(path, True):
            raise _hostile(file, path, "a file of a store", "a path outside of it")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _no_bundle(file, f"the hash of {shown(path)} is {shown(digest)}, no sha256")
    for path in sorted(hashes.keys() ^ (members.keys() - {MANIFEST})):
        listed = path in hashes
        places = ("in the manifest only", "a member, too") if listed else ("no member", "a member")
        raise _hostile(file, path, *reversed(places))
    if not any(path.startswith(REFERENCES) for path in hashes):
        raise SchemaError(f"{file} holds no store")
    return said


def _no_bundle(file: Path, why: str) -> SchemaError:
    return SchemaError(
        f"{file} is no bundle of memtool: {why}",
        expected=f"a file with {MANIFEST} in it, as memtool export --bundle writes it",
    )


def _damaged(file: Path, path: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        what="bundle",
        name=f"{file}: {path}",
        expected=expected,
        found=found,
        remedy="copy the bundle again",
    )


def _hostile(file: Path, path: str, expected: str, found: str) -> IntegrityError:
    """What no bundle of ours has: damage, or made to do harm."""
    return IntegrityError(
        what="bundle",
        name=f"{file}: {shown(path)}",
        expected=expected,
        found=found,
        remedy="copy the bundle again, from whom you trust",
    )
