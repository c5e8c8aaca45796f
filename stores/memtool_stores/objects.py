"""The files of a store, looked at directly: a directory, or an object store under a prefix.

icechunk reads and writes what it knows of. To copy a store, to size what gc would free, or to prove
that bytes are gone, every file counts, known or not.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from memtool_stores.errors import MemtoolError, NotFoundError, StorageError
from memtool_stores.files import appearing
from memtool_stores.ice import of_os_error
from memtool_stores.names import below
from memtool_stores.redacted import HIDDEN

CONNECT_TIMEOUT = "3s"
ANSWER_TIMEOUT = "60s"
FIRST_ANSWER_TIMEOUT = "10s"
WHOLE_TIMEOUT = "1h"
RETRIES = 5
PIECE_BYTES = 1024 * 1024
"""How much of a file is in memory while it is copied."""

_MD5 = re.compile(r'"([0-9a-f]{32})"')


@dataclass(frozen=True)
class ObjectInfo:
    """One file: its path from the root of the store with `/`, its size, when it was written.

    `md5` is what an object store tells of most of its objects, for some encrypted ones wrongly.
    """

    path: str
    nbytes: int
    modified: datetime
    md5: str | None = None


class Objects(Protocol):
    """All files of a store. Paths are relative and use `/`; errors are StorageError."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every file whose path is `prefix` or lies under it, in no order."""

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises NotFoundError."""

    def pieces(self, path: str) -> Iterator[bytes]:
        """The bytes of a file, some at a time. Raises NotFoundError."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all, in the place of an older one."""

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """As `write`, some bytes at a time; an error of `pieces` leaves what was there."""

    def delete(self, path: str) -> None:
        """Take a file away; one that is not there is gone already."""


def objects_at(url: str) -> Objects:
    """The files of the store at a directory or `s3://bucket/prefix`."""
    if url.startswith("s3://"):
        return _Bucket(url, ANSWER_TIMEOUT)
    return _Directory(Path(url))


def write_new(url: str, path: str, data: bytes) -> None:
    """Write a file of `s3://bucket/…`, unless there is one already, which then stays.

    Raises:
        StorageError: no answer.
    """
    _Bucket(url, ANSWER_TIMEOUT).write_new(path, data)


def bucket_holds(url: str, prefix: str) -> bool:
    """Whether there is any file under `prefix` of `s3://bucket/…`; soon told when nobody answers.

    Raises:
        NotFoundError: no such bucket.
        StorageError: no credentials, or no answer.
    """
    return any(True for _ in _Bucket(url, FIRST_ANSWER_TIMEOUT).list(prefix))


class Retractable:
    """The files of a new place, where what was written can be taken back."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._written: list[str] = []

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Objects."""
        return self._objects.list(prefix)

    def read(self, path: str) -> bytes:
        """See Objects."""
        return self._objects.read(path)

    def pieces(self, path: str) -> Iterator[bytes]:
        """See Objects."""
        return self._objects.pieces(path)

    def write(self, path: str, data: bytes) -> None:
        """See Objects."""
        self._written.append(path)
        self._objects.write(path, data)

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """See Objects."""
        self._written.append(path)
        self._objects.write_pieces(path, pieces)

    def delete(self, path: str) -> None:
        """See Objects."""
        self._objects.delete(path)

    def take_back(self, prefix: str = "") -> None:
        """Delete what was written under `prefix`, the last first: references before the rest.

        What cannot be deleted is left, and the others are deleted nevertheless.
        """
        for path in reversed(self._written):
            if path.startswith(prefix):
                with contextlib.suppress(StorageError):
                    self._objects.delete(path)
        self._written.clear()


class _Directory:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, Path] = {}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Objects."""
        start = self._root / prefix
        if start.is_file():
            yield _info(prefix, start.stat())
        waiting = [prefix.rstrip("/")] if start.is_dir() else []
        while waiting:
            # A file or folder may go while we look: gc and other writers are allowed to. A folder
            # that may not be read is left out, as by pathlib.
            folder = waiting.pop()
            with contextlib.suppress(FileNotFoundError, PermissionError):
                # Not by pathlib, which takes ten times as long for as many as there can be.
                for entry in os.scandir(self._root / folder):
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file():
                            yield _info(path, entry.stat())

    def read(self, path: str) -> bytes:
        """See Objects."""
        with self._reading(path):
            return self._path(path).read_bytes()

    def pieces(self, path: str) -> Iterator[bytes]:
        """See Objects."""
        with self._reading(path), self._path(path).open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"no file {path} in {self._root}") from error
        except OSError as error:
            raise of_os_error(error, f"read {path}", str(self._root)) from error

    def write(self, path: str, data: bytes) -> None:
        """See Objects."""
        self.write_pieces(path, (data,))

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """See Objects."""
        target = self._path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A copy of a store is brought to the disk when all of it is there.
            with appearing(target, flushed=False) as file:
                for piece in pieces:
                    file.write(piece)
        except OSError as error:
            raise of_os_error(error, f"write {path}", str(self._root)) from error

    def delete(self, path: str) -> None:
        """See Objects."""
        try:
            self._path(path).unlink(missing_ok=True)
        except OSError as error:
            raise of_os_error(error, f"delete {path}", str(self._root)) from error

    def _path(self, path: str) -> Path:
        """Inside the root; that a folder is, is looked at once: links are followed slowly."""
        *folders, name = path.split("/")
        folder = self._folders.get("/".join(folders))
        if folder is None:
            folder = self._folders["/".join(folders)] = below(self._root, *folders)
        plain = name not in {"", ".", ".."} and not (folder / name).is_symlink()
        return folder / name if plain else below(folder, name)


def _info(path: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))


class _Bucket:
    def __init__(self, url: str, timeout: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError as error:
            raise StorageError(
                f"{url}: looking at the files of an object store needs obstore",
                remedy="pip install 'memtool[s3]'",
            ) from error
        self._url = url
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = prefix.strip("/")
        # Credentials, region and endpoint come from the AWS_* variables, as for icechunk.
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        if endpoint and not re.match(r"https?://[^/]", endpoint):
            # What stands before an @ may be a password, also where no scheme says so.
            before, at, host = endpoint.rpartition("@")
            raise StorageError(
                f"AWS_ENDPOINT_URL={HIDDEN if before else ''}{at}{host} is no address",
                expected="http://host:port or https://host",
            )
        with self._answering("look"):
            self._store: Any = S3Store(
                bucket,
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "connect_timeout": CONNECT_TIMEOUT,
                    # Of silence: a large file may take longer as long as it moves.
                    "read_timeout": timeout,
                    "timeout": WHOLE_TIMEOUT,
                },
                retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=5)},
            )

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path) if part)

    @contextlib.contextmanager
    def _answering(self, doing: str) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise self._refusal(doing, str(error)) from error
            raise NotFoundError(f"could not {doing} in {self._url}: it is not there") from error
        except (exceptions.BaseError, OSError) as error:
            raise self._refusal(doing, str(error)) from error

    def _refusal(self, doing: str, said: str) -> MemtoolError:
        """What the object store answered, in our words."""
        bucket = self._url.removeprefix("s3://").partition("/")[0]
        if "NoSuchBucket" in said:
            return NotFoundError(
                f"could not {doing} in {self._url}: there is no bucket {bucket!r}",
                remedy="make the bucket, or name another",
            )
        if re.search(r"redential|AccessDenied|AccessKey|SignatureDoesNotMatch|403 Forbidden", said):
            return StorageError(
                f"could not {doing} in {self._url}: not permitted with the credentials at hand",
                # Files of profiles are not read here.
                remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a profile, "
                "`aws configure export-credentials --format env` prints them",
            )
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or "the endpoint of the region"
        return StorageError(
            f"could not {doing} in {self._url}: no answer from {endpoint}",
            transient=True,
            remedy="check AWS_ENDPOINT_URL and AWS_REGION, then run it again",
        )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Objects."""
        start = len(self._prefix) + 1 if self._prefix else 0
        with self._answering("list the files"):
            for batch in self._store.list(self._key(prefix) or None):
                for entry in batch:
                    md5 = _MD5.fullmatch(entry["e_tag"] or "")
                    yield ObjectInfo(
                        entry["path"][start:],
                        entry["size"],
                        entry["last_modified"],
                        None if md5 is None else md5[1],
                    )

    def read(self, path: str) -> bytes:
        """See Objects."""
        with self._answering(f"read {path}"):
            return bytes(self._store.get(self._key(path)).bytes())

    def pieces(self, path: str) -> Iterator[bytes]:
        """See Objects."""
        with self._answering(f"read {path}"):
            stream = iter(self._store.get(self._key(path)).stream(min_chunk_size=PIECE_BYTES))
        while True:
            with self._answering(f"read {path}"):
                piece = next(stream, None)
            if piece is None:
                return
            yield bytes(piece)

    def write(self, path: str, data: bytes) -> None:
        """See Objects."""
        with self._answering(f"write {path}"):
            self._store.put(self._key(path), data)

    def write_new(self, path: str, data: bytes) -> None:
        """As the function."""
        from obstore import exceptions

        with self._answering(f"write {path}"), contextlib.suppress(exceptions.AlreadyExistsError):
            self._store.put(self._key(path), data, mode="create")

    def write_pieces(self, path: str, pieces: Iterable[bytes]) -> None:
        """See Objects."""
        # Gathered first: the pieces may come from a bucket, which cannot be asked from inside put.
        with tempfile.SpooledTemporaryFile(max_size=PIECE_BYTES) as file:
            try:
                for piece in pieces:
                    file.write(piece)
                file.seek(0)
            except OSError as error:
                raise of_os_error(error, f"write {path}", tempfile.gettempdir()) from error
            with self._answering(f"write {path}"):
                self._store.put(self._key(path), file)

    def delete(self, path: str) -> None:
        """See Objects."""
        with contextlib.suppress(NotFoundError), self._answering(f"delete {path}"):
            self._store.delete(self._key(path))
