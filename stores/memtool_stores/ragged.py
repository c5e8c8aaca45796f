"""How the bytes of a ragged row are cut: into equal chunks, each with a hash of its own.

A row of several chunks lies in as many objects, and the hash of the whole row is that of none of
them: the hashes of the pieces, in its record, are what proves that its bytes are gone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

CHUNK_BYTES = 4 * 1024 * 1024
"""Length of a chunk at most."""


def chunk_bytes(nbytes: int) -> int:
    """Length of each chunk of so many bytes: the fewest chunks, and the least beyond the end."""
    return max(1, math.ceil(nbytes / max(1, math.ceil(nbytes / CHUNK_BYTES))))


def chunk_count(nbytes: int) -> int:
    """How many chunks so many bytes have."""
    return math.ceil(nbytes / chunk_bytes(nbytes))


def cut(data: bytes | memoryview, step: int) -> Iterator[bytes]:
    """The bytes in chunks of this length, the last filled up with zeros, as they are stored."""
    for first in range(0, len(data), step):
        yield bytes(data[first : first + step]).ljust(step, b"\0")


def piece_hashes(data: bytes | memoryview) -> tuple[str, ...]:
    """SHA-256 of every chunk as it is stored; () for one chunk."""
    step = chunk_bytes(len(data))
    if len(data) <= step:
        return ()
    return tuple(hashlib.sha256(chunk).hexdigest() for chunk in cut(data, step))
