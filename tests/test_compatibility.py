"""docs/compatibility.md is true: what any release wrote is read, and what a newer one wrote is not.

The folder compatibility has a record of every schema and the settings of every release that changed
them, as they were written; the stores are in stores/fixtures.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtool import sealed
from memtool.config import resolve
from memtool.errors import MismatchError
from memtool.evaluation import matrix, record
from memtool.evaluation.summary import summarise_rows
from memtool.methods import exchange
from memtool.remembered import remembered
from memtool.settings import get, keys
from memtool_stores import MemoryStore, bundle, migrate
from memtool_stores.testing import small_space, some_values

HERE = Path(__file__).parent
WRITTEN = HERE / "compatibility"
PAGE = (HERE.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")

RECORDS = range(1, record.SCHEMA_VERSION + 1)
STORES = range(1, migrate.SCHEMA_VERSION + 1)
SETTINGS = sorted(WRITTEN.glob("settings-*.yaml"))


@pytest.mark.parametrize(
    ("what", "newest"),
    [
        ("store", migrate.SCHEMA_VERSION),
        ("bundle", bundle.BUNDLE_SCHEMA),
        ("record", record.SCHEMA_VERSION),
        ("accuracy matrix", matrix.SCHEMA_VERSION),
        ("adapter folder", exchange.ABOUT_VERSION),
    ],
)
def test_the_table_says_what_the_code_writes(what: str, newest: int) -> None:
    (row,) = re.findall(rf"^\| {what}\b.*\| (\d+) \| ([\d to]+) \|$", PAGE, re.M)
    assert row == (str(newest), f"1 to {newest}" if newest > 1 else "1")


@pytest.mark.parametrize("schema", STORES)
def test_a_store_of_every_schema_is_read_whole(schema: int, tmp_path: Path) -> None:
    """photo, art and cartoon are `some_values` of seeds 0, 1 and 2; v1 is before one was lost."""
    with zipfile.ZipFile(HERE / "stores" / "fixtures" / f"schema-{schema}.zip") as archive:
        archive.extractall(tmp_path / "store")
    store = MemoryStore.open(tmp_path / "store")
    assert {store.view(name).schema for name in store.branches()} == {schema}
    assert store.space == small_space()
    for seed, name in enumerate(("photo", "art", "cartoon")):
        assert store.view("v1").value(name).tobytes() == some_values(store.space, seed).tobytes()
    for version in store.log():
        store.view(version.id).require_readable()
    assert store.verify().ok
    done = store.migrate()
    assert [tip.committed is None for tip in done.branches] == [
        schema == migrate.SCHEMA_VERSION
    ] * 2
    assert store.view().schema == migrate.SCHEMA_VERSION
    assert store.verify().ok


@pytest.mark.parametrize("schema", RECORDS)
def test_a_record_of_every_schema_is_read_and_written_as_the_one_it_needs(
    schema: int, tmp_path: Path
) -> None:
    file = WRITTEN / f"record-{schema}.json"
    before = sealed.read_json(file).content
    assert before["schema_version"] == schema
    found = record.read_record(file)
    assert found.row("memory").metrics["faa"] == summarise_rows([found])[0].metrics["faa"].mean
    assert bool(found.row("memory").right) == (schema > 1)
    again = record.write_record(found, tmp_path / "again.json")
    assert record.read_record(again) == found
    after = sealed.read_json(again).content
    assert after.pop("schema_version") == max(schema, 2)
    assert _lost(before, after) == ["/schema_version"]
    if schema > 1:
        assert again.read_bytes() == file.read_bytes()


def _lost(before: object, after: object, place: str = "") -> list[str]:
    """Where a document has not what an earlier one has; what is new in it is no loss."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            lost
            for key, value in before.items()
            for lost in _lost(value, after.get(key, KeyError), f"{place}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [lost for i, (a, b) in pairs for lost in _lost(a, b, f"{place}/{i}")]
    return [] if before == after else [place]


MEANT = {("memory.query_norm", True): "layer", ("memory.query_norm", False): "none"}
"""What a value of an earlier release is called today."""


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_settings_of_every_release_are_read(file: Path) -> None:
    config = resolve(file=file, ambient=False).config
    for key, value in _flat(yaml.safe_load(file.read_text(encoding="utf-8"))).items():
        if key in keys(config.method):
            read = get(config, key)
            meant = MEANT.get((key, value), value) if isinstance(value, Hashable) else value
            assert (list(read) if isinstance(read, tuple) else read) == (
                Path(meant) if isinstance(read, Path) else meant
            ), key


def _flat(settings: dict[str, Any], head: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{head}{name}.") if isinstance(value, dict) else {head + name: value}
    return found


@pytest.mark.parametrize(
    ("read", "schema", "newest"),
    [
        (record.read_record, record.SCHEMA, record.SCHEMA_VERSION),
        (matrix.AccuracyMatrix.load, matrix.SCHEMA, matrix.SCHEMA_VERSION),
        (exchange.About.read, None, exchange.ABOUT_VERSION),
    ],
)
def test_what_a_newer_memtool_wrote_is_refused_and_says_so(
    read: Callable[[Path], object], schema: str | None, newest: int, tmp_path: Path
) -> None:
    newer = tmp_path / "newer.json"
    sealed.write_json(newer, {"schema": schema, "schema_version": newest + 1, "more": 1})
    with pytest.raises(MismatchError, match=f"schema version {newest + 1}") as raised:
        read(newer)
    assert raised.value.exit_status == 2
    assert raised.value.remedy == "upgrade memtool"


@pytest.mark.parametrize("section", ["memory", "modulation"])
def test_similarities_whose_names_changed_places_are_read_as_they_were_meant(
    section: str, tmp_path: Path
) -> None:
    store = MemoryStore.create(tmp_path / "store", small_space())
    for then, now in (("kl", "reverse-kl"), ("reverse-kl", "kl"), ("dot", "dot")):
        said = {"configuration": {section: {"similarity": then}}}
        with store.transaction(f"as 0.1 wrote {then}", said) as txn:
            txn.put_blob("any", then.encode())
        method = "mira" if section == "memory" else section
        made_with = {**remembered(store), "method": method}
        nano = {"backbone.name": "nano"}
        config = resolve(ambient=False, remembered=made_with, overrides=nano).config
        assert get(config, f"{section}.similarity") == now
        # What is written today is read as it was meant, too.
        with store.transaction("as now", {"configuration": config.recorded()}) as txn:
            txn.put_blob("any", b"now")
        again = resolve(ambient=False, remembered=remembered(store), overrides=nano).config
        assert get(again, f"{section}.similarity") == now
