"""Data sets decoded once into uint8 arrays on disk.

An entry of the cache is a folder, `<name>-<size>px-<key>`, with images.npy (rows, size, size, 3),
rows.npz (labels, domains, is_test, content) and header.json, which is sealed and has the checksums
of both. Its key covers what the source's files look like from outside (names, sizes, times), so a
warm opening reads no image file and imports no reader. Writing happens beside the entry, under a
lock, and ends with a rename: other processes see a whole entry or none. An entry that is not what
was written is built again. Only its owner may read it: it holds training data.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from memtool import sealed
from memtool.atomic import write_atomic
from memtool.errors import BusyError, CorruptError, DataError, MemtoolError, NotFoundError
from memtool.outside import unreadable
from memtool.settings import Crop
from memtool.streams.images import decode_square, quiet_decoders
from memtool.streams.listing import Listing, Source
from memtool.streams.ordering import random_ranks
from memtool.streams.stored import Shape, StoredImages, block_rows
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


def open_cached(
    source: Source, image_size: int, *, crop: Crop = "centre", skip_broken: bool = False
) -> Table:
    """The decoded rows of `source`: from the cache, or decoded now and kept there.

    Images are made square as `crop` says. With `skip_broken` those that cannot be read are left
    out, and the table's notes say so.

    Rows are ordered by split, then by domain, and shuffled once within, so that a domain is one
    contiguous view and any leading part of it a fair sample. Raises DataError for images that
    cannot be decoded, all of them in one (with their files or rows), and for a cache that cannot be
    written.
    """
    name = re.sub(r"[^\w.-]+", "_", source.name)
    how = "" if crop == "centre" else f"/{crop}"
    how += "/whole only" if skip_broken else ""
    key = hashlib.sha256(f"{_FORMAT}/{source.key}{how}".encode()).hexdigest()[:20]
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
                _build(entry, source, _Decoder(source.name, image_size, crop, skip_broken))
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


def _build(entry: Path, source: Source, decoder: _Decoder) -> None:
    """Decode every image of `source` into `entry`. The caller holds the lock of `entry`."""
    # Left by processes that were killed; the lock says that nobody works on them.
    for left in _in_the_making(entry):
        shutil.rmtree(left, ignore_errors=True)
    building = part_folder(entry)
    try:
        with source.open() as listing:
            _log.info("decoding %d images of %s", len(listing.labels), source.name)
            _write(building, listing, decoder)
        if entry.exists():
            # A broken entry. Whoever has its files open keeps them.
            shutil.rmtree(entry)
        building.rename(entry)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@dataclass
class _Decoder:
    """How the images of a data set are decoded, and what is wrong with those that cannot be."""

    name: str
    image_size: int
    crop: Crop
    skip_broken: bool
    broken: list[MemtoolError] = field(default_factory=list)

    def encoded(self, listing: Listing, rows: Sequence[int]) -> list[bytes | MemtoolError]:
        """The bytes of some rows' images, or why there are none."""
        try:
            return list(listing.encoded(rows))
        except (DataError, NotFoundError):
            return [self._one(listing, row) for row in rows]

    def _one(self, listing: Listing, row: int) -> bytes | MemtoolError:
        try:
            return listing.encoded([row])[0]
        except (DataError, NotFoundError) as error:
            return error

    def square(
        self, listing: Listing, row: int, encoded: bytes | MemtoolError
    ) -> npt.NDArray[np.uint8] | MemtoolError:
        """The image of a row, or why there is none."""
        if isinstance(encoded, MemtoolError):
            return encoded
        try:
            return decode_square(encoded, self.image_size, listing.where(row), self.crop)
        except DataError as error:
            return error

    def require_whole(self, count: int) -> list[str]:
        """A sentence on the images that are left out; none for none.

        Raises DataError for those that may not be, and where there are no others.
        """
        broken = self.broken
        if not broken:
            return []
        if (not self.skip_broken and len(broken) == 1) or count == len(broken) == 1:
            raise broken[0]
        some = "; ".join(error.message for error in broken[:BROKEN_SHOWN])
        more = f"; and {len(broken) - BROKEN_SHOWN} more" if len(broken) > BROKEN_SHOWN else ""
        said = f"{self.name}: {len(broken):,} of {count:,} images cannot be read"
        if not self.skip_broken or len(broken) == count:
            raise DataError(
                f"{said}: {some}{more}",
                expected=broken[0].expected,
                remedy="replace or remove them, or --set stream.skip_broken=true for the others",
            )
        return [f"{said} and are left out: {some}{more}"]


BROKEN_SHOWN = 20
"""Images that cannot be read which a message names."""


def _write(folder: Path, listing: Listing, decoder: _Decoder) -> None:
    count, image_size = len(listing.labels), decoder.image_size
    domains = listing.domains if listing.domains is not None else np.zeros(count, np.int64)
    order = np.lexsort((random_ranks(count, "table", 0), domains, listing.is_test))
    fingerprint = hashlib.sha256()
    content: list[int] = []
    checksums: list[int] = []
    rest = bytearray()
    block = block_rows((count, image_size, image_size, 3)) * image_size**2 * 3
    whole: list[int] = []

    with (
        (folder / "images.npy").open("wb") as file,
        ThreadPoolExecutor(max_workers=os.cpu_count()) as pool,
        quiet_decoders(),
    ):
        header_bytes = _write_header(file, (count, image_size, image_size, 3))

        def decode(row: int, encoded: bytes | MemtoolError) -> npt.NDArray[np.uint8] | MemtoolError:
            return decoder.square(listing, row, encoded)

        for start in range(0, count, _CHUNK_ROWS):
            rows = order[start : start + _CHUNK_ROWS].tolist()
            encoded = decoder.encoded(listing, rows)
            squares = pool.map(decode, rows, encoded)
            for row, data, square in zip(rows, encoded, squares, strict=True):
                if isinstance(data, MemtoolError):
                    decoder.broken.append(data)
                    continue
                if isinstance(square, MemtoolError):
                    decoder.broken.append(square)
                    continue
                fingerprint.update(hashlib.sha256(data).digest())
                whole.append(row)
                pixels = square.tobytes()
                content.append(int.from_bytes(hashlib.sha256(pixels).digest()[:8], "little"))
                file.write(pixels)
                rest += pixels
                if len(rest) == block:
                    checksums.append(zlib.crc32(rest))
                    rest.clear()
        left_out = decoder.require_whole(count)
        if rest:
            checksums.append(zlib.crc32(rest))
        shape = (len(whole), image_size, image_size, 3)
        file.seek(0)
        if _write_header(file, shape) != header_bytes:
            raise OSError(errno.EIO, "the header of the images grew", str(folder))
        file.flush()
        os.fsync(file.fileno())

    labels, is_test = listing.labels[whole], listing.is_test[whole]
    domains = domains[whole]
    rows_file = io.BytesIO()
    contents = np.array(content, dtype=np.uint64)
    np.savez(rows_file, labels=labels, domains=domains, is_test=is_test, content=contents)
    write_atomic(folder / "rows.npz", rows_file.getvalue())
    names = json.dumps([listing.class_names, listing.domain_names])
    fingerprint.update(f"{_rows_hash(labels, domains, is_test)}/{names}".encode())
    if decoder.crop != "centre":  # what is learned from is not what it was
        fingerprint.update(decoder.crop.encode())
    header = {
        "format": _FORMAT,
        "shape": shape,
        "rows_sha256": hashlib.sha256(rows_file.getvalue()).hexdigest(),
        "crc32": checksums,
        "class_names": listing.class_names,
        "domain_names": listing.domain_names,
        "fingerprint": fingerprint.hexdigest(),
        "notes": (*listing.notes, *left_out),
    }
    sealed.write_json(folder / "header.json", header)


def _write_header(file: BinaryIO, shape: Shape) -> int:
    """Write what stands before the images; how many bytes that is, whatever the number of them."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _rows_hash(
    labels: npt.NDArray[np.int64],
    domains: npt.NDArray[np.int64],
    is_test: npt.NDArray[np.bool_],
) -> str:
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    digest.update(domains.astype("<i8").tobytes())
    digest.update(is_test.astype("u1").tobytes())
    return digest.hexdigest()
