"""Proof that the store is whole: every version, row, key and blob is what was written.

  heads      every branch and tag leads to a version whose seal, schema and shapes hold
  checksums  also every version before them, and the checksum of every stored chunk
  full       also the SHA-256 of every row, key block and blob

What several versions share is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from memtool_stores.catalog import Catalog
from memtool_stores.errors import IntegrityError, NewerSchemaError, StoreError
from memtool_stores.history import check_name, of_snapshot, snapshots, unreadable_refs
from memtool_stores.ice import configuration, icechunk, storage, translated
from memtool_stores.tree import Root, Tree, seal, sha256

Level = Literal["heads", "checksums", "full"]

KEYS_PATH = "/keys"
BLOB_PATH = "/blobs/"
ROWS_PER_READ = 64


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was written. `name` says which adapter, blob, version or ref."""

    what: str
    name: str
    expected: str
    found: str


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at, and what was wrong; `ok` when nothing was."""

    level: Level
    versions: int
    rows: int
    blobs: int
    damages: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


@dataclass
class _Seen:
    """What has been looked at so far, and what was found."""

    versions: set[str] = field(default_factory=set)
    rows: set[tuple[int, str]] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    blobs: set[tuple[str, str]] = field(default_factory=set)
    damages: list[Damage] = field(default_factory=list)

    @contextmanager
    def looking_at(self, what: str, name: str) -> Iterator[None]:
        """An error inside the block becomes one damage."""
        try:
            with translated(f"read {what} {name!r}", "the store"):
                yield
        except NewerSchemaError:
            raise
        except IntegrityError as error:
            known = error.what not in {"store", "array"}
            self.damages.append(
                Damage(
                    error.what if known else what,
                    error.name if known else name,
                    error.expected or "what was written",
                    error.found,
                )
            )
        except StoreError as error:
            self.damages.append(Damage(what, name, "what was written", error.message))


def verify(url: str, level: Level) -> VerifyReport:
    """Look at the whole store with fresh eyes: nothing remembered in this process is trusted."""
    seen = _Seen()
    with translated("open the store", url):
        repository = icechunk().Repository.open(storage(url), configuration())
    for kind, name in unreadable_refs(repository, url):
        seen.damages.append(Damage(kind, name, "the id of a version", "a file that is none"))
    for kind, names, lookup in (
        ("branch", _names(repository.list_branches, seen, "branches"), repository.lookup_branch),
        ("tag", _names(repository.list_tags, seen, "tags"), repository.lookup_tag),
    ):
        for name in names:
            with seen.looking_at(kind, name):
                check_name(name, kind)
                _verify_line(repository, lookup(name), level, seen)
    return VerifyReport(
        level, len(seen.versions), len(seen.rows), len(seen.blobs), tuple(seen.damages)
    )


def _names(list_refs: Callable[[], set[str]], seen: _Seen, what: str) -> list[str]:
    with seen.looking_at("references", what):
        return sorted(list_refs())
    return []


def _verify_line(repository: Any, tip: str, level: Level, seen: _Seen) -> None:
    """A tip and, beyond the level of heads, all its ancestors, oldest first."""
    line = []
    for snapshot, oldest in snapshots(repository, tip):
        line.append((snapshot, oldest))
        if level == "heads":
            break
    for snapshot, oldest in reversed(line):
        at_tip = snapshot.id == tip
        if snapshot.id in seen.versions and not at_tip:
            continue
        seen.versions.add(snapshot.id)
        with seen.looking_at("version", snapshot.id):
            _verify_version(repository, snapshot, oldest, level, seen, whole=at_tip)


def _verify_version(
    repository: Any, snapshot: Any, oldest: bool, level: Level, seen: _Seen, *, whole: bool
) -> None:
    """One version; with `whole` all its rows are read through it, else those not yet seen."""
    tree = Tree(repository.readonly_session(snapshot_id=snapshot.id))
    _verify_seal(snapshot, oldest, tree)
    root = tree.root()
    tree.check_shapes(root)
    if level == "heads":
        return
    # What this version wrote anew lies in files of its own, even if an earlier one wrote the same.
    written: set[str] = set()
    with seen.looking_at("transaction log", snapshot.id):
        diff = repository.diff(from_snapshot_id=snapshot.parent_id, to_snapshot_id=snapshot.id)
        written = {str(path) for path in diff.updated_chunks}
    catalog = Catalog()
    with seen.looking_at("catalog", snapshot.id):
        catalog = tree.read_catalog(Catalog(), root.state)
    _verify_rows(tree, catalog, seen, hashes=level == "full", whole=whole)
    if whole:
        written |= {KEYS_PATH, *(BLOB_PATH + name for name in root.state.blobs)}
    _verify_keys_and_blobs(tree, root, snapshot.id, seen, hashes=level == "full", written=written)


def _verify_seal(snapshot: Any, oldest: bool, tree: Tree) -> None:
    of_snapshot(snapshot, oldest=oldest)
    metadata = snapshot.metadata
    found = seal(
        tree.attributes,
        parent=metadata["parent"],
        time=metadata["time"],
        message=snapshot.message,
        user=metadata["user"],
    )
    if found != metadata["seal"]:
        raise IntegrityError(
            what="version", name=snapshot.id, expected=f"seal {metadata['seal']}", found=found
        )
    if not oldest and metadata["parent"] != snapshot.parent_id:
        raise IntegrityError(
            what="version",
            name=snapshot.id,
            expected=f"parent {metadata['parent']}",
            found=f"parent {snapshot.parent_id}",
        )


def _verify_rows(tree: Tree, catalog: Catalog, seen: _Seen, *, hashes: bool, whole: bool) -> None:
    records = [r for r in catalog.records.values() if whole or (r.row, r.sha256) not in seen.rows]
    for begin in range(0, len(records), ROWS_PER_READ):
        some = records[begin : begin + ROWS_PER_READ]
        damages = len(seen.damages)
        with seen.looking_at("values", some[0].name):
            block = tree.read_values(some[0].row, some[-1].row + 1)
        single = len(seen.damages) > damages
        # One bad chunk fails its whole block: then the rows are read one by one to name it.
        del seen.damages[damages:]
        for record in some:
            seen.rows.add((record.row, record.sha256))
            with seen.looking_at("values", record.name):
                row = (
                    tree.read_values(record.row, record.row + 1)[0]
                    if single
                    else block[record.row - some[0].row]
                )
                if hashes and sha256(row) != record.sha256:
                    raise IntegrityError(
                        what="values",
                        name=record.name,
                        expected=f"sha256 {record.sha256}",
                        found=sha256(row),
                    )


def _verify_keys_and_blobs(
    tree: Tree, root: Root, version: str, seen: _Seen, *, hashes: bool, written: set[str]
) -> None:
    keys = root.state.keys
    if keys is not None and (KEYS_PATH in written or keys.sha256 not in seen.keys):
        seen.keys.add(keys.sha256)
        with seen.looking_at("keys", version):
            found = sha256(tree.read_keys())
            if hashes and found != keys.sha256:
                raise IntegrityError(
                    what="keys", name=version, expected=f"sha256 {keys.sha256}", found=found
                )
    for name, expected in root.state.blobs.items():
        if BLOB_PATH + name in written or (name, expected) not in seen.blobs:
            seen.blobs.add((name, expected))
            with seen.looking_at("blob", name):
                found = sha256(tree.read_blob(name))
                if hashes and found != expected:
                    raise IntegrityError(
                        what="blob", name=name, expected=f"sha256 {expected}", found=found
                    )
