"""The zarr tree of one version, as store.md draws it: its arrays, its state, and its seal.

/            attributes: schema_version, min_reader, store_id, backbone, layout, state
/values      [T, numel]     one adapter, or the atoms of one task, a row: chunk (1, numel), crc32c
/files/row   [bytes]        the data of a ragged row, which has no bytes in /values, crc32c
/catalog     [bytes]        see catalog.py
/keys        [L, R, d_k]    float32, row-aligned with /values (zeros where there is no key), chunks
                            of some rows (keys.py), crc32c
/parts       [P]            bytes of any length, an element a chunk: blobs, and the pages of their
                            index (index.py), crc32c
/blobs/name  [bytes]        blobs that an older schema wrote, crc32c
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores import keys, limits
from memtool_stores.arrays import (
    CRC32C_BYTES,
    delete,
    listed,
    not_as_written,
    opened,
    read_chunks,
    read_packed,
    read_row,
    write_bytes,
)
from memtool_stores.catalog import AdapterRecord, Catalog, Counts, first_lines, live_of_lines
from memtool_stores.errors import IntegrityError, NewerSchemaError, SchemaError
from memtool_stores.held import Held
from memtool_stores.index import Entry, Index, IndexState, Pages
from memtool_stores.jsonvalues import digest, mapping, member, whole
from memtool_stores.keys import KeysState
from memtool_stores.migrate import SCHEMA_VERSION, migrated
from memtool_stores.names import check_id, check_ref
from memtool_stores.parts import (
    PARTS,
    check_parts,
    delete_parts,
    parts_of,
    pieces_of,
    read_parts,
    write_parts,
)
from memtool_stores.ragged import chunk_bytes, chunk_count
from memtool_stores.space import Layout, Space

CATALOG_CHUNK_BYTES = 16 * 1024

LISTED_BYTES = 4 * CATALOG_CHUNK_BYTES
"""Of the catalog that are read at a time for a list of its first records."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class State:
    """What a version must contain; every transaction writes it, so two of them always conflict.

    `adapters` and `atoms` count the live rows of each kind, `purged` those without bytes, `rows`
    all there ever were, `ragged` those with an array of their own under /files. `catalog_lines` is
    None in a version of an older schema than 5.
    """

    adapters: int = 0
    atoms: int = 0
    purged: int = 0
    rows: int = 0
    ragged: int = 0
    catalog_bytes: int = 0
    catalog_chain: str = ""
    catalog_lines: int | None = 0
    keys: KeysState | None = None
    index: IndexState = field(default_factory=IndexState)

    @classmethod
    def of_json(cls, data: Any) -> State:
        """The state that `asdict` wrote.

        Raises:
            SchemaError: a part is missing, of the wrong kind, or larger than its limit.
        """
        what = "the state"
        said = mapping(data, what)
        # A newer schema that we may read can have more in it.
        counts = {
            name: whole(member(said, name, what), f"{name} of {what}")
            for name in ("adapters", "atoms", "purged", "rows", "ragged", "catalog_bytes")
        }
        if counts["adapters"] + counts["atoms"] + counts["purged"] > counts["rows"]:
            raise SchemaError(
                f"{what} counts {counts['adapters']:,} adapters, {counts['atoms']:,} rows of atoms "
                f"and {counts['purged']:,} purged rows",
                expected=f"together at most {counts['rows']:,} rows",
            )
        if counts["ragged"] + counts["purged"] > counts["rows"]:
            raise SchemaError(
                f"{what} counts {counts['ragged']:,} ragged and {counts['purged']:,} purged rows",
                expected=f"together at most {counts['rows']:,} rows",
            )
        limits.require("array_bytes", counts["catalog_bytes"], "the catalog")
        chain, lines = (member(said, name, what) for name in ("catalog_chain", "catalog_lines"))
        return cls(
            **counts,
            catalog_lines=None if lines is None else whole(lines, f"catalog_lines of {what}"),
            catalog_chain=chain if chain == "" else digest(chain, f"catalog_chain of {what}"),
            keys=KeysState.of_json(member(said, "keys", what), counts["rows"]),
            index=IndexState.of_json(member(said, "blobs", what)),
        )

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        said = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "index"}
        keys = None if self.keys is None else asdict(self.keys)
        return {**said, "keys": keys, "blobs": self.index.to_json()}


@dataclass(frozen=True)
class Root:
    """The attributes of the root group."""

    store_id: str
    space: Space
    state: State

    def to_json(self) -> dict[str, Any]:
        """The attributes as they are stored."""
        return {
            "schema_version": SCHEMA_VERSION,
            "min_reader": SCHEMA_VERSION,
            "store_id": self.store_id,
            **self.space.to_json(),
            "state": self.state.to_json(),
        }


def _too_new(found: int, needs: str, schema: int) -> NewerSchemaError:
    return NewerSchemaError(
        f"this store has schema {found} and {needs} schema {schema}",
        expected=f"at most schema {SCHEMA_VERSION}",
        remedy="pip install --upgrade memtool",
    )


def numpy_dtype(layout: Layout) -> np.dtype[Any]:
    """How numpy holds a value: bfloat16, which it has not, as the bits in uint16."""
    return np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[layout.dtype])


def sha256(data: bytes | Array) -> str:
    """Hash of bytes, or of the bytes of a C-ordered array, in hex."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(data).view(np.uint8).data).hexdigest()


def seal(attributes: Mapping[str, Any], *, parent: str, time: str, message: str, user: str) -> str:
    """Hash over everything of a version that has no hash of its own."""
    text = json.dumps([attributes, parent, time, message, user], sort_keys=True, ensure_ascii=True)
    return sha256(text.encode())


class Tree:
    """The tree of one icechunk session; reading and writing by what things are, not by paths."""

    def __init__(self, session: Any, *, write: bool = False) -> None:
        import zarr

        self._zarr = zarr
        try:
            self._group = zarr.open_group(session.store, mode="r+" if write else "r", zarr_format=3)
        except FileNotFoundError as error:
            raise SchemaError("this version has no memory in it") from error
        self.attributes: dict[str, Any] = dict(self._group.attrs)
        self._values_open = False
        self.chunk_lengths: set[int] = set()
        """Stored bytes of the chunks of keys, blobs and ragged rows that were read."""

    @classmethod
    def create(cls, session: Any, root: Root) -> Tree:
        """The empty tree of a new store."""
        import zarr

        layout = root.space.layout
        zarr.create_group(session.store, attributes=root.to_json())
        tree = cls(session, write=True)
        bits = {"bits_of": "bfloat16"} if layout.dtype == "bfloat16" else {}
        tree._create(
            "values", (0, layout.numel), (1, layout.numel), numpy_dtype(layout), attributes=bits
        )
        tree._create("catalog", (0,), (CATALOG_CHUNK_BYTES,), np.dtype("u1"), compress=True)
        return tree

    def _create(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype[Any],
        *,
        compress: bool = False,
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        codecs = self._zarr.codecs
        zstd = [codecs.ZstdCodec(level=3)] if compress else []
        return self._group.create_array(
            name,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            compressors=[*zstd, codecs.Crc32cCodec()],
            filters=None,
            fill_value=0,
            attributes=attributes,
            overwrite=True,
            # A row of negative zeros equals the fill value, but not its bytes.
            config={"write_empty_chunks": True},
        )

    def root(self) -> Root:
        """The checked attributes.

        Raises:
            NewerSchemaError: only a newer memtool reads this store.
            SchemaError: these are not the attributes of a memory.
        """
        found, needed = (self.attributes.get(name) for name in ("schema_version", "min_reader"))
        if type(found) is not int or type(needed) is not int or min(found, needed) < 1:
            raise SchemaError("this zarr tree is not a memory", expected="a schema_version")
        if needed > SCHEMA_VERSION:
            raise _too_new(found, "needs a memtool that reads", needed)
        what = "the root group"
        mapping(member(self.attributes, "state", what), "the state")
        try:
            attributes = migrated(self.attributes)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise SchemaError(
                f"the state of a tree of schema {found}: {type(error).__name__}: {error}",
                expected="what memtool wrote in that schema",
            ) from error
        return Root(
            check_id(member(attributes, "store_id", what), "a store"),
            Space.from_json(attributes),
            State.of_json(attributes["state"]),
        )

    def set_root(self, root: Root) -> None:
        """Write the attributes, and bring an older tree to the schema they are of.

        Raises:
            NewerSchemaError: the tree is of a schema that this code may read, but not write.
        """
        found = self.attributes["schema_version"]
        if found > SCHEMA_VERSION:
            raise _too_new(found, "is written only by a memtool of", found)
        migrated(self.attributes, self._group)
        self._group.attrs.put(root.to_json())
        self.attributes = root.to_json()

    def _open_values(self, layout: Layout, rows: int | None = None) -> Any:
        dtype, numel = numpy_dtype(layout), layout.numel
        return opened(self._group, "values", dtype, (rows, numel), (1, numel))

    def read_values(self, rows: Sequence[int], layout: Layout) -> Array:
        """These rows of the values, (len(rows), numel).

        Raises:
            IntegrityError: one has no bytes, other ones than its crc32c says, or too few.
        """
        if not self._values_open:
            self._open_values(layout)
            self._values_open = True
        places = [f"{row}/0" for row in rows]
        chunks = read_chunks(self._group, "values", places, layout.nbytes)
        data = b"".join(chunks)
        return np.frombuffer(data, numpy_dtype(layout)).reshape(len(rows), layout.numel)

    def read_row(self, record: AdapterRecord, layout: Layout) -> Array:
        """The row of a record, (numel,), read-only, as its chunk has it, for a check of its hash.

        A row is one chunk: its bytes, then the crc32c. The way through zarr's arrays takes longer
        than the read itself, and the hash of the catalog proves more than the crc32c.

        Raises:
            IntegrityError: it has no bytes, or not as many as a row of this layout.
        """
        data = read_row(self._group, "values", f"{record.row}/0")
        if data is None or len(data) != layout.nbytes:
            raise IntegrityError(
                what="values",
                name=record.name,
                expected=f"{layout.nbytes:,} bytes",
                found="no bytes" if data is None else f"{len(data):,} bytes",
            )
        return np.frombuffer(data, numpy_dtype(layout))

    def append_values(self, at: int, rows: Sequence[Array | Held | None], layout: Layout) -> None:
        """Write rows from row `at` on, where the values must end; None is a row without bytes.

        Raises:
            IntegrityError: the values have another shape, type or encoding.
        """
        values = self._open_values(layout, at).with_config({"write_empty_chunks": True})
        values.resize((at + len(rows), layout.numel))
        for index, row in enumerate(rows, start=at):
            if isinstance(row, Held):
                values[index] = np.frombuffer(row.data(), numpy_dtype(layout))
            elif row is not None:
                values[index] = row

    def has_row(self, row: int) -> bool:
        """Whether a row of the values has bytes."""
        from zarr.core.sync import sync

        return bool(sync(self._group.store.exists(f"values/c/{row}/0")))

    def erase_values(self, rows: Iterable[int]) -> None:
        """Take the bytes of these rows out of this version."""
        delete(self._group, [f"values/c/{row}/0" for row in rows])

    def write_files(self, files: Mapping[int, Held]) -> None:
        """Write the bytes of ragged rows, by row; they are read one after the other.

        Raises:
            IntegrityError: what is called /files is no group.
        """
        if not files:
            return
        found = self._group.get("files")
        if found is None:
            self._group.create_group("files")
        elif hasattr(found, "chunks"):
            raise not_as_written("files", "a group", "an array")
        self._write_bytes({f"files/{row}": held for row, held in files.items()}, chunk_bytes)

    def _write_bytes(self, new: Mapping[str, Held], step: Callable[[int], int]) -> None:
        """Write new arrays of bytes by name; `step` gives the length of chunks of so many bytes."""
        for first in [*new][:1]:  # what the others are encoded like
            self._create(first, (0,), (1,), np.dtype("u1"))
            read = ((name, held.data()) for name, held in new.items())
            arrays = ((name, data, step(len(data))) for name, data in read)
            write_bytes(self._group, first, arrays)

    def delete_files(self, rows: Iterable[int]) -> None:
        """Take the bytes of these ragged rows out of this version."""
        from zarr.core.sync import sync

        for row in rows:
            sync(self._group.store.delete_dir(f"files/{row}"))

    def files(self) -> list[str]:
        """Names of what lies under /files, whatever it is: of rows, unless a stranger was there."""
        return listed(self._group, "files")

    def file_chunks(self, record: AdapterRecord) -> Iterator[memoryview]:
        """The chunks of a ragged row, one after the other; the last is filled up with zeros.

        Raises:
            IntegrityError: there are none of the length that the record says, or one is not what
                was written; names the adapter.
            SchemaError: they are larger than `limits.array_bytes`.
        """
        assert record.nbytes is not None
        limits.require("array_bytes", record.nbytes, f"the data of adapter {record.name!r}")
        path, nbytes = f"files/{record.row}", chunk_bytes(record.nbytes)
        try:
            opened(self._group, path, np.dtype("u1"), (record.nbytes,), (nbytes,))
            self.chunk_lengths.add(nbytes + CRC32C_BYTES)
            yield from read_chunks(self._group, path, range(chunk_count(record.nbytes)), nbytes)
        except IntegrityError as error:
            raise IntegrityError(
                what="values",
                name=record.name,
                expected=error.expected or "what was written",
                found=f"{error.name}: {error.found}",
            ) from error

    def read_file(self, record: AdapterRecord) -> Array:
        """The bytes of a ragged row, uint8 (nbytes,), read-only, for a check of their hash.

        Raises:
            IntegrityError, SchemaError: as `file_chunks`.
        """
        return np.frombuffer(b"".join(self.file_chunks(record)), np.uint8)[: record.nbytes]

    def read_catalog(self, known: Catalog, state: State) -> Catalog:
        """The catalog of `state`, reading only what `known` does not have where it is a prefix.

        Raises:
            IntegrityError: it is not what was written, or counts other rows than `state`.
        """
        catalog = self._read_catalog(known, state)
        counts = Counts(state.adapters, state.atoms, state.purged, state.rows, state.ragged)
        if catalog.counts != counts:
            raise IntegrityError(
                what="catalog", name="counts", expected=str(counts), found=str(catalog.counts)
            )
        if state.catalog_lines not in {None, catalog.lines}:
            raise IntegrityError(
                what="catalog",
                name="lines",
                expected=f"{state.catalog_lines:,}",
                found=f"{catalog.lines:,}",
            )
        return catalog

    def read_live(self, state: State, end: int) -> list[AdapterRecord]:
        """The first `end` live records in row order, of a catalog that nobody has read.

        Where no line changes what an earlier one says, the lines of these are read and no others.

        Raises:
            IntegrityError: they are not what was written.
        """
        if not state.catalog_lines == state.rows == state.adapters + state.atoms:
            return live_of_lines(self._catalog_bytes(0, state), state.catalog_chain, end)
        data, read = b"", 0
        while data.count(b"\n") < min(end, state.rows):
            until = min(read + LISTED_BYTES, state.catalog_bytes)
            if read == until:
                break
            data += self.catalog_bytes(read, until, state)
            read = until
        return first_lines(data, min(end, state.rows))

    def _read_catalog(self, known: Catalog, state: State) -> Catalog:
        if (known.chain, known.size) == (state.catalog_chain, state.catalog_bytes):
            return known
        if 0 < known.size < state.catalog_bytes:
            try:
                return known.read_on(self._catalog_bytes(known.size, state), state.catalog_chain)
            except IntegrityError:
                # Not a prefix (a rollback lies between), or damaged: the full reading decides.
                return self._read_catalog(type(known)(), state)
        return type(known)().read_on(self._catalog_bytes(0, state), state.catalog_chain)

    def _open_catalog(self, nbytes: int) -> Any:
        chunks = (CATALOG_CHUNK_BYTES,)
        return opened(self._group, "catalog", np.dtype("u1"), (nbytes,), chunks, zstd=True)

    def _catalog_bytes(self, first: int, state: State) -> bytes:
        return self.catalog_bytes(first, state.catalog_bytes, state)

    def catalog_bytes(self, first: int, last: int, state: State) -> bytes:
        """The bytes of the catalog from `first` to before `last`.

        Raises:
            IntegrityError: one of their chunks is not what was written.
        """
        self._open_catalog(state.catalog_bytes)
        begin, end = first // CATALOG_CHUNK_BYTES, math.ceil(last / CATALOG_CHUNK_BYTES)
        chunks = read_packed(self._group, "catalog", range(begin, end), CATALOG_CHUNK_BYTES)
        offset = begin * CATALOG_CHUNK_BYTES
        return b"".join(chunks)[first - offset : last - offset]

    def append_catalog(self, at: int, data: bytes) -> None:
        """Write lines from byte `at` on, where the catalog must end."""
        catalog = self._open_catalog(at)
        catalog.resize((at + len(data),))
        catalog[at:] = np.frombuffer(data, np.uint8)

    def read_keys(self, state: KeysState) -> tuple[str, Array]:
        """The hash that proves the keys, and they, (L, R, d_k) float32, by row of the values.

        Raises:
            IntegrityError: they are not the bytes that were written, or of another shape.
            SchemaError: they are larger than `limits.array_bytes`.
        """
        return keys.read_keys(self._group, state)

    def keys_shape(self, state: KeysState) -> tuple[int, int, int]:
        """Layers, rows and width of the keys."""
        layers, rows, width = keys.open_keys(self._group, state).shape
        return layers, rows, width

    def read_key_chains(self, state: KeysState, known: Sequence[str]) -> list[str]:
        """The hash chain of the keys, as `keys.read_chains`."""
        array = keys.open_keys(self._group, state)
        self.chunk_lengths.add(keys.block_nbytes(array) + CRC32C_BYTES)
        return keys.read_chains(self._group, state, known)

    def write_keys(self, new: Array | None, old: KeysState | None) -> KeysState | None:
        """Put these keys in the place of the old ones; None takes them away."""
        if new is not None:
            return keys.write_keys(self._group, self._create_keys, new, old)
        if keys.KEYS in self._group:
            del self._group[keys.KEYS]
        return None

    def append_keys(self, new: Array, old: KeysState) -> KeysState:
        """Put these keys, (L, n, d_k), after the old ones."""
        return keys.append_keys(self._group, self._create_keys, new, old)

    def _create_keys(self, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        self._create(keys.KEYS, shape, chunks, keys.KEYS_DTYPE)

    def index(self, state: State, pages: Pages | None = None) -> Index:
        """The blobs of this version; `pages` of their index are known."""
        known = {} if pages is None else pages
        return Index(state.index, lambda pieces: read_parts(self._group, pieces), known)

    def parts(self) -> list[int]:
        """The parts that have bytes, whoever they belong to, sorted."""
        return sorted(map(int, listed(self._group, f"{PARTS}/c")))

    def read_blob(self, name: str, entry: Entry) -> bytes:
        """The bytes of a blob.

        Raises:
            IntegrityError: it is not there, or not the bytes that were written.
            SchemaError: it is larger than `limits.array_bytes`.
        """
        if entry.part is not None:
            limits.require("array_bytes", entry.nbytes, f"blob {name!r}")
            try:
                return b"".join(read_parts(self._group, pieces_of(entry.part, entry.nbytes)))
            except IntegrityError as error:
                expected = error.expected or "what was written"
                raise IntegrityError(
                    what="blob", name=name, expected=expected, found=error.found
                ) from error
        array = self._open_blob(name)
        (size,), (chunk,) = array.shape, array.chunks
        limits.require("array_bytes", max(size, chunk), f"blob {name!r}")
        self.chunk_lengths.add(chunk + CRC32C_BYTES)
        places = range(math.ceil(size / chunk))
        return b"".join(read_chunks(self._group, f"blobs/{name}", places, chunk))[:size]

    def read_small_blobs(self, entries: Sequence[Entry]) -> Iterator[bytes]:
        """The bytes of blobs of one part each, read together.

        Raises:
            IntegrityError: as `read_blob`; it does not say of which.
        """
        pieces = [(entry.part, entry.nbytes) for entry in entries if entry.part is not None]
        return map(bytes, read_parts(self._group, pieces))

    def blob_nbytes(self, name: str, entry: Entry) -> int:
        """The length that a blob says it has. Raises IntegrityError when it is not there."""
        return entry.nbytes if entry.part is not None else int(self._open_blob(name).shape[0])

    def _open_blob(self, name: str) -> Any:
        path = f"blobs/{check_ref(name, 'blob')}"
        return opened(self._group, path, np.dtype("u1"), (None,), (None,))

    def write_blobs(self, index: Index, blobs: Mapping[str, Held | None]) -> IndexState:
        """Put these bytes in the place of the old ones, None for a blob that goes.

        The old ones, and the pages of the index that named them, go from this version.

        Raises:
            SchemaError: an old one is larger than `limits.array_bytes`.
        """
        parts = index.allotment()
        old = {name: index.get(name) for name in blobs}
        for name, was in old.items():
            if was is not None and was.part is not None:
                limits.require("array_bytes", was.nbytes, f"blob {name!r}")
                parts.give_back(was.part, parts_of(was.nbytes))
            elif was is not None:
                del self._group[f"blobs/{name}"]
        entries: dict[str, Entry | None] = dict.fromkeys(blobs)
        data: list[tuple[int, Held]] = []
        # New ones first: what is replaced now is likely to be replaced again.
        for name, held in sorted(blobs.items(), key=lambda blob: old[blob[0]] is not None):
            if held is not None:
                part = parts.take(parts_of(held.nbytes))
                entries[name] = Entry(held.sha256, part, held.nbytes)
                data.append((part, held))
        made = index.changed(entries, parts)
        if parts.count:
            held_data = ((part, held.data()) for part, held in data)
            pages = ((part, page.data()) for part, page in made.written.items())
            write_parts(self._group, parts.count, itertools.chain(held_data, pages))
        delete_parts(self._group, parts.emptied)
        return IndexState(parts.count, made.page, made.count, free=parts.free)

    def check_shapes(self, root: Root) -> None:
        """Nothing, when every array has the shape that the state demands.

        Raises:
            IntegrityError: names the array and both shapes.
        """
        state = root.state
        self._open_values(root.space.layout, state.rows)
        self._open_catalog(state.catalog_bytes)
        check_parts(self._group, state.index.parts)
        if ("keys" in self._group) != (state.keys is not None):
            raise IntegrityError(
                what="array",
                name="keys",
                expected="keys" if state.keys else "no keys",
                found="no keys" if state.keys else "keys",
            )
        if state.keys is not None:
            keys.open_keys(self._group, state.keys)

    def check_old_blobs(self, index: Index) -> None:
        """Nothing, when just those blobs have an array of their own that the index says.

        Raises:
            IntegrityError: others have.
        """
        wanted = {name for name, entry in index.items() if entry.part is None}
        found = set(listed(self._group, "blobs"))
        if found != wanted:
            raise IntegrityError(
                what="array",
                name="blobs",
                expected=", ".join(sorted(wanted)) or "no blob",
                found=", ".join(sorted(found)) or "no blob",
            )
