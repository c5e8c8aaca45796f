"""Tensors with a row for each task or adapter, in blobs of a few hundred kilobytes.

    <name>.0, <name>.1, …   the rows in their order, as many in each but the last

So a commit writes the blobs whose rows it adds or changes; the others stay where they lie.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from memtool.errors import CorruptError
from memtool.methods.in_store import StoredState, drop, put_changed
from memtool.tensor_bytes import read_tensors
from memtool_stores import MemoryView, Transaction

ID = "id"
"""The column that holds ids of adapters."""

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


class StateInRows(StoredState):
    """A state of which some fields have an entry for each task or adapter: these are rows.

    `BY_ROW` has, by what stands behind the name of the blob, the fields by the columns of its rows;
    a column `id` holds ids of adapters, the others integers. The blob says how many there are of
    each. Of schema version 1 they are in the blob itself.
    """

    BY_ROW: ClassVar[Mapping[str, Mapping[str, str]]]

    @classmethod
    def _whole(cls, said: Mapping[str, Any], view: MemoryView) -> Mapping[str, Any]:
        if said.get("schema_version") == 1:
            return said
        rows: dict[str, list[Any]] = {}
        for part, columns in cls.BY_ROW.items():
            shapes = {name: "uint8 n w" if name == ID else "int64 n" for name in columns}
            found = read_rows(view, f"{cls.blob}.{part}", **shapes)
            for name, field in columns.items():
                rows[field] = []
                if found:
                    rows[field] = _ids(found[name]) if name == ID else found[name].tolist()
        counts = {name: len(one) for name, one in rows.items()}
        if said.get("counts") != counts:
            raise CorruptError(
                f"blob {cls.blob!r} with rows beside it of {counts}",
                expected=str(said.get("counts")),
            )
        return {**{name: one for name, one in said.items() if name != "counts"}, **rows}

    def put(self, txn: Transaction) -> None:
        """As `StoredState.put`; of the rows what is new or changed is written."""
        fields = self.model_dump(mode="json")
        fields["schema_version"] = type(self).model_fields["schema_version"].default
        counts = dict[str, int]()
        for part, columns in self.BY_ROW.items():
            own = {name: fields.pop(field) for name, field in columns.items()}
            counts |= {field: len(own[name]) for name, field in columns.items()}
            put_rows(txn, f"{self.blob}.{part}", {name: _row(name, own[name]) for name in own})
        txn.put_blob(self.blob, json.dumps({**fields, "counts": counts}).encode())

    @classmethod
    def drop(cls, txn: Transaction) -> None:
        """Leave the version that is being written without a state."""
        drop(txn, cls.blob)
        for part in cls.BY_ROW:
            drop_rows(txn, f"{cls.blob}.{part}")


def _row(column: str, values: Sequence[Any]) -> Tensor:
    """A column of rows; ids, which are equally long, as their letters."""
    if column == ID:
        return torch.tensor([[*id.encode()] for id in values], dtype=torch.uint8)
    return torch.tensor(values, dtype=torch.int64)


def _ids(rows: Tensor) -> list[str]:
    return [bytes(row).decode("ascii", "replace") for row in rows.numpy()]


def _drop_from(txn: Transaction, name: str, first: int) -> None:
    for blob in [*_blobs(txn.base, name)][first:]:
        txn.delete_blob(blob)


def _blobs(view: MemoryView, name: str) -> Iterator[str]:
    piece = 0
    while view.has_blob(blob := f"{name}.{piece}"):
        yield blob
        piece += 1
