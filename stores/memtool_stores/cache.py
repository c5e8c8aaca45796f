"""The derived cache: all live values of a version in one memory-mapped file.

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
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memtool_stores.catalog import AdapterRecord
from memtool_stores.errors import IntegrityError
from memtool_stores.space import Space
from memtool_stores.tree import Array, numpy_dtype, sha256

KEEP_FILES = 4
"""Files of one store that stay when a new one is built."""

ROWS_PER_READ = 256

_log = logging.getLogger(__name__)


def folder(store_id: str) -> Path:
    """Where the files of one store lie: under $MEMTOOL_CACHE, else the user's cache folder."""
    given = os.environ.get("MEMTOOL_CACHE")
    if given:
        return Path(given) / "stores" / store_id
    import platformdirs

    return Path(platformdirs.user_cache_dir("memtool")) / "stores" / store_id


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
    """The values of the given adapters of one version, (t, numel), in their order."""

    def __init__(
        self,
        read: Callable[[int, int], Array],
        store_id: str,
        space: Space,
        records: Sequence[AdapterRecord],
    ) -> None:
        # read(first, last) gives those rows from the store.
        self._read_store = read
        self._space = space
        self._records = tuple(records)
        self._folder = folder(store_id)
        self._digests = _prefix_digests(self._records)
        mapped = self._map()
        self._array = self._build() if mapped is None else mapped
        self._known_good = np.zeros(len(self._records), dtype=bool)

    @property
    def path(self) -> Path:
        """The file of these values."""
        return self._folder / f"{self._digests[-1]}.values"

    def rows(self, positions: Sequence[int] | None = None) -> Array:
        """The rows at these positions, read-only; all of them, without a copy, for None.

        Raises:
            IntegrityError: the store itself holds other bytes than were written.
        """
        wanted = range(len(self._records)) if positions is None else positions
        for position in wanted:
            if not self._known_good[position]:
                if sha256(self._array[position]) != self._records[position].sha256:
                    _log.warning("%s holds a wrong row; building it again", self.path)
                    self._array = self._build(from_older=False)
                    self._known_good[:] = False
                    checked(self._array[position], self._records[position])
                self._known_good[position] = True
        if positions is None:
            return self._array
        rows = self._array[np.asarray(positions, dtype=np.intp)]
        rows.flags.writeable = False
        return rows

    def _map(self) -> Array | None:
        """The file as an array, or None where there is none of the right size."""
        shape = (len(self._records), self._space.numel)
        if not self._records:
            return np.empty(shape, numpy_dtype(self._space.layout))
        try:
            if self.path.stat().st_size != len(self._records) * self._space.layout.nbytes:
                return None
            mapped = np.memmap(self.path, numpy_dtype(self._space.layout), "r", shape=shape)
        except OSError:
            return None
        return mapped.view(np.ndarray)

    def _build(self, *, from_older: bool = True) -> Array:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
        except OSError as error:
            _log.warning("no cache in %s (%s): values are read into memory", self._folder, error)
            return self._read(0)
        part = Path(name)
        try:
            with os.fdopen(handle, "r+b") as file:
                done = self._copy_older(file) if from_older else 0
                for first, rows in self._blocks(done):
                    file.seek(first * self._space.layout.nbytes)
                    file.write(rows.data)
            part.replace(self.path)
            self._prune()
            array = self._map()
        except OSError as error:
            _log.warning("no cache in %s (%s): values are read into memory", self._folder, error)
            return self._read(0)
        finally:
            part.unlink(missing_ok=True)
        return self._read(0) if array is None else array

    def _read(self, first: int) -> Array:
        blocks = [rows for _, rows in self._blocks(first)]
        array = np.concatenate(blocks)
        array.flags.writeable = False
        return array

    def _blocks(self, first: int) -> Iterator[tuple[int, Array]]:
        """Position and checked rows from position `first` on, some hundred at a time."""
        for begin in range(first, len(self._records), ROWS_PER_READ):
            records = self._records[begin : begin + ROWS_PER_READ]
            origin = records[0].row
            block = self._read_store(origin, records[-1].row + 1)
            rows = np.ascontiguousarray(block[[record.row - origin for record in records]])
            for row, record in zip(rows, records, strict=True):
                checked(row, record)
            yield begin, rows

    def _copy_older(self, file: Any) -> int:
        """Begin with the longest older file that holds our first rows; how many those are."""
        positions = {f"{digest}.values": t for t, digest in enumerate(self._digests)}
        with contextlib.suppress(OSError):
            names = {entry.name for entry in os.scandir(self._folder)}
            done = max((t for name, t in positions.items() if name in names), default=0)
            older = self._folder / f"{self._digests[done]}.values"
            if done and older.stat().st_size == done * self._space.layout.nbytes:
                with older.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
                return done
        file.seek(0)
        file.truncate()
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
