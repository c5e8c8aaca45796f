"""The zarr tree of one version, as store.md draws it: its arrays, its state, and its seal.

/            attributes: schema_version, min_reader, store_id, backbone, layout, state
/values      [T, numel]     one adapter, or the atoms of one task, a row: chunk (1, numel), crc32c
/catalog     [bytes]        see catalog.py
/keys        [L, R, d_k]    float32, row-aligned with /values (zeros where there is no key), crc32c
/blobs/name  [bytes]        whole files, crc32c
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from memtool_stores.catalog import Catalog
from memtool_stores.errors import IntegrityError, NewerSchemaError, NotFoundError, SchemaError
from memtool_stores.migrate import SCHEMA_VERSION, migrated
from memtool_stores.space import Layout, Space

CATALOG_CHUNK_BYTES = 16 * 1024
KEYS_PER_CHUNK = 256
BLOB_CHUNK_BYTES = 4 * 1024 * 1024
CRC32C_BYTES = 4

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KeysState:
    """Hash of the keys array, and how many rows of the values it covers."""

    sha256: str
    rows: int


@dataclass(frozen=True)
class State:
    """What a version must contain; every transaction writes it, so two of them always conflict.

    `adapters` and `atoms` count the live rows of each kind, `purged` those without bytes, `rows`
    all there ever were.
    """

    adapters: int = 0
    atoms: int = 0
    purged: int = 0
    rows: int = 0
    catalog_bytes: int = 0
    catalog_chain: str = ""
    keys: KeysState | None = None
    blobs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> State:
        """The state that `asdict` wrote."""
        keys = data["keys"]
        # A newer schema that we may read can have more in it.
        known = {name: data[name] for name in (f.name for f in fields(cls)) if name != "keys"}
        return cls(**known, keys=None if keys is None else KeysState(**keys))


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
            "state": asdict(self.state),
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
        self._values: Any = None

    @classmethod
    def create(cls, session: Any, root: Root) -> Tree:
        """The empty tree of a new store."""
        import zarr

        layout = root.space.layout
        group = zarr.create_group(session.store, attributes=root.to_json())
        tree = cls(session, write=True)
        bits = {"bits_of": "bfloat16"} if layout.dtype == "bfloat16" else {}
        tree._create(
            "values", (0, layout.numel), (1, layout.numel), numpy_dtype(layout), attributes=bits
        )
        tree._create("catalog", (0,), (CATALOG_CHUNK_BYTES,), np.dtype("u1"), compress=True)
        group.create_group("blobs")
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
        if not isinstance(found, int) or not isinstance(needed, int):
            raise SchemaError("this zarr tree is not a memory", expected="a schema_version")
        if needed > SCHEMA_VERSION:
            raise _too_new(found, "needs a memtool that reads", needed)
        try:
            attributes = migrated(self.attributes)
            return Root(
                str(attributes["store_id"]),
                Space.from_json(attributes),
                State.of_json(attributes["state"]),
            )
        except (KeyError, TypeError) as error:
            raise SchemaError(f"the attributes of this memory lack {error}") from error

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

    def read_values(self, first: int, last: int) -> Array:
        """Rows first to last - 1 of the values, (rows, numel)."""
        if self._values is None:
            self._values = self._group["values"]
        return np.asarray(self._values[first:last])

    def read_row(self, row: int, layout: Layout) -> Array:
        """One row of the values, (numel,), read-only, as its chunk has it, for a check of its hash.

        A row is one chunk: its bytes, then four of crc32c. The way through zarr's arrays takes
        longer than the read itself, and the hash of the catalog proves more than the crc32c. A
        chunk that is not there gives an empty row.
        """
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        chunk = sync(self._group.store.get(f"values/c/{row}/0", default_buffer_prototype()))
        data = b"" if chunk is None else chunk.as_numpy_array()[:-CRC32C_BYTES]
        return np.frombuffer(data, numpy_dtype(layout))

    def append_values(self, at: int, rows: Sequence[Array | None]) -> None:
        """Write rows from row `at` on, where the values must end; None is a row without bytes."""
        values = self._group["values"].with_config({"write_empty_chunks": True})
        values.resize((at + len(rows), values.shape[1]))
        for index, row in enumerate(rows, start=at):
            if row is not None:
                values[index] = row

    def has_row(self, row: int) -> bool:
        """Whether a row of the values has bytes."""
        from zarr.core.sync import sync

        return bool(sync(self._group.store.exists(f"values/c/{row}/0")))

    def erase_values(self, rows: Iterable[int]) -> None:
        """Take the bytes of these rows out of this version."""
        from zarr.core.sync import sync

        for row in rows:
            sync(self._group.store.delete(f"values/c/{row}/0"))

    def read_catalog(self, known: Catalog, state: State) -> Catalog:
        """The catalog of `state`, reading only what `known` does not have where it is a prefix."""
        if known.chain == state.catalog_chain:
            return known
        if 0 < known.size < state.catalog_bytes:
            try:
                return known.read_on(self._catalog_bytes(known.size, state), state.catalog_chain)
            except IntegrityError:
                # Not a prefix (a rollback lies between), or damaged: the full reading decides.
                return self.read_catalog(Catalog(), state)
        return Catalog().read_on(self._catalog_bytes(0, state), state.catalog_chain)

    def _catalog_bytes(self, first: int, state: State) -> bytes:
        return np.asarray(self._group["catalog"][first : state.catalog_bytes]).tobytes()

    def append_catalog(self, at: int, data: bytes) -> None:
        """Write lines from byte `at` on, where the catalog must end."""
        catalog = self._group["catalog"]
        catalog.resize((at + len(data),))
        catalog[at:] = np.frombuffer(data, np.uint8)

    def read_keys(self) -> Array:
        """The keys, (L, R, d_k) float32, by row of the values."""
        return np.asarray(self._group["keys"][:])

    def write_keys(self, keys: Array | None) -> None:
        """Put these keys in the place of the old ones; None takes them away."""
        if keys is None:
            if "keys" in self._group:
                del self._group["keys"]
            return
        layers, rows, width = keys.shape
        # Chunks are stored whole: equal ones have the least beyond the last row.
        chunks = max(1, math.ceil(rows / KEYS_PER_CHUNK))
        step = max(1, math.ceil(rows / chunks))
        array = self._create("keys", keys.shape, (layers, step, width), keys.dtype)
        # One chunk after the other stays in the processor's cache; zarr's ten at a time do not.
        for first in range(0, rows, step):
            array[:, first : first + step] = keys[:, first : first + step]

    def read_blob(self, name: str) -> bytes:
        """The bytes of a blob."""
        try:
            array = self._group[f"blobs/{name}"]
        except KeyError as error:
            raise NotFoundError(f"no blob {name!r} in this version") from error
        return np.asarray(array[:]).tobytes()

    def write_blob(self, name: str, data: bytes) -> None:
        """Put these bytes in the place of the old ones."""
        chunk = max(1, min(len(data), BLOB_CHUNK_BYTES))
        array = self._create(f"blobs/{name}", (len(data),), (chunk,), np.dtype("u1"))
        if data:
            array[:] = np.frombuffer(data, np.uint8)

    def delete_blob(self, name: str) -> None:
        """Take a blob away."""
        del self._group[f"blobs/{name}"]

    def check_shapes(self, root: Root) -> None:
        """Nothing, when every array has the shape that the state demands.

        Raises:
            IntegrityError: names the array and both shapes.
        """
        state = root.state
        wanted = {
            "values": (state.rows, root.space.numel),
            "catalog": (state.catalog_bytes,),
        }
        for name, shape in wanted.items():
            found = self._group[name].shape
            if tuple(found) != shape:
                raise IntegrityError(
                    what="array", name=name, expected=f"shape {shape}", found=f"shape {found}"
                )
        blobs = set(self._group["blobs"].array_keys())
        if blobs != set(state.blobs):
            raise IntegrityError(
                what="array",
                name="blobs",
                expected=", ".join(sorted(state.blobs)) or "no blob",
                found=", ".join(sorted(blobs)) or "no blob",
            )
        if ("keys" in self._group) != (state.keys is not None):
            raise IntegrityError(
                what="array",
                name="keys",
                expected="keys" if state.keys else "no keys",
                found="no keys" if state.keys else "keys",
            )
