"""Bytes of any length, each an element of the one array `/parts`.

An array for each would make every later version longer, which lists its arrays. An element is a
chunk: how many it holds (1) and its length, both uint32, the bytes, the crc32c (zarr's codec
`vlen-bytes`). More than `PART_BYTES` are cut into several elements, one after the other. What a
commit takes away leaves its elements to what it writes; those that are left over have no chunk.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from memtool_stores import arrays
from memtool_stores.arrays import (
    CRC32C_BYTES,
    delete,
    fetched,
    not_as_written,
    put,
    put_in_turn,
    unsealed,
    with_crc32c,
)
from memtool_stores.held import Bytes
from memtool_stores.printable import shown

PARTS = "parts"
PART_BYTES = 4 * 1024 * 1024
"""Longest element."""

READ_PARTS = 64
"""Elements that are read at a time, and about `arrays.WRITTEN_BYTES` of them."""

_HEAD = struct.Struct("<II")


def parts_of(nbytes: int) -> int:
    """How many elements so many bytes are; no bytes are one of no length."""
    return max(1, -(-nbytes // PART_BYTES))


def _document(count: int) -> dict[str, Any]:
    """The metadata of the array with so many elements."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [count],
        "data_type": "variable_length_bytes",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "",
        "codecs": [{"name": "vlen-bytes"}, {"name": "crc32c"}],
        "attributes": {},
    }


def check_parts(group: Any, count: int) -> None:
    """Nothing, when there is the array with so many elements; none for 0.

    Raises:
        IntegrityError: it is another one.
    """
    (found,) = fetched(group, [f"{PARTS}/zarr.json"])
    try:
        said = None if found is None else json.loads(found.tobytes())
    except (ValueError, RecursionError):
        said = "no JSON"
    if said != (_document(count) if count else None):
        raise not_as_written(PARTS, f"an array of {count:,} elements", shown(said))


def write_parts(group: Any, count: int, data: Iterable[tuple[int, Bytes]]) -> None:
    """Make it an array of so many elements, with these bytes from that element on in it.

    They are asked for one by one, and some MB of them are in memory at a time.
    """
    # Before its chunks: those outside of it are refused.
    put(group, {f"{PARTS}/zarr.json": json.dumps(_document(count)).encode()})
    put_in_turn(group, (chunk for first, one in data for chunk in _chunks(first, one)))


def _chunks(first: int, data: Bytes) -> Iterator[tuple[str, bytes]]:
    """The elements of these bytes from that one on: where each is stored, and its chunk."""
    for part, length in pieces_of(first, len(data)):
        begin = (part - first) * PART_BYTES
        piece = bytes(data[begin : begin + length])
        yield f"{PARTS}/c/{part}", with_crc32c(_HEAD.pack(1, length) + piece)


def pieces_of(first: int, nbytes: int) -> list[tuple[int, int]]:
    """The elements of so many bytes from element `first` on, each with its length."""
    return [
        (first + number, min(PART_BYTES, nbytes - number * PART_BYTES))
        for number in range(parts_of(nbytes))
    ]


def read_parts(group: Any, pieces: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    """What these elements of such lengths hold; some MB of them are in memory at a time.

    Raises:
        IntegrityError: one is not there, has another length, or not the crc32c it ends with.
    """
    some: list[tuple[int, int]] = []
    for number, piece in enumerate(pieces, start=1):
        some.append(piece)
        full = len(some) == READ_PARTS or sum(n for _, n in some) >= arrays.WRITTEN_BYTES
        if full or number == len(pieces):
            chunks = fetched(group, [f"{PARTS}/c/{place}" for place, _ in some])
            for (place, length), chunk in zip(some, chunks, strict=True):
                yield _piece(place, chunk, length)
            some = []


def _piece(place: int, chunk: Any, length: int) -> memoryview:
    if chunk is None:
        raise not_as_written(PARTS, f"{length:,} bytes in element {place}", "no such element")
    inner = unsealed(PARTS, place, chunk)
    head = inner[: _HEAD.size].tobytes()
    if head != _HEAD.pack(1, length) or len(inner) != _HEAD.size + length:
        raise not_as_written(
            PARTS,
            f"{length:,} bytes in element {place}",
            f"{max(0, len(inner) - _HEAD.size):,} bytes",
        )
    return inner[_HEAD.size :].data


def part_length(chunk: bytes) -> int | None:
    """How long the chunk of an element is, by what it begins with; None where it is none."""
    if len(chunk) < _HEAD.size:
        return None
    count, length = _HEAD.unpack_from(chunk)
    return _HEAD.size + length + CRC32C_BYTES if count == 1 and length <= PART_BYTES else None


def payload(chunk: bytes) -> bytes:
    """The bytes of an element from its chunk; b"" where it is none."""
    return chunk[_HEAD.size : -CRC32C_BYTES] if part_length(chunk) == len(chunk) else b""


def delete_parts(group: Any, places: Iterable[int]) -> None:
    """Take the bytes of these elements out of this version."""
    delete(group, [f"{PARTS}/c/{place}" for place in places])
