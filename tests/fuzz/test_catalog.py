"""Catalogs as a stranger's store would have them: a right chain over lines of any kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool_stores import IntegrityError
from memtool_stores.catalog import AdapterRecord, Catalog
from memtool_stores.names import check_id, check_name
from tests.fuzz.door import STRANGE, VALUES, altered, cases, damaged, long, refused_or_taken

pytestmark = long


def _line(row: int, **changes: Any) -> dict[str, Any]:
    meta = {"task": row, "classes": ["dog", "cat"], "domain": "photo", "note": {"lr": 0.1}}
    record = AdapterRecord.of(
        id=f"{row:026}", row=row, name=f"name {row}", sha256="0a" * 32, meta=meta, scaling=2.0
    )
    return {**json.loads(record.line()), **changes}


DOCUMENT = [
    _line(0),
    _line(1, kind="atoms", pruned={"blocks.0": [0, 1]}),
    _line(2, header="5f" * 32),
    _line(0, state="removed"),
    _line(1, kind="atoms", state="purged"),
    _line(3, name="name 0"),
]


def _text(lines: Any) -> bytes:
    lines = lines if isinstance(lines, list) else [lines]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


CATALOGS = st.one_of(
    altered(DOCUMENT).map(_text),
    damaged(_text(DOCUMENT)),
    st.lists(VALUES, max_size=4).map(_text),
    st.lists(STRANGE, max_size=4).map(b"\n".join),
    st.sampled_from([1, 500, 3_000, 30_000]).map(lambda depth: b"[" * depth + b"\n"),
    st.permutations(DOCUMENT).map(_text),
)


@cases
@given(line=CATALOGS)
def test_a_line_is_a_record_or_is_refused(line: bytes) -> None:
    with refused_or_taken():
        record = AdapterRecord.of_line(line)
        assert AdapterRecord.of_line(record.line()) == record


@cases
@given(data=CATALOGS, before=st.integers(0, len(DOCUMENT)))
def test_a_catalog_with_a_right_chain_is_sound_or_is_refused(data: bytes, before: int) -> None:
    """Read from the beginning, and on from a catalog that is known."""
    known = Catalog().extended([_text(line) for line in DOCUMENT[:before]])
    for catalog in (Catalog(), known):
        counts, records = catalog.counts, dict(catalog.records)
        try:
            with refused_or_taken():
                longer = catalog.read_on(data, catalog._link(data.splitlines(keepends=True)))
                _is_sound(longer)
        finally:
            assert (catalog.counts, dict(catalog.records)) == (counts, records)


def _is_sound(catalog: Catalog) -> None:
    records = list(catalog.records.values())
    assert [record.row for record in records] == list(range(catalog.counts.rows))
    live = [record for record in records if record.live]
    assert len({record.name for record in live}) == len(live)
    assert len(live) == catalog.counts.adapters + catalog.counts.atoms
    for record in records:
        check_name(record.name, "an adapter")
        check_id(record.id, "a row")
        hash(record)
        bytes.fromhex(record.sha256)
        assert catalog.by_id(record.id) is record
        assert AdapterRecord.of_line(record.line()) == record


@cases
@given(data=CATALOGS)
def test_a_catalog_with_a_wrong_chain_is_damaged(data: bytes) -> None:
    catalog = Catalog().extended([_text(DOCUMENT[0])])
    with pytest.raises(IntegrityError, match="catalog 'chain' is damaged"):
        catalog.read_on(data, "00" * 32)
