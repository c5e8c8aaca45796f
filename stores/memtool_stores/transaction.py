"""What one commit will do: operations are gathered in memory and reach the disk all at once.

Nothing is written before the commit, so a transaction that is left (an error, Ctrl-C, a kill)
leaves nothing behind, and all writing to disk happens while the lock of the store is held. Bytes of
files and blobs need not be gathered: what is `Held` is read one after the other in the commit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores import limits
from memtool_stores.atoms import segments_of
from memtool_stores.catalog import AdapterRecord, Catalog, Kind, plain_json
from memtool_stores.errors import (
    NotFoundError,
    SchemaError,
    SpaceMismatchError,
)
from memtool_stores.held import Held, TensorFile
from memtool_stores.index import IndexState
from memtool_stores.keys import KeysState
from memtool_stores.migrate import SCHEMA_VERSION
from memtool_stores.names import check_ref
from memtool_stores.pending import Pending
from memtool_stores.tree import Array, Root, State, Tree, numpy_dtype, sha256
from memtool_stores.view import HEADER_PREFIX, MemoryView, tensors_of


class Transaction:
    """Changes on top of `base`, the version that the transaction began with.

    `version` is the id of the committed version once the transaction is done; the id of the base
    when there was nothing to commit. `written` is the id of the version that lies in the store
    before it is known whether the branch took it; None again when it is known that it did not.
    """

    def __init__(self, base: MemoryView) -> None:
        self.base = base
        self.version = base.version
        self.written: str | None = None
        self._space = base.space
        self._said = Pending(base)
        # None for a row without bytes in the values; those of ragged ones are in `_files`.
        self._rows: list[Array | Held | None] = []
        self._files: dict[int, Held] = {}
        self._erased: set[int] = set()
        self._keys: Array | None = None
        self._keys_set = False
        # Those of rows after the ones that had keys, where keys are not set anew.
        self._added_keys: Array | None = None
        self._blobs: dict[str, Held | None] = {}
        self._migrates = False

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        keys = self._keys_set or self._added_keys is not None
        return bool(self._said.lines or keys or self._blobs or self._migrates)

    @property
    def nbytes(self) -> int:
        """Bytes of payload that the commit will write."""
        blobs = sum(held.nbytes for held in self._blobs.values() if held is not None)
        keys = sum(one.nbytes for one in (self._keys, self._added_keys) if one is not None)
        rows = sum(row.nbytes for row in self._rows if row is not None)
        files = sum(held.nbytes for held in self._files.values())
        return rows + files + keys + blobs + sum(map(len, self._said.lines))

    @property
    def purges(self) -> bool:
        """Whether bytes of a row are taken out of the memory."""
        return bool(self._erased)

    @property
    def adapters(self) -> tuple[AdapterRecord, ...]:
        """The adapters that are live after the operations so far, in row order."""
        return self._said.live_of("adapter")

    @property
    def atom_records(self) -> tuple[AdapterRecord, ...]:
        """The rows of atoms that are live after the operations so far, in row order."""
        return self._said.live_of("atoms")

    def migrate(self) -> None:
        """Bring the tree to the schema that this code writes, as every commit does."""
        self._migrates = self.base.schema < SCHEMA_VERSION

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
        return self._add(name, values, meta or {})

    def add_atoms(
        self,
        name: str,
        values: npt.NDArray[Any],
        meta: Mapping[str, Any] | None = None,
    ) -> str:
        """Append the rank-1 atoms of one task, laid out like an adapter; their id.

        At every module, row i of lora_A is the key of atom i and column i of lora_B its value.
        Names, `values` and `meta` are as in `add`; atoms and adapters share one set of names.

        Raises:
            AlreadyExistsError: a live adapter or row of atoms has this name.
            SpaceMismatchError: another shape or dtype, or no module of the layout holds atoms.
            SchemaError: `meta` is not JSON, or the name is empty.
        """
        if not self.base.modules():
            raise SpaceMismatchError(
                "the layout of this store has no modules, so it cannot hold atoms",
                expected="segments <module>.lora_A (r, d_in) and <module>.lora_B (d_out, r)",
            )
        return self._add(name, values, meta or {}, kind="atoms")

    def prune_atoms(self, id_or_name: str, ranks: Mapping[str, Iterable[int]]) -> None:
        """Take single atoms out: `ranks` names, by module, the indices inside the row.

        Their bytes stay in the row; an atom that is out already is out.

        Raises:
            NotFoundError: there is no such row of atoms, or no such module.
            SchemaError: a rank that the module does not have, or an adapter instead of atoms.
        """
        record = self._said.live(id_or_name)
        if record.kind != "atoms":
            raise SchemaError(
                f"{record.name!r} is an adapter", expected="the id or name of a row of atoms"
            )
        pruned = {module: set(out) for module, out in record.pruned.items()}
        for module, indices in ranks.items():
            count = segments_of(self._space.layout, module)[0].shape[0]
            wanted = {operator.index(rank) for rank in indices}
            if wrong := sorted(rank for rank in wanted if not 0 <= rank < count):
                raise SchemaError(
                    f"module {module!r} has no atom {wrong[0]}", expected=f"0 to {count - 1}"
                )
            pruned[module] = pruned.get(module, set()) | wanted
        after = {module: tuple(sorted(out)) for module, out in sorted(pruned.items()) if out}
        if after != dict(record.pruned):
            self._said.write(replace(record, pruned=MappingProxyType(after)))

    def add_file(
        self, name: str, data: bytes | TensorFile, meta: Mapping[str, Any] | None = None
    ) -> str:
        """Append the adapter of a safetensors file; `MemoryView.export` gives the same bytes back.

        A `TensorFile` is read again in the commit, instead of being in memory until then.

        Where its tensors are those of the layout, in the same order, it is a row like any other.
        Else the row is ragged: it keeps the layout of the file, whose tensors may be of several of
        the dtypes F64, F32, F16 and BF16.

        Raises:
            AlreadyExistsError: a live adapter has this name.
            SchemaError: it is not a safetensors file of such tensors, larger than
                `limits.array_bytes`, or `meta` is not JSON.
        """
        if isinstance(data, bytes):
            data = TensorFile.of(data, f"the file of adapter {name!r}")
        layout, digest = self._space.layout, sha256(data.header.data)
        said = {"file_sha256": data.sha256, **(meta or {})}
        self._said.check_free(name)
        about: dict[str, Any] = {
            "name": name,
            "sha256": data.values.sha256,
            "meta": said,
            "header": digest,
        }
        if data.header.tensors == tensors_of(layout):
            record = self._append(data.values, **about)
        else:
            record = self._append_ragged(data.values, **about, pieces=data.pieces)
        header = data.header.data
        self._put_header(digest, lambda: Held.of(header))
        return record.id

    def take(
        self, view: MemoryView, id_or_name: str, changes: Mapping[str, Any] | None = None
    ) -> AdapterRecord:
        """Append a live row of another memory, or version, bit for bit; its new record.

        It gets an id of its own, and keeps its kind, scaling and what was pruned; `changes` are
        keys of its meta that are others here. Its bytes are read in the commit.

        Raises:
            NotFoundError: there is none.
            AlreadyExistsError: a live adapter has its name.
            SpaceMismatchError: it is not ragged, and the layouts differ.
        """
        record = view.get(id_or_name)
        ours, theirs = self._space.layout, view.space.layout
        if not record.ragged and (ours.segments, ours.dtype) != (theirs.segments, theirs.dtype):
            raise SpaceMismatchError(
                f"adapter {record.name!r} is of rank {theirs.rank}, {theirs.numel:,} numbers of "
                f"{theirs.dtype}",
                expected=f"the layout of this memory: rank {ours.rank}, {ours.numel:,} numbers of "
                f"{ours.dtype}",
            )
        self._said.check_free(record.name)
        held = view.held_value(record.id)
        said: dict[str, Any] = {
            "name": record.name,
            "sha256": record.sha256,
            "meta": {**record.meta, **(changes or {})},
            "scaling": record.scaling,
            "header": record.header,
            "kind": record.kind,
            "pruned": record.pruned,
        }
        if (digest := record.header) is not None:
            self._put_header(digest, lambda: view.held_blob(HEADER_PREFIX + digest))
        if record.ragged:
            return self._append_ragged(held, **said, pieces=record.pieces)
        return self._append(held, **said)

    def _put_header(self, digest: str, header: Callable[[], Held]) -> None:
        blob = HEADER_PREFIX + digest
        if not self._has_blob(blob):
            self._blobs[blob] = header()

    def _add(
        self,
        name: str,
        values: npt.NDArray[Any],
        meta: Mapping[str, Any],
        *,
        kind: Kind = "adapter",
    ) -> str:
        dtype = numpy_dtype(self._space.layout)
        shape = (self._space.numel,)
        if values.shape != shape or values.dtype != dtype:
            raise SpaceMismatchError(
                f"the values of adapter {name!r} are {values.dtype} of shape {values.shape}",
                expected=f"{dtype} of shape {shape} ({self._space.layout.dtype} values)",
            )
        self._said.check_free(name)
        row = np.array(values, dtype=dtype, order="C", copy=True)
        return self._append(row, name=name, sha256=sha256(row), meta=meta, kind=kind).id

    def _append_ragged(self, held: Held, *, name: str, **said: Any) -> AdapterRecord:
        """A new record as by `_append`, and the bytes of its own layout."""
        nbytes = limits.require("array_bytes", held.nbytes, f"the data of adapter {name!r}")
        record = self._append(None, name=name, **said, nbytes=nbytes)
        self._files[record.row] = held
        return record

    def _append(self, row: Array | Held | None, **said: Any) -> AdapterRecord:
        """A new record with all that is `said` of it, and its row of the values."""
        from ulid import ULID

        layout = self._space.layout
        record = AdapterRecord.of(
            id=str(ULID()),
            row=self.base.state.rows + len(self._rows),
            **{"scaling": layout.alpha / layout.rank, **said},
        )
        self._said.write(record)
        self._rows.append(row)
        return record

    def value(self, id_or_name: str) -> Array:
        """The value of an adapter that is live now, as `MemoryView.value`, added here or before.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is not what was written.
        """
        record = self._said.live(id_or_name)
        added = record.row - self.base.state.rows
        if added < 0:
            return self.base.value(record.id)
        row = self._rows[added]
        if row is None:
            return np.frombuffer(self._files[record.row].data(), np.uint8)
        if isinstance(row, Held):
            return np.frombuffer(row.data(), numpy_dtype(self._space.layout))
        return row

    def remove(self, id_or_name: str) -> None:
        """Take an adapter or a row of atoms out of the memory; its row stays, and so do its bytes.

        Raises:
            NotFoundError: there is none.
        """
        self._said.write(replace(self._said.live(id_or_name), state="removed"))

    def purge(self, id_or_name: str) -> None:
        """Remove an adapter or a row of atoms and erase its bytes, and its key, from this version.

        One that was removed before is purged by its id, or by its name when no other row bears it.
        The catalog keeps what was said of it. Older versions keep the bytes until gc takes those
        versions: see `MemoryStore.holders` and `MemoryStore.find_bytes`.

        Raises:
            NotFoundError: there is none, it is purged already, or the name fits several.
        """
        record = self._said.with_bytes(id_or_name)
        self._said.write(replace(record, state="purged"))
        added = record.row - self.base.state.rows
        if added >= 0:
            self._rows[added] = None
            self._files.pop(record.row, None)
        self._erased.add(record.row)

    def update(self, id_or_name: str, **changes: Any) -> None:
        """Change what is said of an adapter: keys of its meta, None takes one away; or its name.

        Raises:
            NotFoundError: there is none.
            AlreadyExistsError: the new name is taken.
            SchemaError: a change is not JSON.
        """
        record = self._said.live(id_or_name)
        name = changes.pop("name", record.name)
        if name != record.name:
            self._said.check_free(name)
        meta = {**record.meta, **plain_json(changes, f"the meta of adapter {record.name!r}")}
        layout = self._space.layout
        self._said.write(
            AdapterRecord.of(
                id=record.id,
                row=record.row,
                name=name,
                sha256=record.sha256,
                meta={key: value for key, value in meta.items() if value is not None},
                scaling=layout.alpha / layout.rank,
                header=record.header,
                kind=record.kind,
                pruned=record.pruned,
                nbytes=record.nbytes,
                pieces=record.pieces,
            )
        )

    def set_keys(self, keys: npt.NDArray[np.float32] | None) -> None:
        """Set the keys, (L, T, d_k) float32 in the order of `adapters` now; None takes them away.

        Adapters added later in this or another transaction have no key until keys are set again.

        Raises:
            SpaceMismatchError: not three axes, not float32, or T is not the number of adapters.
        """
        if keys is None:
            self._keys, self._keys_set, self._added_keys = None, True, None
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
        self._keys, self._keys_set = _by_row(keys, live, 0), True
        self._added_keys = None

    def add_keys(self, keys: npt.NDArray[np.float32]) -> None:
        """Give keys, (L, n, d_k) float32, to the adapters that have none: the last n, in order.

        Nothing of the other keys is read or written, but for the last of them. Without keys in
        memory it is `set_keys`.

        Raises:
            SpaceMismatchError: they do not fit the other keys, or n is not the number of adapters
                without one.
        """
        shape = self._keys_shape()
        if shape is None:
            self.set_keys(keys)
            return
        layers, covered, width = shape
        fresh = self._said.live_from(covered)
        wanted = (layers, len(fresh), width)
        if keys.dtype != np.float32 or keys.shape != wanted or not fresh:
            raise SpaceMismatchError(
                f"keys to add are {keys.dtype} of shape {keys.shape}",
                expected=f"float32 of shape {wanted}, one key per adapter without one",
                remedy=None if fresh else "set_keys, which gives every adapter another key",
            )
        more = _by_row(keys, fresh, covered)
        if self._keys_set:
            self._keys = np.concatenate([self._keys, more], axis=1)
        elif self._added_keys is not None:
            self._added_keys = np.concatenate([self._added_keys, more], axis=1)
        else:
            self._added_keys = more

    def _keys_shape(self) -> tuple[int, int, int] | None:
        """Layers, rows of the values that have keys by now, and width; None without keys."""
        if self._keys_set:
            return None if self._keys is None else self._keys.shape
        shape = self.base.keys_shape
        if shape is None or self._added_keys is None:
            return shape
        return shape[0], shape[1] + self._added_keys.shape[1], shape[2]

    def put_blob(self, name: str, data: bytes | Held) -> None:
        """Store a file under a name, in the place of an older one of that name.

        Raises:
            SchemaError: the name has other characters than letters, digits, '.', '_' and '-', or
                begins with "header-", which belongs to the store.
        """
        check_ref(name, "blob")
        self._refuse_header(name)
        self._blobs[name] = data if isinstance(data, Held) else Held.of(bytes(data))

    def delete_blob(self, name: str) -> None:
        """Take a blob away.

        Raises:
            NotFoundError: there is none of that name.
        """
        self._refuse_header(name)
        if not self._has_blob(name):
            raise NotFoundError(f"no blob {name!r}")
        if self.base.has_blob(name):
            self._blobs[name] = None
        else:
            del self._blobs[name]

    def _has_blob(self, name: str) -> bool:
        if name in self._blobs:
            return self._blobs[name] is not None
        return self.base.has_blob(name)

    def _refuse_header(self, name: str) -> None:
        if name.startswith(HEADER_PREFIX):
            raise SchemaError(f"blob names that begin with {HEADER_PREFIX!r} belong to the store")

    def write(self, tree: Tree) -> tuple[Root, Catalog]:
        """Carry the operations out on a tree at the base version; the new root and catalog."""
        base = self.base.state
        catalog = self.base.catalog.extended(self._said.lines)
        if self._rows:
            tree.append_values(base.rows, self._rows, self._space.layout)
        tree.write_files(self._files)
        erased = [row for row in sorted(self._erased) if row < base.rows]
        tree.erase_values(erased)
        ragged = {record.row for record in self._said.changed.values() if record.ragged}
        tree.delete_files(row for row in erased if row in ragged)
        if self._said.lines:
            tree.append_catalog(base.catalog_bytes, b"".join(self._said.lines))
        keys = self._write_keys(tree)
        index = self._write_blobs(tree, catalog)
        state = State(
            adapters=catalog.counts.adapters,
            atoms=catalog.counts.atoms,
            purged=catalog.counts.purged,
            rows=catalog.counts.rows,
            ragged=catalog.counts.ragged,
            catalog_bytes=catalog.size,
            catalog_chain=catalog.chain,
            catalog_lines=catalog.lines,
            keys=keys,
            index=index,
        )
        root = Root(self.base.store_id, self._space, state)
        tree.set_root(root)
        return root, catalog

    def _needless_headers(self, catalog: Catalog) -> dict[str, None]:
        """Blobs with headers of ragged rows that are purged, which no row with bytes has."""
        gone = {r.header for r in self._said.changed.values() if r.ragged and r.row in self._erased}
        if gone:
            gone -= {r.header for r in catalog.records.values() if r.state != "purged"}
        return {f"{HEADER_PREFIX}{digest}": None for digest in gone}

    def _write_blobs(self, tree: Tree, catalog: Catalog) -> IndexState:
        changed = {**self._blobs, **self._needless_headers(catalog)}
        index = self.base.index
        changed = {name: held for name, held in changed.items() if held or name in index}
        # What an older schema lists gets pages with the first commit.
        return tree.write_blobs(index, changed) if changed or index.state.listed else index.state

    def _write_keys(self, tree: Tree) -> KeysState | None:
        """Write keys that were set or added, with zeros at the erased rows; their state then."""
        state, keys, added = self.base.state.keys, self._keys, self._added_keys
        if not self._keys_set:
            covered = 0 if state is None else state.rows
            if state is None or all(row >= covered for row in self._erased):
                if state is None or added is None:
                    return state
                self._erase_keys(added, covered)
                return tree.append_keys(added, state)
            there = self.base.row_keys()
            assert there is not None
            keys = there.copy() if added is None else np.concatenate([there, added], axis=1)
        if keys is not None and self._erased:
            keys = keys.copy()
            self._erase_keys(keys, 0)
        return tree.write_keys(keys, state)

    def _erase_keys(self, keys: Array, first: int) -> None:
        """Zeros at the erased rows, in keys (L, n, d_k) that begin with row `first`."""
        rows = range(first, first + keys.shape[1])
        keys[:, [row - first for row in self._erased if row in rows]] = 0


def _by_row(keys: Array, records: Sequence[AdapterRecord], first: int) -> Array:
    """Keys (L, t, d_k) of these records at their rows, from row `first` on; zeros between."""
    spread = np.zeros((keys.shape[0], records[-1].row + 1 - first, keys.shape[2]), dtype="<f4")
    spread[:, [record.row - first for record in records]] = keys
    return spread
