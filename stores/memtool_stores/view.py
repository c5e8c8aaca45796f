"""One version of the memory, as it was and will be: no later commit changes what a view gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from memtool_stores.atoms import AtomBank, bank, modules_of, segments_of
from memtool_stores.cache import LOCK_SECONDS, ValueCache, checked
from memtool_stores.catalog import AdapterRecord, Catalog
from memtool_stores.errors import (
    IntegrityError,
    NotFoundError,
    SchemaError,
    SpaceMismatchError,
    VersionExpiredError,
)
from memtool_stores.held import Held
from memtool_stores.history import Version, is_expired, of_snapshot, sealed_tree, snapshots
from memtool_stores.ice import guard_fork, icechunk, open_repository, translated
from memtool_stores.index import Entry, Index, Pages
from memtool_stores.space import Layout, Space
from memtool_stores.sums import check_snapshot
from memtool_stores.tensorfile import TensorInfo, read_header, write_header
from memtool_stores.tree import Array, Root, State, Tree, sha256

NAMED = 20
"""Blobs that an error names at most."""

HEADER_PREFIX = "header-"
"""Blobs of this name hold safetensors headers; they belong to the store."""


def tensors_of(layout: Layout) -> tuple[TensorInfo, ...]:
    """The tensors of a file of that layout."""
    return tuple(TensorInfo(s.name, s.shape, layout.dtype) for s in layout.segments)


class MemoryView:
    """An immutable version. Everything is read on first use and checked against its hash.

    bfloat16 values come as their bits in uint16 (`space.layout.dtype` says "bfloat16").
    """

    def __init__(
        self,
        repository: Any,
        where: str,
        version: str,
        known: Callable[[Catalog | None], Catalog],
        lock_timeout: float = LOCK_SECONDS,
        pages: Pages | None = None,
    ) -> None:
        self._repository = repository
        self._where = where
        self._id = version
        # Gives the newest catalog that the store has parsed, and takes ours in exchange.
        self._known = known
        # Pages of the index of blobs that the store has read, which gets ours, too.
        self._pages = {} if pages is None else pages
        # Of the cache.
        self._lock_timeout = lock_timeout

    def __repr__(self) -> str:
        return f"MemoryView({self._where!r}, version={self._id!r})"

    def __len__(self) -> int:
        return self.state.adapters

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Errors inside the block, told apart: damaged, or expired under our hands."""
        guard_fork()
        try:
            with translated(f"read {what}", self._where):
                yield
        except (IntegrityError, NotFoundError) as error:
            if self._is_gone(error):
                raise VersionExpiredError(
                    f"version {self._id} was taken away by gc while it was read",
                    remedy="open a view of a version that `memtool log` lists",
                ) from error
            if isinstance(error, NotFoundError) and error.__cause__ is not None:
                # It belongs to this version and is not there.
                raise IntegrityError(
                    what="version", name=self._id, expected=what, found=error.message
                ) from error
            raise

    def _is_gone(self, error: Exception) -> bool:
        """Whether the version of this view has left the store."""
        if error.__cause__ is None:
            return False
        # A fresh repository: the one at hand remembers what it has seen.
        fresh = open_repository(self._where)
        try:
            fresh.lookup_snapshot(self._id)
        except icechunk().IcechunkError as missing:
            return "not found" in str(missing).lower() and is_expired(fresh, self._where, self._id)
        return False

    @cached_property
    def _tree(self) -> Tree:
        with self._reading(f"version {self._id}"):
            return sealed_tree(self._repository, self._id)

    @cached_property
    def _root(self) -> Root:
        return self._tree.root()

    @property
    def state(self) -> State:
        """What this version must contain: counts and hashes."""
        return self._root.state

    @property
    def schema(self) -> int:
        """The schema that this version was written in."""
        _ = self._root  # checked
        return int(self._tree.attributes["schema_version"])

    @property
    def space(self) -> Space:
        """Backbone and layout."""
        return self._root.space

    @property
    def store_id(self) -> str:
        """The identity of the store and of its clones."""
        return self._root.store_id

    @cached_property
    def _version(self) -> Version:
        with self._reading(f"version {self._id}"):
            check_snapshot(self._where, self._id)
            snapshot, oldest = next(snapshots(self._repository, self._id))
            return of_snapshot(snapshot, oldest=oldest)

    @property
    def version(self) -> str:
        """Id of this version."""
        return self._id

    @property
    def message(self) -> str:
        """What the committer said."""
        return self._version.message

    @property
    def time(self) -> datetime:
        """When it was committed, aware."""
        return self._version.time

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the committer recorded, as JSON values."""
        return self._version.metadata

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog with the removed adapters in it."""
        with self._reading("the catalog"):
            catalog = self._tree.read_catalog(self._known(None), self.state)
        self._known(catalog)
        return catalog

    def require_readable(self) -> None:
        """Nothing, when all that has a name in this version can be told by it.

        Raises:
            IntegrityError, SchemaError: the catalog or the list of blobs holds what no store of
                ours has, a name that is none for example.
        """
        self.catalog  # noqa: B018
        self.blobs()

    @property
    def adapters(self) -> tuple[AdapterRecord, ...]:
        """The live adapters in row order."""
        return self.catalog.live

    @property
    def atom_records(self) -> tuple[AdapterRecord, ...]:
        """The live rows of atoms, one a task, in row order."""
        return self.catalog.live_atoms

    @property
    def live(self) -> tuple[AdapterRecord, ...]:
        """The live adapters, then the live rows of atoms."""
        return (*self.adapters, *self.atom_records)

    def page(self, first: int, count: int) -> tuple[AdapterRecord, ...]:
        """The `count` live records from the `first`-th on, from 0, in row order.

        It reads what it needs of the catalog where that was not read yet: after the last of these
        nothing is, when no row was ever changed or removed, and then of the bytes the crc32c alone
        is checked.

        Raises:
            IntegrityError: that is not what was written.
        """
        end = first + count
        if "catalog" in self.__dict__ or end >= self.state.adapters + self.state.atoms:
            return tuple(sorted(self.live, key=lambda record: record.row)[first:end])
        with self._reading("the catalog"):
            return tuple(self._tree.read_live(self.state, end)[first:])

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the live adapters in row order."""
        return tuple(record.id for record in self.adapters)

    def get(self, id_or_name: str) -> AdapterRecord:
        """The live adapter or row of atoms of that id or name.

        Raises:
            NotFoundError: there is none.
        """
        return self.catalog.get(id_or_name)

    def modules(self) -> tuple[str, ...]:
        """Names of the modules that hold atoms: those with a `.lora_A` and a `.lora_B`."""
        return modules_of(self.space.layout)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {record.id: position for position, record in enumerate(self._of_layout)}

    @cached_property
    def _of_layout(self) -> tuple[AdapterRecord, ...]:
        """The live adapters that are not ragged, in row order."""
        return tuple(record for record in self.adapters if not record.ragged)

    @cached_property
    def _cache(self) -> ValueCache:
        return self._cache_of(self._of_layout)

    def _refuse_ragged(self, records: Sequence[AdapterRecord]) -> None:
        for record in records:
            if record.ragged:
                raise SpaceMismatchError(
                    f"adapter {record.name!r} is ragged: it has a layout of its own",
                    expected="adapters of the layout of the store",
                    remedy="export(id) gives its file, value(id) the bytes of its tensors",
                )

    @cached_property
    def _atom_cache(self) -> ValueCache:
        return self._cache_of(self.atom_records)

    def _cache_of(self, records: Sequence[AdapterRecord]) -> ValueCache:
        return ValueCache(
            self._read_rows, self.store_id, self.space, records, lock_timeout=self._lock_timeout
        )

    def _read_rows(self, rows: Sequence[int]) -> Array:
        with self._reading(f"rows {rows[0]} to {rows[-1]} of the values"):
            return self._tree.read_values(rows, self.space.layout)

    def values(self, ids: Sequence[str] | None = None) -> Array:
        """The values of these adapters (ids or names), all live ones in row order for None.

        Returns:
            (t, numel), read-only, a copy: float32, float16, or bfloat16 bits as uint16. What
            needs one tensor of each takes `segment`, which reads no other.

        Raises:
            NotFoundError: one of them is not there, or is a row of atoms.
            SpaceMismatchError: one of them is ragged; `export` gives its file.
            IntegrityError: a row is not what was written.
        """
        if ids is None:
            self._refuse_ragged(self.adapters)
            return self._cache.rows()
        return self._cache.rows([self._position(name) for name in ids])

    def _position(self, id_or_name: str) -> int:
        record = self.get(id_or_name)
        if record.kind != "adapter":
            raise NotFoundError(
                f"{record.name!r} is a row of atoms", expected="adapters", remedy="view.atoms(...)"
            )
        self._refuse_ragged([record])
        return self._positions[record.id]

    def value(self, id_or_name: str) -> Array:
        """The value of an adapter or row of atoms, (numel,), read-only, from the store and checked.

        Of a ragged adapter, the data section of its file: uint8 (nbytes,).

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is not what was written.
        """
        record = self.get(id_or_name)
        with self._reading(f"the value of {record.name!r}"):
            if record.ragged:
                row = self._tree.read_file(record)
            else:
                row = self._tree.read_row(record, self.space.layout)
        return checked(row, record)

    def held_value(self, id_or_name: str) -> Held:
        """The bytes of `value`, not read yet.

        Raises:
            NotFoundError: there is none.
        """
        record = self.get(id_or_name)
        nbytes = self.space.layout.nbytes if record.nbytes is None else record.nbytes
        where = f"adapter {record.name!r} of {self._where}"
        return Held(record.sha256, nbytes, lambda: self.value(record.id).tobytes(), where)

    def held_blob(self, name: str) -> Held:
        """The bytes of `blob`, not read yet.

        Raises:
            NotFoundError: there is none of that name.
            IntegrityError: it should be there and is not.
        """
        entry = self._entry(name)
        with self._reading(f"blob {name!r}"):
            nbytes = self._tree.blob_nbytes(name, entry)
        return Held(
            entry.sha256, nbytes, lambda: self.blob(name), f"blob {name!r} of {self._where}"
        )

    def segment(self, name: str, out: Array | None = None) -> Array:
        """One tensor of all live adapters, (t, *shape): a read-only copy, or in `out`.

        `out` is C-contiguous, of that shape and of the type of `values`.

        Raises:
            NotFoundError: the layout has no such segment.
            SpaceMismatchError: a live adapter is ragged; `export` gives its file.
            IntegrityError: a row is not what was written.
        """
        self._refuse_ragged(self.adapters)
        return self._cache.tensor(self.space.layout.segment(name), out)

    def atoms(self, module: str) -> AtomBank:
        """The atoms of one module over all live rows of atoms, pruned ones left out.

        Raises:
            NotFoundError: no module of that name holds atoms; `modules` lists them.
            IntegrityError: a row is not what was written.
        """
        keys, values = map(self._atom_cache.tensor, segments_of(self.space.layout, module))
        return bank(keys, values, self.atom_records, module)

    def keys(self) -> Array | None:
        """The keys of the live adapters, (L, t_k, d_k) float32, or None when there are none.

        Aligned with `adapters[:t_k]`: adapters added after the keys were set have none yet, and
        they are the last. Removed adapters are skipped.

        Raises:
            IntegrityError: they are not what was written.
        """
        keys = self.row_keys()
        if keys is None:
            return None
        rows = [record.row for record in self.adapters if record.row < keys.shape[1]]
        return keys if len(rows) == keys.shape[1] else np.ascontiguousarray(keys[:, rows])

    @property
    def keys_shape(self) -> tuple[int, int, int] | None:
        """Layers, rows of the values that the keys cover, and width; None when there are none."""
        state = self.state.keys
        if state is None:
            return None
        with self._reading("the keys"):
            return self._tree.keys_shape(state)

    def row_keys(self) -> Array | None:
        """The keys by row of the values, (L, R, d_k) float32, zeros where a row had none.

        Raises:
            IntegrityError: they are not what was written.
        """
        state = self.state.keys
        if state is None:
            return None
        with self._reading("the keys"):
            found, keys = self._tree.read_keys(state)
        if found != state.sha256:
            raise IntegrityError(what="keys", name=self._id, expected=state.sha256, found=found)
        return keys

    @cached_property
    def index(self) -> Index:
        """The blobs by name, those that belong to the store too, and where they lie."""
        return self._tree.index(self.state, self._pages)

    @cached_property
    def blob_hashes(self) -> Mapping[str, str]:
        """The SHA-256 of every blob by name, those of the store too; all pages are read."""
        with self._reading("the list of blobs"):
            return MappingProxyType({name: one.sha256 for name, one in self.index.items()})

    def blobs(self) -> tuple[str, ...]:
        """Names of the blobs, sorted."""
        return tuple(sorted(b for b in self.blob_hashes if not b.startswith(HEADER_PREFIX)))

    def has_blob(self, name: str) -> bool:
        """Whether there is a blob of that name; no list of all is read for it."""
        return self.blob_sha256(name) is not None

    def blob_sha256(self, name: str) -> str | None:
        """The SHA-256 of a blob, None when there is none of that name."""
        with self._reading("the list of blobs"):
            found = self.index.get(name)
        return None if found is None else found.sha256

    def blob(self, name: str) -> bytes:
        """The bytes of a blob.

        Raises:
            NotFoundError: there is none of that name.
            IntegrityError: they are not what was written.
        """
        entry = self._entry(name)
        expected = entry.sha256
        with self._reading(f"blob {name!r}"):
            data = self._tree.read_blob(name, entry)
        if sha256(data) != expected:
            raise IntegrityError(what="blob", name=name, expected=expected, found=sha256(data))
        return data

    def _entry(self, name: str) -> Entry:
        with self._reading("the list of blobs"):
            found = self.index.get(name)
        if found is None:
            names = self.blobs()
            few = f"one of {', '.join(names[:NAMED])}{', …' if len(names) > NAMED else ''}"
            raise NotFoundError(
                f"no blob {name!r} in version {self._id}", expected=few if names else None
            )
        return found

    def export(self, id_or_name: str) -> bytes:
        """One adapter as a safetensors file.

        Byte for byte the file that `Transaction.add_file` was given; for one that came as an array,
        a header with the names and shapes of the layout is made.

        Raises:
            NotFoundError: there is none.
            IntegrityError: it is not what was written.
        """
        record = self.get(id_or_name)
        if record.header is None:
            layout = self.space.layout
            header = write_header([(s.name, s.shape) for s in layout.segments], layout.dtype)
        else:
            header = self.blob(HEADER_PREFIX + record.header)
            self._check_header(header, record)
        return header + self.value(record.id).tobytes()

    def _check_header(self, header: bytes, record: AdapterRecord) -> None:
        """Nothing, when this is the header of a safetensors file of our layout, or of its own.

        Raises:
            SchemaError: it is not.
        """
        layout, where = self.space.layout, f"the stored file of adapter {record.name!r}"
        nbytes = layout.nbytes if record.nbytes is None else record.nbytes
        found, wanted = read_header(header, where, size=len(header) + nbytes), tensors_of(layout)
        if not record.ragged and found.tensors != wanted:
            raise SchemaError(
                f"{where} has other tensors than the layout of the store",
                expected=f"{len(wanted)} tensors of {layout.dtype}, in the order of the layout",
            )
