"""Data sets decoded once into uint8 arrays on disk.

An entry of the cache is a folder, `<name>-<size>px-<key>`, with images.npy (rows, size, size, 3),
rows.npz (labels, domains, is_test, content) and header.json, which is sealed and has the checksums
of both. Its key covers what the source's files look like from outside (names, sizes, times), so a
warm opening reads no image file and imports no reader. Writing happens beside the entry, under a
lock, and ends with a rename: other processes see a whole entry or none. An entry that is not what
was written is built again. Only its owner may read it: it holds training data.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool import sealed
from memtool.atomic import write_atomic
from memtool.errors import BusyError, CorruptError
from memtool.outside import unreadable
from memtool.streams.images import decode_square, quiet_decoders
from memtool.streams.listing import Listing, Source
from memtool.streams.ordering import random_ranks
from memtool.streams.stored import StoredImages, block_rows
from memtool.streams.table import Table, cache_error, cache_folder
from memtool_stores.errors import SchemaError
from memtool_stores.files import is_part, part_folder
from memtool_stores.printable import printable

_FORMAT = 3
_CHUNK_ROWS = 256
_IN_MEMORY_BYTES = 512 * 1024**2  # images up to this size are read whole
_SAID_SECONDS = 30
_STALLED_SECONDS = 300  # a builder that has written nothing for so long has stopped
_FETCHING_SECONDS = 3600  # before its first image it may be fetching the data

_log = logging.getLogger(__name__)


def open_cached(source: Source, image_size: int) -> Table:
    """The decoded rows of `source`: from the cache, or decoded now and kept there.

    Rows are ordered by split, then by domain, and shuffled once within, so that a domain is one
    contiguous view and any leading part of it a fair sample. Raises DataError for an image that
    cannot be decoded (with its file or row) and for a cache that cannot be written.
    """
    name = re.sub(r"[^\w.-]+", "_", source.name)
    key = hashlib.sha256(f"{_FORMAT}/{source.key}".encode()).hexdigest()[:20]
    entry = cache_folder() / "images" / f"{name}-{image_size}px-{key}"
    table = _read(entry, source.name, image_size)
    if table is not None:
        return table

    try:
        # Whoever made the folder decides who may look; each entry is private on its own.
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(entry, source.name):
            # Another process may have finished the same entry while this one waited.
            table = _read(entry, source.name, image_size)
            if table is None:
                _build(entry, source, image_size)
                table = _read(entry, source.name, image_size)
    except OSError as error:
        raise cache_error(error) from error
    if table is None:
        raise cache_error(OSError(f"{entry} does not hold what was just written"))
    return table


@contextmanager
def _alone(entry: Path, name: str) -> Iterator[None]:
    """Hold the lock of an entry; wait for another process only as long as it writes."""
    from filelock import FileLock, Timeout

    lock = FileLock(entry.with_name(f"{entry.name}.lock"))
    begin = moved = time.monotonic()
    written: int | None = None
    said = False
    while True:
        try:
            lock.acquire(timeout=min(1, _SAID_SECONDS))
            break
        except Timeout as error:
            waited, size = time.monotonic() - begin, _written(entry)
            if size != written:
                written, moved = size, time.monotonic()
            if waited > _SAID_SECONDS and not said:
                said = True
                _log.warning("waiting for another process that decodes the images of %s", name)
            patience = _FETCHING_SECONDS if size is None else _STALLED_SECONDS
            if time.monotonic() - moved > patience:
                raise BusyError(
                    f"another process decodes the images of {name} into {entry}, and has written "
                    f"nothing for {patience} seconds",
                    expected="a process that goes on, or ends",
                    remedy="end it (fuser names it: fuser "
                    f"{lock.lock_file}), or another cache with MEMTOOL_CACHE",
                ) from error
    try:
        yield
    finally:
        lock.release()


def _written(entry: Path) -> int | None:
    """Bytes of images that a builder has written so far; None before the first."""
    sizes = []
    for building in _in_the_making(entry):
        with suppress(OSError):
            sizes.append((building / "images.npy").stat().st_size)
    return max(sizes, default=None)


def _in_the_making(entry: Path) -> list[Path]:
    """The folder that becomes an entry, and those that killed builders left."""
    return [path for path in entry.parent.glob(f".{entry.name}.*") if is_part(path.name)]


def _read(entry: Path, name: str, image_size: int) -> Table | None:
    """The table in a folder of the cache, or None where it is absent or not what was written.

    MemtoolError where the system refuses to read it: that is no damage.
    """
    if not (entry / "header.json").exists():
        return None
    try:
        document = sealed.read_json(entry / "header.json")
        header = document.content
        if not document.sealed or header["format"] != _FORMAT:
            raise ValueError("its header has no checksum")
        data = sealed.read_file(entry / "rows.npz")
        if hashlib.sha256(data).hexdigest() != header["rows_sha256"]:
            raise ValueError("rows.npz is not what was written")
        with np.load(io.BytesIO(data)) as rows:
            labels, domains, is_test = rows["labels"], rows["domains"], rows["is_test"]
            content = rows["content"]
        shape = (len(labels), image_size, image_size, 3)
        if list(shape) != header["shape"]:
            raise ValueError("its header does not fit its arrays")
        stored = StoredImages(entry / "images.npy", shape, header["crc32"])
        return Table(
            name=name,
            images=stored.all() if stored.nbytes <= _IN_MEMORY_BYTES else stored,
            labels=labels,
            domains=domains if header["domain_names"] else None,
            is_test=is_test,
            class_names=tuple(header["class_names"]),
            domain_names=tuple(header["domain_names"]),
            fingerprint=header["fingerprint"],
            content=content,
            notes=tuple(header["notes"]),
        )
    except (CorruptError, SchemaError) as error:
        reason = error.message
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        reason = str(error)
    except OSError as error:
        raise unreadable(Path(error.filename or entry), error) from error
    except (ValueError, KeyError) as error:
        reason = str(error)
    _log.warning(
        "the cache entry %s is broken and will be built again: %s",
        printable(entry.name),
        printable(reason),
    )
    return None


def _build(entry: Path, source: Source, image_size: int) -> None:
    """Decode every image of `source` into `entry`. The caller holds the lock of `entry`."""
    # Left by processes that were killed; the lock says that nobody works on them.
    for left in _in_the_making(entry):
        shutil.rmtree(left, ignore_errors=True)
    building = part_folder(entry)
    try:
        with source.open() as listing:
            _log.info("decoding %d images of %s", len(listing.labels), source.name)
            _write(building, listing, image_size)
        if entry.exists():
            # A broken entry. Whoever has its files open keeps them.
            shutil.rmtree(entry)
        building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(folder: Path, listing: Listing, image_size: int) -> None:
    count = len(listing.labels)
    domains = listing.domains if listing.domains is not None else np.zeros(count, np.int64)
    order = np.lexsort((random_ranks(count, "table", 0), domains, listing.is_test))
    labels, domains, is_test = listing.labels[order], domains[order], listing.is_test[order]
    shape = (count, image_size, image_size, 3)
    fingerprint = hashlib.sha256()
    content = np.empty(count, np.uint64)
    checksums: list[int] = []
    rest = bytearray()
    block = block_rows(shape) * image_size**2 * 3

    with (
        (folder / "images.npy").open("wb") as file,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        quiet_decoders(),
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )

        def decode(row: int, encoded: bytes) -> npt.NDArray[np.uint8]:
            return decode_square(encoded, image_size, listing.where(row))

        for start in range(0, count, _CHUNK_ROWS):
            rows = order[start : start + _CHUNK_ROWS].tolist()
            encoded = listing.encoded(rows)
            for data in encoded:
                fingerprint.update(hashlib.sha256(data).digest())
            for place, square in enumerate(pool.map(decode, rows, encoded), start):
                pixels = square.tobytes()
                content[place] = int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little")
                file.write(pixels)
                rest += pixels
                if len(rest) == block:
                    checksums.append(zlib.crc32(rest))
                    rest.clear()
        if rest:
            checksums.append(zlib.crc32(rest))
        file.flush()
        os.fsync(file.fileno())

    rows_file = io.BytesIO()
    np.savez(rows_file, labels=labels, domains=domains, is_test=is_test, content=content)
    write_atomic(folder / "rows.npz", rows_file.getvalue())
    names = json.dumps([listing.class_names, listing.domain_names])
    fingerprint.update(f"{_rows_hash(labels, domains, is_test)}/{names}".encode())
    header = {
        "format": _FORMAT,
        "shape": shape,
        "rows_sha256": hashlib.sha256(rows_file.getvalue()).hexdigest(),
        "crc32": checksums,
        "class_names": listing.class_names,
        "domain_names": listing.domain_names,
        "fingerprint": fingerprint.hexdigest(),
        "notes": listing.notes,
    }
    sealed.write_json(folder / "header.json", header)


def _rows_hash(
    labels: npt.NDArray[np.int64],
    domains: npt.NDArray[np.int64],
    is_test: npt.NDArray[np.bool_],
) -> str:
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    digest.update(domains.astype("<i8").tobytes())
    digest.update(is_test.astype("u1").tobytes())
    return digest.hexdigest()
