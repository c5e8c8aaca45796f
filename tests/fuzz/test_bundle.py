"""The door of bundles: whatever the file is, the target is a whole store or is not there."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtool_stores import MemoryStore
from memtool_stores.bundle import MANIFEST, read_bundle
from memtool_stores.objects import objects_at
from memtool_stores.testing import fill, small_space
from tests.fuzz.door import (
    NAMES,
    STRANGE,
    cases,
    damaged,
    long,
    nothing_else_changes,
    refused_or_taken,
)

pytestmark = long


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real one: an adapter, a blob and a tag."""
    folder = tmp_path_factory.mktemp("bundle")
    store = MemoryStore.create(folder / "memory", small_space())
    with store.transaction("write") as txn:
        fill(txn, small_space(), "a", 1)
        txn.put_blob("note", b"1")
    store.tag("v1")
    store.bundle(folder / "file")
    return (folder / "file").read_bytes()


@pytest.fixture
def sandbox() -> Iterator[Path]:
    """A folder with something in it to be harmed, and room to climb out of the target."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for victim in ("victim", "deep/victim", "deep/er/victim"):
            (folder / victim).parent.mkdir(exist_ok=True, parents=True)
            (folder / victim).write_bytes(b"precious")
        yield folder


def _import(data: bytes, sandbox: Path) -> None:
    """Import it as the command line does: the target is a whole store or is not there."""
    file, target = sandbox / "file", sandbox / "deep" / "er" / "copy"
    file.write_bytes(data)
    shutil.rmtree(target, ignore_errors=True)
    with nothing_else_changes(sandbox, but=target), refused_or_taken():
        MemoryStore.from_bundle(file, target)
    if target.exists():
        assert MemoryStore.open(target).verify().ok


def _read(data: bytes, sandbox: Path) -> None:
    """Read it into a plain folder, which nothing takes back."""
    file, target = sandbox / "file", sandbox / "deep" / "er" / "copy"
    file.write_bytes(data)
    shutil.rmtree(target, ignore_errors=True)
    with nothing_else_changes(sandbox, but=target), refused_or_taken():
        read_bundle(file, objects_at(str(target)))
    written = [path.relative_to(target) for path in target.rglob("*") if path.is_file()]
    assert all(path.parts[0] in {"ice", "sums"} for path in written)


@cases
@given(data=st.data())
def test_a_damaged_bundle(bundle: bytes, sandbox: Path, data: st.DataObject) -> None:
    broken = data.draw(damaged(bundle))
    _read(broken, sandbox)
    if data.draw(st.integers(0, 29)) == 0:  # it opens a repository, which takes longer
        _import(broken, sandbox)


PATHS = st.one_of(
    st.sampled_from(
        [
            "ice/refs/branch.main/ref.json",
            "ice/chunks/0123",
            "ice/../../victim",
            "ice/../../../../victim",
            "ice/..",
            "/ice/x",
            "ice//x",
            "ice/./x",
            "ice\\..\\x",
            "ice/a\0b",
            "ICE/x",
            "sums/x",
            "ice/",
            "ice",
            "lock",
            MANIFEST,
        ]
    ),
    NAMES,
    NAMES.map(lambda name: f"ice/{name}"),
    NAMES.map(lambda name: f"ice/refs/{name}/ref.json"),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
METHODS = st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A zip that somebody made: any paths, twice perhaps, packed, linked, with any manifest."""
    with tempfile.TemporaryFile() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile says that a name is there twice
        with zipfile.ZipFile(out, "w") as archive:
            hashes: dict[str, Any] = {}
            for path in draw(st.lists(PATHS, max_size=4)):
                content = draw(st.one_of(STRANGE, st.just(bytes(100_000))))
                entry = zipfile.ZipInfo("x")
                entry.filename = path.encode(errors="replace").decode()
                entry.compress_type = draw(METHODS)
                entry.external_attr = draw(st.sampled_from([0, 0o100644, 0o120777, 0o40755])) << 16
                archive.writestr(entry, content)
                hashes[path] = hashlib.sha256(content).hexdigest()
            hashes |= draw(st.dictionaries(PATHS, JSON, max_size=1))
            said: Any = {"bundle_schema": 1, "files": hashes, "store_id": "x", "head": 1}
            said |= draw(st.dictionaries(st.sampled_from([*said]), JSON, max_size=1))
            for key in draw(st.sets(st.sampled_from(["store_id", "head"]))):
                said.pop(key, None)
            archive.writestr(
                MANIFEST, json.dumps(draw(st.one_of(st.just(said), JSON))), draw(METHODS)
            )
        out.seek(0)
        return draw(st.one_of(st.just(out.read()), damaged(out.read()))) or b"PK"


@cases
@given(data=hostile(), imported=st.integers(0, 29))
def test_a_hostile_bundle(sandbox: Path, data: bytes, imported: int) -> None:
    _read(data, sandbox)
    if imported == 0:
        _import(data, sandbox)


@cases
@given(
    field=st.sampled_from(range(8)),
    value=st.integers(0, 2**64 - 1) | st.sampled_from([2**16 - 1, 2**31, 2**32 - 1, 2**63]),
    where=st.sampled_from([b"PK\1\2", b"PK\3\4", b"PK\5\6"]),
    which=st.integers(0, 5),
)
def test_sizes_and_places_that_are_lies(
    bundle: bytes, sandbox: Path, field: int, value: int, where: bytes, which: int
) -> None:
    layouts = {b"PK\1\2": "<4s6H3L5H2L", b"PK\3\4": "<4s5H3L2H", b"PK\5\6": "<4s4H2LH"}
    layout = struct.Struct(layouts[where])
    places, at = [], bundle.find(where)
    while at >= 0 and at + layout.size <= len(bundle):
        places.append(at)
        at = bundle.find(where, at + 1)
    at = places[which % len(places)]
    record = list(layout.unpack_from(bundle, at))
    number = 1 + (field * 3 + which) % (len(record) - 1)
    codes = [code for count, code in _codes(layout.format) for _ in range(count)]
    record[number] = value % (2**16 if codes[number] == "H" else 2**32)
    lying = bytearray(bundle)
    layout.pack_into(lying, at, *record)
    _read(bytes(lying), sandbox)


def _codes(form: str) -> list[tuple[int, str]]:
    """The fields of a struct: how many of which kind."""
    found, count = [], ""
    for letter in form[1:]:
        if letter.isdigit():
            count += letter
        else:
            found.append((1 if letter == "s" else int(count or 1), letter))
            count = ""
    return found
