"""Data sets decoded once into memory-mapped uint8 arrays.

An entry of the cache is a folder, `<name>-<size>px-<key>`, with images.npy (rows, size, size, 3),
rows.npz (labels, domains, is_test, content) and header.json. Its key covers what the files of the
source look like from outside (names, sizes, times), so a warm opening reads no image and imports no
reader.
Writing happens beside the entry, under a lock, and ends with a rename: other processes see a whole
entry or none. An entry that does not fit its header is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memtool.streams.images import decode_square, quiet_decoders
from memtool.streams.listing import Listing, Source
from memtool.streams.ordering import random_ranks
from memtool.streams.table import Table, cache_error, cache_folder

_FORMAT = 2
_CHUNK_ROWS = 256

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

    from filelock import FileLock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_name(f"{entry.name}.lock")):
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


def _read(entry: Path, name: str, image_size: int) -> Table | None:
    """The table in a folder of the cache, or None where it is absent or does not fit."""
    if not (entry / "header.json").exists():
        return None
    try:
        header = json.loads((entry / "header.json").read_text(encoding="utf-8"))
        with np.load(entry / "rows.npz", allow_pickle=False) as rows:
            labels, domains, is_test = rows["labels"], rows["domains"], rows["is_test"]
            content = rows["content"]
        # Copy-on-write: torch.from_numpy warns about read-only arrays, the file stays as it is.
        images = np.asarray(np.load(entry / "images.npy", mmap_mode="c", allow_pickle=False))
        fits = (
            header["format"] == _FORMAT
            and images.dtype == np.uint8
            and images.shape == (len(labels), image_size, image_size, 3)
            and list(images.shape) == header["shape"]
            and header["rows_sha256"] == _rows_hash(labels, domains, is_test, content)
        )
        if fits:
            return Table(
                name=name,
                images=images,
                labels=labels,
                domains=domains if header["domain_names"] else None,
                is_test=is_test,
                class_names=tuple(header["class_names"]),
                domain_names=tuple(header["domain_names"]),
                fingerprint=header["fingerprint"],
                content=content,
                notes=tuple(header["notes"]),
            )
        reason = "its header does not fit its arrays"
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error)
    _log.warning("the cache entry %s is broken and will be built again: %s", entry.name, reason)
    return None


def _build(entry: Path, source: Source, image_size: int) -> None:
    """Decode every image of `source` into `entry`. The caller holds the lock of `entry`."""
    building = entry.with_name(f"{entry.name}.building")
    # Left by a process that was killed; the lock says that nobody works on it.
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        with source.open() as listing:
            _log.info("decoding %d images of %s", len(listing.labels), source.name)
            _write(building, listing, image_size)
        if entry.exists():
            # A broken entry. Whoever has mapped its files keeps them.
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
        file.flush()
        os.fsync(file.fileno())

    np.savez(folder / "rows.npz", labels=labels, domains=domains, is_test=is_test, content=content)
    names = json.dumps([listing.class_names, listing.domain_names])
    fingerprint.update(f"{_rows_hash(labels, domains, is_test)}/{names}".encode())
    header = {
        "format": _FORMAT,
        "shape": shape,
        "rows_sha256": _rows_hash(labels, domains, is_test, content),
        "class_names": listing.class_names,
        "domain_names": listing.domain_names,
        "fingerprint": fingerprint.hexdigest(),
        "notes": listing.notes,
    }
    (folder / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _rows_hash(
    labels: npt.NDArray[np.int64],
    domains: npt.NDArray[np.int64],
    is_test: npt.NDArray[np.bool_],
    content: npt.NDArray[np.uint64] | None = None,
) -> str:
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    digest.update(domains.astype("<i8").tobytes())
    digest.update(is_test.astype("u1").tobytes())
    if content is not None:
        digest.update(content.astype("<u8").tobytes())
    return digest.hexdigest()
