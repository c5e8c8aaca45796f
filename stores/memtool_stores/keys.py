"""The keys on disk: one array (L, R, d_k), of which a commit writes the blocks that changed alone.

A block is a chunk: the keys of some rows of the values in all layers. The blocks are bound to each
other by a hash chain, so that the hash of the last proves all of them, and who appends reads one
block and no more. Keys that an older schema wrote have one hash over all bytes until they change.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores import limits
from memtool_stores.arrays import (
    not_as_written,
    opened,
    put_in_turn,
    read_chunks,
    with_crc32c,
)
from memtool_stores.errors import IntegrityError, SchemaError
from memtool_stores.jsonvalues import digest, mapping, member, whole

KEYS = "keys"
KEYS_DTYPE = np.dtype("<f4")

BLOCK_BYTES = 256 * 1024
BLOCK_ROWS = 256
"""A block has no more bytes, and no more rows, but always one row."""

Array = npt.NDArray[Any]

Create = Callable[[tuple[int, ...], tuple[int, ...]], None]
"""Makes a new array of a shape and chunks, in the place of the old one."""


@dataclass(frozen=True)
class KeysState:
    """How many rows of the values have keys, and what proves them.

    `sha256` is the end of the hash chain, and `before` what it was before the last block; of keys
    that an older schema wrote, `sha256` is the hash of all bytes, and `before` is None.
    """

    sha256: str
    rows: int
    before: str | None = None

    @classmethod
    def of_json(cls, data: Any, most: int) -> KeysState | None:
        """The state of the keys, None where there are none; they cover `most` rows at most.

        Raises:
            SchemaError: a part is missing or of the wrong kind.
        """
        if data is None:
            return None
        what = "keys of the state"
        said = mapping(data, what)
        rows = whole(member(said, "rows", what), "the rows of the keys", least=1)
        if rows > most:
            raise SchemaError(f"keys of {rows:,} rows", expected=f"at most {most:,}, all there are")
        before = said.get("before")
        return cls(
            digest(member(said, "sha256", what), "the hash of the keys"),
            rows,
            None if before is None else digest(before, "the hash before the last keys"),
        )


def block_rows(layers: int, width: int, rows: int) -> int:
    """Rows of a block: a power of two while they are few, and little is beyond the end."""
    most = BLOCK_BYTES // (KEYS_DTYPE.itemsize * layers * width)
    return int(min(max(1, min(most, BLOCK_ROWS)), 2 ** math.ceil(math.log2(rows))))


def beginning(layers: int, step: int, width: int) -> str:
    """The chain before the first block; it binds the shape of blocks."""
    return hashlib.sha256(f"keys {layers} {step} {width}".encode()).hexdigest()


def linked(chain: str, block: Array) -> str:
    """The chain after a block (L, n, d_k), of rows that there are."""
    data = np.ascontiguousarray(block).view(np.uint8).data
    return hashlib.sha256(bytes.fromhex(chain) + hashlib.sha256(data).digest()).hexdigest()


def chains_of(blocks: Iterable[Array], start: str) -> list[str]:
    """The chain before the first of these blocks and after each."""
    return [*itertools.accumulate(blocks, linked, initial=start)]


def cut(keys: Array, step: int) -> list[Array]:
    """Keys (L, n, d_k) as blocks of so many rows, the last with those that are left."""
    return [keys[:, first : first + step] for first in range(0, keys.shape[1], step)]


def open_keys(group: Any, state: KeysState) -> Any:
    """The array. Raises IntegrityError for one of other shape, SchemaError for one too large."""
    array = opened(group, KEYS, KEYS_DTYPE, (None, state.rows, None), (None, None, None))
    (layers, _, width), chunks = array.shape, array.chunks
    if (chunks[0], chunks[2]) != (layers, width):
        raise not_as_written(KEYS, f"chunks ({layers}, any, {width})", f"chunks {chunks}")
    # As much as is stored: the last chunk can go on beyond the last row.
    rows = max(state.rows, math.ceil(state.rows / chunks[1]) * chunks[1])
    limits.require("array_bytes", KEYS_DTYPE.itemsize * layers * rows * width, "the keys")
    return array


def block_nbytes(array: Any) -> int:
    """Bytes of a block as it is stored, without its crc32c."""
    return int(KEYS_DTYPE.itemsize * math.prod(array.chunks))


def read_blocks(group: Any, array: Any, first: int = 0) -> Iterator[Array]:
    """The blocks from that one on, (L, n, d_k) each, the last with the rows that there are."""
    layers, step, width = array.chunks
    rows = array.shape[1]
    numbers = range(first, math.ceil(rows / step))
    chunks = read_chunks(group, KEYS, [f"0/{number}/0" for number in numbers], block_nbytes(array))
    # Of the rows that there are now, whatever becomes of the array while they are read.
    return (
        np.frombuffer(data, KEYS_DTYPE).reshape(layers, step, width)[:, : rows - number * step]
        for number, data in zip(numbers, chunks, strict=True)
    )


def read_keys(group: Any, state: KeysState) -> tuple[str, Array]:
    """The hash that proves the keys, and they, (L, R, d_k)."""
    array = open_keys(group, state)
    blocks = [*read_blocks(group, array)]
    keys = np.ascontiguousarray(np.concatenate(blocks, axis=1))
    if state.before is None:
        return hashlib.sha256(keys.view(np.uint8).data).hexdigest(), keys
    return chains_of(blocks, beginning(*array.chunks))[-1], keys


def read_chains(group: Any, state: KeysState, known: Sequence[str] = ()) -> list[str]:
    """The hash chain before the first block and after each; of an older schema, the hash of all.

    Blocks that a `known` beginning of it comes after are not read, when it is of blocks of this
    shape. One block is in memory at a time.
    """
    if state.before is None:
        return [read_keys(group, state)[0]]
    array = open_keys(group, state)
    start = beginning(*array.chunks)
    *passed, end = known if start in known[:1] else [start]
    return [*passed, *chains_of(read_blocks(group, array, len(passed)), end)]


def stored(block: Array, step: int) -> bytes:
    """A block as its chunk has it: filled up with rows of zeros, and its crc32c."""
    whole_block = np.zeros((block.shape[0], step, block.shape[2]), KEYS_DTYPE)
    whole_block[:, : block.shape[1]] = block
    return with_crc32c(whole_block.tobytes())


def write_keys(group: Any, create: Create, keys: Array, old: KeysState | None) -> KeysState:
    """Put keys (L, R, d_k) in the place of the old ones; blocks that are as they were stay.

    Raises:
        IntegrityError: the old ones are not what was written.
    """
    layers, rows, width = keys.shape
    step = block_rows(layers, width, rows)
    array = _same_blocks(group, old, layers, step, width)
    there: Iterator[Array] = iter(())
    if array is None:
        create(keys.shape, (layers, step, width))
    else:
        there = read_blocks(group, array)
    blocks = cut(keys, step)
    pairs = enumerate(zip(blocks, itertools.chain(there, itertools.repeat(None)), strict=False))
    # The last one in any case: what changed nothing could not be committed.
    changed = (
        (f"{KEYS}/c/0/{number}/0", stored(block, step))
        for number, (block, was) in pairs
        if number == len(blocks) - 1 or was is None or was.tobytes() != block.tobytes()
    )
    # Chunks outside of an array are refused: it grows first, and shrinks last.
    if array is not None and array.shape[1] < rows:
        array.resize(keys.shape)
    put_in_turn(group, changed)
    if array is not None and array.shape[1] > rows:
        array.resize(keys.shape)
    *_, before, end = chains_of(blocks, beginning(layers, step, width))
    return KeysState(end, rows, before)


def append_keys(group: Any, create: Create, keys: Array, old: KeysState) -> KeysState:
    """Put keys (L, n, d_k) after the old ones, of which one block is read, and that written again.

    Raises:
        IntegrityError: that block is not what was written.
    """
    layers, rows, width = keys.shape[0], old.rows + keys.shape[1], keys.shape[2]
    step = block_rows(layers, width, rows)
    array = _same_blocks(group, old, layers, step, width)
    if array is None or old.before is None:
        # Few enough to be one block, or written by an older memtool.
        found, there = read_keys(group, old)
        _require(found, old)
        return write_keys(group, create, np.concatenate([there, keys], axis=1), old)
    number = (old.rows - 1) // step
    (last,) = read_blocks(group, array, number)
    _require(linked(old.before, last), old)
    array.resize((layers, rows, width))
    blocks = cut(np.concatenate([last, keys], axis=1), step)
    full = last.shape[1] // step  # one that is full stays
    changed = enumerate(blocks[full:], number + full)
    put_in_turn(group, ((f"{KEYS}/c/0/{place}/0", stored(one, step)) for place, one in changed))
    *_, before, end = chains_of(blocks, old.before)
    return KeysState(end, rows, before)


def _same_blocks(group: Any, old: KeysState | None, layers: int, step: int, width: int) -> Any:
    """The array, when its blocks are of this shape; None where it has to be made anew."""
    if old is None or old.before is None:
        return None
    array = open_keys(group, old)
    return array if array.chunks == (layers, step, width) else None


def _require(found: str, state: KeysState) -> None:
    if found != state.sha256:
        raise IntegrityError(what=KEYS, name="blocks", expected=state.sha256, found=found)
