"""About what a commit writes beside what it is given: said before anything is written.

The first page of the index of blobs, now and then some below it, the last block of keys and the
last chunk of the catalog are written again, the manifests that list them, and a snapshot that lists
the manifests. None of it grows with the size of an adapter; with the number of them only as pages
have levels and a snapshot has entries.
"""

from __future__ import annotations

import math

from memtool_stores.ice import GROWING
from memtool_stores.index import DIGITS, LEAF
from memtool_stores.keys import BLOCK_BYTES, BLOCK_ROWS, KEYS_DTYPE
from memtool_stores.tree import CATALOG_CHUNK_BYTES
from memtool_stores.view import MemoryView

ENTRY_BYTES = 16
"""Of a chunk in a manifest, packed."""

BLOB_BYTES, PAGE_BYTES = 100, 85
"""Of a blob, or another page, in a page."""

LOT = 8
"""Names that go from a page to one below it, together."""

SNAPSHOT_BYTES, MANIFEST_BYTES = 2_600, 25
"""A snapshot, log and checksums of a version, and what each manifest adds to them."""

PACKED = 0.35
"""Of the length of catalog lines, when they are packed."""


def state_bytes(view: MemoryView | None, blobs: int) -> int:
    """About the bytes that a commit on a version writes beside its payload; None: on a new store.

    It adds rows with keys and changes so many blobs.
    """
    if view is None:
        return SNAPSHOT_BYTES + blobs * BLOB_BYTES
    state = view.state
    leaf, levels = state.index.count, 1
    while leaf > LEAF:
        leaf, levels = math.ceil(leaf / len(DIGITS)), levels + 1
    below = blobs * (levels - 1) / LOT
    page = min(state.index.count, LEAF) * BLOB_BYTES + (levels > 1) * len(DIGITS) * PAGE_BYTES
    written = int((1 + below) * page)
    lengths = {
        "values": state.rows,
        "catalog": math.ceil(state.catalog_bytes / CATALOG_CHUNK_BYTES),
        "parts": state.index.parts,
    }
    written += int(PACKED * (state.catalog_bytes % CATALOG_CHUNK_BYTES))
    if (shape := view.keys_shape) is not None:
        row = KEYS_DTYPE.itemsize * shape[0] * shape[2]
        rows = max(1, min(shape[1], BLOCK_ROWS, BLOCK_BYTES // row))
        written += rows * row
        lengths["keys"] = math.ceil(shape[1] / rows)
    manifests = 0
    for array, length in lengths.items():
        chunks = GROWING[array][1]
        there = math.ceil(length / chunks)
        written += ENTRY_BYTES * (length % chunks)  # the last one is written in any case
        if array == "parts":
            written += ENTRY_BYTES * int(min(below, there - 1) * chunks)
        manifests += there
    return written + SNAPSHOT_BYTES + MANIFEST_BYTES * manifests
