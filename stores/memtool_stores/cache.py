"""The derived cache: all live values of a version in one memory-mapped file, tensor by tensor.

What retrieval reads is one tensor of all adapters, so that is what lies together: the file has a
block (t, *shape) for every segment of the layout, in its order. A row is in as many pieces.

It holds nothing of its own: a file is named by the hash of the hashes of its rows, every row is
checked against the catalog the first time this process hands it out, and a wrong or missing file is
built again from the store. Versions with the same adapters share one file, and a version that only
adds some begins with a copy of the older file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool_stores.catalog import AdapterRecord
from memtool_stores.errors import IntegrityError
from memtool_stores.ice import of_os_error
from memtool_stores.names import below, check_id
from memtool_stores.space import Segment, Space
from memtool_stores.tree import Array, numpy_dtype, sha256

KEEP_FILES = 4
"""Files of one store that stay when a new one is built."""

ROWS_PER_READ = 256

ROWS_PER_CHECK = 16
"""Rows that are put together to compare their hashes: few enough to stay in the processor."""

_log = logging.getLogger(__name__)


def folder(store_id: str) -> Path:
    """Where the files of one store lie: under $MEMTOOL_CACHE, else the user's cache folder.

    Raises:
        SchemaError: that is no id of a store, or its folder is a link to elsewhere.
    """
    check_id(store_id, "a store")
    given = os.environ.get("MEMTOOL_CACHE")
    if given:
        return below(Path(given) / "stores", store_id)
    import platformdirs

    return below(Path(platformdirs.user_cache_dir("memtool")) / "stores", store_id)


def drop(store_id: str) -> None:
    """Delete the files of one store: of a purged row, no copy may stay here.

    A process that has one mapped keeps reading it; its bytes go when the last of those lets go.

    Raises:
        StorageError: a file could not be deleted.
    """
    place = folder(store_id)
    try:
        for path in (*place.glob("*.values"), *place.glob("*.part")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise of_os_error(error, "delete the cached values", str(place)) from error


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


class ValueCache:
    """The values of the given t adapters of one version, in their order."""

    def __init__(
        self,
        read: Callable[[Sequence[int]], Array],
        store_id: str,
        space: Space,
        records: Sequence[AdapterRecord],
    ) -> None:
        # read(rows) gives those rows from the store.
        self._read_store = read
        self._space = space
        self._records = tuple(records)
        self._folder = folder(store_id)
        self._digests = _prefix_digests(self._records)
        mapped = self._map()
        self._tensors = self._split(self._build() if mapped is None else mapped)
        self._known_good = np.zeros(len(self._records), dtype=bool)

    @property
    def path(self) -> Path:
        """The file of these values."""
        return self._folder / f"{self._digests[-1]}.values"

    def rows(self, positions: Sequence[int] | None = None) -> Array:
        """A copy of the rows at these positions, (n, numel), read-only; of all of them for None.

        Raises:
            IntegrityError: the store itself holds other bytes than were written.
        """
        wanted = np.arange(len(self._records)) if positions is None else np.asarray(positions, int)
        rows = self._gather(wanted)
        if not self._are_right(rows, wanted):
            _log.warning("%s holds a wrong row; building it again", self.path)
            self._tensors = self._split(self._build(from_older=False))
            self._known_good[:] = False
            rows = self._gather(wanted)
            for row, position in zip(rows, wanted, strict=True):
                checked(row, self._records[position])
        self._known_good[wanted] = True
        rows.flags.writeable = False
        return rows

    def tensor(self, segment: Segment) -> Array:
        """One tensor of all rows, (t, *shape), read-only and without a copy.

        Raises:
            IntegrityError: the store itself holds other bytes than were written.
        """
        count = len(self._records)
        if not self._known_good.all():
            for first in range(0, count, ROWS_PER_CHECK):
                self.rows(range(first, min(first + ROWS_PER_CHECK, count)))
        return self._tensors[segment.name].reshape(count, *segment.shape)

    def _gather(self, positions: npt.NDArray[np.intp]) -> Array:
        tensors = self._tensors.values()
        return np.concatenate([tensor.take(positions, axis=0) for tensor in tensors], axis=1)

    def _are_right(self, rows: Array, positions: npt.NDArray[np.intp]) -> bool:
        """Whether those of the rows whose hash was not compared before have the right one."""
        return all(
            sha256(rows[place]) == self._records[positions[place]].sha256
            for place in np.flatnonzero(~self._known_good[positions])
        )

    def _split(self, array: Array) -> dict[str, Array]:
        """The block of every segment by its name, (t, numel of it), in the array of the file."""
        count = len(self._records)
        return {
            s.name: array[count * s.offset :][: count * s.numel].reshape(count, s.numel)
            for s in self._space.layout.segments
        }

    def _map(self) -> Array | None:
        """The file as an array, (t * numel,), or None where there is none of the right size."""
        dtype, size = numpy_dtype(self._space.layout), len(self._records) * self._space.numel
        if not size:
            return np.empty(0, dtype)
        try:
            if self.path.stat().st_size != size * dtype.itemsize:
                return None
            mapped = np.memmap(self.path, dtype, "r", shape=(size,))
        except OSError:
            return None
        return mapped.view(np.ndarray)

    def _build(self, *, from_older: bool = True) -> Array:
        """The file made anew; by one process at a time, the others wait and map what it made."""
        import filelock

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self._folder / "lock"):
                made = self._map() if from_older else None
                return self._build_alone(from_older=from_older) if made is None else made
        except OSError as error:
            _log.warning("no cache in %s (%s): values are read into memory", self._folder, error)
            return self._read()

    def _build_alone(self, *, from_older: bool) -> Array:
        for left in self._folder.glob("*.part"):  # by a builder that was killed
            left.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        part = Path(name)
        try:
            with os.fdopen(handle, "r+b") as file:

                def put(first: int, elements: Array) -> None:
                    file.seek(first * elements.itemsize)
                    file.write(np.ascontiguousarray(elements).data)

                self._fill(put, self._copy_older(put) if from_older else 0)
            part.replace(self.path)
            self._prune()
            array = self._map()
        finally:
            part.unlink(missing_ok=True)
        return self._read() if array is None else array

    def _read(self) -> Array:
        """What the file would hold, in memory."""
        array = np.empty(len(self._records) * self._space.numel, numpy_dtype(self._space.layout))

        def put(first: int, elements: Array) -> None:
            array[first : first + elements.size] = elements.ravel()

        self._fill(put, 0)
        array.flags.writeable = False
        return array

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
        positions = {f"{digest}.values": t for t, digest in enumerate(self._digests)}
        layout = self._space.layout
        with contextlib.suppress(OSError):
            names = {entry.name for entry in os.scandir(self._folder)}
            done = max((t for name, t in positions.items() if name in names), default=0)
            older = self._folder / f"{self._digests[done]}.values"
            if done and older.stat().st_size == done * layout.nbytes:
                mapped = np.memmap(older, numpy_dtype(layout), "r")
                for segment in layout.segments:
                    block = mapped[done * segment.offset :][: done * segment.numel]
                    put(len(self._records) * segment.offset, block)
                return done
        return 0

    def _prune(self) -> None:
        """Delete all but the newest files of this store; a mapped file stays readable."""
        files = sorted(self._folder.glob("*.values"), key=lambda p: p.stat().st_mtime_ns)
        for old in files[:-KEEP_FILES]:
            with contextlib.suppress(OSError):
                old.unlink()


def _prefix_digests(records: Sequence[AdapterRecord]) -> list[str]:
    """Hash of the hashes of the first 0, 1, …, t rows."""
    running = hashlib.sha256()
    digests = [running.hexdigest()]
    for record in records:
        running.update(bytes.fromhex(record.sha256))
        digests.append(running.hexdigest())
    return digests
