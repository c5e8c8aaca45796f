"""Damaged files: verify finds every one and names it, and no reader is given a changed byte."""

from __future__ import annotations

import itertools
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtool_stores import (
    Damage,
    IntegrityError,
    MemoryStore,
    NotFoundError,
    Space,
    VersionExpiredError,
)
from memtool_stores.testing import fill, some_values
from tests.fuzz.door import CASES

FLIPS = 40 if CASES > 200 else 8
"""Accidents a kind of file: of `make test`, and of `make test-all`."""
SWAPS = 40
LEADING = ("snapshots", "manifests", "pages")


@dataclass
class Rich:
    """A store with every kind of file, and which files are of which kind."""

    store: MemoryStore
    files: dict[str, dict[Path, str]] = field(default_factory=dict)
    """By kind: every file with the name that verify must give it."""

    def note(self, kind: str, paths: set[Path], name: str) -> None:
        """These files are of that kind and must be called so."""
        self.files.setdefault(kind, {}).update(dict.fromkeys(paths, name))


KINDS = {
    "values": "values",
    "catalog": "catalog",
    "keys": "keys",
    "blobs": "blob",
    "pages": "index",
    "snapshots": "version",
    "manifests": "manifest",
    "transactions": "transaction log",
    "branches": "branch",
    "tags": "tag",
    "sums": None,
}
"""By kind of file, what verify calls it; the checksums may say it of what they are the sums of."""


@pytest.fixture
def rich(store: MemoryStore, space: Space) -> Rich:
    """Every kind of file: rows, catalog, keys, blobs, tags, branches."""
    made = Rich(store)
    ice = Path(store.url) / "ice"
    known = set(ice.rglob("*"))

    def new(kind: str) -> set[Path]:
        files = {p for p in (ice / kind).rglob("*") if p.is_file()} - known
        known.update(files)
        return files

    def note_version() -> None:
        for kind in ("snapshots", "manifests", "transactions"):
            made.note(kind, new(kind), store.head())
        made.note("sums", {Path(store.url) / "sums" / store.head()}, store.head())

    first = store.head()
    for kind in ("snapshots", "transactions"):
        made.note(kind, set((ice / kind).iterdir()), first)
    made.note("sums", {Path(store.url) / "sums" / first}, first)
    for task in range(3):
        with store.transaction(f"write task {task}") as txn:
            fill(txn, space, f"t{task}", task)
        chunks = new("chunks")
        rows = {path for path in chunks if path.stat().st_size == space.layout.nbytes + 4}
        assert len(rows) == 1
        made.note("values", rows, f"t{task}")
        made.note("catalog", chunks - rows, store.head())
        note_version()
    store.tag("v1", "HEAD~1")
    with store.transaction("keys") as txn:
        txn.set_keys(np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32))
    made.note("keys", new("chunks"), store.head())
    note_version()
    with store.transaction("blob") as txn:
        txn.put_blob("query-modules", bytes(range(200)))
    chunks = new("chunks")
    blobs = {path for path in chunks if bytes(range(200)) in path.read_bytes()}
    assert (len(blobs), len(chunks)) == (1, 2)
    made.note("blobs", blobs, "query-modules")
    made.note("pages", chunks - blobs, "part 1")
    note_version()
    store.tag("v2")
    store.branch("side", "HEAD~1")
    with store.transaction("more") as txn:
        txn.remove("t0")
        fill(txn, space, "t3", 3)
    chunks = new("chunks")
    rows = {path for path in chunks if path.stat().st_size == space.layout.nbytes + 4}
    made.note("values", rows, "t3")
    note_version()
    for path in (ice / "refs").rglob("ref.json"):
        kind, _, name = path.parent.name.partition(".")
        made.note("branches" if kind == "branch" else "tags", {path}, name)
    assert store.verify().ok
    assert made.files.keys() == KINDS.keys()
    return made


def _reads(url: str) -> Iterator[Callable[[], object]]:
    """All that a reader can ask for, one after the other; each opens the store anew."""

    def asking(question: Callable[[MemoryStore], object]) -> Callable[[], object]:
        return lambda: question(MemoryStore.open(url))

    yield asking(lambda store: store.space)
    yield asking(lambda store: (store.tags(), store.branches()))
    for ref in ("main", "side", "v1", "v2", "HEAD~4"):
        yield asking(lambda store, ref=ref: store.log(ref))
        yield asking(lambda store, ref=ref: store.diff(ref))
        yield asking(lambda store, ref=ref: store.view(ref).adapters)
        yield asking(lambda store, ref=ref: store.view(ref).values().tobytes())
        yield asking(lambda store, ref=ref: _keys(store, ref))
        yield asking(lambda store, ref=ref: _blobs(store, ref))
        yield asking(lambda store, ref=ref: store.export("t1", ref))


def _answer(read: Callable[[], object]) -> object:
    try:
        return read()
    except IntegrityError as error:
        return error


def _keys(store: MemoryStore, ref: str) -> bytes | None:
    keys = store.view(ref).keys()
    return None if keys is None else keys.tobytes()


def _blobs(store: MemoryStore, ref: str) -> dict[str, bytes]:
    view = store.view(ref)
    return {name: view.blob(name) for name in view.blobs()}


def _flips(paths: list[Path], count: int) -> Iterator[tuple[Path, str]]:
    """Flip one bit of one file, yield the file, and put it back."""
    generator = random.Random(count)
    for _ in range(count):
        path = generator.choice(paths)
        whole = path.read_bytes()
        bit = generator.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        yield path, f"bit {bit} of {path}"
        path.write_bytes(whole)


def _losses(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Every file cut short, made empty and deleted, and put back."""
    for path in paths:
        whole = path.read_bytes()
        for what, data in (("half", whole[: len(whole) // 2]), ("empty", b""), ("gone", None)):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            yield path, f"{what}: {path}"
            path.write_bytes(whole)


def _assert_named(damages: tuple[Damage, ...], kind: str, name: str, how: str) -> None:
    """The damage is in the list under its kind and name, and nothing is there twice."""
    assert damages, how
    listed = [(damage.what, damage.name) for damage in damages]
    assert len(set(listed)) == len(listed), (how, listed)
    assert all(damage.expected and damage.found for damage in damages), how
    if KINDS[kind] is None:
        assert name in {named for _, named in listed}, (how, damages)
    else:
        assert (KINDS[kind], name) in listed, (how, damages)


def _files(url: str, kind: str) -> list[Path]:
    return sorted(p for p in (Path(url) / "ice" / kind).rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found_and_named(rich: Rich, kind: str) -> None:
    names = rich.files[kind]
    found = 0
    for path, how in _flips(sorted(names), FLIPS):
        _assert_named(rich.store.verify("full").damages, kind, names[path], how)
        found += 1
    assert found == FLIPS
    assert rich.store.verify().ok


@pytest.mark.parametrize("kind", KINDS)
def test_every_lost_or_shortened_file_is_found_and_named(rich: Rich, kind: str) -> None:
    names = rich.files[kind]
    for path, how in _losses(sorted(names)):
        _assert_named(rich.store.verify("full").damages, kind, names[path], how)
    assert rich.store.verify().ok


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_of_damage_is_told_so_or_given_what_was_written(
    rich: Rich, kind: str, cache: Path
) -> None:
    right = [read() for read in _reads(rich.store.url)]
    paths = sorted(rich.files[kind])
    told = 0
    for damaged in (
        _flips(paths, FLIPS),
        _losses(paths if FLIPS > 8 else [paths[0], paths[-1]]),
    ):
        for _, how in damaged:
            for file in cache.rglob("*.values"):
                file.unlink()
            for number, (read, expected) in enumerate(
                zip(_reads(rich.store.url), right, strict=True)
            ):
                found = _answer(read)
                if isinstance(found, IntegrityError):
                    assert found.exit_status == 5
                    assert found.remedy is not None
                    assert "memtool verify" in found.remedy
                    told += 1
                else:
                    assert found == expected, (how, number)
    # Nobody but verify reads transaction logs; of checksums, those of snapshots may be looked at.
    if kind != "sums":
        assert (told > 0) == (kind != "transactions")


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_not_damaged_can_be_rolled_back_to(rich: Rich, lost: bool) -> None:
    store = rich.store
    (path,) = (p for p in rich.files["snapshots"] if p.name == store.head())
    if lost:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    fresh = MemoryStore.open(store.url)
    with pytest.raises(IntegrityError):
        fresh.view()
    assert fresh.rollback("v2") == ""
    assert len(MemoryStore.open(store.url).view()) == 3
    assert fresh.verify().ok
    fresh.gc(keep_last=2)
    assert fresh.verify().ok


def test_a_lost_version_is_no_expired_one(rich: Rich) -> None:
    store = rich.store
    lost, expired = store.view("HEAD~1").version, store.view("HEAD~5").version
    (path,) = (p for p in rich.files["snapshots"] if p.name == lost)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match=lost):
        MemoryStore.open(store.url).view(lost).values()
    path.write_bytes(whole)
    store.gc(keep_last=2)
    with pytest.raises(VersionExpiredError):
        MemoryStore.open(store.url).view(expired)


def test_the_checksums_are_those_of_sha256sum(rich: Rich) -> None:
    names = sorted(f"sums/{path.name}" for path in rich.files["sums"])
    command = ["sha256sum", "--check", "--strict", "--quiet", *names]
    subprocess.run(command, cwd=rich.store.url, check=True)


def test_what_an_older_memtool_wrote_has_no_checksums_until_the_next_commit(
    rich: Rich, space: Space
) -> None:
    store = rich.store
    for path in rich.files["sums"]:
        path.unlink()
    (Path(store.url) / "sums").rmdir()
    assert store.verify().ok
    for seed in (11, 12):
        with store.transaction("by this memtool") as txn:
            fill(txn, space, f"n{seed}", seed)
    assert store.verify().ok
    assert len(list((Path(store.url) / "sums").iterdir())) == 2
    (Path(store.url) / "sums" / store.view("HEAD~1").version).unlink()
    (damage,) = store.verify().damages
    assert (damage.what, damage.name) == ("checksums", store.view("HEAD~1").version)


@pytest.mark.parametrize("keep", range(1, 7))
def test_gc_takes_the_checksums_of_what_it_takes_along(rich: Rich, space: Space, keep: int) -> None:
    store = rich.store
    store.gc(keep_last=keep)
    kept = {v.id for ref in ("main", "side", "v1", "v2") for v in store.log(ref)}
    assert {p.name for p in (Path(store.url) / "sums").iterdir()} == kept
    assert store.verify().ok
    with store.transaction("and on") as txn:
        fill(txn, space, "on", 8)
    assert store.verify().ok
    for kind in ("snapshots", "manifests", "transactions"):
        for path, how in _flips(_files(store.url, kind), FLIPS // 4):
            damages = store.verify().damages
            assert KINDS[kind] in {damage.what for damage in damages}, (how, path, damages)


def test_a_damaged_row_is_named(rich: Rich, space: Space) -> None:
    chunks = [
        p for p in _files(rich.store.url, "chunks") if p.stat().st_size == space.layout.nbytes + 4
    ]
    wanted = rich.store.view("v1").value("t1").tobytes()
    (path,) = [p for p in chunks if p.read_bytes().startswith(wanted)]
    data = bytearray(path.read_bytes())
    data[7] ^= 16
    path.write_bytes(data)
    for level in ("checksums", "full"):
        report = rich.store.verify(level)
        assert {(d.what, d.name) for d in report.damages} == {("values", "t1")}
    assert rich.store.verify("heads").ok
    fresh = MemoryStore.open(rich.store.url)
    with pytest.raises(IntegrityError):
        fresh.view().value("t1")
    with pytest.raises(IntegrityError):
        fresh.view().values()
    assert fresh.view().value("t2") is not None


def test_a_row_with_a_right_checksum_but_other_bytes_is_found(rich: Rich, space: Space) -> None:
    """Two chunks that changed places: every checksum holds, only the hash of the row tells."""
    one, two, *_ = [
        p for p in _files(rich.store.url, "chunks") if p.stat().st_size == space.layout.nbytes + 4
    ]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert rich.store.verify("checksums").ok
    report = rich.store.verify("full")
    assert {d.what for d in report.damages} == {"values"}
    assert len({d.name for d in report.damages}) == 2


def test_every_file_that_was_appended_to_is_named(rich: Rich) -> None:
    """Also a chunk, of which no reader is given what lies beyond its end."""
    appended = itertools.cycle([b"\0", b"\n", b"another line", bytes(40_000)])
    for kind, names in rich.files.items():
        for path, name in sorted(names.items()):
            whole = path.read_bytes()
            path.write_bytes(whole + next(appended))
            named = {(damage.what, damage.name) for damage in rich.store.verify().damages}
            chunk = ("chunk", path.relative_to(rich.store.url).as_posix())
            assert named & {chunk, (KINDS[kind] or "checksums", name)}, (path, named)
            path.write_bytes(whole)
    assert rich.store.verify().ok


def test_a_chunk_that_became_as_long_as_a_row_is_named(store: MemoryStore, space: Space) -> None:
    row = space.layout.nbytes + 4
    with store.transaction("write") as txn:
        txn.put_blob("small", b"{}" * 20)
        txn.add("one", some_values(space, 1))
        txn.set_keys(np.ones((1, 1, 3), dtype=np.float32))
    short = [path for path in _files(store.url, "chunks") if path.stat().st_size < row]
    assert len(short) == 2
    for path in short:
        whole = path.read_bytes()
        path.write_bytes(whole + bytes(row - len(whole)))
        assert [damage.what for damage in store.verify().damages] == ["chunk"]
        path.write_bytes(whole)
    assert store.verify().ok


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\x0b", 1),
        lambda text: text + text.split(b"\n")[0] + b"\n",
        lambda text: b"\n".join([*reversed(text.split(b"\n")[:-1]), b""]),
    ],
    ids=["cut", "carriage returns", "another separator", "repeated", "reversed"],
)
def test_checksums_that_say_the_same_in_other_bytes_are_named(rich: Rich, change: Any) -> None:
    for path in rich.files["sums"]:
        whole = path.read_bytes()
        if (other := change(whole)) == whole:
            continue
        path.write_bytes(other)
        assert "checksums" in {damage.what for damage in rich.store.verify().damages}
        path.write_bytes(whole)
    assert rich.store.verify().ok


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_files_that_changed_places_are_named(rich: Rich, kind: str) -> None:
    """Of one kind or of two: whatever is in them is right elsewhere.

    What only another file leads to (a branch, a snapshot, a manifest, a page) is not looked for
    where that one is damaged, which is said.
    """
    order = ({*rich.files["branches"], *rich.files["tags"]}, *map(rich.files.get, LEADING))
    depth = {path: place for place, paths in enumerate(order) for path in paths or ()}
    generator = random.Random(SWAPS)
    names = rich.files[kind]
    everything = [path for paths in rich.files.values() for path in paths]
    for number in range(SWAPS):
        one = generator.choice(sorted(names))
        others = {*(names if number % 2 and len(names) > 1 else everything)} - {one}
        two = generator.choice(sorted(others))
        first, second = one.read_bytes(), two.read_bytes()
        if first == second:
            continue
        one.write_bytes(second)
        two.write_bytes(first)
        damages = rich.store.verify().damages
        if depth.get(two, len(order)) < depth.get(one, len(order)):
            assert damages
        elif kind not in {"branches", "tags"} or two not in names:
            _assert_named(damages, kind, names[one], f"{one} and {two}")
        for read in itertools.islice(_reads(rich.store.url), number % 3, None, 5):
            # A branch in the place of another leads to another version, and rightly so.
            with suppress(NotFoundError):
                _answer(read)
        one.write_bytes(first)
        two.write_bytes(second)
    assert rich.store.verify().ok


def test_gc_does_not_take_the_versions_of_a_damaged_tag(rich: Rich) -> None:
    (path,) = [p for p in _files(rich.store.url, "refs") if "tag.v1" in str(p)]
    whole = path.read_bytes()
    path.write_bytes(b"?" + whole[1:])
    with pytest.raises(IntegrityError, match="tag 'v1' is damaged"):
        rich.store.gc(keep_last=1)
    path.write_bytes(whole)
    rich.store.gc(keep_last=1)
    assert len(rich.store.view("v1")) == 2


def test_what_was_written_twice_is_read_twice(grown: MemoryStore) -> None:
    """Keys and blobs that return to an earlier content lie in files of their own."""
    keys = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    for turn in (0, 1, 0, 1):
        with grown.transaction(f"turn {turn}") as txn:
            txn.set_keys(keys[turn])
            txn.put_blob("head", bytes([turn]) * 300)
    assert grown.verify().ok
    for path in _files(grown.url, "chunks"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not MemoryStore.open(grown.url).verify().ok, path.name
        path.write_bytes(whole)
    assert grown.verify().ok
