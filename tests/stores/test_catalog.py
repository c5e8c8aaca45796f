"""The catalog against a plain dictionary: any lines, any number of ways to go on from a version."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtool_stores import IntegrityError, MemoryStore, NotFoundError, Space
from memtool_stores.catalog import AdapterRecord, Catalog, Counts, first_lines, live_of_lines
from memtool_stores.testing import fill, some_values
from memtool_stores.tree import State

Rows = dict[str, AdapterRecord]

changes = st.lists(
    st.tuples(
        st.sampled_from(["new", "change"]),
        st.integers(0, 50),
        st.sampled_from("xyz"),
        st.sampled_from(["adapter", "atoms"]),
        st.sampled_from(["live", "removed", "purged"]),
    ),
    min_size=1,
    max_size=4,
)


def _id(row: int) -> str:
    return f"{row:026}"


def _record(row: int, name: str, kind: Any = "adapter", state: Any = "live") -> AdapterRecord:
    values: dict[str, Any] = {"task": row, "classes": ["a"], "domain": "d"}
    record = AdapterRecord.of(
        id=_id(row), row=row, name=name, sha256="00" * 32, meta=values, scaling=2.0, kind=kind
    )
    return AdapterRecord.of_line(record.line().replace(b'"live"', json.dumps(state).encode()))


def _assert_same(catalog: Catalog, rows: Rows) -> None:
    assert list(catalog.records.items()) == list(rows.items())
    live = [record for record in rows.values() if record.state == "live"]
    assert list(catalog.live) == [record for record in live if record.kind == "adapter"]
    assert list(catalog.live_atoms) == [record for record in live if record.kind == "atoms"]
    purged = sum(record.state == "purged" for record in rows.values())
    expected = Counts(len(catalog.live), len(catalog.live_atoms), purged, len(rows))
    assert catalog.counts == expected
    for id in map(_id, (0, 1, 7, 50)):
        assert catalog.by_id(id) == rows.get(id)
    for name in "xyz":
        found = {record.id for record in rows.values() if record.name == name}
        assert {record.id for record in catalog.named(name)} == found
        assert (catalog.by_name(name) in live) == any(record.name == name for record in live)
        if not any(record.name == name for record in live):
            with pytest.raises(NotFoundError):
                catalog.get(name)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), changes), max_size=8))
def test_it_is_a_dictionary_with_versions(commits: list[tuple[int, Any]]) -> None:
    """Every commit goes on from any version there is; all of them stay as they were."""
    versions: list[tuple[Catalog, Rows]] = [(Catalog(), {})]
    for which, some in commits:
        catalog, rows = versions[which % len(versions)]
        rows, lines = dict(rows), []
        for what, row, name, kind, state in some:
            row = len(rows) if what == "new" or not rows else row % len(rows)
            if state == "live" and any(r.live and r.name == name for r in rows.values()):
                name = f"{name}{row}"
            record = _record(row, name, kind, state)
            rows[record.id] = record
            lines.append(record.line())
        longer = catalog.extended(lines)
        _assert_same(catalog.read_on(b"".join(lines), longer.chain), rows)
        versions.append((longer, rows))
        for version, expected in versions:
            _assert_same(version, expected)


def test_lines_that_were_not_written_change_nothing() -> None:
    one = Catalog().extended([_record(0, "x").line()])
    with pytest.raises(IntegrityError, match="chain"):
        one.read_on(_record(1, "y").line(), "00" * 32)
    for line in (b"{}\n", b"[]\n", b"?\n", _record(1, "y").line().replace(b"adapter", b"strange")):
        with pytest.raises(IntegrityError, match="one JSON record a line"):
            one.read_on(line, one._link([line]))
    assert list(one.records) == [_id(0)]
    # Nothing of it is in the way of what is really written next.
    two = one.extended([_record(1, "y").line()])
    assert two._lines is one._lines


def test_threads_may_go_on_from_the_same_version() -> None:
    one = Catalog().extended([_record(0, "x").line()])
    lines = [_record(1, f"n{number}").line() for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        catalogs = list(pool.map(lambda line: one.extended([line]), lines))
    for number, catalog in enumerate(catalogs):
        assert [record.name for record in catalog.live] == ["x", f"n{number}"]


def test_an_append_parses_its_own_line_only(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown.view().get("t0")
    parsed = []
    real = AdapterRecord.of_line.__func__  # type: ignore[attr-defined]

    def counted(cls: type[AdapterRecord], line: bytes) -> AdapterRecord:
        parsed.append(line)
        record: AdapterRecord = real(cls, line)
        return record

    monkeypatch.setattr(AdapterRecord, "of_line", classmethod(counted))
    for task in range(3, 8):
        with grown.transaction("write") as txn:
            fill(txn, space, f"t{task}", task)
        assert grown.view().get(f"t{task}").row == task
    assert len(parsed) == 5
    # What another handle wrote is read on, not from the beginning.
    with MemoryStore.open(grown.url).transaction("write") as txn:
        fill(txn, space, "t8", 8)
    parsed.clear()
    assert grown.view().get("t8").row == 8
    assert len(parsed) == 1


def test_opening_reads_no_catalog(grown: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cls: type[AdapterRecord], line: bytes) -> AdapterRecord:
        raise AssertionError("a line was parsed")

    monkeypatch.setattr(AdapterRecord, "of_line", classmethod(refuse))
    view = MemoryStore.open(grown.url).view()
    assert (len(view), view.state.rows) == (3, 3)


@pytest.mark.parametrize("change", ["nothing", "a name", "removed", "atoms", "purged", "schema 4"])
def test_a_page_of_records_is_a_part_of_all_and_parses_few(
    grown: MemoryStore, space: Space, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """As the list of all, sorted; where no line changes another, of a few lines and no more."""
    with grown.transaction("many") as txn:
        for task in range(3, 900):
            txn.add(f"t{task}", some_values(space, task), {"task": task, "said": "x" * 400})
    with grown.transaction("change") as txn:
        match change:
            case "a name":
                txn.update("t700", name="another")
            case "removed":
                txn.remove("t1")
            case "atoms":
                txn.add_atoms("a", some_values(space, 8))
            case "purged":
                txn.purge("t4")
    if change == "schema 4":
        now = State.of_json
        before = lambda data: replace(now(data), catalog_lines=None)  # noqa: E731
        monkeypatch.setattr(State, "of_json", staticmethod(before))
    every = sorted(MemoryStore.open(grown.url).view().live, key=lambda record: record.row)
    parsed, real = [], AdapterRecord.of_line.__func__  # type: ignore[attr-defined]

    def counted(cls: type[AdapterRecord], line: bytes) -> AdapterRecord:
        parsed.append(line)
        record: AdapterRecord = real(cls, line)
        return record

    monkeypatch.setattr(AdapterRecord, "of_line", classmethod(counted))
    for first, count in ((0, 1), (0, 7), (5, 90), (300, 1), (len(every) - 3, 2)):
        view = MemoryStore.open(grown.url).view()
        parsed.clear()
        assert list(view.page(first, count)) == every[first : first + count]
        assert first + count <= len(parsed) <= first + count + 1
    for first, count in ((0, 2000), (890, 20), (2000, 5)):
        assert list(view.page(first, count)) == every[first : first + count]


def test_a_page_of_records_is_of_lines_that_were_written(grown: MemoryStore) -> None:
    """What stands in the chunks is what was written, or an error that names the catalog."""
    lines = [_record(row, f"n{row}").line() for row in (0, 2)]
    with pytest.raises(IntegrityError, match="row 2, live"):
        first_lines(b"".join(lines), 2)
    with pytest.raises(IntegrityError, match="no line"):
        first_lines(lines[0], 2)
    with pytest.raises(IntegrityError, match="chain"):
        live_of_lines(lines[0], "00" * 32, 1)
    strange = b'{"id":1}\n'
    with pytest.raises(IntegrityError, match="line 1"):
        live_of_lines(strange, Catalog()._link([strange]), 1)


def test_a_transaction_sees_its_own_changes(grown: MemoryStore, space: Space) -> None:
    with grown.transaction("change") as txn:
        txn.update("t0", name="u0")
        fill(txn, space, "t0", 7)
        txn.add_atoms("a", some_values(space, 8))
        txn.remove("t1")
        assert [record.name for record in txn.adapters] == ["u0", "t2", "t0"]
        assert [record.name for record in txn.atom_records] == ["a"]
        assert txn.value("u0").tobytes() == some_values(space, 0).tobytes()
        assert txn.value("t0").tobytes() == some_values(space, 7).tobytes()
        with pytest.raises(NotFoundError):
            txn.value("t1")
    assert [record.name for record in grown.view().adapters] == ["u0", "t2", "t0"]
    assert grown.verify().ok
