"""The catalog: who lives in which row. Append-only JSON lines, the last line of an id wins.

Every line is bound to all before it by a hash chain, so one hash in the state of a version proves
the whole catalog, and a reader that holds an older state only reads what was appended.
"""

from __future__ import annotations

import difflib
import gc
import hashlib
import io
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from memtool_stores import limits
from memtool_stores.errors import IntegrityError, NotFoundError, SchemaError
from memtool_stores.jsonvalues import digest, items, mapping, member, number, parse, text, whole
from memtool_stores.names import check_id, check_name
from memtool_stores.printable import shown
from memtool_stores.ragged import chunk_count

Kind: TypeAlias = Literal["adapter", "atoms"]
"""What a row is: one adapter, or the rank-1 atoms of a task."""

RowState: TypeAlias = Literal["live", "removed", "purged"]
"""A removed row keeps its bytes; a purged one has none in this version."""

KINDS = get_args(Kind)
ROW_STATES = get_args(RowState)
NOTHING_PRUNED: Mapping[str, tuple[int, ...]] = MappingProxyType({})
NOTHING_SAID: Mapping[str, Any] = MappingProxyType({})

SUGGEST_AMONG = 10_000
"""Names compared with one that is not there; with more of them the search would take seconds."""


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One adapter of the store, or the atoms of one task.

    `row` is its row in the values; `sha256` the hash of that row's bytes; `scaling` what multiplies
    its B A; `meta` everything that was said of it, as JSON values. `header` is the hash of the
    safetensors header it came with, None when it came as an array. `pruned` holds, by module, the
    ranks of the atoms that were taken out. `nbytes` is the length of a ragged row, one with a
    layout of its own that its header says; None for one of the layout of the store. `pieces` are
    the hashes of the chunks of a ragged row that has several (see ragged.py).
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
    kind: Kind = "adapter"
    state: RowState = "live"
    pruned: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: NOTHING_PRUNED, hash=False
    )
    nbytes: int | None = None
    pieces: tuple[str, ...] = ()

    @property
    def ragged(self) -> bool:
        """Whether its layout is its own: its bytes lie apart from the values."""
        return self.nbytes is not None

    @property
    def live(self) -> bool:
        """Whether it is in the memory: neither removed nor purged."""
        return self.state == "live"

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
        kind: Kind = "adapter",
        pruned: Mapping[str, tuple[int, ...]] = NOTHING_PRUNED,
        nbytes: int | None = None,
        pieces: tuple[str, ...] = (),
    ) -> AdapterRecord:
        """A live record with task, domain, classes and scaling from `meta` where it has them.

        Raises:
            SchemaError: `meta` is not JSON, or one of those four is of the wrong kind.
        """
        plain = plain_json(meta, f"the meta of adapter {name!r}")
        return cls._of_plain(
            id, row, name, sha256, plain, scaling, header, kind, "live", pruned, nbytes, pieces
        )

    @classmethod
    def _of_plain(
        cls,
        id: str,
        row: int,
        name: str,
        sha256: str,
        meta: dict[str, Any],
        scaling: float,
        header: str | None,
        kind: Kind,
        state: RowState,
        pruned: Mapping[str, tuple[int, ...]],
        nbytes: int | None,
        pieces: tuple[str, ...],
    ) -> AdapterRecord:
        """`of` with a meta that is JSON already and belongs to nobody else."""
        what = f"the meta of adapter {name!r}"
        task, domain, classes = meta.get("task"), meta.get("domain"), meta.get("classes")
        for one in (task, domain, *items([] if classes is None else classes, f"{what}: classes")):
            if isinstance(one, list | dict):
                raise SchemaError(
                    f"{what}: {shown(one)} as task, domain or class", expected="text or a number"
                )
        return cls(
            id,
            row,
            name,
            task,
            None if domain is None else str(domain),
            tuple(classes or ()),
            number(meta.get("scaling", scaling), f"{what}: scaling"),
            sha256,
            MappingProxyType(meta),
            header,
            kind,
            state,
            pruned,
            nbytes,
            pieces,
        )

    def line(self) -> bytes:
        """The record as one line of the catalog."""
        data: dict[str, Any] = {
            "id": self.id,
            "row": self.row,
            "name": self.name,
            "kind": self.kind,
            "state": self.state,
            "sha256": self.sha256,
            "scaling": self.scaling,
            "header": self.header,
            "meta": dict(self.meta),
            "pruned": {module: list(ranks) for module, ranks in self.pruned.items()},
        }
        if self.nbytes is not None:
            data["nbytes"], data["pieces"] = self.nbytes, list(self.pieces)
        return (json.dumps(data, separators=(",", ":"), sort_keys=True) + "\n").encode()

    @classmethod
    def of_line(cls, line: bytes) -> AdapterRecord:
        """The record that `line` wrote.

        Raises:
            SchemaError: no such line was ever written.
        """
        limits.require("text_bytes", len(line), "a line of the catalog")
        what = "the record"
        data = mapping(parse(line, what), what)
        # Schema 1 had adapters only, and no word for it.
        kind, state = data.get("kind", "adapter"), member(data, "state", what)
        if kind not in KINDS or state not in ROW_STATES:
            raise SchemaError(
                f"a row of kind {shown(kind)} in state {shown(state)}",
                expected=f"{' or '.join(KINDS)}; {', '.join(ROW_STATES)}",
            )
        header = member(data, "header", what)
        return cls._of_plain(
            check_id(member(data, "id", what), "a row"),
            whole(member(data, "row", what), "the row"),
            check_name(member(data, "name", what), "an adapter"),
            digest(member(data, "sha256", what), "the hash of the row"),
            mapping(member(data, "meta", what), "meta"),
            number(member(data, "scaling", what), "scaling"),
            None if header is None else digest(header, "the hash of the header"),
            # Of all records one text each, not one a record.
            KINDS[KINDS.index(kind)],
            ROW_STATES[ROW_STATES.index(state)],
            _pruned(data["pruned"]) if data.get("pruned") else NOTHING_PRUNED,
            *(_own_bytes(data, kind, header) if data.get("nbytes") is not None else (None, ())),
        )


def _own_bytes(data: dict[str, Any], kind: Kind, header: Any) -> tuple[int | None, tuple[str, ...]]:
    """Length and hashes of the chunks of a ragged row."""
    nbytes = whole(data["nbytes"], "the length of the row")
    said = items(member(data, "pieces", "the record"), "pieces of the row")
    pieces = tuple(digest(one, "the hash of a piece of the row") for one in said)
    count = chunk_count(nbytes)
    if len(pieces) != (count if count > 1 else 0) or kind != "adapter" or header is None:
        raise SchemaError(
            f"a row of kind {kind} with {nbytes:,} bytes of its own in {len(pieces):,} pieces and "
            f"{'no' if header is None else 'a'} header",
            expected=f"an adapter with a header, and with {count:,} pieces where that is not one",
        )
    return nbytes, pieces


def _pruned(value: Any) -> Mapping[str, tuple[int, ...]]:
    """The ranks that were taken out, by module."""
    return MappingProxyType(
        {
            text(module, "a module"): tuple(
                whole(rank, f"a rank of {module}") for rank in items(ranks, f"ranks of {module}")
            )
            for module, ranks in mapping(value, "what is pruned").items()
        }
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


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No cyclic garbage collection inside the block, which only makes what stays.

    Each run of it walks through all records made so far: half of the time of a large catalog.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class _Lines:
    """The records of all lines read so far, in their order; only ever appended to.

    Catalogs of one line of history share it, each knowing how many lines are its own: the next
    version costs one append here and not a copy of everything. `last_of_id` and `last_of_name` give
    the place of the newest line; from each line `before_of_id` and `before_of_name` lead to the one
    before it with the same id or name, or to -1. `ids` are in the order of the rows.
    """

    def __init__(self, records: Iterable[AdapterRecord] = ()) -> None:
        self.records: list[AdapterRecord] = []
        self.ids: list[str] = []
        self.last_of_id: dict[str, int] = {}
        self.last_of_name: dict[str, int] = {}
        self.before_of_id: list[int] = []
        self.before_of_name: list[int] = []
        self.growing = threading.Lock()
        self.extend(records)

    def extend(self, records: Iterable[AdapterRecord]) -> None:
        """Append; what leads to a line comes after it, so that no other thread is misled."""
        for record in records:
            place = len(self.records)
            self.before_of_id.append(self.last_of_id.get(record.id, -1))
            self.before_of_name.append(self.last_of_name.get(record.name, -1))
            self.records.append(record)
            if record.id not in self.last_of_id:
                self.ids.append(record.id)
            self.last_of_id[record.id] = place
            self.last_of_name[record.name] = place


@dataclass(frozen=True)
class Counts:
    """How many rows of each sort a catalog has: live adapters, live atoms, purged ones, all.

    `ragged` counts the ragged ones that are not purged.
    """

    adapters: int = 0
    atoms: int = 0
    purged: int = 0
    rows: int = 0
    ragged: int = 0


class Catalog:
    """The catalog at one version; immutable.

    `size` is its length in bytes, `chain` the hash that binds all its lines, in hex.
    """

    def __init__(self) -> None:
        """The catalog of an empty store."""
        self.size = 0
        self.chain = ""
        self.counts = Counts()
        self._lines = _Lines()
        self._length = 0

    @property
    def lines(self) -> int:
        """How many lines it has; more than rows where some change what earlier ones say."""
        return self._length

    def extended(self, lines: Sequence[bytes]) -> Catalog:
        """The catalog with more lines; the receiver stays as it is."""
        records = [AdapterRecord.of_line(line) for line in lines]
        return self._with(records, sum(map(len, lines)), self._link(lines))

    def read_on(self, data: bytes, chain: str) -> Catalog:
        """The catalog and what was appended since, which must lead to `chain`.

        Raises:
            IntegrityError: the bytes are not the lines that were written, or no lines that can
                have been; it names the line.
        """
        found = self._link(io.BytesIO(data))
        if found != chain:
            raise _wrong_chain(chain, found)
        with _collector_at_rest():
            return self._with(self._parsed(io.BytesIO(data)), len(data), found)

    def _parsed(self, lines: Iterable[bytes]) -> list[AdapterRecord]:
        records = []
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    raise SchemaError("a line without an end")
                records.append(self._kept(AdapterRecord.of_line(line)))
            except SchemaError as error:
                place = self._length + len(records)
                raise _wrong_line(place, error.message, error.expected) from error
        return records

    def _kept(self, record: AdapterRecord) -> AdapterRecord:
        """What is held of a record."""
        return record

    def _link(self, lines: Iterable[bytes]) -> str:
        """The hash that binds our lines and these."""
        digest = bytes.fromhex(self.chain)
        for line in lines:
            digest = hashlib.sha256(digest + line).digest()
        return digest.hex()

    def _with(self, records: Sequence[AdapterRecord], nbytes: int, chain: str) -> Catalog:
        longer = type(self)()
        longer.size = self.size + nbytes
        longer.chain = chain
        longer._length = self._length + len(records)
        longer.counts = self._counted(records)
        with self._lines.growing:
            if len(self._lines.records) == self._length:
                longer._lines = self._lines
                longer._lines.extend(records)
            else:
                # Another version went on from here already: the two part ways.
                longer._lines = _Lines(self._lines.records[: self._length])
                longer._lines.extend(records)
        return longer

    def _counted(self, records: Iterable[AdapterRecord]) -> Counts:
        """What there is after these records, each of which must fit in with what was before it.

        Raises:
            IntegrityError: one has a row that is not its own, or the name of another live one.
        """
        counts = self.counts
        adapters, atoms, purged, rows = counts.adapters, counts.atoms, counts.purged, counts.rows
        ragged = counts.ragged
        changed: dict[str, AdapterRecord] = {}
        # The live row of a name, None where there is none, as far as these records change it.
        owners: dict[str, str | None] = {}
        for place, record in enumerate(records, start=self._length):
            before = changed.get(record.id) or self.by_id(record.id)
            row = rows if before is None else before.row
            if record.row != row:
                raise _wrong_line(place, f"row {record.row} for {record.name!r}", f"row {row}")
            rows += before is None
            for counted, step in ((before, -1), (record, 1)):
                if counted is not None:
                    adapters += step * (counted.live and counted.kind == "adapter")
                    atoms += step * (counted.live and counted.kind == "atoms")
                    purged += step * (counted.state == "purged")
                    ragged += step * (counted.ragged and counted.state != "purged")
            if before is not None and before.live:
                owners[before.name] = None
            if record.live:
                if record.name not in owners:
                    owner = self.by_name(record.name)
                    owners[record.name] = None if owner is None else owner.id
                if owners[record.name] is not None:
                    raise _wrong_line(place, f"{record.name!r} again", "one live row of a name")
                owners[record.name] = record.id
            changed[record.id] = record
        return Counts(adapters, atoms, purged, rows, ragged)

    def by_id(self, id: str) -> AdapterRecord | None:
        """The record of that id, live or not, or None."""
        place = self._lines.last_of_id.get(id, -1)
        while place >= self._length:
            place = self._lines.before_of_id[place]
        return None if place < 0 else self._lines.records[place]

    def by_name(self, name: str) -> AdapterRecord | None:
        """The live record of that name, or None."""
        return next((record for record in self.named(name) if record.live), None)

    def named(self, name: str) -> Iterator[AdapterRecord]:
        """The records that are called so now, live or not, the last changed first."""
        place = self._lines.last_of_name.get(name, -1)
        while place >= 0:
            if place < self._length:
                record = self._lines.records[place]
                if self.by_id(record.id) is record:
                    yield record
            place = self._lines.before_of_name[place]

    @cached_property
    def records(self) -> Mapping[str, AdapterRecord]:
        """All records by id in row order, removed and purged ones too."""
        ids = self._lines.ids[: self.counts.rows]
        return {record.id: record for record in map(self.by_id, ids) if record is not None}

    def from_row(self, row: int) -> Iterator[AdapterRecord]:
        """The records from a row of the values on, in row order, removed and purged ones too."""
        for id in self._lines.ids[row : self.counts.rows]:
            record = self.by_id(id)
            if record is not None:
                yield record

    def goes_on_from(self, known: Catalog) -> bool:
        """Whether all lines of another catalog are the first of this one."""
        return self._lines is known._lines and known._length <= self._length

    def require_bytes(self, data: bytes) -> None:
        """Nothing, when these bytes are the lines of this catalog. Raises IntegrityError."""
        found = Catalog()._link(io.BytesIO(data))
        if found != self.chain:
            raise _wrong_chain(self.chain, found)

    def since(self, known: Catalog) -> Sequence[AdapterRecord]:
        """What the lines after those of a catalog say, which is a beginning of this one."""
        return self._lines.records[known._length : self._length]

    def _live(self, kind: Kind) -> tuple[AdapterRecord, ...]:
        return tuple(r for r in self.records.values() if r.kind == kind and r.state == "live")

    @cached_property
    def live(self) -> tuple[AdapterRecord, ...]:
        """The adapters that are neither removed nor purged, in row order."""
        return self._live("adapter")

    @cached_property
    def live_atoms(self) -> tuple[AdapterRecord, ...]:
        """The rows of atoms that are neither removed nor purged, in row order."""
        return self._live("atoms")

    def get(self, id_or_name: str) -> AdapterRecord:
        """The live adapter or row of atoms of that id or name.

        Raises:
            NotFoundError: there is none, or it was removed.
        """
        record = self.by_id(id_or_name)
        if record is None or not record.live:
            record = self.by_name(id_or_name)
        if record is None:
            names = [live.name for live in (*self.live, *self.live_atoms)]
            few = len(names) <= SUGGEST_AMONG
            close = difflib.get_close_matches(id_or_name, names, n=1) if few else []
            raise NotFoundError(
                f"no adapter {id_or_name!r} among the {len(names)} of this version",
                remedy=f"did you mean {close[0]!r}?" if close else "`memtool ls` lists them",
            )
        return record


class BareCatalog(Catalog):
    """A catalog that holds no meta: for who checks all records and is asked for none."""

    def _kept(self, record: AdapterRecord) -> AdapterRecord:
        return replace(record, meta=NOTHING_SAID)


_BEGINNING = re.compile(rb'\{"header":(?:null|"[0-9a-f]{64}"),"id":"([0-9A-Z]{26})"')
"""Of every line that `AdapterRecord.line` writes."""


def first_lines(data: bytes, count: int) -> list[AdapterRecord]:
    """The records of the first `count` lines, which are those of the first rows, and live.

    Raises:
        IntegrityError: they are not.
    """
    records = Catalog()._parsed(itertools.islice(io.BytesIO(data), count))
    for row, record in enumerate(records):
        if (record.row, record.live) != (row, True):
            raise _wrong_line(row, f"row {record.row}, {record.state}", f"row {row}, live")
    if len(records) < count:
        raise _wrong_line(len(records), "no line", None)
    return records


def live_of_lines(data: bytes, chain: str, end: int) -> list[AdapterRecord]:
    """The first `end` live records in row order, of a whole catalog; few lines are parsed.

    Raises:
        IntegrityError: the bytes are not the lines that were written.
    """
    lines = [*io.BytesIO(data)]
    if (found := Catalog()._link(lines)) != chain:
        raise _wrong_chain(chain, found)
    # The last line of an id wins; ids come in the order of their rows.
    last: dict[bytes, int] = {}
    for place, line in enumerate(lines):
        if begin := _BEGINNING.match(line):
            last[begin[1]] = place
        else:  # not written by us, or damaged, which parsing says
            last[Catalog()._parsed([line])[0].id.encode()] = place
    records: list[AdapterRecord] = []
    for place in last.values():
        if len(records) == end:
            break
        (record,) = Catalog()._parsed([lines[place]])
        records += [record] if record.live else []
    return records


def _wrong_chain(expected: str, found: str) -> IntegrityError:
    return IntegrityError(what="catalog", name="chain", expected=expected, found=found or "nothing")


def _wrong_line(place: int, found: str, expected: str | None) -> IntegrityError:
    """The error for a line of the catalog, by its place from 0."""
    also = f": {expected}" if expected else ""
    return IntegrityError(
        what="catalog",
        name=f"line {place + 1}",
        expected=f"one JSON record a line, as it was written{also}",
        found=found,
    )
