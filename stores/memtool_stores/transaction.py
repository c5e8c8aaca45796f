"""What one commit will do: operations are gathered in memory and reach the disk all at once.

Nothing is written before the commit, so a transaction that is left (an error, Ctrl-C, a kill)
leaves nothing behind, and all writing to disk happens while the lock of the store is held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores.catalog import AdapterRecord, Catalog, plain_json
from memtool_stores.errors import (
    AlreadyExistsError,
    NotFoundError,
    SchemaError,
    SpaceMismatchError,
)
from memtool_stores.history import check_name
from memtool_stores.tensorfile import read_header
from memtool_stores.tree import Array, KeysState, Root, State, Tree, numpy_dtype, sha256
from memtool_stores.view import HEADER_PREFIX, MemoryView


class Transaction:
    """Changes on top of `base`, the version that the transaction began with.

    `version` is the id of the committed version once the transaction is done; the id of the base
    when there was nothing to commit.
    """

    def __init__(self, base: MemoryView) -> None:
        self.base = base
        self.version = base.version
        self._space = base.space
        self._records = dict(base.catalog.records)
        self._names = {record.name: record.id for record in base.adapters}
        self._lines: list[bytes] = []
        self._rows: list[Array] = []
        self._keys: Array | None = None
        self._keys_set = False
        self._blobs: dict[str, bytes | None] = {}

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self._lines or self._keys_set or self._blobs)

    @property
    def nbytes(self) -> int:
        """Bytes of payload that the commit will write."""
        blobs = sum(len(data) for data in self._blobs.values() if data is not None)
        keys = 0 if self._keys is None else self._keys.nbytes
        return sum(row.nbytes for row in self._rows) + keys + blobs + sum(map(len, self._lines))

    @property
    def adapters(self) -> tuple[AdapterRecord, ...]:
        """The adapters that are live after the operations so far, in row order."""
        return tuple(record for record in self._records.values() if record.live)

    def add(
        self,
        name: str,
        values: npt.NDArray[Any],
        meta: Mapping[str, Any] | None = None,
    ) -> str:
        """Append one adapter; its id.

        `values` has shape (numel,) and the dtype of the layout (bfloat16: its bits as uint16).
        Known keys of `meta`: task, domain, classes, scaling, setting, hyperparameters, provenance,
        file_sha256.

        Raises:
            AlreadyExistsError: a live adapter has this name.
            SpaceMismatchError: another shape or dtype.
            SchemaError: `meta` is not JSON, or the name is empty.
        """
        return self._add(name, values, meta or {}, None)

    def add_file(self, name: str, data: bytes, meta: Mapping[str, Any] | None = None) -> str:
        """Append the adapter of a safetensors file; `MemoryView.export` gives the same bytes back.

        Raises:
            SpaceMismatchError: its tensors are not those of the layout, in the same order.
            SchemaError: it is not a safetensors file.
        """
        header = read_header(data, f"the file of adapter {name!r}")
        layout = self._space.layout
        wanted = [(s.name, s.shape) for s in layout.segments]
        found = [(t.name, t.shape) for t in header.tensors]
        if header.dtype != layout.dtype or wanted != found:
            odd = sorted({str(pair) for pair in set(wanted) ^ set(found)})[:3]
            raise SpaceMismatchError(
                f"the file of adapter {name!r} has other tensors than the layout of the store "
                f"({header.dtype}; {', '.join(odd) or 'in another order'})",
                expected=f"{len(wanted)} tensors of {layout.dtype}, in the order of the layout",
            )
        values = np.frombuffer(data, numpy_dtype(layout), offset=len(header.data))
        digest = sha256(header.data)
        blob = HEADER_PREFIX + digest
        added = self._add(name, values, {"file_sha256": sha256(data), **(meta or {})}, digest)
        if blob not in self._known_blobs():
            self._blobs[blob] = header.data
        return added

    def _add(
        self, name: str, values: npt.NDArray[Any], meta: Mapping[str, Any], header: str | None
    ) -> str:
        from ulid import ULID

        dtype = numpy_dtype(self._space.layout)
        shape = (self._space.numel,)
        if values.shape != shape or values.dtype != dtype:
            raise SpaceMismatchError(
                f"the values of adapter {name!r} are {values.dtype} of shape {values.shape}",
                expected=f"{dtype} of shape {shape} ({self._space.layout.dtype} values)",
            )
        self._check_free(name)
        row = np.array(values, dtype=dtype, order="C", copy=True)
        layout = self._space.layout
        record = AdapterRecord.of(
            id=str(ULID()),
            row=len(self._records),
            name=name,
            sha256=sha256(row),
            meta=meta,
            scaling=layout.alpha / layout.rank,
            header=header,
        )
        self._write(record)
        self._rows.append(row)
        return record.id

    def _check_free(self, name: str) -> None:
        if not name or name != name.strip() or not name.isprintable():
            raise SchemaError(f"{name!r} cannot be the name of an adapter", expected="plain text")
        if name in self._names or name in self._records:
            raise AlreadyExistsError(
                f"there is a live adapter named {name!r}",
                remedy="another name, or remove that one first",
            )

    def _write(self, record: AdapterRecord) -> None:
        """Take a new or changed record into the catalog."""
        before = self._records.get(record.id)
        if before is not None and before.live:
            del self._names[before.name]
        self._records[record.id] = record
        if record.live:
            self._names[record.name] = record.id
        self._lines.append(record.line())

    def _live(self, id_or_name: str) -> AdapterRecord:
        record = self._records.get(self._names.get(id_or_name, id_or_name))
        if record is None or not record.live:
            raise NotFoundError(f"no adapter {id_or_name!r}", remedy="`memtool ls` lists them")
        return record

    def remove(self, id_or_name: str) -> None:
        """Take an adapter out of the memory; its row stays, older versions still have it.

        Raises:
            NotFoundError: there is none.
        """
        self._write(replace(self._live(id_or_name), live=False))

    def update(self, id_or_name: str, **changes: Any) -> None:
        """Change what is said of an adapter: keys of its meta, None takes one away; or its name.

        Raises:
            NotFoundError: there is none.
            AlreadyExistsError: the new name is taken.
            SchemaError: a change is not JSON.
        """
        record = self._live(id_or_name)
        name = changes.pop("name", record.name)
        if name != record.name:
            self._check_free(name)
        meta = {**record.meta, **plain_json(changes, f"the meta of adapter {record.name!r}")}
        layout = self._space.layout
        self._write(
            AdapterRecord.of(
                id=record.id,
                row=record.row,
                name=name,
                sha256=record.sha256,
                meta={key: value for key, value in meta.items() if value is not None},
                scaling=layout.alpha / layout.rank,
                header=record.header,
            )
        )

    def set_keys(self, keys: npt.NDArray[np.float32] | None) -> None:
        """Set the keys, (L, T, d_k) float32 in the order of `adapters` now; None takes them away.

        Adapters added later in this or another transaction have no key until keys are set again.

        Raises:
            SpaceMismatchError: not three axes, not float32, or T is not the number of adapters.
        """
        if keys is None:
            self._keys, self._keys_set = None, True
            return
        live = self.adapters
        if keys.ndim != 3 or keys.dtype != np.float32 or keys.shape[1] != len(live):
            raise SpaceMismatchError(
                f"keys are {keys.dtype} of shape {keys.shape}",
                expected=f"float32 of shape (layers, {len(live)}, d_k), one key per live adapter",
            )
        if 0 in keys.shape:
            raise SpaceMismatchError(
                f"keys of shape {keys.shape} hold nothing", expected="at least one adapter"
            )
        spread = np.zeros((keys.shape[0], live[-1].row + 1, keys.shape[2]), dtype="<f4")
        spread[:, [record.row for record in live]] = keys
        self._keys, self._keys_set = spread, True

    def put_blob(self, name: str, data: bytes) -> None:
        """Store a file under a name, in the place of an older one of that name.

        Raises:
            SchemaError: the name has other characters than letters, digits, '.', '_' and '-', or
                begins with "header-", which belongs to the store.
        """
        check_name(name, "blob")
        self._refuse_header(name)
        self._blobs[name] = bytes(data)

    def delete_blob(self, name: str) -> None:
        """Take a blob away.

        Raises:
            NotFoundError: there is none of that name.
        """
        self._refuse_header(name)
        if name not in self._known_blobs():
            raise NotFoundError(f"no blob {name!r}")
        if name in self.base.state.blobs:
            self._blobs[name] = None
        else:
            del self._blobs[name]

    def _known_blobs(self) -> set[str]:
        known = set(self.base.state.blobs)
        for name, data in self._blobs.items():
            known.add(name) if data is not None else known.discard(name)
        return known

    def _refuse_header(self, name: str) -> None:
        if name.startswith(HEADER_PREFIX):
            raise SchemaError(f"blob names that begin with {HEADER_PREFIX!r} belong to the store")

    def write(self, tree: Tree) -> tuple[Root, Catalog]:
        """Carry the operations out on a tree at the base version; the new root and catalog."""
        base = self.base.state
        catalog = self.base.catalog.extended(self._lines)
        if self._rows:
            tree.append_values(base.rows, self._rows)
        if self._lines:
            tree.append_catalog(base.catalog_bytes, b"".join(self._lines))
        keys = base.keys
        if self._keys_set:
            tree.write_keys(self._keys)
            rows = self._keys
            keys = None if rows is None else KeysState(sha256(rows), rows.shape[1])
        blobs = dict(base.blobs)
        for name, data in self._blobs.items():
            if data is None:
                tree.delete_blob(name)
                del blobs[name]
            else:
                tree.write_blob(name, data)
                blobs[name] = sha256(data)
        state = State(
            adapters=len(catalog.live),
            rows=len(catalog.records),
            catalog_bytes=catalog.size,
            catalog_chain=catalog.chain,
            keys=keys,
            blobs=blobs,
        )
        root = Root(self.base.store_id, self._space, state)
        tree.set_root(root)
        return root, catalog
