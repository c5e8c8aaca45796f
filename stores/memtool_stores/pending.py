"""What a transaction says of rows, on top of the catalog of the version that it began with.

Only what differs from that is kept: a copy would make an append as long as the catalog.
"""

from __future__ import annotations

from memtool_stores.catalog import AdapterRecord, Kind
from memtool_stores.errors import AlreadyExistsError, NotFoundError
from memtool_stores.names import check_name
from memtool_stores.view import MemoryView


class Pending:
    """Records by id that are `changed`, and the `lines` of the catalog that say so."""

    def __init__(self, base: MemoryView) -> None:
        self._base = base
        self.changed: dict[str, AdapterRecord] = {}
        self.lines: list[bytes] = []
        self._names: dict[str, str] = {}

    def live_of(self, kind: Kind) -> tuple[AdapterRecord, ...]:
        """The rows of a kind that are live now, in row order."""
        # New rows come after all of the base, in the order in which they were added.
        records = {**self._base.catalog.records, **self.changed}
        return tuple(r for r in records.values() if r.kind == kind and r.live)

    def live_from(self, row: int) -> tuple[AdapterRecord, ...]:
        """The adapters that are live now from a row of the values on, in row order."""
        records = {record.id: record for record in self._base.catalog.from_row(row)}
        records |= {r.id: r for r in self.changed.values() if r.row >= row}
        return tuple(r for r in records.values() if r.kind == "adapter" and r.live)

    def check_free(self, name: str) -> None:
        """Raise AlreadyExistsError where a live row has this name, SchemaError for no name."""
        check_name(name, "an adapter")
        if self.named(name) is not None or self.record(name) is not None:
            raise AlreadyExistsError(
                f"there is a live adapter named {name!r}",
                remedy="another name, or remove that one first",
            )

    def record(self, id: str) -> AdapterRecord | None:
        """The record of that id as it is now, live or not."""
        return self.changed.get(id) or self._base.catalog.by_id(id)

    def named(self, name: str) -> AdapterRecord | None:
        """The live record that has that name now."""
        if name in self._names:
            return self.changed[self._names[name]]
        record = self._base.catalog.by_name(name)
        return None if record is None or record.id in self.changed else record

    def write(self, record: AdapterRecord) -> None:
        """Take a new or changed record into the catalog."""
        before = self.changed.get(record.id)
        if before is not None and before.live:
            del self._names[before.name]
        self.changed[record.id] = record
        if record.live:
            self._names[record.name] = record.id
        self.lines.append(record.line())

    def live(self, id_or_name: str) -> AdapterRecord:
        """The live row of that id or name. Raises NotFoundError."""
        record = self.named(id_or_name) or self.record(id_or_name)
        if record is None or not record.live:
            raise NotFoundError(f"no adapter {id_or_name!r}", remedy="`memtool ls` lists them")
        return record

    def with_bytes(self, id_or_name: str) -> AdapterRecord:
        """The live or removed row of that id or name. Raises NotFoundError, also for several."""
        record = self.named(id_or_name) or self.record(id_or_name)
        rows = [record] if record is not None else self._out_of_memory(id_or_name)
        kept = [row for row in rows if row.state != "purged"]
        if len(kept) == 1:
            return kept[0]
        if kept:
            raise NotFoundError(
                f"{len(kept)} removed rows were called {id_or_name!r}",
                expected=f"one of the ids {', '.join(row.id for row in kept)}",
            )
        if rows:
            raise NotFoundError(f"the bytes of {id_or_name!r} are purged already")
        raise NotFoundError(f"no adapter {id_or_name!r}", remedy="`memtool ls` lists them")

    def _out_of_memory(self, name: str) -> list[AdapterRecord]:
        """The removed and purged rows that bear this name."""
        ids = {record.id for record in self._base.catalog.named(name)}
        ids |= {record.id for record in self.changed.values()}
        records = (self.record(id) for id in sorted(ids))
        return [record for record in records if record is not None and record.name == name]
