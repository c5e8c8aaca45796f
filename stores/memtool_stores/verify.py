"""Proof that the store is whole: every version, row, key and blob is what was written.

  heads      every branch and tag leads to a version whose seal, schema and shapes hold
  checksums  also every version before them, and the checksum of every stored chunk
  full       also the SHA-256 of every row, key block and blob, and of every piece of a ragged row

What several versions share is read once. In a directory the files of snapshots, transaction logs
and manifests are compared with their own checksums too (sums.py), those of the tips at level heads;
where a damaged snapshot hides the versions before it, they are found by these.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from memtool_stores import sums
from memtool_stores.arrays import CRC32C_BYTES, whole_chunk
from memtool_stores.catalog import AdapterRecord, BareCatalog, Catalog
from memtool_stores.errors import (
    ForkedProcessError,
    IntegrityError,
    MemtoolError,
    NewerSchemaError,
    StorageError,
)
from memtool_stores.history import (
    MAIN,
    TRIES,
    checked_snapshot,
    is_expired,
    of_snapshot,
    reachable,
    sealed_tree,
    snapshots,
)
from memtool_stores.ice import looking_up, open_repository, translated
from memtool_stores.index import Entry, IndexState, Ref
from memtool_stores.names import check_ref
from memtool_stores.objects import objects_at
from memtool_stores.parts import part_length, parts_of
from memtool_stores.printable import one_line
from memtool_stores.references import References, unreadable
from memtool_stores.space import Layout
from memtool_stores.tree import CATALOG_CHUNK_BYTES, State, Tree, sha256

Level = Literal["heads", "checksums", "full"]

KEYS_PATH = "/keys"
PARTS_PATH = "/parts"
BLOB_PATH = "/blobs/"
FILES_PATH = "/files/"
ROWS_PER_READ = 64


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written. `name` says which adapter, blob, version or ref."""

    what: str
    name: str
    expected: str
    found: str


@dataclass(frozen=True)
class Unchecked:
    """One thing that the system would not let us read: nobody knows whether it is damaged."""

    what: str
    name: str
    why: str


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was wrong; `ok` when nothing was and all could be read.

    `unfinished` are branches and tags, `tag v1`, that a full disk or a kill kept from being made.
    """

    level: Level
    versions: int
    rows: int
    blobs: int
    damages: tuple[Damage, ...]
    unchecked: tuple[Unchecked, ...] = ()
    unfinished: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damages and not self.unchecked


@dataclass
class _Seen:
    """What has been looked at so far, and what was found."""

    versions: dict[str, str | None] = field(default_factory=dict)
    """The parent of each, which comes before it; None for an oldest one."""
    rows: set[bytes] = field(default_factory=set)
    """Row and hash of each, as `_mark`: a store has many, and of none more is held than that."""
    catalog: Catalog = field(default_factory=BareCatalog)
    """That of the last version whose lines were all checked; the next one goes on from it."""
    catalog_tail: bytes = b""
    """What its last chunk, which the next one may have written again, held."""
    keys: set[str] = field(default_factory=set)
    key_chains: tuple[str, list[str]] = ("", [])
    """The version whose keys were read last, and their hash chain from before the first block."""
    blobs: set[bytes] = field(default_factory=set)
    """Likewise of blobs."""
    pages: set[Ref] = field(default_factory=set)
    damages: dict[Hashable, Damage] = field(default_factory=dict)
    """One for each damaged thing, however often it was read."""
    unchecked: dict[tuple[str, str], Unchecked] = field(default_factory=dict)
    row_lengths: set[int] = field(default_factory=set)
    """Stored bytes of a row, with its crc32c."""
    chunk_lengths: set[int] = field(default_factory=set)
    """Stored bytes of other chunks."""
    hidden: bool = False
    """Whether some history could not be followed to its end."""

    def add(self, damage: Damage, *same: Hashable) -> None:
        """One more, unless that thing is known to be damaged: same kind and name, or `same`."""
        damage = replace(damage, name=one_line(damage.name), found=one_line(damage.found))
        self.damages.setdefault((damage.what, *(same or (damage.name,))), damage)

    def pass_over(self, what: str, name: str, error: MemtoolError) -> None:
        """One more that could not be read, for no fault of its own."""
        self.unchecked.setdefault((what, name), Unchecked(what, name, error.message))

    @contextmanager
    def looking_at(self, what: str, name: str, *same: Hashable) -> Iterator[None]:
        """An error inside the block becomes one damage, or one thing that could not be checked."""
        try:
            with translated(f"read {what} {name!r}", "the store"):
                yield
        except (NewerSchemaError, ForkedProcessError):
            raise
        except StorageError as error:
            self.pass_over(what, name, error)
        except IntegrityError as error:
            known = error.what not in {"store", "array", "catalog"}
            place = "" if known or error.what == "store" else f"{error.name}: "
            found = Damage(
                error.what if known else what,
                error.name if known else name,
                error.expected or "what was written",
                place + error.found,
            )
            self.add(found, *same)
        except MemtoolError as error:
            self.add(Damage(what, name, "what was written", error.message), *same)


def _mark(*said: object) -> bytes:
    """A few bytes that stand for what is said of a thing."""
    return hashlib.blake2b(repr(said).encode(), digest_size=16).digest()


def _mark_row(record: AdapterRecord) -> bytes:
    return _mark(record.row, record.sha256)


def verify(url: str, level: Level) -> VerifyReport:
    """Look at the whole store with fresh eyes: nothing remembered in this process is trusted.

    Raises:
        NotFoundError: there is no store.
        NewerSchemaError: a branch holds what only a newer memtool reads.
    """
    for _ in range(TRIES):
        report, met = _verified(url, level)
        if not report.damages or not _expired_since(url, met):
            break  # else gc took what was being read
    return report


def _expired_since(url: str, met: set[str]) -> bool:
    """Whether gc has expired one of these versions."""
    with suppress(MemtoolError), translated("list the versions", url):
        repository = open_repository(url)
        named = reachable(repository, url)
        return any(version not in named and is_expired(repository, url, version) for version in met)
    return False


def _verified(url: str, level: Level) -> tuple[VerifyReport, set[str]]:
    """What one look finds, and the versions that it met."""
    seen = _Seen()
    try:
        repository = open_repository(url)
    except IntegrityError as error:
        # Without main nothing can be read but the files one by one.
        known = error.what != "store"
        what, name = (error.what, error.name) if known else ("branch", MAIN)
        seen.add(Damage(what, name, error.expected or "", error.found))
        repository, seen.hidden = None, True
    unread = References()
    with seen.looking_at("references", "branches and tags"):
        unread = unreadable(url)
    for kind, name in unread.damaged:
        seen.add(Damage(kind, name, "the id of a version", "a file that is none"))
        seen.hidden = True
    if repository is not None:
        _verify_refs(repository, unread, level, seen)
    if repository is not None and seen.hidden and level != "heads":
        _verify_hidden(repository, url, level, seen)
    _verify_files(url, seen)
    if level != "heads" and not url.startswith("s3://"):
        _verify_chunk_files(url, seen)
    report = VerifyReport(
        level,
        len(seen.versions),
        len(seen.rows),
        len(seen.blobs),
        tuple(seen.damages.values()),
        tuple(seen.unchecked.values()),
        tuple(f"{kind} {name}" for kind, name in unread.unfinished),
    )
    damaged = {damage.name for damage in report.damages if damage.what == "version"}
    return report, damaged | seen.versions.keys()


def _verify_refs(repository: Any, unread: References, level: Level, seen: _Seen) -> None:
    """Every branch and tag that can be read itself, and what it leads to."""
    passed = {*unread.damaged, *unread.unfinished}
    for kind, list_refs, lookup in (
        ("branch", repository.list_branches, repository.lookup_branch),
        ("tag", repository.list_tags, repository.lookup_tag),
    ):
        names = []
        with seen.looking_at("references", f"of kind {kind}"):
            names = sorted(list_refs())
        for name in (name for name in names if (kind, name) not in passed):
            with seen.looking_at(kind, name):
                check_ref(name, kind)
                _verify_line(repository, lookup(name), level, seen)


def _verify_line(repository: Any, tip: str, level: Level, seen: _Seen) -> None:
    """A tip and, beyond the level of heads, all its ancestors, oldest first."""
    line: list[tuple[Any, bool]] = []
    seen.hidden = was_hidden = seen.hidden
    with seen.looking_at("version", tip):
        seen.hidden = True
        for snapshot, oldest in snapshots(repository, tip):
            line.append((snapshot, oldest))
            if level == "heads":
                break
        seen.hidden = was_hidden
        if not line:
            raise IntegrityError(
                what="version", name=tip, expected="a memory", found="what icechunk begins with"
            )
    for snapshot, oldest in reversed(line):
        at_tip = snapshot.id == tip
        if snapshot.id in seen.versions and not at_tip:
            continue
        seen.versions[snapshot.id] = None if oldest else snapshot.parent_id
        with seen.looking_at("version", snapshot.id):
            _verify_version(repository, snapshot, oldest, level, seen, whole=at_tip)


def _verify_files(url: str, seen: _Seen) -> None:
    """The checksums of the files of snapshots, transaction logs and manifests."""
    noted = _noted(url, seen)
    # Of a version that cannot be read, the parent is not known: any that has checksums will do.
    hidden = {version: version for version in sorted(noted - seen.versions.keys()) if seen.hidden}
    for version, parent in {**seen.versions, **hidden}.items():
        if version not in noted:
            if parent in noted:
                seen.add(Damage("checksums", version, "a file with the checksums", "none"))
            continue
        with seen.looking_at("checksums", version):
            for wrong in sums.check(url, version, parent):
                if isinstance(wrong, sums.Unread):
                    seen.pass_over(wrong.kind, wrong.version, wrong.error)
                    continue
                seen.add(Damage(wrong.kind, wrong.version, wrong.expected, wrong.found))


def _noted(url: str, seen: _Seen) -> frozenset[str]:
    """The versions that have checksums."""
    with seen.looking_at("checksums", "of all versions"):
        return sums.versions(url)
    return frozenset()


def _verify_chunk_files(url: str, seen: _Seen) -> None:
    """Files of chunks that something was appended to: no reader is given what is beyond the end.

    What else is wrong with a chunk was found when it was read. One that no version has is garbage,
    and is left to gc.
    """
    objects = objects_at(url)
    known = seen.row_lengths | seen.chunk_lengths
    with seen.looking_at("chunks", "of the store"):
        for entry in objects.list("ice/chunks"):
            with seen.looking_at("chunk", entry.path):
                data = objects.read(entry.path)
                whole = whole_chunk(data, {part_length(data) or 0} | known)
                if whole not in {None, entry.nbytes}:
                    seen.add(
                        Damage(
                            "chunk",
                            entry.path,
                            f"{whole:,} bytes",
                            f"{entry.nbytes:,} bytes: something was appended",
                        )
                    )


def _verify_hidden(repository: Any, url: str, level: Level, seen: _Seen) -> None:
    """The versions that a damaged snapshot hides, as far as they can be read."""
    for version in sorted(_noted(url, seen) - seen.versions.keys()):
        with seen.looking_at("version", version):
            # What calls itself another version could lead icechunk round in a circle.
            snapshot = checked_snapshot(repository.lookup_snapshot(version), version)
            seen.versions[version] = snapshot.parent_id
            _verify_version(repository, snapshot, True, level, seen, whole=False)


def _verify_version(
    repository: Any, snapshot: Any, oldest: bool, level: Level, seen: _Seen, *, whole: bool
) -> None:
    """One version; with `whole` all its rows are read through it, else those not yet seen."""
    tree = sealed_tree(repository, snapshot.id)
    of_snapshot(snapshot, oldest=oldest)
    if not oldest and snapshot.metadata["parent"] != snapshot.parent_id:
        raise IntegrityError(
            what="version",
            name=snapshot.id,
            expected=f"parent {snapshot.metadata['parent']}",
            found=f"parent {snapshot.parent_id}",
        )
    root = tree.root()
    seen.row_lengths.add(root.space.layout.nbytes + CRC32C_BYTES)
    tree.check_shapes(root)
    if level == "heads":
        _require_files(len(tree.files()), root.state.ragged)
        return
    # What this version wrote anew lies in files of its own, even if an earlier one wrote the same.
    written = _Written()
    parent = snapshot.parent_id
    if ("version", parent) not in seen.damages:
        with (
            seen.looking_at("transaction log", snapshot.id),
            looking_up(repository, parent, snapshot.id),
        ):
            diff = repository.diff(from_snapshot_id=parent, to_snapshot_id=snapshot.id)
            moved = (*diff.new_arrays, *diff.deleted_arrays, *diff.updated_arrays)
            written = _Written(
                parent,
                {str(path): chunks for path, chunks in diff.updated_chunks.items()},
                frozenset(map(str, diff.new_arrays)),
                frozenset(map(str, moved)),
            )
    records: list[AdapterRecord] = []
    with seen.looking_at("catalog", snapshot.id):
        catalog, new = _verify_catalog(tree, root.state, seen, whole=whole)
        # Of a row that was purged since, an older line says that it has bytes.
        newest = (record for record in new if catalog.by_id(record.id) is record)
        records = [*catalog.records.values()] if whole else [*newest]
        if whole or written.below(FILES_PATH):
            with seen.looking_at("version", snapshot.id):
                _verify_owners(tree, catalog, seen)
    rows = [
        record
        for record in records
        if whole
        or _mark_row(record) not in seen.rows
        or f"{FILES_PATH}{record.row}" in written.chunks
    ]
    hashes = level == "full"
    _verify_rows(tree, rows, root.space.layout, seen, hashes=hashes)
    _verify_keys(tree, root.state, snapshot.id, written, seen, hashes=hashes, whole=whole)
    _verify_blobs(tree, root.state, written, seen, hashes=hashes, whole=whole)
    seen.chunk_lengths |= tree.chunk_lengths


@dataclass(frozen=True)
class _Written:
    """What a version wrote on top of its parent.

    By array the places of chunks; the arrays that are new; those that came, went or have another
    shape.
    """

    parent: str = ""
    chunks: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    new: frozenset[str] = frozenset()
    moved: frozenset[str] = frozenset()

    def below(self, path: str) -> bool:
        """Whether an array below this path came, went or changed its shape."""
        return any(array.startswith(path) for array in self.moved)


def _verify_catalog(
    tree: Tree, state: State, seen: _Seen, *, whole: bool
) -> tuple[Catalog, Sequence[AdapterRecord]]:
    """The catalog of a version, and the records of its lines that were not looked at before.

    Where it goes on from the last one, all before lies in chunks that were read, but for the last
    of them, which was written again: what both have of it is compared. `whole` reads all again.

    Raises:
        IntegrityError: it is not what was written.
    """
    known, tail = seen.catalog, seen.catalog_tail
    size, step = state.catalog_bytes, CATALOG_CHUNK_BYTES
    catalog = tree.read_catalog(known, state)
    goes_on = catalog.goes_on_from(known)
    if goes_on and known.size < size:
        goes_on = tree.catalog_bytes(known.size - len(tail), known.size, state) == tail
    if whole or not goes_on:
        catalog.require_bytes(tree.catalog_bytes(0, size, state))
    seen.catalog, seen.catalog_tail = catalog, tree.catalog_bytes(size // step * step, size, state)
    return catalog, catalog.since(known if goes_on else BareCatalog())


def _require_files(found: int, expected: int) -> None:
    if found != expected:
        raise IntegrityError(
            what="array", name="files", expected=f"{expected:,} arrays", found=f"{found:,} arrays"
        )


def _verify_owners(tree: Tree, catalog: Catalog, seen: _Seen) -> None:
    """Every ragged row that has bytes has an array under /files, and nothing else has.

    Raises:
        IntegrityError: something there is nobody's.
    """
    owners = {str(r.row): r for r in catalog.records.values() if r.ragged and r.state != "purged"}
    found = set(tree.files())
    for row in sorted(owners.keys() - found):
        record = owners[row]
        damage = Damage("values", record.name, f"an array files/{row}", "no such array")
        seen.add(damage, record.row, record.sha256)
    if strange := sorted(found - owners.keys()):
        raise IntegrityError(
            what="array",
            name="files",
            expected="an array for each ragged row that has bytes",
            found=f"{', '.join(strange[:3])}{', …' if len(strange) > 3 else ''} of nobody",
        )


def _verify_rows(
    tree: Tree, wanted: list[AdapterRecord], layout: Layout, seen: _Seen, *, hashes: bool
) -> None:
    _verify_without_values(tree, [r for r in wanted if r.state == "purged" or r.ragged], seen)
    kept = [r for r in wanted if r.state != "purged"]
    for record in (r for r in kept if r.ragged):
        seen.rows.add(_mark_row(record))
        with seen.looking_at("values", record.name, record.row, record.sha256):
            _verify_file(tree, record, hashes=hashes)
    records = [r for r in kept if not r.ragged]
    for begin in range(0, len(records), ROWS_PER_READ):
        some = records[begin : begin + ROWS_PER_READ]
        # One bad chunk fails its whole block: then the rows are read one by one to name it.
        trial = _Seen()
        with trial.looking_at("values", some[0].name):
            block = tree.read_values([record.row for record in some], layout)
        single = bool(trial.damages or trial.unchecked)
        for place, record in enumerate(some):
            seen.rows.add(_mark_row(record))
            with seen.looking_at("values", record.name, record.row):
                row = tree.read_values([record.row], layout)[0] if single else block[place]
                if hashes and sha256(row) != record.sha256:
                    raise IntegrityError(
                        what="values",
                        name=record.name,
                        expected=f"sha256 {record.sha256}",
                        found=sha256(row),
                    )


def _verify_file(tree: Tree, record: AdapterRecord, *, hashes: bool) -> None:
    """The bytes of a ragged row, a chunk at a time."""
    whole, left = hashlib.sha256(), record.nbytes or 0
    for place, chunk in enumerate(tree.file_chunks(record)):
        whole.update(chunk[:left])
        left -= len(chunk[:left])
        if hashes and record.pieces and (found := sha256(bytes(chunk))) != record.pieces[place]:
            raise IntegrityError(
                what="values",
                name=record.name,
                expected=f"sha256 {record.pieces[place]} of chunk {place}",
                found=found,
            )
    if hashes and whole.hexdigest() != record.sha256:
        raise IntegrityError(
            what="values",
            name=record.name,
            expected=f"sha256 {record.sha256}",
            found=whole.hexdigest(),
        )


def _verify_without_values(tree: Tree, records: list[AdapterRecord], seen: _Seen) -> None:
    """A purged row must have no bytes in this version, a ragged one none in the values."""
    for record in records:
        with seen.looking_at("values", record.name, record.row):
            if tree.has_row(record.row):
                why = "purged" if record.state == "purged" else "ragged"
                raise IntegrityError(
                    what="values", name=record.name, expected=f"no bytes: {why}", found="bytes"
                )


def _verify_keys(
    tree: Tree,
    state: State,
    version: str,
    written: _Written,
    seen: _Seen,
    *,
    hashes: bool,
    whole: bool,
) -> None:
    """The keys; without `whole` only the blocks that the version wrote and those after them."""
    keys, places = state.keys, written.chunks.get(KEYS_PATH, ())
    if keys is None:
        return
    before, known = seen.key_chains
    anew = whole or KEYS_PATH in written.new
    if not anew and not places and keys.sha256 in seen.keys:
        if before == written.parent:
            seen.key_chains = version, known
        return
    if anew or before != written.parent:
        known = []
    seen.keys.add(keys.sha256)
    with seen.looking_at("keys", version, keys.sha256):
        chains = tree.read_key_chains(keys, known[: min((place[1] for place in places), default=0)])
        if hashes and chains[-1] != keys.sha256:
            raise IntegrityError(
                what="keys", name=version, expected=f"sha256 {keys.sha256}", found=chains[-1]
            )
        seen.key_chains = version, chains


def _verify_blobs(
    tree: Tree, state: State, written: _Written, seen: _Seen, *, hashes: bool, whole: bool
) -> None:
    """The blobs and the pages that list them; without `whole` those alone that are new."""
    index = tree.index(state)
    parts = {place[0] for place in written.chunks.get(PARTS_PATH, ())}
    named: dict[str, Entry | None] = dict(state.index.listed)
    refs: set[Ref] = set()
    all_read = True
    waiting = [] if state.index.page is None else [(state.index.page, "")]
    while waiting:
        ref, path = waiting.pop()
        # Who writes a page again writes all that lead to it, too.
        if not whole and ref in seen.pages and ref.part not in parts:
            continue
        seen.pages.add(ref)
        read = False
        with seen.looking_at("index", f"part {ref.part}"):
            if ref in refs:
                raise _of_several(ref.part)
            refs.add(ref)
            page = index.page(ref, path)
            read = True
            for name, one in page.blobs.items():
                named.setdefault(name, one)  # further down stands what was before
            below = [(one, path + digit) for digit, one in page.pages.items()]
            index.ahead([(one, to) for one, to in below if whole or one not in seen.pages])
            waiting += below
        all_read = all_read and read
    found = {name: entry for name, entry in named.items() if entry is not None}
    if whole and all_read:
        with seen.looking_at("array", "parts"):
            _verify_parts(tree, refs, found.values(), state.index)
    if whole or written.below(BLOB_PATH):
        with seen.looking_at("array", "blobs"):
            tree.check_old_blobs(index)
    new = {
        name: entry
        for name, entry in found.items()
        if whole
        or entry.part in parts
        or BLOB_PATH + name in written.chunks
        or _mark(name, entry) not in seen.blobs
    }
    seen.blobs.update(_mark(name, entry) for name, entry in new.items())
    small = [n for n, e in new.items() if e.part is not None and parts_of(e.nbytes) == 1]
    for begin in range(0, len(small), ROWS_PER_READ):
        names = small[begin : begin + ROWS_PER_READ]
        # Where one of them is damaged, each is read for itself to name it.
        with suppress(IntegrityError, StorageError), translated("read blobs", "the store"):
            for name, data in zip(
                names, tree.read_small_blobs([new[name] for name in names]), strict=True
            ):
                if not hashes or sha256(data) == new[name].sha256:
                    del new[name]
    for name, entry in new.items():
        with seen.looking_at("blob", name, name, entry):
            digest = sha256(tree.read_blob(name, entry))
            if hashes and digest != entry.sha256:
                raise IntegrityError(
                    what="blob", name=name, expected=f"sha256 {entry.sha256}", found=digest
                )


def _verify_parts(
    tree: Tree,
    pages: Iterable[Ref],
    blobs: Collection[Entry],
    index: IndexState,
) -> None:
    """Every part belongs to one page or blob or is free; one that belongs to none has no bytes.

    And there are as many blobs as the state says.

    Raises:
        IntegrityError: it is not so.
    """
    if len(blobs) != index.count:
        raise IntegrityError(
            what="index", name="count", expected=f"{index.count:,}", found=f"{len(blobs):,} blobs"
        )
    owned = [(page.part, page.part + 1) for page in pages]
    owned += [(b.part, b.part + parts_of(b.nbytes)) for b in blobs if b.part is not None]
    owned.sort()
    unused = [(first, first + count) for first, count in index.free]
    for (_, end), (first, _) in pairwise(sorted([*owned, *unused])):
        if first < end:
            raise _of_several(first)
    firsts = [first for first, _ in owned]
    places = ((part, bisect_right(firsts, part) - 1) for part in tree.parts())
    strange = [part for part, place in places if place < 0 or part >= owned[place][1]]
    if strange:
        raise IntegrityError(
            what="array",
            name="parts",
            expected="bytes in the parts alone that the index names",
            found=f"bytes in part {strange[0]}, one of {len(strange):,} of nobody",
        )


def _of_several(part: int) -> IntegrityError:
    return IntegrityError(
        what="index",
        name=f"part {part}",
        expected="one page or blob in it, none where it is free",
        found="several",
    )
