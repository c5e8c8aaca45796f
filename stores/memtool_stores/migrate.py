"""From an older schema to the one this code writes, a step at a time.

A version is never rewritten: history stays as it was written, and is read through the same steps.
The first commit on an old tree changes the tree too, in the same transaction; `MemoryStore.migrate`
makes such a commit where nothing else is to be committed.

  1  arrays /values, /catalog, /keys, blobs, and an empty group /atoms
  2  rows of kind "atoms" beside those of adapters, pruned atoms, purged rows: the state counts
     them, and the lines of the catalog say so. A line of schema 1 has none of these words and
     means an adapter with nothing pruned; that is why no line is written again. No group /atoms.
  3  ragged rows, which have a layout of their own and their bytes in an array /files/<row>: the
     state counts them. A line of an older schema has no `nbytes` and means a row of the layout.
  4  blobs lie in one array /parts, and so do the pages of their index, whose first the state names
     (index.py); keys have a hash chain over their blocks (keys.py), of which a commit writes those
     that changed. Blobs that were there stay in arrays of their own, /blobs/<name>, which pages
     say; keys that were there keep their one hash until they change.
  5  what changes of the blobs waits in the first page of their index, and goes down some at a time,
     so the state counts the blobs; it counts the lines of the catalog, too. A page of schema 4 is
     one in which nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Attributes = dict[str, Any]

SCHEMA_VERSION = 5
"""What this code writes, and the newest `min_reader` that it understands."""


def _from_1(attributes: Attributes, group: Any | None) -> Attributes:
    """Count atoms and purged rows, of which there are none, and take the empty group away."""
    if group is not None and "atoms" in group:
        del group["atoms"]
    return {**attributes, "state": {**attributes["state"], "atoms": 0, "purged": 0}}


def _from_2(attributes: Attributes, _: Any | None) -> Attributes:
    """Count ragged rows, of which there are none."""
    return {**attributes, "state": {**attributes["state"], "ragged": 0}}


def _from_3(attributes: Attributes, _: Any | None) -> Attributes:
    """Blobs have no pages yet: they are listed."""
    state = attributes["state"]
    blobs = {"parts": 0, "page": None, "listed": state["blobs"]}
    return {**attributes, "state": {**state, "blobs": blobs}}


def _from_4(attributes: Attributes, _: Any | None) -> Attributes:
    """Count the blobs: those that are listed, or that the first page says are below it.

    Nobody counted the lines of the catalog.
    """
    state = attributes["state"]
    blobs = state["blobs"]
    page = blobs["page"]
    count = len(blobs.get("listed", ())) if page is None else page[2]
    now = {**state, "catalog_lines": None, "blobs": {**blobs, "count": count}}
    return {**attributes, "state": now}


MIGRATIONS: Mapping[int, Callable[[Attributes, Any | None], Attributes]] = {
    1: _from_1,
    2: _from_2,
    3: _from_3,
    4: _from_4,
}
"""The step away from each older schema.

It takes the attributes of the root group and gives those of the next schema; `group` is the zarr
group to change likewise, or None when the tree is only read.
"""


@dataclass(frozen=True)
class BranchMigration:
    """The tip of one branch: its version, the schema of its tree, and what it holds.

    `rows` and `blobs` stay as they are; `committed` is the version that brought the tree to the
    newest schema, None where that was not needed or nothing was to be done.
    """

    branch: str
    version: str
    schema: int
    rows: int
    blobs: int
    committed: str | None = None

    @property
    def needed(self) -> bool:
        """Whether this code writes a newer schema."""
        return self.schema < SCHEMA_VERSION


@dataclass(frozen=True)
class Migration:
    """Every branch of a store, main first; `files` and `nbytes` is all that lies in the store."""

    branches: tuple[BranchMigration, ...]
    files: int
    nbytes: int


def migrated(attributes: Mapping[str, Any], group: Any | None = None) -> Attributes:
    """The attributes as this code writes them; the tree below `group`, when given, likewise.

    Raises:
        KeyError, TypeError: these are not the attributes of a memory.
    """
    result = dict(attributes)
    for version in range(result["schema_version"], SCHEMA_VERSION):
        result = {**MIGRATIONS[version](result, group), "schema_version": version + 1}
    return {**result, "min_reader": SCHEMA_VERSION}
