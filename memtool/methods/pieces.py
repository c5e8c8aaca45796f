"""Tensors with a row for each task or adapter, in blobs of a few hundred kilobytes.

    <name>.0, <name>.1, …   the rows in their order, as many in each but the last

So a commit writes the blobs whose rows it adds or changes; the others stay where they lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.errors import CorruptError
from memtool.methods.in_store import put_changed
from memtool.tensor_bytes import read_tensors
from memtool_stores import MemoryView, Transaction

PIECE_BYTES = 256 * 1024
"""What a blob has at most, unless a single row has more."""


def put_rows(txn: Transaction, name: str, rows: Mapping[str, Tensor]) -> None:
    """Let `name` have these rows: tensors (n, ...) on the CPU, by their own names."""
    first = next(iter(rows.values()))
    count, pieces = len(first), 0
    if count:
        row = sum(tensor[0].numel() * tensor.element_size() for tensor in rows.values())
        each = max(1, PIECE_BYTES // row)
        pieces = math.ceil(count / each)
    for piece in range(pieces):
        own = slice(piece * each, (piece + 1) * each)
        some = {key: tensor[own].contiguous() for key, tensor in rows.items()}
        put_changed(txn, f"{name}.{piece}", save(some))
    _drop_from(txn, name, pieces)


def rows_bytes(whole: int) -> int:
    """Bytes that a commit writes at most of so many bytes of rows, to which it adds some."""
    return min(whole, PIECE_BYTES)


def drop_rows(txn: Transaction, name: str) -> None:
    """Let `name` have no rows."""
    _drop_from(txn, name, 0)


def read_rows(view: MemoryView, name: str, **shapes: str) -> dict[str, Tensor]:
    """The rows of `name` at a version; nothing where it has none.

    `shapes` as of `read_tensors`, for every blob. Raises CorruptError.
    """
    found: list[dict[str, Any]] = []
    for blob in _blobs(view, name):
        found.append(read_tensors(view.blob(blob), f"blob {blob!r}", **shapes))
        if not len(next(iter(found[-1].values()))):
            raise CorruptError(f"blob {blob!r} has no rows")
        here, before = ([one[key].shape[1:] for key in shapes] for one in (found[-1], found[0]))
        if here != before:
            raise CorruptError(
                f"blob {blob!r} has rows of shape {here}", expected=f"{before}, as before it"
            )
    return {key: torch.cat([one[key] for one in found]) for key in shapes if found}


def without_rows(fields: Mapping[str, Any], by_row: Collection[str]) -> bytes:
    """Fields as JSON, but for those that are rows: of these it says how many there are."""
    counts = {name: len(fields[name]) for name in sorted(by_row)}
    rest = {name: one for name, one in fields.items() if name not in by_row}
    return json.dumps({**rest, "counts": counts}).encode()


def with_rows(
    said: Mapping[str, Any], rows: Mapping[str, Sequence[Any]], blob: str
) -> dict[str, Any]:
    """What `without_rows` was given, of what it said and the rows.

    Raises CorruptError where there are not as many.
    """
    counts = {name: len(one) for name, one in rows.items()}
    if said.get("counts") != counts:
        raise CorruptError(
            f"blob {blob!r} with rows beside it of {counts}", expected=str(said.get("counts"))
        )
    return {**{name: one for name, one in said.items() if name != "counts"}, **rows}


def id_rows(ids: Sequence[str]) -> Tensor:
    """Ids of adapters, which are equally long, as rows: uint8 (n, letters)."""
    return torch.tensor([[*id.encode()] for id in ids], dtype=torch.uint8)


def ids_of(rows: Tensor) -> list[str]:
    """What `id_rows` was given."""
    return [bytes(row).decode("ascii", "replace") for row in rows.numpy()]


def _drop_from(txn: Transaction, name: str, first: int) -> None:
    for blob in [*_blobs(txn.base, name)][first:]:
        txn.delete_blob(blob)


def _blobs(view: MemoryView, name: str) -> Iterator[str]:
    piece = 0
    while view.has_blob(blob := f"{name}.{piece}"):
        yield blob
        piece += 1
