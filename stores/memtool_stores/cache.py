"""The derived cache: all live values of a version in one file, tensor by tensor.

What retrieval reads is one tensor of all adapters, so that is what lies together: the file has a
block (t, *shape) for every segment of the layout, in its order. A row is in as many pieces.

It holds nothing of its own: a file is named by the hash of the hashes of its rows, every row is
checked against the catalog the first time this process hands it out, and a wrong or missing file is
built again from the store. Versions with the same adapters share one file, and a version that only
adds some begins with a copy of the older file.

The file is read, never mapped: a mapped file that somebody cuts short kills the process that looks
at it, and no copy, link or mode of it keeps its owner from doing so. Only its owner may read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memtool_stores import caches
from memtool_stores.catalog import AdapterRecord
from memtool_stores.errors import IntegrityError
from memtool_stores.files import PART, is_part, part
from memtool_stores.ice import of_os_error
from memtool_stores.names import below, check_id
from memtool_stores.space import Segment, Space
from memtool_stores.tree import Array, numpy_dtype, sha256

SUFFIX = ".values"

INDEX_SUFFIX = ".index"
"""Of the files in `derived`."""

KEEP_FILES = 4
"""Files of one store that stay when a new one is built."""

ROWS_PER_READ = 256

LOCK_SECONDS = 30.0
"""How long to wait for another process that builds the same file."""

COPIED_ELEMENTS = 1024 * 1024
"""How much of an older file is in memory while it is copied."""

ROWS_PER_CHECK = 16
"""Rows that are put together to compare their hashes: few enough to stay in the processor."""

_log = logging.getLogger(__name__)


def folder(store_id: str) -> Path:
    """Where the files of one store lie: under $MEMTOOL_CACHE, else the user's cache folder.

    Raises:
        SchemaError: that is no id of a store, or its folder is a link to elsewhere.
    """
    check_id(store_id, "a store")
    return below(caches.root() / "stores", store_id)


def drop(store_id: str) -> None:
    """Delete the files of one store: of a purged row, no copy may stay here.

    A process that has one open keeps reading it; its bytes go when the last of those lets go.

    Raises:
        StorageError: a file could not be deleted.
    """
    place = folder(store_id)
    try:
        for path in place.glob("*"):
            if path.suffix in (SUFFIX, INDEX_SUFFIX) or is_part(path.name):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise of_os_error(error, "delete the cached values", str(place)) from error


def make_private(place: Path) -> None:
    """Make the folder of a store's files, for its owner alone: they hold weights."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        # A folder that an older memtool made is open to all.
        place.chmod(0o700)


def prune(place: Path, suffix: str, keep: int) -> None:
    """Delete all but the newest files of a suffix; one that is open stays readable."""
    with contextlib.suppress(OSError):  # another store of the same id drops its files
        files = sorted(place.glob(f"*{suffix}"), key=lambda p: p.stat().st_mtime_ns)
        for old in files[:-keep]:
            old.unlink(missing_ok=True)


def checked(row: Array, record: AdapterRecord) -> Array:
    """The row, when its hash is the one of the catalog.

    Raises:
        IntegrityError: it is not; names the adapter.
    """
    found = sha256(row)
    if found != record.sha256:
        raise IntegrityError(
            what="values", name=record.name, expected=f"sha256 {record.sha256}", found=found
        )
    return row


class _Source(Protocol):
    """Where the bytes of the file are: in it, or in memory, as it would hold them."""

    def read(self, at: int, into: memoryview) -> bool:
        """Fill `into` with the bytes from `at` on; whether there were enough."""

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it since it was opened, or since this was asked last."""


class _Memory:
    def __init__(self, elements: Array) -> None:
        self._bytes = _bytes(elements)

    def read(self, at: int, into: memoryview) -> bool:
        """See _Source."""
        into[:] = self._bytes[at : at + len(into)]
        return True

    def is_unchanged(self) -> bool:
        """See _Source."""
        return True


class _File:
    """A file of the cache. It is held open: what is deleted or replaced can still be read."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """OSError when it is not there, is no ordinary file, or has another size."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._handle = os.open(path, flags)
        weakref.finalize(self, os.close, self._handle)
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
            raise OSError(f"{path} is no file of {nbytes} bytes")
        self._state = self._looks()

    def read(self, at: int, into: memoryview) -> bool:
        """See _Source."""
        wanted = len(into)
        try:
            count = os.preadv(self._handle, [into], at)
            while 0 < count < wanted:  # the system reads no more than 2 GB at once
                more = os.preadv(self._handle, [into[count:]], at + count)
                if not more:
                    return False
                count += more
        except OSError:
            return False
        return count == wanted

    def is_unchanged(self) -> bool:
        """See _Source."""
        before, self._state = self._state, self._looks()
        return self._state == before

    def _looks(self) -> tuple[int, int, int]:
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class ValueCache:
    """The values of the given t adapters of one version, in their order.

    `lock_timeout` is how many seconds it waits for another process that builds the same file.
    """

    def __init__(
        self,
        read: Callable[[Sequence[int]], Array],
        store_id: str,
        space: Space,
        records: Sequence[AdapterRecord],
        *,
        lock_timeout: float = LOCK_SECONDS,
    ) -> None:
        # read(rows) gives those rows from the store.
        self._read_store = read
        self._space = space
        self._dtype = numpy_dtype(space.layout)
        self._records = tuple(records)
        self._folder = folder(store_id)
        self._lock_timeout = lock_timeout
        self._digests = _prefix_digests(self._records)
        size = self._dtype.itemsize
        # Of every segment: the byte where its block begins, and its bytes in a row.
        self._pieces = [
            (len(self._records) * s.offset * size, s.offset * size, (s.offset + s.numel) * size)
            for s in space.layout.segments
        ]
        self._source = self._open() or self._build()
        self._known_good = np.zeros(len(self._records), dtype=bool)

    @property
    def path(self) -> Path:
        """The file of these values."""
        return self._folder / f"{self._digests[-1]}{SUFFIX}"

    def rows(self, positions: Sequence[int] | None = None) -> Array:
        """A copy of the rows at these positions, (n, numel), read-only; of all of them for None.

        Raises:
            IntegrityError: the store itself holds other bytes than were written.
        """
        wanted = np.arange(len(self._records)) if positions is None else np.asarray(positions, int)
        rows = self._gather(wanted)
        if rows is None or not self._are_right(rows, wanted):
            self._build_again()
            rows = self._gather(wanted)
            if rows is None:  # cut again: nobody can cut what is in memory
                self._source = self._read()
                rows = self._gather(wanted)
                assert rows is not None
            for row, position in zip(rows, wanted, strict=True):
                checked(row, self._records[position])
        self._known_good[wanted] = True
        rows.flags.writeable = False
        return rows

    def tensor(self, segment: Segment, out: Array | None = None) -> Array:
        """A copy of one tensor of all rows, (t, *shape): read-only, or in `out`, which is returned.

        `out` is C-contiguous and of the same shape and type.

        Raises:
            IntegrityError: the store itself holds other bytes than were written.
        """
        count = len(self._records)
        found = np.empty((count, *segment.shape), self._dtype) if out is None else out
        if (found.shape, found.dtype) != ((count, *segment.shape), self._dtype) or not (
            found.flags.c_contiguous and found.flags.writeable
        ):
            raise ValueError(
                f"out is {found.dtype} {found.shape}: not a contiguous array of {self._dtype} "
                f"{(count, *segment.shape)} that can be written"
            )
        at, into = count * segment.offset * self._dtype.itemsize, _bytes(found)
        self._check_all()
        if not self._source.read(at, into) or not self._source.is_unchanged():
            self._source = self._read()
            self._source.read(at, into)
        if out is None:
            found.flags.writeable = False
        return found

    def _check_all(self) -> None:
        """Compare all hashes that were not compared since somebody wrote to the file."""
        if not self._source.is_unchanged():
            self._known_good[:] = False
        if not self._known_good.all():
            count = len(self._records)
            for first in range(0, count, ROWS_PER_CHECK):
                self.rows(range(first, min(first + ROWS_PER_CHECK, count)))

    def _gather(self, positions: npt.NDArray[np.intp]) -> Array | None:
        """The rows at these positions, or None where the file has been cut short."""
        rows = np.empty((len(positions), self._space.numel), self._dtype)
        # Rows that follow each other lie together in every block.
        breaks = np.flatnonzero(np.diff(positions) != 1) if len(positions) > 1 else ()
        for begin, end in pairwise([0, *(int(at) + 1 for at in breaks), len(positions)]):
            if begin < end and not self._gather_run(int(positions[begin]), rows[begin:end]):
                return None
        if not self._source.is_unchanged():
            self._known_good[:] = False
        return rows

    def _gather_run(self, first: int, rows: Array) -> bool:
        """Fill rows with those from position `first` on; whether they were there."""
        read, size = self._source.read, self._dtype.itemsize
        if len(rows) == 1:
            into = _bytes(rows)
            for start, begin, end in self._pieces:
                if not read(start + first * (end - begin), into[begin:end]):
                    return False
            return True
        for start, begin, end in self._pieces:
            piece = np.empty((len(rows), (end - begin) // size), self._dtype)
            if not read(start + first * (end - begin), _bytes(piece)):
                return False
            rows[:, begin // size : end // size] = piece
        return True

    def _are_right(self, rows: Array, positions: npt.NDArray[np.intp]) -> bool:
        """Whether those of the rows whose hash was not compared before have the right one."""
        return all(
            sha256(rows[place]) == self._records[positions[place]].sha256
            for place in np.flatnonzero(~self._known_good[positions])
        )

    def _open(self) -> _Source | None:
        """The file, or None where there is none of the right size."""
        size = len(self._records) * self._space.numel
        if not size:
            return _Memory(np.empty(0, self._dtype))
        try:
            return _File(self.path, size * self._dtype.itemsize)
        except OSError:
            return None

    def _build_again(self) -> None:
        _log.warning("%s was cut short or holds a wrong row; building it again", self.path)
        self._source = self._build(from_older=False)
        self._known_good[:] = False

    def _build(self, *, from_older: bool = True) -> _Source:
        """The file made anew; by one process at a time, the others wait and open what it made."""
        import filelock

        try:
            make_private(self._folder)
            with filelock.FileLock(self._folder / "lock", timeout=self._lock_timeout):
                made = self._open() if from_older else None
                return self._build_alone(from_older=from_older) if made is None else made
        except filelock.Timeout:
            _log.warning(
                "another process has held the lock of the cache %s for more than %g seconds: "
                "values are read into memory",
                self._folder,
                self._lock_timeout,
            )
        except OSError as error:
            _log.warning("no cache in %s (%s): values are read into memory", self._folder, error)
        return self._read()

    def _build_alone(self, *, from_older: bool) -> _Source:
        for left in self._folder.glob(f"*{PART}"):  # by a builder that was killed
            left.unlink(missing_ok=True)
        building = part(self.path)
        try:
            with building.open("r+b") as file:

                def put(first: int, elements: Array) -> None:
                    file.seek(first * elements.itemsize)
                    file.write(np.ascontiguousarray(elements).data)

                self._fill(put, self._copy_older(put) if from_older else 0)
            building.replace(self.path)
            prune(self._folder, SUFFIX, KEEP_FILES)
            made = self._open()
        finally:
            building.unlink(missing_ok=True)
        return self._read() if made is None else made

    def _read(self) -> _Source:
        """What the file would hold, in memory."""
        array = np.empty(len(self._records) * self._space.numel, self._dtype)

        def put(first: int, elements: Array) -> None:
            array[first : first + elements.size] = elements.ravel()

        self._fill(put, 0)
        return _Memory(array)

    def _fill(self, put: Callable[[int, Array], None], done: int) -> None:
        """Give `put` the rows from position `done` on: where elements go, and the elements."""
        for first, rows in self._blocks(done):
            for segment in self._space.layout.segments:
                columns = slice(segment.offset, segment.offset + segment.numel)
                at = len(self._records) * segment.offset + first * segment.numel
                put(at, rows[:, columns])

    def _blocks(self, first: int) -> Iterator[tuple[int, Array]]:
        """Position and checked rows from position `first` on, some hundred at a time."""
        for begin in range(first, len(self._records), ROWS_PER_READ):
            records = self._records[begin : begin + ROWS_PER_READ]
            rows = self._read_store([record.row for record in records])
            for row, record in zip(rows, records, strict=True):
                checked(row, record)
            yield begin, rows

    def _copy_older(self, put: Callable[[int, Array], None]) -> int:
        """Begin with the longest older file that holds our first rows; how many those are."""
        positions = {f"{digest}{SUFFIX}": t for t, digest in enumerate(self._digests)}
        layout = self._space.layout
        with contextlib.suppress(OSError):
            names = {entry.name for entry in os.scandir(self._folder)}
            done = max((t for name, t in positions.items() if name in names), default=0)
            if not done:
                return 0
            older = _File(self._folder / f"{self._digests[done]}{SUFFIX}", done * layout.nbytes)
            for segment in layout.segments:
                end = done * (segment.offset + segment.numel)
                for at in range(done * segment.offset, end, COPIED_ELEMENTS):
                    block = np.empty(min(COPIED_ELEMENTS, end - at), self._dtype)
                    if not older.read(at * block.itemsize, _bytes(block)):
                        return 0
                    shift = (len(self._records) - done) * segment.offset
                    put(at + shift, block)
            return done
        return 0


def _bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array, to read or to write."""
    return array.reshape(-1).view(np.uint8).data


def _prefix_digests(records: Sequence[AdapterRecord]) -> list[str]:
    """Hash of the hashes of the first 0, 1, …, t rows."""
    running = hashlib.sha256()
    digests = [running.hexdigest()]
    for record in records:
        running.update(bytes.fromhex(record.sha256))
        digests.append(running.hexdigest())
    return digests
