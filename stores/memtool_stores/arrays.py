"""Arrays of a version, read chunk by chunk: no size is believed that stored bytes do not prove.

zarr makes room for whatever its metadata say, and fills it with zeros where chunks are missing.
Here the metadata must be such as we write them, every chunk must be there in its full length and
with its crc32c, and room is made for what was read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores.errors import IntegrityError
from memtool_stores.printable import shown
from memtool_stores.ragged import cut

CRC32C_BYTES = 4
"""What ends every stored chunk: the crc32c of the bytes before it."""

BATCH_CHUNKS = 256
BATCH_BYTES = 64 * 1024 * 1024
"""Chunks that are fetched at a time, and bytes of them, but always one chunk."""

WRITTEN_ARRAYS = 32
WRITTEN_CHUNKS = 256
WRITTEN_BYTES = 16 * 1024 * 1024
"""Arrays, or chunks, that are written at a time, and about how many bytes of them."""

MOST_PACKED_BYTES = 20_000
"""What a chunk of the catalog has when it cannot be made smaller, and a little more."""

Bytes = npt.NDArray[np.uint8]

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def opened(
    group: Any,
    name: str,
    dtype: np.dtype[Any],
    shape: tuple[int | None, ...],
    chunks: tuple[int | None, ...],
    *,
    zstd: bool = False,
) -> Any:
    """The zarr array of that name, when it is one that we can have written.

    None in `shape` or `chunks` stands for any length.

    Raises:
        IntegrityError: it is not there, or has another type, shape or encoding.
    """
    array = group.get(name)
    if not hasattr(array, "chunks"):
        raise not_as_written(name, "an array", "none" if array is None else "a group")
    said = array.metadata.to_dict()
    codecs = ["bytes", *(["zstd"] if zstd else []), "crc32c"]
    keys = {"name": "default", "configuration": {"separator": "/"}}
    order = said["codecs"][0].get("configuration", {}).get("endian", "little")
    for part, expected, found in (
        ("type", dtype.newbyteorder("="), array.dtype.newbyteorder("=")),
        ("codecs", codecs, [codec["name"] for codec in said["codecs"]]),
        ("order of bytes", "little", order),
        ("names of chunks", keys, said["chunk_key_encoding"]),
        ("fill value", 0, said["fill_value"]),
    ):
        if found != expected:
            raise not_as_written(name, f"{part} {expected}", f"{part} {shown(found)}")
    for part, wanted, found in (("shape", shape, array.shape), ("chunks", chunks, array.chunks)):
        fits = len(found) == len(wanted) and all(
            n is None or n == m for n, m in zip(wanted, found, strict=True)
        )
        if not fits or (part == "chunks" and min(found) < 1):
            lengths = ", ".join("any" if n is None else str(n) for n in wanted)
            raise not_as_written(name, f"{part} ({lengths})", f"{part} {shown(found)}")
    return array


def read_chunks(
    group: Any, name: str, places: Sequence[object], nbytes: int
) -> Iterator[memoryview]:
    """What the chunks of an array hold, (nbytes,) each; `places` are such as 0 or "3/0".

    Raises:
        IntegrityError: one is not there, has another length, or not the crc32c it ends with.
    """
    for place, data in _stored(group, name, places, nbytes):
        if len(data) != nbytes + CRC32C_BYTES:
            raise not_as_written(
                name,
                f"{nbytes + CRC32C_BYTES:,} bytes in chunk {place}",
                f"{len(data):,} bytes in chunk {place}",
            )
        yield unsealed(name, place, data).data


def read_packed(group: Any, name: str, places: Sequence[object], nbytes: int) -> Iterator[bytes]:
    """As `read_chunks`, of chunks that were compressed with zstd.

    The length that a chunk says it has is compared with `nbytes` before it is unpacked.
    """
    from numcodecs.zstd import decompress

    for place, data in _stored(group, name, places, nbytes):
        packed = unsealed(name, place, data)
        found = _unpacked_bytes(packed[:18].tobytes())
        if found != nbytes:
            said = "no length" if found is None else f"{found:,} bytes"
            raise not_as_written(
                name, f"{nbytes:,} bytes packed in chunk {place}", f"{said} packed in chunk {place}"
            )
        try:
            yield decompress(packed)
        except RuntimeError as error:
            raise not_as_written(name, f"chunk {place} as zstd packs it", str(error)) from error


def read_row(group: Any, name: str, place: str) -> Bytes | None:
    """What one chunk holds, without its crc32c, which is not checked; None when it is not there."""
    (data,) = fetched(group, [f"{name}/c/{place}"])
    return None if data is None else data[:-CRC32C_BYTES]


def write_bytes(
    group: Any, like: str, arrays: Iterable[tuple[str, bytes | memoryview, int]]
) -> None:
    """Write new one-axis arrays of bytes, encoded as the one of name `like`, which is there.

    Each comes as its name, its bytes, and the length of its chunks; of all no more than some are
    asked for at a time. The way through zarr's arrays, one by one, takes ten times as long.
    """
    (found,) = fetched(group, [f"{like}/zarr.json"])
    assert found is not None
    document = json.loads(found.tobytes())
    documents: dict[str, bytes] = {}
    chunks: dict[str, bytes] = {}
    waiting = 0
    for name, data, step in arrays:
        grid = {"name": "regular", "configuration": {"chunk_shape": [step]}}
        said = {**document, "shape": [len(data)], "chunk_grid": grid}
        documents[f"{name}/zarr.json"] = json.dumps(said).encode()
        for place, chunk in enumerate(cut(data, step)):
            chunks[f"{name}/c/{place}"] = with_crc32c(chunk)
        waiting += len(data)
        if len(documents) == WRITTEN_ARRAYS or waiting >= WRITTEN_BYTES:
            put(group, documents)
            put(group, chunks)
            documents, chunks, waiting = {}, {}, 0
    put(group, documents)
    put(group, chunks)


def with_crc32c(data: bytes) -> bytes:
    """The bytes of a chunk as they are stored: with their crc32c after them."""
    from google_crc32c import value

    return data + value(data).to_bytes(CRC32C_BYTES, "little")


def put(group: Any, files: Mapping[str, bytes]) -> None:
    """Write files of the tree, all at once."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    buffer = default_buffer_prototype().buffer

    async def put() -> None:
        sets = (group.store.set(key, buffer.from_bytes(data)) for key, data in files.items())
        await asyncio.gather(*sets)

    sync(put())


def put_in_turn(group: Any, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files of the tree that are asked for one by one; some MB of them are in memory."""
    some: dict[str, bytes] = {}
    waiting = 0
    for key, data in files:
        some[key] = data
        waiting += len(data)
        if len(some) == WRITTEN_CHUNKS or waiting >= WRITTEN_BYTES:
            put(group, some)
            some, waiting = {}, 0
    put(group, some)


def delete(group: Any, keys: Sequence[str]) -> None:
    """Take files of the tree away, all at once."""
    from zarr.core.sync import sync

    async def delete() -> None:
        await asyncio.gather(*(group.store.delete(key) for key in keys))

    sync(delete())


def listed(group: Any, name: str) -> list[str]:
    """Names of what lies in a group of that name, whatever it is, sorted."""
    from zarr.core.sync import sync

    async def names() -> list[str]:
        return [entry async for entry in group.store.list_dir(name)]

    return sorted(set(sync(names())) - {"zarr.json"})


def whole_chunk(data: bytes, lengths: Iterable[int]) -> int | None:
    """How many of these bytes are a stored chunk, all of which end with their crc32c.

    All of them, or where something was appended to the file, the first ones; None when neither is
    so. A chunk that was appended to is known by one of these lengths, or is a packed one.
    """
    from google_crc32c import extend, value

    def ends_at(length: int, crc: int) -> bool:
        return data[length : length + CRC32C_BYTES] == crc.to_bytes(CRC32C_BYTES, "little")

    for length in (len(data), *lengths):
        inner = length - CRC32C_BYTES
        if inner >= 0 and length <= len(data) and ends_at(inner, value(data[:inner])):
            return length
    crc = 0
    for inner in range(min(len(data) - CRC32C_BYTES, MOST_PACKED_BYTES)):
        if inner and ends_at(inner, crc):
            return inner + CRC32C_BYTES
        crc = extend(crc, data[inner : inner + 1])
    return None


def _stored(
    group: Any, name: str, places: Sequence[object], nbytes: int
) -> Iterator[tuple[object, Bytes]]:
    """The chunks as they are stored, some at a time."""
    step = max(1, min(BATCH_CHUNKS, BATCH_BYTES // max(1, nbytes)))
    for first in range(0, len(places), step):
        some = places[first : first + step]
        for place, data in zip(
            some, fetched(group, [f"{name}/c/{place}" for place in some]), strict=True
        ):
            if data is None:
                raise not_as_written(name, f"{nbytes:,} bytes in chunk {place}", "no such chunk")
            yield place, data


def fetched(group: Any, keys: Sequence[str]) -> list[Bytes | None]:
    """Files of the tree, read all at once; None for one that is not there."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    prototype = default_buffer_prototype()

    async def fetch() -> list[Any]:
        return await asyncio.gather(*(group.store.get(key, prototype) for key in keys))

    return [None if one is None else one.as_numpy_array() for one in sync(fetch())]


def unsealed(name: str, place: object, data: Bytes) -> Bytes:
    """A chunk without the crc32c that it must end with. Raises IntegrityError for another one."""
    from google_crc32c import value

    inner = data[:-CRC32C_BYTES]
    found = value(inner).to_bytes(CRC32C_BYTES, "little")
    noted = data[-CRC32C_BYTES:].tobytes()
    if found != noted:
        raise not_as_written(
            name,
            f"crc32c {noted.hex()} of chunk {place}",
            f"crc32c {found.hex()}",
        )
    return inner


def _unpacked_bytes(head: bytes) -> int | None:
    """The length that the first frame of zstd says it unpacks to, if it is one and says it.

    RFC 8878, 3.1.1.1: magic number, descriptor, window (unless there is one segment), dictionary,
    length.
    """
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        return None
    descriptor = head[4]
    single = descriptor >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    if not width or len(head) < at + width:
        return None
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)


def not_as_written(name: str, expected: str, found: str) -> IntegrityError:
    """The error for an array that is not as we write it."""
    return IntegrityError(what="array", name=name, expected=expected, found=found)
