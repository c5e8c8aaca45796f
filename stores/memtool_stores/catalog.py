"""The catalog: who lives in which row. Append-only JSON lines, the last line of an id wins.

Every line is bound to all before it by a hash chain, so one hash in the state of a version proves
the whole catalog, and a reader that holds an older state only reads what was appended.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from memtool_stores.errors import IntegrityError, NotFoundError, SchemaError


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter of the store.

    `row` is its row in the values; `sha256` the hash of that row's bytes; `scaling` what multiplies
    its B A; `meta` everything that was said of it, as JSON values. `header` is the hash of the
    safetensors header it came with, None when it came as an array. `live` is False once removed.
    """

    id: str
    row: int
    name: str
    task: Any
    domain: str | None
    classes: tuple[Any, ...]
    scaling: float
    sha256: str
    meta: Mapping[str, Any] = field(hash=False)
    header: str | None = None
    live: bool = True

    @classmethod
    def of(
        cls,
        *,
        id: str,
        row: int,
        name: str,
        sha256: str,
        meta: Mapping[str, Any],
        scaling: float,
        header: str | None = None,
        live: bool = True,
    ) -> AdapterRecord:
        """A record with task, domain, classes and scaling taken from `meta` where it has them.

        Raises:
            SchemaError: `meta` is not JSON, or one of those four is of the wrong kind.
        """
        plain = plain_json(meta, f"the meta of adapter {name!r}")
        try:
            return cls(
                id=id,
                row=row,
                name=name,
                task=plain.get("task"),
                domain=None if plain.get("domain") is None else str(plain["domain"]),
                classes=tuple(plain.get("classes") or ()),
                scaling=float(plain.get("scaling", scaling)),
                sha256=sha256,
                meta=MappingProxyType(plain),
                header=header,
                live=live,
            )
        except (TypeError, ValueError) as error:
            raise SchemaError(
                f"the meta of adapter {name!r}: {error}",
                expected="classes as a list, scaling as a number",
            ) from error

    def line(self) -> bytes:
        """The record as one line of the catalog."""
        data = {
            "id": self.id,
            "row": self.row,
            "name": self.name,
            "state": "live" if self.live else "removed",
            "sha256": self.sha256,
            "scaling": self.scaling,
            "header": self.header,
            "meta": dict(self.meta),
        }
        return (json.dumps(data, separators=(",", ":"), sort_keys=True) + "\n").encode()

    @classmethod
    def of_line(cls, line: bytes) -> AdapterRecord:
        """The record that `line` wrote."""
        data = json.loads(line)
        return cls.of(
            id=data["id"],
            row=data["row"],
            name=data["name"],
            sha256=data["sha256"],
            meta=data["meta"],
            scaling=data["scaling"],
            header=data["header"],
            live=data["state"] == "live",
        )


def plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A deep copy of `value` as it will be read back from JSON.

    Raises:
        SchemaError: it holds something that JSON has no word for.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SchemaError(
            f"{what} cannot be stored: {error}", expected="JSON: text, numbers, lists, mappings"
        ) from error
    return plain


@dataclass(frozen=True)
class Catalog:
    """The catalog at one version: `records` by id in row order, removed ones too.

    `size` is its length in bytes, `chain` the hash that binds all its lines, in hex.
    """

    records: Mapping[str, AdapterRecord] = field(default_factory=dict)
    size: int = 0
    chain: str = ""

    def extended(self, lines: Iterable[bytes]) -> Catalog:
        """The catalog with more lines; the receiver stays as it is."""
        records, size, chain = dict(self.records), self.size, self.chain
        for line in lines:
            record = AdapterRecord.of_line(line)
            records[record.id] = record
            size += len(line)
            chain = hashlib.sha256(bytes.fromhex(chain) + line).hexdigest()
        return Catalog(records, size, chain)

    def read_on(self, data: bytes, chain: str) -> Catalog:
        """The catalog and what was appended since, which must lead to `chain`.

        Raises:
            IntegrityError: the bytes are not the lines that were written.
        """
        try:
            catalog = self.extended(data.splitlines(keepends=True))
        except (ValueError, KeyError, TypeError, SchemaError) as error:
            raise IntegrityError(
                what="catalog", name="lines", expected="one JSON record a line", found=str(error)
            ) from error
        if catalog.chain != chain:
            raise IntegrityError(
                what="catalog", name="chain", expected=chain, found=catalog.chain or "nothing"
            )
        return catalog

    @cached_property
    def live(self) -> tuple[AdapterRecord, ...]:
        """The adapters that are not removed, in row order."""
        return tuple(record for record in self.records.values() if record.live)

    @cached_property
    def names(self) -> dict[str, AdapterRecord]:
        """The live adapters by name."""
        return {record.name: record for record in self.live}

    def get(self, id_or_name: str) -> AdapterRecord:
        """The live adapter of that id or name.

        Raises:
            NotFoundError: there is none, or it was removed.
        """
        record = self.records.get(id_or_name)
        if record is None or not record.live:
            record = self.names.get(id_or_name)
        if record is None:
            close = difflib.get_close_matches(id_or_name, self.names, n=1)
            raise NotFoundError(
                f"no adapter {id_or_name!r} among the {len(self.live)} of this version",
                remedy=f"did you mean {close[0]!r}?" if close else "`memtool ls` lists them",
            )
        return record
